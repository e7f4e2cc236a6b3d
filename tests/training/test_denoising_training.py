"""Stage `teacher`: the loss against plain torch, what learns, what is saved, and resume."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from lightning.pytorch import Callback, LightningModule, Trainer

from data.shards.datamodule import ShardDataModule
from sdxs_lightning.core.noise_schedule import add_noise, target_of
from sdxs_lightning.core.seeding import Stream, normal, uniform
from sdxs_lightning.core.timesteps import TimestepRange
from sdxs_lightning.families.sd import StableDiffusion
from sdxs_lightning.stages.teacher import BRANCH_OUTPUTS, DenoisingTraining, begin_from
from sdxs_lightning.training.averaged_training import AveragedTraining
from sdxs_lightning.training.lr_schedules import TrapezoidLR
from tests.helpers.tiny import tiny_batch

Base = Callable[[str], Path]


def stage(
    base: Path, output: Path, seed: int = 3, weights: str | None = None, caption_dropout: float = 0.5
) -> DenoisingTraining:
    torch.manual_seed(1)  # not that of the tiny base
    return DenoisingTraining(
        StableDiffusion(str(base)),
        partial(torch.optim.SGD, lr=0.05),
        lambda optimizer: TrapezoidLR(optimizer, total_updates=8, rise_updates=2, fall_updates=2),
        output=str(output),
        caption_dropout=caption_dropout,
        ema_decay=0.5,
        seed=seed,
        weights=weights,
    )


def fit(
    module: DenoisingTraining, shards: Path, steps: int, ckpt: Path | None = None, save: Path | None = None
) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        module, ShardDataModule(str(shards), batch_size=4), ckpt_path=None if ckpt is None else str(ckpt)
    )
    if save is not None:
        trainer.save_checkpoint(save)


@pytest.mark.parametrize("kind", ["sd-epsilon", "sd-v_prediction"])
def test_loss_equals_plain_torch(base: Base, kind: str, tmp_path: Path) -> None:
    module, batch = stage(base(kind), tmp_path), tiny_batch(6)
    assert batch.latents is not None
    family = module.family
    latents = batch.latents * family.scaling_factor
    noise = normal(3, Stream.FAKE_NOISE, batch.positions, latents.shape[1:])
    timesteps = TimestepRange(0, 999).draw(3, Stream.FAKE_TIMESTEP, batch.positions)
    dropped = uniform(3, Stream.DROPOUT, batch.positions) < 0.5
    assert 0 < dropped.sum() < 6
    captions = ["" if drop else text for drop, text in zip(dropped.tolist(), batch.captions, strict=True)]
    embeds = family.encode_prompts(captions).prompt_embeds
    unet = module.denoiser.unet
    output = unet(add_noise(latents, noise, timesteps, family.schedule), timesteps, embeds).sample
    target = target_of(family.prediction_type, latents, noise, timesteps, family.schedule)
    expected = (output.double() - target.double()).square().mean()
    module.log = lambda *_args, **_kwargs: None  # type: ignore[method-assign]
    assert module.training_step(batch, 0).item() == pytest.approx(expected.item(), rel=1e-6)


def test_saves_the_average_and_nothing_frozen(base: Base, shards: Path, tmp_path: Path) -> None:
    folder = base("sd-v_prediction")
    module = stage(folder, tmp_path / "unet")
    start = {name: value.clone() for name, value in module.denoiser.unet.named_parameters()}
    assert not all(
        torch.equal(value, other)
        for value, other in zip(
            start.values(), UNet2DConditionModel.from_pretrained(folder / "unet").parameters(), strict=True
        )
    ), "training starts from the config, not from the base's weights"
    seen: list[dict[str, torch.Tensor]] = []

    class Witness(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
            seen.append(
                {name: value.detach().clone() for name, value in module.denoiser.unet.named_parameters()}
            )

    trainer = Trainer(
        accelerator="cpu",
        max_steps=3,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Witness()],
    )
    trainer.fit(module, ShardDataModule(str(shards), batch_size=4))
    assert {key.split(".")[0] for key in module.state_dict()} == {"denoiser", "ema"}
    saved = UNet2DConditionModel.from_pretrained(tmp_path / "unet", torch_dtype=torch.float16)
    for name, value in saved.named_parameters():
        # AveragedModel copies the first update, then averages with the decay 0.5.
        expected = 0.25 * seen[0][name] + 0.25 * seen[1][name] + 0.5 * seen[2][name]
        torch.testing.assert_close(value.float(), expected, rtol=2e-3, atol=1e-4)
        assert not torch.equal(seen[2][name], start[name])


def small_unet(**settings: object) -> UNet2DConditionModel:
    usual: dict[str, object] = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "cross_attention_dim": 24,
        "use_linear_projection": True,
    }
    return UNet2DConditionModel(**usual | settings)


@pytest.mark.parametrize(
    ("before", "after", "added"),
    [
        ({}, {"transformer_layers_per_block": (1, 2)}, "transformer_blocks.1."),
        (
            {},
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 6 * 4 + 12,
            },
            "add_embedding.",
        ),
        ({}, {"layers_per_block": 3}, r"(down_blocks\.\d\.\w+\.[12]|up_blocks\.\d\.\w+\.[12])\."),
        # Of equal widths all shapes fit, also those of layers that read another skip connection.
        (
            {"block_out_channels": (16, 16)},
            {"block_out_channels": (16, 16), "layers_per_block": (1, 2)},
            r"(down_blocks\.1\.\w+|up_blocks\.0\.\w+)\.1\.",
        ),
        ({"mid_block_type": None}, {"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block."),
    ],
)
def test_begins_as_the_unet_without_the_added_layers(
    before: dict[str, object], after: dict[str, object], added: str
) -> None:
    """They do not change what is computed, and learn from there."""
    torch.manual_seed(0)
    source, unet = small_unet(**before), small_unet(**after)
    new = begin_from(unet, source.state_dict())
    assert set(new) == {name for name in unet.state_dict() if re.search(added, name)}
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 24)
    given = {"text_embeds": torch.randn(2, 12), "time_ids": torch.randint(1, 64, (2, 6)).float()}
    output = unet(*inputs, added_cond_kwargs=given).sample
    torch.testing.assert_close(output, source(*inputs).sample)
    output.square().mean().backward()
    for name, parameter in unet.named_parameters():
        if name in new and name.endswith(tuple(f"{branch}.weight" for branch in BRANCH_OUTPUTS)):
            assert parameter.grad is not None, name
            # An added transformer's own last layer lets nothing through to those of its blocks yet.
            inside = f"{name.split('.transformer_blocks.')[0]}.proj_out.weight" in new
            assert parameter.grad.any() or (inside and "transformer_blocks" in name), name


def test_begins_from_the_weights_that_are_named(
    base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = base("sd-v_prediction")
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        module = stage(folder, tmp_path, weights=str(folder))
    count = len(module.denoiser.unet.state_dict())
    assert f"Began from '{folder}' with {count} of {count} tensors." in caplog.text
    for value, other in zip(
        module.denoiser.unet.parameters(),
        UNet2DConditionModel.from_pretrained(folder / "unet").parameters(),
        strict=True,
    ):
        assert torch.equal(value, other.float())


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan")])
def test_a_clipping_that_erases_or_turns_the_gradients_is_refused(norm: float) -> None:
    with pytest.raises(
        ValueError, match="trainer.gradient_clip_val must be above 0, or null for no clipping"
    ):
        AveragedTraining.configure_gradient_clipping(None, None, norm)  # type: ignore[arg-type]


def test_refuses_weights_of_which_nothing_fits() -> None:
    with pytest.raises(
        ValueError, match="not one tensor of weights has the name and shape of one of this U-N"
    ):
        begin_from(small_unet(), {"conv_in.weight": torch.zeros(3, 3), "elsewhere": torch.zeros(2)})


def test_what_would_be_found_at_the_end_is_refused_at_the_start(base: Base, tmp_path: Path) -> None:
    """diffusers writes nothing to a file in the place of the folder, and says so in a log alone."""
    (tmp_path / "file").touch()
    module = stage(base("sd-v_prediction"), tmp_path / "file")
    with pytest.raises(
        ValueError, match="/file', which cannot be a folder .*; change model.init_args.output"
    ):
        module.setup("fit")
    for share in (float("nan"), 2.0, -1.0):
        with pytest.raises(ValueError, match=r"caption_dropout is a share in \[0, 1\], got"):
            stage(base("sd-v_prediction"), tmp_path, caption_dropout=share)


def test_resume_is_exact(base: Base, shards: Path, tmp_path: Path) -> None:
    folder = base("sd-v_prediction")
    whole, first, rest = (stage(folder, tmp_path / name) for name in ("a", "b", "c"))
    fit(whole, shards, 6)
    fit(first, shards, 3, save=tmp_path / "half.ckpt")
    fit(rest, shards, 6, ckpt=tmp_path / "half.ckpt")
    for (name, value), other in zip(
        whole.denoiser.named_parameters(), rest.denoiser.parameters(), strict=True
    ):
        assert torch.equal(value, other), name


def test_trapezoid_rises_stays_and_falls() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = TrapezoidLR(optimizer, total_updates=10, rise_updates=4, fall_updates=5)
    rates = []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 1.6, 1.2, 0.8, 0.4, 0.0])
