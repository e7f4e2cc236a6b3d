"""A student with the guidance scale as an input: embedding, training, and the export in stock diffusers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from evaluation.images.samples import PipelineImages, load_pipeline
from sdxs_lightning.callbacks.export import Export
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.guidance import guide
from sdxs_lightning.core.latents import to_uint8
from sdxs_lightning.core.seeding import Stream, normal
from sdxs_lightning.families.folders import read_json
from sdxs_lightning.inference.model_folder import ModelFolder
from sdxs_lightning.inference.negative_prompts import negative_prompt_inputs
from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.networks.guidance_input import (
    GuidanceInput,
    add_guidance_input,
    guidance_embedding,
    record_learnt,
)
from sdxs_lightning.networks.lora import LoRA
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.objectives.decoupled_guidance import DecoupledGuidance
from sdxs_lightning.objectives.distribution_matching import (
    DistributionMatching,
    distribution_matching_gradient,
)
from sdxs_lightning.objectives.regression import Regression
from sdxs_lightning.objectives.segmented_score_distillation import SegmentedScoreDistillation
from sdxs_lightning.objectives.term import term_gradients
from sdxs_lightning.pairs.target_pairs import PairSettings
from sdxs_lightning.stages.distillation.step import OneStepDistillation
from sdxs_lightning.stages.distillation.student_inputs import with_guidance
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from tests.helpers.tiny import LATENT_SHAPE, tiny_batch
from tests.helpers.tiny_distillation import built, distillation, family_of, fit, sample_of, weights

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
    terms = {"plain": term, "both": DistributionMatching(guidance_scale=99.0, fake_guidance_scale=98.0)}
    found = term_gradients(terms, sample, module.context)[0]
    assert sample.guidance_scale(1.0) == 1.0  # a term that does not guide
    noisy = sample.renoise(module.family.schedule, term.timesteps, Stream.SCORE_TIMESTEP, Stream.SCORE_NOISE)
    for index in range(4):
        one = slice(index, index + 1)
        known = noisy.latents[one], noisy.timesteps[one], sample.conditioning[one]
        with torch.no_grad():
            cond, uncond = module.real_score.module.unguided_pair(*known)
            real = guide(cond.pred_x0, uncond.pred_x0, float(scales[index]))
            fakes = {
                "plain": module.fake_score.predict(*known).pred_x0,
                "both": module.fake_score.denoiser.guided(*known, float(scales[index])).pred_x0,
            }
            expected = {
                name: distribution_matching_gradient(sample.latents[one], real, fake) / sample.latents.numel()
                for name, fake in fakes.items()
            }
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name][one], gradient, rtol=1e-3, atol=1e-6)


def test_it_trains_and_stock_diffusers_runs_it_at_any_scale(base: Base, shards: Path, tmp_path: Path) -> None:
    module = guided(
        base("sd-epsilon"),
        pairs=PairSettings(count=8, sampler_steps=2, sampler_batch_size=4, guidance_scale=3.0),
        regression=Regression(),
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
    learnt = {"low": 1.0, "high": 4.0, "negative_prompts": False}
    assert pipeline.unet.config["_student_guidance"] == learnt
    pipeline.unet.save_pretrained(tmp_path / "again")
    saved = read_json(tmp_path / "again" / "config.json")
    assert saved["_student_guidance"] == learnt
    unexpected = UNet2DConditionModel.extract_init_dict(saved)[1]  # what diffusers would warn about
    assert unexpected == {}
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
    with pytest.raises(UserError, match="or in diffusers, pipeline"):
        ModelFolder.read(tmp_path / "pipeline", "torch")
    # It goes on from there.
    again = StudentGenerator(SGD, weights=str(tmp_path / "pipeline"), guidance=RANGE)
    again.build(module.family)
    found = again.denoiser.unet.time_embedding.cond_proj.weight
    assert torch.equal(found, module.ema.denoiser.unet.time_embedding.cond_proj.weight)
    narrower = StudentGenerator(
        SGD, weights=str(tmp_path / "pipeline"), guidance=replace(RANGE, high=3.0, negative_prompts=("a",))
    )
    narrower.build(module.family)
    assert narrower.denoiser.unet.config["_student_guidance"] == {
        "low": 1.0,
        "high": 3.0,
        "negative_prompts": True,
    }
    with pytest.raises(ValueError, match="set student.init_args.guidance, such as"):
        StudentGenerator(SGD, weights=str(tmp_path / "pipeline")).build(module.family)


NEGATIVE = replace(RANGE, negative_prompts=("a blue square", "a red"), negative_share=0.6)


@pytest.mark.parametrize("name", ["sd-epsilon", "sdxl-epsilon"])
def test_the_real_score_is_guided_away_from_each_samples_negative_prompt(base: Base, name: str) -> None:
    module = built(distillation(base(name), student=StudentGenerator(SGD, guidance=NEGATIVE), gan=False))
    assert module.real_score is not None and module.fake_score is not None
    batch = tiny_batch(8)
    sample = module._sample(batch, module.terms.distillation)
    drawn, chosen = NEGATIVE.draw_negative_prompts(module.seed, batch.positions)
    assert set(drawn.tolist()) == {0, 1} and 0 < int(chosen.sum()) < 8
    texts = [NEGATIVE.negative_prompts[i] for i in drawn.tolist()]
    plain, negative = module.family.encode_prompts(batch.captions), module.family.encode_prompts(texts)
    uncond = plain.unconditional()
    seen: dict[str, tuple[Any, Any]] = {}
    networks = {"student": module.student.denoiser, "fake": module.fake_score.denoiser}
    networks["real"] = module.real_score.module
    for role, network in networks.items():
        forward = network.unet.forward

        def noted(*args: Any, role: str = role, forward: Any = forward, **kwargs: Any) -> Any:
            seen[role] = (
                kwargs["encoder_hidden_states"],
                kwargs.get("added_cond_kwargs", {}).get("text_embeds"),
            )
            return forward(*args, **kwargs)

        network.unet.forward = noted
    sample = module._sample(batch, module.terms.distillation)
    term_gradients({"dm": DistributionMatching(guidance_scale=99.0)}, sample, module.context)
    pooled: Any = plain.pooled_prompt_embeds, uncond.pooled_prompt_embeds, negative.pooled_prompt_embeds
    kinds: list[Any] = [
        (0, (plain.prompt_embeds, uncond.prompt_embeds, negative.prompt_embeds), chosen[:, None, None])
    ]
    kinds += [(1, pooled, chosen[:, None])] if name == "sdxl-epsilon" else []
    for part, (own, without, against), which in kinds:
        against = torch.where(which, against, without)
        torch.testing.assert_close(seen["real"][part], torch.cat([against, own]))
        for role in ("student", "fake"):
            torch.testing.assert_close(seen[role][part], own + without - against)
            assert torch.equal(seen[role][part][~chosen], own[~chosen])  # none changes nothing
    assert (name == "sdxl-epsilon") == (seen["real"][1] is not None)


def test_pairs_have_no_negative_prompts(base: Base) -> None:
    module = built(
        distillation(
            base("sd-epsilon"),
            student=StudentGenerator(SGD, guidance=NEGATIVE),
            pairs=PairSettings(count=8, sampler_steps=2, sampler_batch_size=4, guidance_scale=3.0),
            regression=Regression(),
            update_schedule=UpdateSchedule(max_student_updates=9, warmup_updates=1),
        )
    )
    plain = module.family.encode_prompts(tiny_batch(4).captions)
    given = with_guidance(module.student, module.family, plain, tiny_batch(4).positions, 3.0, 0)
    assert (
        given.negative_prompt_shift is None and given.negative_prompt_embeds is plain.negative_prompt_embeds
    )
    assert given.guidance_scales is not None and set(given.guidance_scales.tolist()) == {3.0}


@pytest.mark.parametrize("name", ["sd-epsilon", "sdxl-epsilon"])
def test_stock_diffusers_takes_negative_prompts(base: Base, tmp_path: Path, name: str) -> None:
    module = built(distillation(base(name), student=StudentGenerator(SGD, guidance=NEGATIVE), gan=False))
    with torch.no_grad():
        module.student.denoiser.unet.time_embedding.cond_proj.weight.normal_(std=0.3)
    module.write_export(tmp_path / "pipeline", average=False, dtype=torch.float32)
    pipeline = load_pipeline(str(tmp_path / "pipeline"))
    pipeline.set_progress_bar_config(disable=True)
    prompts, negatives = ["a red circle", "a green square"], ["a blue square", ""]
    maker = PipelineImages(pipeline, steps=1, guidance_scale=2.0, seed=0)
    ids = torch.tensor([0, 1])
    images, plain = maker(prompts, ids, negatives), maker(prompts, ids)
    # Up to rounding: given embeddings and those of a prompt are the same operations.
    assert (images[1].int() - plain[1].int()).abs().max() <= 1
    assert (images[0].int() - plain[0].int()).abs().max() > 3
    given = negative_prompt_inputs(pipeline, prompts, negatives).keys()
    conditioning = module.family.encode_prompts(prompts)
    known = module.family.encode_prompts(negatives)
    conditioning = conditioning.with_negative_prompts(
        known.prompt_embeds, known.pooled_prompt_embeds, torch.tensor([True, False])
    )
    noise = normal(0, Stream.EVALUATION, ids, LATENT_SHAPE)
    with torch.no_grad():
        latents = module.student(noise, replace(conditioning, guidance_scales=torch.tensor([2.0, 2.0])))
        ours = to_uint8(module.family.decode(latents))
    assert (images.int() - ours.int()).abs().max() <= 1
    with pytest.raises(UserError, match="1 negative prompts for 2 prompts"):
        negative_prompt_inputs(pipeline, prompts, ["a"])
    record_learnt(pipeline.unet, RANGE)  # which has none
    with pytest.raises(UserError, match="the student learnt no negative prompts .* got 'a blue square'"):
        negative_prompt_inputs(pipeline, prompts, negatives)
    assert negative_prompt_inputs(pipeline, prompts, ["", ""]).keys() == given
    record_learnt(pipeline.unet, NEGATIVE)
    with pytest.raises(
        UserError, match="does not take the guidance scale as an input .* pass negative_prompt"
    ):
        negative_prompt_inputs(load_pipeline(str(base(name))), prompts, negatives)
    with pytest.raises(UserError, match="lists of strings, for one image too, got 'a red circle' and 'a"):
        negative_prompt_inputs(pipeline, "a red circle", "a blue cross")
    assert not any(one.requires_grad for one in negative_prompt_inputs(pipeline, prompts, negatives).values())
    # enable_model_cpu_offload: the pipeline's device is the CPU, and its networks run on another one.
    devices = {"device": torch.device("meta"), "_execution_device": torch.device("cpu")}
    pipeline.__class__ = type("Offloaded", (type(pipeline),), devices)
    assert {one.device.type for one in negative_prompt_inputs(pipeline, prompts, negatives).values()} == {
        "cpu"
    }


def test_what_does_not_go_together_is_refused(base: Base) -> None:
    with pytest.raises(ValueError, match="1 <= low <= default <= high <= 100, got low 2.0, default 1.75"):
        GuidanceInput(low=2.0)
    with pytest.raises(ValueError, match="negative_share is a share above 0 and up to 1, got 0"):
        GuidanceInput(negative_prompts=("a",), negative_share=0.0)
    with pytest.raises(ValueError, match="low <= default <= high <= 100, got .* high inf"):
        GuidanceInput(high=float("inf"))
    with pytest.raises(ValueError, match="is the range of one scale, got low 2.0, default 2.0, high 2.0"):
        GuidanceInput(low=2.0, default=2.0, high=2.0)
    for wrong in ("blurry", ("blurry", ""), (" ",)):
        with pytest.raises(ValueError, match="negative_prompts is a list of prompts that are not empty, got"):
            GuidanceInput(negative_prompts=wrong)  # type: ignore[arg-type]
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


def test_a_range_that_no_update_of_the_student_learns_is_refused(base: Base) -> None:
    pairs = PairSettings(count=8, sampler_steps=2, sampler_batch_size=4, guidance_scale=3.0)
    always = {"pairs": pairs, "regression": Regression(phase="always")}
    unguided = {"distribution_matching": DistributionMatching(guidance_scale=1.0)}
    for settings in (always, unguided):
        with pytest.raises(ValueError, match="student.guidance needs updates of the student at more than"):
            guided(base("sd-epsilon"), **settings)
    guided(base("sd-epsilon"), **unguided, objectives={"guidance": DecoupledGuidance()})
    guided(base("sd-epsilon"), segmented=SegmentedScoreDistillation(lambda_start=0.0, lambda_end=0.0))


def test_a_base_that_takes_a_guidance_scale_is_no_real_score(base: Base, tmp_path: Path) -> None:
    folder = tmp_path / "sd-epsilon"
    shutil.copytree(base("sd-epsilon"), folder)
    unet = family_of(folder).load_unet()
    add_guidance_input(unet, 16)
    unet.save_pretrained(folder / "unet")
    with pytest.raises(ValueError, match="as LCMs do, and cannot be the real score: give the model that"):
        guided(folder).configure_model()
