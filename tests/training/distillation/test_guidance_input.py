"""A student with the guidance scale as an input: embedding, training, and the export in stock diffusers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from sdxs_lightning.callbacks.export import Export
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.guidance import guide
from sdxs_lightning.core.seeding import Stream
from sdxs_lightning.inference.model_folder import ModelFolder
from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.networks.guidance_input import GuidanceInput, add_guidance_input, guidance_embedding
from sdxs_lightning.networks.lora import LoRA
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.objectives.distribution_matching import (
    DistributionMatching,
    distribution_matching_gradient,
)
from sdxs_lightning.objectives.regression import Regression
from sdxs_lightning.objectives.term import term_gradients
from sdxs_lightning.pairs.target_pairs import PairSettings
from sdxs_lightning.stages.distillation.step import OneStepDistillation
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from tests.helpers.tiny import LATENT_SHAPE, tiny_batch
from tests.helpers.tiny_distillation import built, distillation, fit, sample_of, weights

Base = Callable[[str], Path]
SGD = partial(torch.optim.SGD, lr=0.1)
RANGE = GuidanceInput(low=1.0, high=4.0, default=2.0, dimensions=16)


def guided(base: Path, **settings: Any) -> OneStepDistillation:
    return distillation(base, student=StudentGenerator(SGD, guidance=RANGE), **settings)


def test_the_embedding_is_that_of_diffusers() -> None:
    scales = torch.tensor([1.0, 1.75, 3.0, 7.5])
    theirs = StableDiffusionPipeline.get_guidance_scale_embedding(None, scales - 1, 256)
    torch.testing.assert_close(
        guidance_embedding(scales, 256), theirs, rtol=1e-5, atol=2e-3
    )  # of angles up to 6500


def test_the_new_input_changes_nothing_and_is_made_once(base: Base) -> None:
    module = built(distillation(base("sd-epsilon")))
    sample = sample_of(module).detach()
    scales = torch.tensor([1.0, 2.0, 3.0])
    conditioning = replace(sample.conditioning, guidance_scales=scales)
    before = module.student(sample.latents, conditioning)
    unet = module.student.denoiser.unet
    add_guidance_input(unet, 16)
    add_guidance_input(unet, 16)
    assert unet.config["time_cond_proj_dim"] == 16
    assert torch.equal(module.student(sample.latents, conditioning), before)
    with torch.no_grad():
        unet.time_embedding.cond_proj.weight.normal_()
    after = module.student(sample.latents, conditioning)
    assert not torch.allclose(after, before, atol=1e-3)
    # Each sample has its own: a batch of one scale gives the same for that sample.
    alone = module.student(sample.latents, replace(conditioning, guidance_scales=scales[1].expand(3)))
    torch.testing.assert_close(alone[1], after[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone[2], after[2], atol=1e-4)
    with pytest.raises(ValueError, match=r"takes? a guidance embedding of 16 dimensions.*set it to 16"):
        add_guidance_input(unet, 32)


def test_the_real_score_is_guided_by_each_samples_scale(base: Base) -> None:
    module = built(guided(base("sd-epsilon"), gan=False))
    assert module.real_score is not None and module.fake_score is not None
    with torch.no_grad():
        module.fake_score.denoiser.unet.conv_in.weight.mul_(1.2)
    batch = tiny_batch(4)
    sample = module._sample(batch, module.terms.distillation)
    scales = sample.conditioning.guidance_scales
    assert scales is not None and len(set(scales.tolist())) == 4
    assert float(scales.min()) >= 1 and float(scales.max()) <= 4
    term = DistributionMatching(guidance_scale=99.0)
    found = term_gradients({"dm": term}, sample, module.context)[0]["dm"]
    assert sample.guidance_scale(1.0) == 1.0  # a term that does not guide
    noisy = sample.renoise(module.family.schedule, term.timesteps, Stream.SCORE_TIMESTEP, Stream.SCORE_NOISE)
    for index in range(4):
        one = slice(index, index + 1)
        known = noisy.latents[one], noisy.timesteps[one], sample.conditioning[one]
        with torch.no_grad():
            cond, uncond = module.real_score.module.unguided_pair(*known)
            real = guide(cond.pred_x0, uncond.pred_x0, float(scales[index]))
            fake = module.fake_score.predict(*known).pred_x0
            expected = (
                distribution_matching_gradient(sample.latents[one], real, fake) / sample.latents.numel()
            )
        torch.testing.assert_close(found[one], expected, rtol=1e-3, atol=1e-6)


def test_it_trains_and_stock_diffusers_runs_it_at_any_scale(base: Base, shards: Path, tmp_path: Path) -> None:
    module = guided(
        base("sd-epsilon"),
        pairs=PairSettings(count=8, sampler_steps=2, sampler_batch_size=4, guidance_scale=3.0),
        regression=Regression(phase="always"),
        update_schedule=UpdateSchedule(
            max_student_updates=9, warmup_updates=1, fake_score_updates_per_student_update=1
        ),
    )
    before = weights(built(module))
    trainer = fit(module, shards, batches=2)
    moved = {name for name, value in weights(module).items() if not torch.equal(value, before[name])}
    projections = {
        f"{role}.denoiser.unet.time_embedding.cond_proj.weight" for role in ("student", "fake_score", "ema")
    }
    assert projections <= moved
    assert module.ema is not None
    with torch.no_grad():  # so that the scale is visible
        module.ema.denoiser.unet.time_embedding.cond_proj.weight.normal_(std=0.3)
    Export(str(tmp_path / "pipeline"), dtype="float32").on_train_end(trainer, module)

    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, *LATENT_SHAPE, generator=torch.Generator().manual_seed(0))
    images = {
        scale: torch.from_numpy(
            pipeline(
                "a red circle", latents=noise, num_inference_steps=1, guidance_scale=scale, output_type="np"
            ).images
        ).permute(0, 3, 1, 2)
        for scale in (1.0, 2.0, 4.0)
    }
    default = module.generate(["a red circle"], noise)
    torch.testing.assert_close(images[2.0], (default / 2 + 0.5).clamp(0, 1), rtol=1e-3, atol=1e-3)
    assert (images[1.0] - images[4.0]).abs().max() > 0.01
    with pytest.raises(UserError, match="run it in diffusers, pipeline"):
        ModelFolder.read(tmp_path / "pipeline", "torch")
    # It goes on from there.
    again = StudentGenerator(SGD, weights=str(tmp_path / "pipeline"), guidance=RANGE)
    again.build(module.family)
    found = again.denoiser.unet.time_embedding.cond_proj.weight
    assert torch.equal(found, module.ema.denoiser.unet.time_embedding.cond_proj.weight)
    with pytest.raises(ValueError, match="set student.init_args.guidance, such as"):
        StudentGenerator(SGD, weights=str(tmp_path / "pipeline")).build(module.family)


def test_what_does_not_go_together_is_refused(base: Base) -> None:
    with pytest.raises(ValueError, match="1 <= low <= default <= high, got low 2.0, default 1.75"):
        GuidanceInput(low=2.0)
    with pytest.raises(ValueError, match="must be even, 4 or more, got 7"):
        GuidanceInput(dimensions=7)
    with pytest.raises(ValueError, match="student.lora freezes all but adapters"):
        StudentGenerator(SGD, lora=LoRA(rank=2), guidance=RANGE)
    with pytest.raises(ValueError, match="set fake_score.lora or student.guidance to null"):
        guided(base("sd-epsilon"), fake_score=FakeScore(SGD, lora=LoRA(rank=2))).configure_model()
    with pytest.raises(
        ValueError, match=r"pairs.guidance_scale is 7.0, outside the range of student.guidance"
    ):
        guided(
            base("sd-epsilon"), pairs=PairSettings(guidance_scale=7.0), regression=Regression(phase="always")
        )
