"""A student of several steps in the whole distillation."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from sdxs_lightning.callbacks.export import Export
from sdxs_lightning.core.seeding import Stream, integers, normal
from sdxs_lightning.memory_plan.hardware import read_hardware
from sdxs_lightning.memory_plan.planner import Planner
from sdxs_lightning.networks.backward_simulation import fresh_noise, sample_in_steps
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.objectives.regression import Regression
from sdxs_lightning.pairs.target_pairs import PairSettings
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from tests.helpers.tiny import LATENT_SHAPE, tiny_batch
from tests.helpers.tiny_distillation import built, distillation, fit, moved, weights

Base = Callable[[str], Path]
SGD = partial(torch.optim.SGD, lr=0.1)
STEPS = [999, 499]


def drawn(seed: int, iteration: int) -> int:
    """Index of the step that an iteration trains."""
    return int(integers(seed, Stream.STEP_INDEX, torch.tensor([iteration]), 0, len(STEPS)))


def test_the_step_is_drawn_once_an_iteration(base: Base, shards: Path) -> None:
    """1.5 passes on average for two steps, the same step for both micro-batches, by seed and iteration alone."""
    module = built(
        distillation(
            base("sd-epsilon"), student=StudentGenerator(SGD, timesteps=STEPS), accumulate_grad_batches=2
        )
    )
    calls: list[int] = []
    module.student.denoiser.unet.register_forward_pre_hook(lambda m, inputs: calls.append(int(inputs[1][0])))
    fit(module, shards, batches=12, batch_size=2)
    assert module.iterations == 6
    expected = [STEPS[: drawn(0, iteration) + 1] for iteration in range(6) for _ in range(2)]
    assert calls == [timestep for steps in expected for timestep in steps]
    assert {len(steps) for steps in expected} == {1, 2}


@pytest.mark.parametrize("kind", ["sd-v_prediction", "sdxl-epsilon"])
def test_every_network_learns_from_samples_of_a_later_step(
    base: Base, shards: Path, kind: str, tmp_path: Path
) -> None:
    seed = next(seed for seed in range(9) if drawn(seed, 0) == 1)
    module = built(distillation(base(kind), student=StudentGenerator(SGD, timesteps=STEPS), seed=seed))
    before = weights(module)
    calls: list[tuple[bool, list[int]]] = []
    module.student.denoiser.unet.register_forward_pre_hook(
        lambda m, inputs: calls.append((torch.is_grad_enabled(), inputs[1].tolist()))
    )
    export = Export(str(tmp_path / "out"), average=False, dtype="float32")
    trainer = fit(module, shards, batches=1, batch_size=8)
    export.on_train_end(trainer, module)
    for role in ("student", "ema", "fake_score", "discriminator"):
        assert moved(before, module, role) > 0.8  # some biases have gradients below rounding
    noise = normal(seed, Stream.STUDENT_NOISE, torch.arange(8), LATENT_SHAPE)
    assert calls == [(False, [999] * 8), (True, [499] * 8)]

    captions = tiny_batch(2).captions
    conditioning = module.family.encode_prompts(captions)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        expected = sample_in_steps(
            module.student.denoiser,
            noise[:2],
            conditioning,
            STEPS,
            lambda noise, step: torch.randn(noise.shape, generator=generator),
        )
        images = module.generate(captions, noise[:2], use_ema=False)
        assert torch.equal(images, module.family.decode(module.student(noise[:2], conditioning)))
    pipeline = getattr(diffusers, module.family.pipeline_class).from_pretrained(tmp_path / "out")
    found = pipeline(
        captions,
        num_inference_steps=2,
        guidance_scale=0.0,
        latents=noise[:2],
        width=32,
        height=32,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("paired", [False, True], ids=["data", "pairs"])
def test_samples_begin_from_the_noised_image_of_the_data_or_the_pair(base: Base, paired: bool) -> None:
    """What reaches the network at the second step, by hand; a pair's image is its target."""
    settings: dict[str, Any] = {}
    if paired:
        settings = {
            "pairs": PairSettings(source="on_the_fly", sampler_steps=1),
            "regression": Regression(),
            "update_schedule": UpdateSchedule(warmup_updates=5, max_student_updates=9),
        }
    student = StudentGenerator(SGD, timesteps=STEPS, image_starts=1.0)
    module = built(distillation(base("sd-epsilon"), student=student, **settings))
    if module.pairs is not None and module.real_score is not None:
        module.pairs.start(module.real_score.module, None)
    inputs: list[torch.Tensor] = []
    module.student.denoiser.unet.register_forward_pre_hook(lambda m, given: inputs.append(given[0]))
    batch = tiny_batch(3)
    terms = module.terms.warmup if paired else module.terms.distillation
    sample = module._sample(batch, terms, 1)
    assert batch.latents is not None and (sample.target is not None) == paired
    image = module.family.scale_latents(batch.latents) if sample.target is None else sample.target
    schedule, timesteps = module.family.schedule, torch.tensor([STEPS[1]])
    fresh = fresh_noise(normal(0, Stream.STUDENT_NOISE, batch.positions, LATENT_SHAPE), 1)
    expected = schedule.alpha_t(timesteps) * image + schedule.sigma_t(timesteps) * fresh
    torch.testing.assert_close(inputs[-1], expected, rtol=0, atol=1e-5)


def test_image_starts_need_images(base: Base) -> None:
    student = StudentGenerator(SGD, timesteps=STEPS, image_starts=0.5)
    module = built(distillation(base("sd-epsilon"), student=student))
    with pytest.raises(ValueError, match="image_starts needs images' latents, and the batch has none"):
        module._sample(dataclasses.replace(tiny_batch(3), latents=None), module.terms.distillation, 1)


def test_the_memory_plan_counts_the_passes_without_graph_as_nothing_that_stays(
    base: Base, tmp_path: Path
) -> None:
    """They keep no activations: the peak is that of one step, but for a few latents."""
    folder = tmp_path / "configs"
    shutil.copytree(base("sd-epsilon"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    hardware = read_hardware({"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed"}, 80.0)
    needed = [
        Planner(distillation(folder, student=StudentGenerator(SGD, timesteps=steps)), hardware, 16)
        .plan()
        .needed()
        for steps in (None, STEPS)
    ]
    assert needed[0] <= needed[1] < 1.05 * needed[0]
