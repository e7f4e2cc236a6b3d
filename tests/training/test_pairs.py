"""PairSettings from their three sources: against the target sampler, and in a training."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from data.prepare.__main__ import main
from data.shards.datamodule import ShardDataModule
from sdxs_lightning.core.batch import TrainingBatch
from sdxs_lightning.core.pair_noise import noise_seeds, pair_noise
from sdxs_lightning.core.seeding import Stream, normal
from sdxs_lightning.memory_plan.hardware import read_hardware
from sdxs_lightning.memory_plan.planner import Planner
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.objectives.regression import Regression
from sdxs_lightning.pairs.scheduler_sampler import SchedulerSampler
from sdxs_lightning.pairs.stored_pairs import PickedPairs
from sdxs_lightning.pairs.target_pairs import PairSettings, TargetPairs
from sdxs_lightning.pairs.target_sampler import TargetSampler
from sdxs_lightning.stages.distillation.step import OneStepDistillation
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from tests.helpers.tiny import LATENT_SHAPE, save_tiny_sd, tiny_batch
from tests.helpers.tiny_distillation import Captions, StopAfter, distillation, family_of, moved, weights

# Of numpy's, inside diffusers.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

Base = Callable[[str], Path]
KINDS = ["sd-v_prediction", "sdxl-epsilon"]
SEED = 5
SETTINGS: dict[str, Any] = {"sampler_steps": 3, "guidance_scale": 2.0, "count": 7}


@pytest.fixture(scope="module")
def pair_set(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of 32 stored pairs of a base, made by the command."""
    folder = tmp_path_factory.mktemp("pair_sets")

    def made(kind: str) -> Path:
        out = folder / kind
        if not out.exists():
            named = ["--model", base(kind), "--captions", "toy:train", "--count", 32, "--out", out]
            how = ["--steps", 3, "--guidance", 2, "--seed", SEED, "--processes", 1, "--device", "cpu"]
            main([str(one) for one in ("pairs", *named, *how)])
        return out

    return made


def denoiser_of(base: Path, weights: Path | None = None) -> Denoiser:
    family = family_of(base)
    unet = family.load_unet(None if weights is None else str(weights))
    return Denoiser(unet, family.schedule, family.prediction_type)


def started(base: Path, **settings: Any) -> TargetPairs:
    pairs = TargetPairs(PairSettings(**SETTINGS | settings), SEED)
    pairs.build(family_of(base))
    pairs.to(torch.device("cpu"), torch.float32)
    pairs.start(denoiser_of(base), Captions())
    return pairs


def check_target(picked: PickedPairs, denoiser: Denoiser, tolerance: float = 1e-4) -> None:
    """The target is what three guided steps of DDIM make of noise and conditioning, twin included."""
    expected = TargetSampler(denoiser, 3, 2.0)(picked.noise, picked.conditioning)
    scale = float(expected.std())
    torch.testing.assert_close(picked.target / scale, expected / scale, rtol=tolerance, atol=tolerance)
    assert not picked.target.requires_grad


def read(folder: Path, contents: list[Any]) -> TrainingBatch:
    data = ShardDataModule(str(folder), 4, contents=contents, shuffle_window_shards=0)
    data.setup()
    assert data.dataset is not None
    return data.dataset.batch([3, 30, 0, 7])


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_in_memory_are_the_target_samplers_whatever_the_batches(base: Base, kind: str) -> None:
    by_size = [started(base(kind), sampler_batch_size=size).pick(tiny_batch(6, 100)) for size in (2, 7)]
    torch.testing.assert_close(by_size[0].target, by_size[1].target, rtol=1e-4, atol=1e-4)
    assert torch.equal(by_size[0].noise, by_size[1].noise)
    check_target(by_size[0], denoiser_of(base(kind)))
    # Prompt and noise belong together: seven noises, of which each goes with one of five captions.
    encoded = family_of(base(kind)).encode_prompts(Captions().train_captions(7))
    rows = [normal(SEED, Stream.PAIRS, torch.tensor([i]), LATENT_SHAPE)[0] for i in range(7)]
    for row, noise in enumerate(by_size[0].noise):
        index = next(i for i, candidate in enumerate(rows) if torch.equal(candidate, noise))
        found = by_size[0].conditioning.prompt_embeds[row]
        torch.testing.assert_close(found, encoded.prompt_embeds[index % 5], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_of_the_batch_are_those_that_the_command_made(
    base: Base, pair_set: Callable[[str], Path], kind: str
) -> None:
    for contents in (["latents", "noise_seeds"], ["latents", "noise_seeds", "sizes"]):
        batch = read(pair_set(kind), contents)
        picked = started(base(kind), source="batch").pick(batch)
        seeds = noise_seeds(SEED, torch.tensor([3, 30, 0, 7]))
        assert torch.equal(picked.noise, pair_noise(seeds, LATENT_SHAPE))
        check_target(picked, denoiser_of(base(kind)), tolerance=2e-3)  # stored as float16
        expected = family_of(base(kind)).encode_prompts(batch.captions)
        torch.testing.assert_close(picked.conditioning.prompt_embeds, expected.prompt_embeds)
        if kind == "sdxl-epsilon":
            assert picked.conditioning.add_time_ids is not None and expected.add_time_ids is not None
            assert torch.equal(picked.conditioning.add_time_ids, expected.add_time_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_on_the_fly_the_student_keeps_its_own_noise_and_prompts(base: Base, kind: str) -> None:
    batch = tiny_batch(3, 40)
    picked = started(base(kind), source="on_the_fly").pick(batch)
    assert torch.equal(picked.noise, normal(SEED, Stream.STUDENT_NOISE, batch.positions, LATENT_SHAPE))
    expected = family_of(base(kind)).encode_prompts(batch.captions)
    torch.testing.assert_close(picked.conditioning.prompt_embeds, expected.prompt_embeds)
    check_target(picked, denoiser_of(base(kind)))


@pytest.mark.parametrize("source", ["memory", "on_the_fly"])
def test_another_checkpoint_and_another_scheduler_sample(base: Base, tmp_path: Path, source: str) -> None:
    other = save_tiny_sd(tmp_path / "other", "v_prediction", seed=1)
    home = base("sd-v_prediction")
    pairs = TargetPairs(
        PairSettings(
            **SETTINGS,
            source=source,  # type: ignore[arg-type]
            weights=str(other),
            scheduler="HeunDiscreteScheduler",
        ),
        SEED,
    )
    assert not pairs.settings.samples_real_score
    pairs.build(family_of(home))
    pairs.to(torch.device("cpu"), torch.float32)
    assert list(pairs.frozen_networks()) == ["target_sampler"] and pairs.own is not None
    assert not any(parameter.requires_grad for parameter in pairs.own.module.parameters())
    pairs.start(None, Captions())
    picked = pairs.pick(tiny_batch(3))
    for weights_of, close in ((other, True), (None, False)):
        sampler = SchedulerSampler(denoiser_of(home, weights_of), 3, 2.0, "HeunDiscreteScheduler")
        expected = sampler(picked.noise, picked.conditioning)
        assert torch.allclose(picked.target, expected, rtol=1e-3, atol=1e-3) == close


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_of_the_data_are_its_latents_with_noise_of_the_run(base: Base, kind: str) -> None:
    batch, home = tiny_batch(3, 40), base(kind)
    assert batch.latents is not None
    picked = started(home, source="data").pick(batch)
    assert torch.equal(picked.noise, normal(SEED, Stream.STUDENT_NOISE, batch.positions, LATENT_SHAPE))
    assert torch.equal(picked.target, family_of(home).scale_latents(batch.latents))
    expected = family_of(home).encode_prompts(batch.captions, batch.original_sizes, batch.crops)
    torch.testing.assert_close(picked.conditioning.prompt_embeds, expected.prompt_embeds)
    assert not PairSettings(source="data").samples
    with pytest.raises(ValueError, match=r"'data' needs latents \(4, 16, 16\) in every batch and got none"):
        started(home, source="data").pick(replace(batch, latents=None))
    with pytest.raises(ValueError, match="without condition images the student would learn the mean"):
        warmup(home, source="data")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "disk"}, "pairs.source is 'disk', accepted are memory, batch, on_the_fly, data"),
        ({"count": 0}, "pairs.count must be 1 or more, got 0"),
        ({"sampler_steps": 0}, "pairs.sampler_steps must be 1 or more, got 0"),
        ({"scheduler": "DDPMScheduler"}, "scheduler 'DDPMScheduler' is not known as one that draws no noise"),
        (
            {"source": "batch", "weights": "a/b"},
            "pairs.weights is 'a/b', but pairs.source 'batch' samples nothing",
        ),
        (
            {"source": "data", "weights": "a/b"},
            "pairs.weights is 'a/b', but pairs.source 'data' samples nothing",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        PairSettings(**settings)


def test_batches_without_pairs_and_data_without_captions_are_refused(base: Base) -> None:
    home = base("sd-v_prediction")
    with pytest.raises(
        ValueError,
        match=r"needs latents \(4, 16, 16\) and pair_noise_seeds .* got latents \(4, 16, 16\) and no",
    ):
        started(home, source="batch").pick(tiny_batch(2))
    with pytest.raises(TypeError, match=r"data\.train_captions\(count\), which NoneType does not have"):
        _start(home, None)

    class NoCaptions:
        def train_captions(self, count: int) -> list[str]:
            return []

    with pytest.raises(ValueError, match="pairs in memory need captions and the training data has none"):
        _start(home, NoCaptions())


def _start(home: Path, datamodule: object) -> None:
    pairs = TargetPairs(PairSettings(**SETTINGS), SEED)
    pairs.build(family_of(home))
    pairs.start(denoiser_of(home), datamodule)


# ---------------------------------------------------------------------------------------------------------- in a training


def warmup(base: Path, **settings: Any) -> OneStepDistillation:
    """Regression alone, without fake score and GAN."""
    return distillation(
        base,
        gan=False,
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        update_schedule=UpdateSchedule(max_student_updates=10, warmup_updates=10),
        fake_score=None,
        distribution_matching=None,
        pairs=PairSettings(**SETTINGS | {"count": 16} | settings),
        regression=Regression(),
        seed=SEED,
    )


def fit(module: OneStepDistillation, folder: Path, contents: list[Any]) -> list[float]:
    """The regression's loss, batch by batch."""
    seen: list[float] = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            seen.append(float(trainer.callback_metrics["student/regression"]))

    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        max_epochs=-1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[Losses(), StopAfter(10)],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, datamodule=ShardDataModule(str(folder), 8, contents=contents))
    return seen


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("batch", "sd-v_prediction"),
        ("batch", "sdxl-epsilon"),
        ("on_the_fly", "sdxl-epsilon"),
        ("memory", "sdxl-epsilon"),
    ],
)
def test_every_source_trains(base: Base, pair_set: Callable[[str], Path], source: str, kind: str) -> None:
    contents = ["latents", "noise_seeds"] if source == "batch" else []
    module = warmup(base(kind), source=source)
    module.configure_model()
    before = weights(module)
    assert (module.real_score is None) == (source == "batch")
    losses = fit(module, pair_set(kind), contents)
    assert len(losses) == 10 and sum(losses[-3:]) < 0.95 * sum(losses[:3])
    assert moved(before, module, "student") == 1
    if source == "on_the_fly":
        assert losses == fit(warmup(base(kind), source=source), pair_set(kind), contents)


@pytest.mark.parametrize("source", ["memory", "batch", "on_the_fly"])
def test_the_memory_plan_knows_every_source(base: Base, tmp_path: Path, source: str) -> None:
    home = base("sd-v_prediction")
    other = None if source == "batch" else str(save_tiny_sd(tmp_path / "other", "v_prediction"))
    module = warmup(home, source=source, weights=other)
    hardware = read_hardware({"accelerator": "cpu", "devices": 1, "precision": "32-true"}, 80.0)
    plan = Planner(module, hardware, 2).plan()
    networks = {network.name for network in plan.networks}
    assert ("target_sampler" in networks) == (source != "batch") and "real_score" not in networks
    assert ("making the pairs" in plan.step.phases) == (source == "memory")
    assert module.pairs is not None and module.pairs._stored is None
