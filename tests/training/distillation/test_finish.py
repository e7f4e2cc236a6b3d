"""Stage `finish`: an adapter on the student, the GAN on its images, score distillation as the anchor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxs_lightning.memory_plan.hardware import read_hardware
from sdxs_lightning.memory_plan.planner import Planner
from sdxs_lightning.networks.discriminator import Discriminator
from sdxs_lightning.networks.lora import LoRA
from sdxs_lightning.networks.projected_discriminator import ProjectedDiscriminator
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.objectives.distribution_matching import DistributionMatching
from sdxs_lightning.objectives.pixel_adversarial import PixelAdversarial
from sdxs_lightning.stages.distillation.step import OneStepDistillation
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from tests.helpers.resumed_run import same
from tests.helpers.tiny import tiny_batch
from tests.helpers.tiny_decoding import SGD, pixel_gan, save_dinov2, save_tiny_autoencoder
from tests.helpers.tiny_distillation import built, distillation, fit, sample_of, weights
from tests.training.resume.test_resume import Witness

Base = Callable[[str], Path]
ADAM = partial(torch.optim.Adam, lr=1e-3)
ANCHOR = DistributionMatching(weight=0.1)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dinov2(tmp_path_factory.mktemp("features") / "dinov2")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_autoencoder(tmp_path_factory.mktemp("tiny") / "vae")


def finishing(base: Path, dinov2: Path, optimizer: Any = SGD, **settings: Any) -> OneStepDistillation:
    pixels = {"crop_px": 24, "decoder": settings.pop("decoder", None)}
    defaults: dict[str, Any] = {
        "optimizer": optimizer,
        "student": StudentGenerator(optimizer, lora=LoRA(rank=2)),
        "distribution_matching": ANCHOR,
    }
    return distillation(base, **defaults | pixel_gan(dinov2, optimizer, **pixels) | settings)


@pytest.mark.parametrize(("kind", "is_tiny"), [("sd-v_prediction", True), ("sdxl-epsilon", False)])
def test_who_learns_and_what_is_kept(
    base: Base, shards: Path, dinov2: Path, tiny: Path, kind: str, is_tiny: bool
) -> None:
    module = built(finishing(base(kind), dinov2, ADAM, decoder=str(tiny) if is_tiny else None))
    assert module.gan is not None
    frozen = module.gan.frozen_networks()
    assert set(frozen) == {"image_features"} | ({"pixel_decoder"} if is_tiny else set())
    before, frozen_before = weights(module), {name: weights(part) for name, part in frozen.items()}
    trainer = fit(module, shards, batches=2)
    now = weights(module)
    moved = {name for name, value in now.items() if not torch.equal(value, before[name])}
    heads = {name for name in now if name.startswith("discriminator.")}
    adapters = {name for name in now if name.startswith(("student.", "ema.")) and "lora_" in name}
    fake_score = {name for name in now if name.startswith("fake_score.")}
    assert moved == heads | adapters | fake_score
    for name, part in frozen.items():
        same(weights(part), frozen_before[name], name)
    # The GAN's frozen networks are in no checkpoint.
    roles = {"student", "fake_score", "discriminator", "ema"}
    assert {name.split(".")[0] for name in module.state_dict()} == roles
    logged = {"student/adversarial", "student/gradient_norm_adversarial"}
    logged |= {f"discriminator/{name}" for name in ("loss", "accuracy", "r1")}
    assert logged <= set(trainer.callback_metrics)


def test_students_gradient_is_the_sum_of_anchor_and_gan(base: Base, dinov2: Path) -> None:
    """Each term alone, then both: the step adds what the terms give."""

    def gradient(**settings: Any) -> torch.Tensor:
        module = built(finishing(base("sd-epsilon"), dinov2, student=StudentGenerator(SGD), **settings))
        module.accumulate = lambda loss, roles, last=None: loss.backward()  # type: ignore[method-assign]
        module._student_backward(sample_of(module), module.terms.distillation)
        parts = [p.grad.flatten() for p in module.student.parameters() if p.grad is not None]
        return torch.cat(parts)

    no_gan = {"discriminator": None, "pixel_adversarial": None, "image_features": None, "gan": False}
    anchor, gan = gradient(**no_gan), gradient(distribution_matching=None)
    torch.testing.assert_close(gradient(), anchor + gan, rtol=1e-3, atol=1e-6)
    assert min(anchor.norm().item(), gan.norm().item()) > 1e-4


def test_resumed_run_equals_the_uninterrupted_one(
    base: Base, shards: Path, dinov2: Path, tiny: Path, tmp_path: Path
) -> None:
    update_schedule = UpdateSchedule(max_student_updates=99, fake_score_updates_per_student_update=2)
    make = partial(
        finishing, base("sd-epsilon"), dinov2, ADAM, update_schedule=update_schedule, decoder=str(tiny)
    )
    trainer = fit(make(), shards, 4, callbacks=[Witness(tmp_path / "cut.ckpt", 2)])
    trainer.save_checkpoint(tmp_path / "straight.ckpt")
    torch.manual_seed(12345)  # the global state must not matter
    trainer = fit(make(), shards, 4, ckpt_path=str(tmp_path / "cut.ckpt"))
    trainer.save_checkpoint(tmp_path / "resumed.ckpt")
    one, two = (torch.load(tmp_path / f"{n}.ckpt", weights_only=False) for n in ("straight", "resumed"))
    for part in ("state_dict", "optimizer_states", "iterations", "student_updates"):
        same(one[part], two[part], part)
    assert one["iterations"] == 4 and one["optimizer_states"][2]["state"]


def test_memory_plan_counts_what_is_frozen_and_keeps_the_heads_whole(
    base: Base, dinov2: Path, tiny: Path
) -> None:
    fsdp2 = read_hardware(
        {
            "accelerator": "gpu",
            "devices": 8,
            "precision": "bf16-mixed",
            "strategy": {"class_path": "sdxs_lightning.training.sharding.ShardedNetworks"},
        },
        gpu_gib=80.0,
    )
    stage = finishing(base("sd-epsilon"), dinov2, ADAM, decoder=str(tiny), real_score_dtype="bfloat16")
    plan = Planner(stage, fsdp2, 4).plan()
    rows = {one.name: one for one in plan.networks}
    assert stage.gan is not None and stage.discriminator is not None
    frozen = stage.gan.frozen_networks().items()
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in frozen}
    assert rows["image_features"].parameters == parameters["image_features"] > 0
    assert rows["pixel_decoder"].parameters == parameters["pixel_decoder"] > 0
    assert rows["pixel_decoder"].weights == 4 * parameters["pixel_decoder"]  # float32, whole on every rank
    heads = sum(p.numel() for p in stage.discriminator.parameters())
    assert rows["discriminator"].gradients == 4 * heads


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"image_features": None},
            "got discriminator ProjectedDiscriminator, pixel_adversarial PixelAdversarial. Set all of a group",
        ),
        (
            {"discriminator": Discriminator(SGD)},
            "got discriminator Discriminator, pixel_adversarial PixelAdversarial, image_features Dinov2Features",
        ),
        (
            {"pixel_adversarial": None},
            "got discriminator ProjectedDiscriminator, image_features Dinov2Features",
        ),
    ],
)
def test_parts_that_do_not_go_together(
    base: Base, dinov2: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        finishing(base("sd-epsilon"), dinov2, **settings)


def test_data_without_images_is_refused_in_the_step(base: Base, dinov2: Path) -> None:
    images = {
        "pixel_adversarial": PixelAdversarial(real="images"),
        "discriminator": ProjectedDiscriminator(SGD),
    }
    module = built(finishing(base("sd-epsilon"), dinov2, **images))
    with pytest.raises(ValueError, match="needs images of 32x32 pixels in every batch and got none"):
        module._fake_score_and_discriminator_backward(sample_of(module).detach(), tiny_batch(3))
