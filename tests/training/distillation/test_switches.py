"""What may be switched on or replaced: bf16, gradient checkpointing, compiled blocks, a student of another shape."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.networks.network import prepare_unet
from sdxs_lightning.networks.student_generator import StudentGenerator
from tests.helpers.tiny import tiny_sd_unet
from tests.helpers.tiny_distillation import (
    built,
    distillation,
    fit,
    moved,
    weights,
)

Base = Callable[[str], Path]
SGD = partial(torch.optim.SGD, lr=0.1)


def test_bf16_mixed_keeps_float32_masters_and_reaches_every_tensor(base: Base, shards: Path) -> None:
    module = built(distillation(base("sd-v_prediction"), real_score_dtype="bfloat16"))
    before = weights(module)
    trainer = fit(module, shards, batches=1, precision="bf16-mixed")
    for role in ("student", "fake_score", "ema"):
        assert moved(before, module, role) == 1.0, role
    # All but the last bias, whose gradient is mean sigmoid(fake) - mean sigmoid(-real), 0 in bfloat16 for a fresh head.
    assert moved(before, module, "discriminator") >= 5 / 6
    assert {value.dtype for value in weights(module).values()} == {torch.float32}
    full = distillation(base("sd-v_prediction"))
    reference = fit(full, shards, batches=1).callback_metrics
    for name in ("student/distribution_matching", "fake_score/loss", "discriminator/loss"):
        assert trainer.callback_metrics[name].dtype == torch.float32
        torch.testing.assert_close(trainer.callback_metrics[name], reference[name], rtol=0.05, atol=1e-3)


def test_gradient_checkpointing_changes_nothing(base: Base, shards: Path) -> None:
    plain = distillation(base("sd-epsilon"))
    saving = distillation(
        base("sd-epsilon"),
        student=StudentGenerator(SGD, gradient_checkpointing=True),
        fake_score=FakeScore(SGD, gradient_checkpointing=True),
    )
    for module in (plain, saving):
        fit(module, shards, batches=1)
    assert saving.student.denoiser.unet.is_gradient_checkpointing
    for one, two in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


def test_compiled_blocks_are_marked_and_can_be_copied() -> None:
    unet = prepare_unet(tiny_sd_unet(), gradient_checkpointing=False, compile_blocks=True)
    compiled = [m for m in unet.modules() if m._compiled_call_impl is not None]
    assert len(compiled) == 11 + 7  # residual and transformer blocks
    copied = copy.deepcopy(unet)
    assert set(copied.state_dict()) == set(tiny_sd_unet().state_dict())


def test_all_shapes_of_blocks_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own limit of eight graphs would leave the others uncompiled, with a warning only."""
    from diffusers import UNet2DConditionModel

    graphs: list[tuple[torch.Size, ...]] = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(tuple(one.shape for one in inputs))
        return graph.forward

    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(plain, backend=record))
    widths = (8, 16, 24, 32)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=widths, down_block_types=["DownBlock2D"] * 4, up_block_types=["UpBlock2D"] * 4,
        mid_block_type=None, cross_attention_dim=8, norm_num_groups=4,
    )  # fmt: skip
    prepare_unet(unet, gradient_checkpointing=False, compile_blocks=True)
    blocks = [m for m in unet.modules() if m._compiled_call_impl is not None]
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        unet(torch.zeros(2, 4, 8, 8), 5, torch.zeros(2, 1, 8))
    torch._dynamo.reset()
    assert len(blocks) == 20 and len(set(graphs)) == len(graphs) > 8 + 4


def test_a_pruned_student_of_another_shape(base: Base, shards: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    config = {k: v for k, v in tiny_sd_unet().config.items() if not k.startswith("_")} | {
        "mid_block_type": None
    }
    UNet2DConditionModel(**config).save_pretrained(tmp_path)
    student = StudentGenerator(SGD, weights=str(tmp_path), conditioning_timestep=399)
    module = built(distillation(base("sd-epsilon"), student=student))
    before = weights(module)
    fit(module, shards, batches=1)
    assert module.student.denoiser.unet.mid_block is None and module.student.conditioning_timestep == 399
    assert moved(before, module, "student") == 1.0
