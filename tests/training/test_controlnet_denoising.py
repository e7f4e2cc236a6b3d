"""ControlNets of many-step U-Nets: by denoising, and fitted to a bigger U-Net's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdxs_lightning.networks.controlled import (
    ControlNetSource,
)
from sdxs_lightning.networks.controlnet import load_controlnet
from sdxs_lightning.objectives.knowledge_distillation import FeatureDistillation, OutputDistillation
from sdxs_lightning.stages.controlnet.training import ControlNetTraining
from tests.helpers.tiny_distillation import (
    control_batch,
    family_of,
    fit,
    moved,
    weights,
)
from tests.training.test_controlnet_training import ADAMW, CONTENTS, SGD, Base, SaveAt


def test_denoising_moves_the_controlnet_alone(base: Base, shards: Path, tmp_path: Path) -> None:
    module = ControlNetTraining(family_of(base("sd-v_prediction")), ADAMW, ema_decay=0.5)
    module.configure_model()
    before, frozen = weights(module), weights(module.controlled.unet)
    fit(module, shards, 3, contents=CONTENTS)  # type: ignore[arg-type]
    module.write_export(tmp_path / "controlnet", average=False, dtype=torch.float32)
    assert moved(before, module, "controlled") > 0.95 and moved(before, module, "ema") > 0.95
    assert all(torch.equal(frozen[name], value) for name, value in weights(module.controlled.unet).items())
    loaded = load_controlnet(tmp_path / "controlnet").state_dict()
    own = module.controlled.controlnet.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in own.items())


def test_a_controlnet_goes_on_with_the_u_net_that_it_was_trained_for(
    base: Base, shards: Path, tmp_path: Path
) -> None:
    module = ControlNetTraining(family_of(base("sd-v_prediction")), SGD)
    trainer = fit(module, shards, 1, contents=CONTENTS)  # type: ignore[arg-type]
    trainer.save_checkpoint(tmp_path / "checkpoint")
    shaken = module.family.load_unet()
    with torch.no_grad():
        shaken.conv_in.weight.add_(0.1)
    shaken.save_pretrained(tmp_path / "unet")
    other = ControlNetTraining(module.family, SGD, weights=str(tmp_path / "unet"))
    with pytest.raises(
        ValueError,
        match="the checkpoint's controlnet was trained on frozen weights .* set model.init_args.weights",
    ):
        fit(other, shards, 2, contents=CONTENTS, ckpt_path=str(tmp_path / "checkpoint"))  # type: ignore[arg-type]


def test_training_by_denoising_resumes_bit_exact(base: Base, shards: Path, tmp_path: Path) -> None:
    def module() -> ControlNetTraining:
        family, shares = (
            family_of(base("sd-v_prediction")),
            {"caption_dropout": 0.5, "condition_dropout": 0.3},
        )
        return ControlNetTraining(family, ADAMW, ema_decay=0.5, **shares)  # type: ignore[arg-type]

    straight, resumed = module(), module()
    save = [SaveAt(2, tmp_path / "checkpoint")]
    fit(straight, shards, 4, contents=CONTENTS, callbacks=save)  # type: ignore[arg-type]
    fit(resumed, shards, 4, contents=CONTENTS, ckpt_path=str(tmp_path / "checkpoint"))  # type: ignore[arg-type]
    expected = weights(straight)
    assert len(expected) > 80  # the ControlNet and its average
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())


def test_fitting_has_no_loss_where_student_and_base_are_one(base: Base, pretrained: Path) -> None:
    folder = str(pretrained)

    def losses(weights: str | None) -> dict[str, Tensor]:
        module = ControlNetTraining(
            family_of(base("sd-v_prediction")),
            SGD,
            controlnet=ControlNetSource(weights),
            task=None,
            base_controlnet=folder,
            output_distillation=OutputDistillation(),
            feature_distillation=FeatureDistillation(),
        )
        module.configure_model()
        assert module.taps == {f"up_blocks.{i}": f"up_blocks.{i}" for i in range(3)}
        return module._terms(control_batch(2))

    assert all(float(loss.detach()) < 1e-10 for loss in losses(folder).values())
    assert all(float(loss.detach()) > 1e-6 for loss in losses(None).values())
