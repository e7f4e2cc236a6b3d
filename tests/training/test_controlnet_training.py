"""Stage `controlnet`: what moves, what is saved, resuming, the condition's way into each network, and messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from data.conditions import Canny
from sdxs_lightning.callbacks.export import Exportable
from sdxs_lightning.core.seeding import Stream, normal
from sdxs_lightning.memory_plan.hardware import read_hardware
from sdxs_lightning.memory_plan.live_bytes import ShapeMemory
from sdxs_lightning.memory_plan.planner import Planner
from sdxs_lightning.memory_plan.step_memory import BatchShape, run_step
from sdxs_lightning.networks.condition_readers import SoftEdgeReader
from sdxs_lightning.networks.controlled import (
    ControlledBaseView,
    ControlledDenoiser,
    ControlledFakeScore,
    ControlledStudent,
    ControlNetSource,
)
from sdxs_lightning.networks.controlnet import load_controlnet
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.discriminator import Discriminator
from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.networks.lora import LoRA
from sdxs_lightning.objectives.adversarial import DiffusionAdversarial
from sdxs_lightning.objectives.condition_consistency import ConditionConsistency
from sdxs_lightning.objectives.knowledge_distillation import OutputDistillation
from sdxs_lightning.objectives.regression import Regression
from sdxs_lightning.pairs.target_pairs import PairSettings
from sdxs_lightning.stages.controlnet.control_images import control_images_of, with_some_dropped
from sdxs_lightning.stages.controlnet.distillation import ControlNetDistillation, ControlSettings
from sdxs_lightning.stages.controlnet.training import ControlNetTraining
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from tests.helpers.planned import ONE_CPU
from tests.helpers.tiny import LATENT_SHAPE, tiny_batch
from tests.helpers.tiny_distillation import (
    batches_of,
    built,
    control_batch,
    family_of,
    fit,
    moved,
    sample_of,
    weights,
)

Base = Callable[[str], Path]
SGD = partial(torch.optim.SGD, lr=0.1)
ADAMW = partial(torch.optim.AdamW, lr=1e-3)
CONTENTS: Any = ["latents", "control_images"]
EVERY = UpdateSchedule(max_student_updates=99, fake_score_updates_per_student_update=1)
MIXED = UpdateSchedule(max_student_updates=99, fake_score_updates_per_student_update=2, warmup_updates=2)


class Inverted:
    """A condition that needs no detector: the image's negative."""

    def __call__(self, image: np.ndarray) -> np.ndarray:
        return 255 - image


def joint(base: Path, make: Any = SGD, **settings: Any) -> ControlNetDistillation:
    """Way `joint`, with the reader of soft edges."""
    settings.setdefault("update_schedule", EVERY)
    settings.setdefault("student", ControlledStudent(make))
    settings.setdefault("fake_score", ControlledFakeScore(make))
    term = ConditionConsistency(SoftEdgeReader(), distance="mse")
    settings.setdefault("objectives", {"condition": term})
    return ControlNetDistillation(family=family_of(base), ema_decay=0.9, **settings)


def sdxs(
    base: Path, pretrained: Path, make: Any = SGD, lora: LoRA | None = None, **settings: Any
) -> ControlNetDistillation:
    """Way `pretrained`, with the fake score as adapters on the base or as a copy of it."""
    folder = str(pretrained)
    return joint(
        base,
        make,
        fake_score=ControlledFakeScore(make, lora=lora, controlnet=ControlNetSource(folder, train=False)),
        objectives=None,
        **{"control": ControlSettings(base_controlnet=folder)} | settings,
    )


# ---------------------------------------------------------------------------------------------------- which tensors move


@pytest.mark.parametrize("kind", ["sd-v_prediction", "sdxl-epsilon"])
def test_only_the_controlnet_of_the_student_moves(base: Base, shards: Path, kind: str) -> None:
    module = built(joint(base(kind), ADAMW))
    before, frozen = weights(module), weights(module.student.denoiser.unet)
    assert all(name.startswith("denoiser.controlnet.") for name, _ in module.student.named_parameters())
    fit(module, shards, batches=3, contents=CONTENTS)
    # The first update moves the zero convolutions alone, the next ones everything.
    assert moved(before, module, "student") > 0.95
    assert moved(before, module, "ema") > 0.95
    assert moved(before, module, "fake_score") > 0.95
    assert all(
        torch.equal(frozen[name], value) for name, value in weights(module.student.denoiser.unet).items()
    )
    assert all(parameter.grad is None for parameter in module.student.denoiser.unet.parameters())


def test_pairs_of_the_data_keep_their_conditions_and_warm_up_the_controlnet(base: Base, shards: Path) -> None:
    settings = {"pairs": PairSettings(source="data"), "regression": Regression(), "update_schedule": MIXED}
    module, batch = built(joint(base("sd-v_prediction"), ADAMW, **settings)), control_batch(3)
    _noise, conditioning, target = module._inputs(batch, module.terms.warmup)
    assert conditioning.control_images is not None and batch.control_images is not None
    assert torch.equal(conditioning.control_images, batch.control_images)
    assert target is not None and torch.equal(target, module.family.scale_latents(batch.latents))
    seen = fit(module, shards, batches=2, contents=CONTENTS).callback_metrics
    assert float(seen["student/regression"]) > 0
    # With a `condition`, the targets' own condition images still come first; without any they are extracted.
    module = built(joint(base("sd-v_prediction"), ADAMW, condition=Inverted(), **settings))
    own = module._inputs(batch, module.terms.warmup).conditioning.control_images
    assert own is not None and torch.equal(own, batch.control_images)
    made = module._inputs(
        replace(batch, control_images=None), module.terms.warmup
    ).conditioning.control_images
    assert made is not None and not torch.equal(made, own)


def test_the_pretrained_controlnet_is_frozen_shared_and_in_no_checkpoint(
    base: Base, shards: Path, pretrained: Path, tmp_path: Path
) -> None:
    module = built(sdxs(base("sd-v_prediction"), pretrained, ADAMW))
    assert module.real_score is not None and isinstance(module.fake_score, ControlledFakeScore)
    real, fake = module.real_score.module, module.fake_score.denoiser
    assert isinstance(real, ControlledDenoiser) and real.controlnet is fake.controlnet
    before, locked = weights(module), weights(fake.controlnet)
    trainer = fit(module, shards, batches=3, contents=CONTENTS)
    assert moved(before, module, "fake_score") > 0.95 and moved(before, module, "student") > 0.95
    assert all(torch.equal(locked[name], value) for name, value in weights(fake.controlnet).items())
    trainer.save_checkpoint(tmp_path / "checkpoint")
    state = torch.load(tmp_path / "checkpoint", weights_only=False)["state_dict"]
    owners = {".".join(name.split(".")[:3]) for name in state}
    assert owners == {"student.denoiser.controlnet", "fake_score.denoiser.unet", "ema.denoiser.controlnet"}


def test_adapters_of_the_fake_score_share_the_base_with_a_real_score_that_has_the_controlnet(
    base: Base, shards: Path, pretrained: Path, tmp_path: Path
) -> None:
    module = sdxs(base("sd-v_prediction"), pretrained, ADAMW, lora=LoRA(rank=2, targets=("to_q", "conv1")))
    module.configure_model()
    assert module.real_score is not None and isinstance(module.fake_score, ControlledFakeScore)
    real, fake = module.real_score.module, module.fake_score.denoiser
    assert isinstance(real, ControlledBaseView)
    assert real.unet is fake.unet and real.controlnet is fake.controlnet
    adapters = {name for name, p in module.fake_score.named_parameters() if p.requires_grad}
    assert adapters and all("lora_" in name for name in adapters)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.fake_score.named_parameters():
            if name in adapters:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    batch = control_batch(2)
    conditioning = module.family.encode_prompts(batch.captions)
    conditioning = replace(conditioning, control_images=batch.control_images)
    noisy = normal(0, Stream.SCORE_NOISE, batch.positions, LATENT_SHAPE), torch.tensor([100, 500])
    plain = Denoiser(module.family.load_unet(), module.family.schedule, module.family.prediction_type).eval()
    alone = ControlledDenoiser(plain, load_controlnet(pretrained).eval())
    with torch.no_grad():
        expected, found = alone(*noisy, conditioning).output, real(*noisy, conditioning).output
        adapted = fake(*noisy, conditioning).output
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (adapted - expected).abs().max() > 1e-2
    before, locked = weights(module), weights(fake.controlnet)
    trainer = fit(module, shards, batches=2, contents=CONTENTS)
    now = dict(module.named_parameters())
    assert {
        n for n in adapters if not torch.equal(before[f"fake_score.{n}"], now[f"fake_score.{n}"])
    } == adapters
    still = {n for n in before if n.startswith("fake_score.")} - {f"fake_score.{n}" for n in adapters}
    assert all(torch.equal(before[name], now[name]) for name in still)
    assert all(torch.equal(locked[name], value) for name, value in weights(fake.controlnet).items())
    trainer.save_checkpoint(tmp_path / "checkpoint")
    state = torch.load(tmp_path / "checkpoint", weights_only=False)["state_dict"]
    assert {name.removeprefix("fake_score.") for name in state if name.startswith("fake_score.")} == adapters


def test_lora_trains_adapters_and_the_new_parts_and_is_merged_on_export(
    base: Base, shards: Path, tmp_path: Path
) -> None:
    student = ControlledStudent(
        SGD, controlnet=ControlNetSource(lora=LoRA(rank=2, targets=("to_q", "conv1")))
    )
    module = built(joint(base("sd-v_prediction"), student=student))
    # The usual targets, of which a ControlNet has no upsampler.
    usual = ControlNetSource(lora=LoRA(rank=2)).make(module.student.denoiser.unet, module.family, "x")
    adapted = {n.split(".lora_")[0] for n, _ in usual.named_parameters() if ".lora_" in n}
    assert any(n.endswith("downsamplers.0.conv") for n in adapted) and any("ff.net.2" in n for n in adapted)
    trained = {name for name, p in module.student.named_parameters() if p.requires_grad}
    assert all("lora_" in name or ".controlnet_" in name for name in trained) and len(trained) > 20
    frozen = {n: p.detach().clone() for n, p in module.student.named_parameters() if n not in trained}
    starting = weights(module)
    assert module.fake_score is not None and module.ema is not None
    trainer = fit(module, shards, batches=2, contents=CONTENTS)
    now = dict(module.student.named_parameters())
    assert all(torch.equal(value, now[name]) for name, value in frozen.items())
    trainer.save_checkpoint(tmp_path / "checkpoint")
    state = torch.load(tmp_path / "checkpoint", weights_only=False)["state_dict"]
    assert {name.removeprefix("student.") for name in state if name.startswith("student.")} == trained
    averaged = {name.removeprefix("ema.") for name in state if name.startswith("ema.")}
    assert averaged == trained  # the frozen weights under the adapters are neither copied nor saved
    assert len(state) == len(averaged) + len(trained) + len(weights(module.fake_score))
    own, average = (dict(one.denoiser.named_parameters()) for one in (module.student, module.ema))
    assert all((average[name] is own[name]) == (f"denoiser.{name}" not in trained) for name in own)
    assert moved(starting, module, "ema") > 0.5
    module.write_export(tmp_path / "controlnet", average=False, dtype=torch.float32)
    loaded = load_controlnet(tmp_path / "controlnet")
    assert not any("lora" in name for name in loaded.state_dict())
    assert _differs(module, loaded) < 1e-5


def _differs(module: ControlNetDistillation, controlnet: Any) -> float:
    """Largest difference of the student's latents with the exported ControlNet in place of its own."""
    batch = control_batch(3)
    noise = normal(0, Stream.STUDENT_NOISE, batch.positions, LATENT_SHAPE)
    conditioning = module.family.encode_prompts(batch.captions)
    conditioning = replace(conditioning, control_images=batch.control_images)
    own = module.student.denoiser
    with torch.no_grad():
        expected = module.student(noise, conditioning)
        kept, own.controlnet = own.controlnet, controlnet
        found = module.student(noise, conditioning)
        own.controlnet = kept
    return float((found - expected).abs().max())


# ------------------------------------------------------------------------------------------------------ resume, export


class SaveAt(Callback):
    """Saves after a number of batches."""

    def __init__(self, batches: int, path: Path) -> None:
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if batches_of(trainer) == self.batches:
            trainer.save_checkpoint(self.path)


def test_resume_is_bit_exact_with_pairs_conditions_and_dropout(
    base: Base, shards: Path, pretrained: Path, tmp_path: Path
) -> None:
    def module() -> ControlNetDistillation:
        return joint(
            base("sd-v_prediction"),
            ADAMW,
            update_schedule=MIXED,
            pairs=PairSettings(count=6, sampler_steps=2, sampler_batch_size=4),
            regression=Regression(),
            condition=Inverted(),
            control=ControlSettings(noise_redrawn=0.5, condition_dropout=0.2),
        )

    straight = module()
    fit(straight, shards, 6, contents=CONTENTS, callbacks=[SaveAt(3, tmp_path / "checkpoint")])
    resumed = module()
    fit(resumed, shards, 6, contents=CONTENTS, ckpt_path=str(tmp_path / "checkpoint"))
    expected = weights(straight)
    assert len(expected) > 100
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())
    assert resumed.student_updates == straight.student_updates == 4


@pytest.mark.parametrize("average", [True, False])
def test_the_export_is_the_controlnet(base: Base, shards: Path, tmp_path: Path, average: bool) -> None:
    module = joint(base("sd-v_prediction"))
    fit(module, shards, 2, contents=CONTENTS)
    assert isinstance(module, Exportable) and module.export_name == "controlnet"
    module.write_export(tmp_path / "controlnet", average=average, dtype=torch.float32)
    loaded = load_controlnet(tmp_path / "controlnet").state_dict()
    assert module.ema is not None
    source = module.ema.denoiser if average else module.student.denoiser
    assert isinstance(source, ControlledDenoiser)
    assert all(torch.equal(value, loaded[name]) for name, value in source.controlnet.state_dict().items())
    assert source.unet is module.student.denoiser.unet  # the average shares the frozen student


def test_an_exported_fake_score_has_its_controlnet(base: Base, pretrained: Path, tmp_path: Path) -> None:
    module = built(joint(base("sd-v_prediction")))
    assert isinstance(module.fake_score, ControlledFakeScore)
    with torch.no_grad():
        for parameter in module.fake_score.parameters():
            parameter.add_(0.01)
    module.write_fake_score(tmp_path / "run" / "fake_score", torch.float32)
    controlnet = ControlNetSource(str(tmp_path / "run" / "fake_score_controlnet"))
    again = ControlledFakeScore(SGD, weights=str(tmp_path / "run" / "fake_score"), controlnet=controlnet)
    again.build(module.family)
    expected = weights(module.fake_score)
    assert all(torch.equal(value, expected[name]) for name, value in weights(again).items())
    # A pretrained one stays where it is.
    built(sdxs(base("sd-v_prediction"), pretrained)).write_fake_score(tmp_path / "other", torch.float32)
    assert [one.name for one in sorted(tmp_path.iterdir())] == ["other", "run"]


# -------------------------------------------------------------------------------------- the condition reaches the networks


def test_who_sees_the_condition(base: Base, pretrained: Path) -> None:
    plain, attached = built(joint(base("sd-v_prediction"))), built(sdxs(base("sd-v_prediction"), pretrained))
    batch = control_batch(2)
    conditioning = plain.family.encode_prompts(batch.captions)
    black, white = (
        replace(conditioning, control_images=torch.full((2, 3, 32, 32), value)) for value in (0.0, 1.0)
    )
    noisy = normal(0, Stream.SCORE_NOISE, batch.positions, LATENT_SHAPE), torch.tensor([100, 500])
    assert (
        plain.real_score is not None and attached.real_score is not None and attached.fake_score is not None
    )

    def depends(network: Any) -> float:
        with torch.no_grad():
            return float((network(*noisy, black)[0] - network(*noisy, white)[0]).abs().max())

    assert depends(plain.real_score.module) == 0  # joint: the plain base
    assert depends(attached.real_score.module) > 1e-3
    assert depends(attached.fake_score.predict) > 1e-3
    same = attached.fake_score.features(*noisy, white)
    _, tapped = attached.fake_score.predict_with_features(*noisy, white)
    torch.testing.assert_close(same, tapped)  # a discriminator's real and fake halves


@pytest.mark.parametrize("source", ["memory", "on_the_fly"])
def test_pairs_bring_the_condition_of_their_target_and_some_new_noise(base: Base, source: Any) -> None:
    module = built(
        joint(
            base("sd-v_prediction"),
            update_schedule=MIXED,
            pairs=PairSettings(source, count=6, sampler_steps=2, sampler_batch_size=4),
            regression=Regression(),
            condition=Inverted(),
            control=ControlSettings(noise_redrawn=0.5),
        )
    )
    assert module.pairs is not None and module.real_score is not None
    module.pairs.start(module.real_score.module, _Captions())
    batch = control_batch(64)
    inputs = module._inputs(batch, module.terms.warmup)
    assert inputs.target is not None and inputs.conditioning.control_images is not None
    images = module.family.decode(inputs.target)
    expected = 1 - ((images.clamp(-1, 1) + 1) * 127.5).round() / 255
    # A pixel between two bytes may fall to either side, since the pairs were decoded in other batches.
    torch.testing.assert_close(inputs.conditioning.control_images, expected, rtol=0, atol=1.01 / 255)
    kept = module.pairs.pick(batch).noise
    redrawn = (inputs.noise != kept).flatten(1).any(dim=1)
    assert 0.25 < float(redrawn.float().mean()) < 0.75
    assert (inputs.noise[redrawn] != kept[redrawn]).all()


class _Captions:
    def train_captions(self, count: int) -> list[str]:
        return ["a red circle", "a blue square"]


def test_dropped_conditions_are_black() -> None:
    controls = torch.ones(400, 3, 2, 2)
    dropped = with_some_dropped(controls, 0.25, 0, torch.arange(400)).flatten(1).amax(dim=1) == 0
    assert 0.18 < float(dropped.float().mean()) < 0.32
    again = with_some_dropped(controls[:100], 0.25, 0, torch.arange(100)).flatten(1).amax(dim=1) == 0
    assert torch.equal(again, dropped[:100])


def test_both_halves_of_the_discriminator_lose_the_same_conditions(base: Base) -> None:
    module = built(
        joint(
            base("sd-v_prediction"),
            discriminator=Discriminator(SGD),
            adversarial=DiffusionAdversarial(),
            control=ControlSettings(condition_dropout=0.5),
            seed=3,
        )
    )
    batch = control_batch(16)
    fake = module._sample(batch, {})
    real = module._real_batch(batch, fake).conditioning
    black = [one.control_images.flatten(1).amax(dim=1) == 0 for one in (fake.conditioning, real)]  # type: ignore[union-attr]
    assert torch.equal(*black) and 0 < int(black[0].sum()) < 16


def test_a_new_controlnet_of_the_fake_score_has_its_own_rate(base: Base) -> None:
    fake_score = ControlledFakeScore(partial(torch.optim.AdamW, lr=1e-5), controlnet_lr=1e-3)
    fake_score.build(family_of(base("sd-v_prediction")))
    start = weights(fake_score)
    made: Any = fake_score.configure_optimizers()
    for parameter in fake_score.parameters():
        parameter.grad = torch.ones_like(parameter)
    made["optimizer"].step()
    moves = {n: float((p.detach() - start[n]).abs().max()) for n, p in fake_score.named_parameters()}
    for name, moved_by in moves.items():  # AdamW's first step is about lr
        assert moved_by == pytest.approx(1e-3 if ".controlnet." in name else 1e-5, rel=0.05), name
    for rate in (0.0, -1e-4, float("nan")):
        with pytest.raises(ValueError, match=f"fake_score.controlnet_lr must be above 0, got {rate}"):
            ControlledFakeScore(SGD, controlnet_lr=rate)
    with pytest.raises(ValueError, match=r"controlnet_lr is 0.1 and fake_score.controlnet.train false"):
        ControlledFakeScore(SGD, controlnet=ControlNetSource("x", train=False), controlnet_lr=0.1)


# ------------------------------------------------------------------------------------------------------- the memory plan


@pytest.mark.parametrize("way", ["joint", "extracted"])
def test_the_memory_plan_counts_what_the_vae_decodes(base: Base, way: str) -> None:
    """`joint` decodes the student's samples for the reader; pairs have their targets decoded for condition images."""
    settings: dict[str, Any] = {}
    if way == "extracted":
        schedule = UpdateSchedule(max_student_updates=2, warmup_updates=2)
        settings = {"fake_score": None, "objectives": None, "update_schedule": schedule}
        settings |= {"pairs": PairSettings("on_the_fly"), "regression": Regression(), "condition": Canny()}
    module = joint(base("sd-v_prediction"), **settings)
    planner = Planner(module, read_hardware(ONE_CPU), 2, ("latents", "control_images"))
    plan, size = planner.plan(), 12
    assert "vae" in {network.name for network in plan.networks}
    batch = BatchShape(LATENT_SHAPE, accumulate=1, control_images=32)
    known = planner.stage, planner.networks, planner.hardware, batch, {"student": 0, "fake_score": 0}
    counted = run_step(*known, ShapeMemory(), size)
    peaks = [max(live for live, _ in line.live) for line in counted]
    assert [one.total for one in plan.step.phase_peaks(size)] == peaks


def test_the_memory_plan_counts_weights_under_adapters_once(base: Base) -> None:
    student = ControlledStudent(SGD, controlnet=ControlNetSource(lora=LoRA(rank=2)))
    module = joint(base("sd-v_prediction"), student=student)
    plan = Planner(module, read_hardware(ONE_CPU), 2, ("latents", "control_images")).plan()
    rows = {row.name: row for row in plan.networks}
    assert rows["ema"].parameters == rows["student"].trainable < rows["student"].parameters
    assert rows["student"].weights - rows["ema"].weights == 4 * (
        rows["student"].parameters - rows["student"].trainable
    )


# -------------------------------------------------------------------------------------------------------------- messages


def test_batches_without_conditions_or_with_others_are_refused(base: Base) -> None:
    family = family_of(base("sd-v_prediction"))
    with pytest.raises(
        ValueError, match=r"needs condition images, and the batch has none: let data\.contents"
    ):
        control_images_of(tiny_batch(2), family, 3)
    batch = replace(control_batch(2), control_images=torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match="condition images have 16x16 pixels and its images 32x32"):
        control_images_of(batch, family, 3)
    with pytest.raises(
        ValueError, match="condition images have 3 channels, and 1 are expected; change conditioning_channels"
    ):
        control_images_of(control_batch(2), family, 1)


def test_pairs_get_conditions_of_the_datas_kind(base: Base) -> None:
    module = joint(base("sd-v_prediction"), condition=Canny(10, 30))
    settings = SimpleNamespace(condition=Canny(10, 30))
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(settings=settings))  # type: ignore[assignment]
    module.configure_model()
    for other in (Canny(), Inverted()):
        module, settings.condition = joint(base("sd-v_prediction"), condition=Canny(10, 30)), other
        module._trainer = SimpleNamespace(datamodule=SimpleNamespace(settings=settings))  # type: ignore[assignment]
        with pytest.raises(
            ValueError, match=r"Canny\(low=10, .* and data.condition (Canny\(low=100|Inverted)"
        ):
            module.configure_model()
        assert not hasattr(module.student, "denoiser")  # nothing was loaded for it


def test_settings_that_contradict_each_other_are_refused(base: Base) -> None:
    with pytest.raises(ValueError, match=r"control\.noise_redrawn is a share in \[0, 1\], got 2"):
        ControlSettings(noise_redrawn=2.0)
    with pytest.raises(ValueError, match=r"conditioning_scale is 0.5 and control.base_controlnet null"):
        ControlSettings(conditioning_scale=0.5)
    for share in (1.0, -0.1, float("nan")):
        refused = (
            rf"condition_dropout is a share in \[0, 1\), got {share}; at 1 the ControlNet would never see"
        )
        with pytest.raises(ValueError, match=f"^control.{refused}"):
            ControlSettings(condition_dropout=share)
        with pytest.raises(ValueError, match=f"^{refused}"):
            ControlNetTraining(family_of(base("sd-v_prediction")), SGD, condition_dropout=share)
    for scale in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=f"control.conditioning_scale must be 0 or more, got {scale}"):
            ControlSettings(conditioning_scale=scale)
    with pytest.raises(ValueError, match=r"student\.controlnet\.train is false"):
        ControlledStudent(SGD, controlnet=ControlNetSource("x", train=False))
    pairs, schedule = PairSettings("on_the_fly"), {"update_schedule": MIXED, "regression": Regression()}
    with pytest.raises(ValueError, match="pairs.source is 'on_the_fly', and condition is null"):
        joint(base("sd-v_prediction"), pairs=pairs, **schedule)
    joint(base("sd-v_prediction"), pairs=PairSettings("batch"), **schedule)  # stored pairs bring their own
    with pytest.raises(
        ValueError, match=r"conditioning_scale is 1.0 and control.conditioning_scale 0.8, of one"
    ):
        sdxs(base("sd-v_prediction"), Path("x"), control=ControlSettings("x", conditioning_scale=0.8))
    for named in (None, "y"):
        with pytest.raises(
            ValueError, match=f"fake_score.controlnet is 'x', frozen, and control.base_controlnet is {named}"
        ):
            sdxs(base("sd-v_prediction"), Path("x"), control=ControlSettings(named))
    for same in ("./x/", str(Path("x").absolute())):
        sdxs(base("sd-v_prediction"), Path("x"), control=ControlSettings(same))
    family = family_of(base("sd-v_prediction"))
    with pytest.raises(ValueError, match="base_controlnet goes together with output_distillation"):
        ControlNetTraining(family, SGD, output_distillation=OutputDistillation())
    with pytest.raises(ValueError, match="the ControlNet has no objective"):
        ControlNetTraining(family, SGD, task=None)
    no_logits = ConditionConsistency(SoftEdgeReader(), distance="cross_entropy")
    module = joint(base("sd-v_prediction"), objectives={"condition": no_logits})
    with pytest.raises(ValueError, match="cross_entropy, which needs the logits .* SoftEdgeReader has none"):
        module.configure_model()
    term = ConditionConsistency(SoftEdgeReader())
    module = built(joint(base("sd-v_prediction"), objectives={"condition": term}, fake_score=FakeScore(SGD)))
    with pytest.raises(
        ValueError, match="ConditionConsistency needs condition images, and the sample has none"
    ):
        term(sample_of(module), module.context)
