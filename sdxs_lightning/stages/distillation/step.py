"""One-step distillation: a student against a frozen real score, a fake score and a discriminator, and against pairs.

A *student update* is a step of the student's optimizer; progress, schedules and the run's end are counted in these. For
*iteration* and *micro-batch* see `manual_turns.py`; for the networks' life around the step `distillation_networks.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch

from sdxs_lightning.core.batch import TrainingBatch
from sdxs_lightning.core.noise_schedule import target_of
from sdxs_lightning.core.seeding import Stream, normal
from sdxs_lightning.families import Family
from sdxs_lightning.networks.discriminator import Discriminator
from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.networks.image_features import ImageFeatures
from sdxs_lightning.networks.network import no_param_grad
from sdxs_lightning.networks.projected_discriminator import ProjectedDiscriminator
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.objectives.adversarial import DiffusionAdversarial
from sdxs_lightning.objectives.denoising import Denoising
from sdxs_lightning.objectives.distribution_matching import DistributionMatching
from sdxs_lightning.objectives.feature_matching import FeatureMatching
from sdxs_lightning.objectives.pixel_adversarial import PixelAdversarial
from sdxs_lightning.objectives.regression import Regression
from sdxs_lightning.objectives.segmented_score_distillation import SegmentedScoreDistillation
from sdxs_lightning.pairs.target_pairs import PairSettings, TargetPairs
from sdxs_lightning.stages.distillation.config_checks import (
    check_f_divergence,
    check_features,
    check_timesteps,
    check_update_schedule,
    gan_of,
    terms_after_warmup,
    warmup_terms,
)
from sdxs_lightning.stages.distillation.diagnostics import latent_stats
from sdxs_lightning.stages.distillation.gan import Data
from sdxs_lightning.stages.distillation.matched_features import MatchedFeatures
from sdxs_lightning.stages.distillation.sample import Sample
from sdxs_lightning.stages.distillation.setup import DistillationNetworks, DistillationParts
from sdxs_lightning.stages.distillation.student_terms import StudentTerm
from sdxs_lightning.stages.distillation.term_gradients import balanced, comparison, term_gradients
from sdxs_lightning.stages.distillation.update_schedule import Updates, UpdateSchedule
from sdxs_lightning.training.plannable import PlannedPhase

Dtype = Literal["float32", "bfloat16", "float16"]


class OneStepDistillation(DistillationNetworks):
    """Trains a one-step student from a base: stages `warmup`, `distill` (DMD2, or segmented) and `finish`.

    Args:
        family: the base.
        student: the network that will be exported.
        fake_score: learns, on every iteration after the warm-up, to denoise what the student makes; None in a run that is
            warm-up only.
        update_schedule: which networks learn on which iteration, and when the run ends.
        distribution_matching: the score-difference loss of the student after the warm-up; None leaves it out.
        segmented: restricts it to low noise and adds feature matching; None is plain score distillation.
        pairs: the target sampler's (noise, latents) pairs, for the warm-up and for the segmented mode; None without either.
        regression: mean square against the pairs' latents, in the warm-up; None leaves it out.
        feature_matching: against the pairs' features, in the warm-up and in the segmented mode; None leaves it out.
        features: what feature matching compares; goes with it.
        denoising: the fake score's own loss.
        discriminator: tells data from samples; None means no GAN.
        adversarial: the GAN on latents: goes with a Discriminator.
        pixel_adversarial: the GAN on images, of the stage `finish`: goes with a ProjectedDiscriminator and image_features.
        image_features: what a discriminator of images looks through.
        ema_decay: of the averaged student that is evaluated and exported, per student update.
        accumulate_grad_batches: micro-batches of an iteration; their gradients are averaged.
        gradient_clip_norm: of each network by itself; None does not clip.
        seed: of every random number of the step, together with a sample's position in the run.
        real_score_dtype: of the frozen networks in the step, real score and text encoders; bfloat16 on GPUs.

    Raises:
        ValueError: for parts that do not go together.

    Source: DMD2, arXiv:2405.14867, algorithm 1 and its released code; SDXS, arXiv:2403.16627, section 3.2, for the warm-up
        and the segmented mode. Departures: fake score and discriminator have one optimizer each; the discriminator's fake
        half is read from the denoising pass (noise and timesteps have the same distribution there, so one pass serves both);
        the averaged student; the loss of a v-prediction base is in v.
    """

    def __init__(
        self,
        family: Family,
        student: StudentGenerator,
        fake_score: FakeScore | None,
        update_schedule: UpdateSchedule,
        distribution_matching: DistributionMatching | None = DistributionMatching(),
        segmented: SegmentedScoreDistillation | None = None,
        pairs: PairSettings | None = None,
        regression: Regression | None = None,
        feature_matching: FeatureMatching | None = None,
        features: MatchedFeatures | None = None,
        denoising: Denoising = Denoising(),
        discriminator: Discriminator | ProjectedDiscriminator | None = None,
        adversarial: DiffusionAdversarial | None = None,
        pixel_adversarial: PixelAdversarial | None = None,
        image_features: ImageFeatures | None = None,
        ema_decay: float = 0.999,
        accumulate_grad_batches: int = 1,
        gradient_clip_norm: float | None = 10.0,
        seed: int = 0,
        real_score_dtype: Dtype = "float32",
    ) -> None:
        gan = gan_of(discriminator, adversarial, pixel_adversarial, image_features)
        target_pairs = TargetPairs(pairs, seed) if pairs is not None else None
        super().__init__(
            DistillationParts(family, student, fake_score, discriminator, gan, features, target_pairs),
            distribution_matching is not None,
            ema_decay,
            accumulate_grad_batches,
            gradient_clip_norm,
            getattr(torch, real_score_dtype),
        )
        self.update_schedule = update_schedule
        self.denoising = denoising
        self.segmented = segmented
        self.seed = seed
        check_features(feature_matching, features, segmented, distribution_matching)
        check_timesteps(adversarial, denoising)
        check_f_divergence(distribution_matching, adversarial)
        self.warmup_terms = warmup_terms(regression, feature_matching, features)
        self.student_terms = terms_after_warmup(
            distribution_matching, segmented, gan, feature_matching, features
        )
        check_update_schedule(
            update_schedule, fake_score is not None, pairs is not None, self.warmup_terms, self.student_terms
        )

    # ------------------------------------------------------------------------------------------------ the training step

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> None:
        """One micro-batch: the student makes a sample, learns from its judges on its iterations, then the judges learn."""
        updates = self.update_schedule.updates_at(self.iterations)
        with self.without_reducer():
            sample = self._sample(batch, updates)
            if updates.student:
                self._student_update(sample, self.warmup_terms if updates.warmup else self.student_terms)
            if updates.critic:
                self._fake_score_and_discriminator_update(sample.detach(), batch)
        self.end_micro_batch(student_updates=self.student_updates)
        if self.pairs is not None and not self._pairs_are_needed:
            self.pairs.forget()
        if self.student_updates >= self.update_schedule.max_student_updates:
            self.trainer.should_stop = True

    def _sample(self, batch: TrainingBatch, updates: Updates) -> Sample:
        """The student's sample, for the batch's prompts or for a pair's; only the student's iterations need its graph."""
        target = None
        if updates.student and (updates.warmup or "feature_matching" in self.student_terms):
            assert self.pairs is not None
            noise, conditioning, target = self.pairs.pick(batch)
        else:
            conditioning = self.family.encode_prompts(batch.captions)
            noise = normal(self.seed, Stream.STUDENT_NOISE, batch.positions, self.family.latent_shape())
        with torch.set_grad_enabled(updates.student):
            latents = self.student.simulate(noise, conditioning)
        data = None if batch.latents is None else self.family.scale_latents(batch.latents)
        self.note("student/", **latent_stats(latents, data))
        return Sample(
            latents=latents,
            conditioning=conditioning,
            positions=batch.positions,
            seed=self.seed,
            target=target,
        )

    def _student_update(self, sample: Sample, terms: Mapping[str, StudentTerm]) -> None:
        """The student descends the sum of its terms."""
        self._student_backward(sample, terms)
        if self.iteration_is_ending:
            self.apply_update("student")
            self.student_updates += 1
            assert self.ema is not None
            self.ema.update(self.student)

    def _student_backward(self, sample: Sample, terms: Mapping[str, StudentTerm]) -> None:
        """The student's gradients; its judges only pass gradients on."""
        with no_param_grad(self.fake_score, self.discriminator):
            gradients, scalars = term_gradients(terms, sample, self.context)
        if self.segmented is not None and "feature_matching" in terms and terms is self.student_terms:
            ratio = self.segmented.feature_matching_ratio(self.progress)
            gradients = balanced(gradients, "feature_matching", "distribution_matching", ratio)
        self.note("student/", **scalars, **comparison(gradients))
        total = torch.stack(list(gradients.values())).sum(dim=0)
        self.accumulate((sample.latents * total).sum())

    def _fake_score_and_discriminator_update(self, fake: Sample, batch: TrainingBatch) -> None:
        """The fake score learns to denoise the sample; it and the discriminator learn to tell it from data."""
        self._fake_score_and_discriminator_backward(fake, batch)
        if self.iteration_is_ending:
            self.apply_update("fake_score")
            if self.discriminator is not None:
                self.apply_update("discriminator")

    def _fake_score_and_discriminator_backward(self, fake: Sample, batch: TrainingBatch) -> None:
        """The gradients of fake score and discriminator."""
        assert self.fake_score is not None
        noisy = fake.renoise(
            self.family.schedule, self.denoising.timesteps, Stream.FAKE_TIMESTEP, Stream.FAKE_NOISE
        )
        asked = noisy.latents, noisy.timesteps, fake.conditioning
        fake_features = None
        if self.gan is not None and self.gan.reads_denoising_pass:
            prediction, fake_features = self.fake_score.predict_with_features(*asked)
        else:
            prediction = self.fake_score.predict(*asked)
        schedule, prediction_type = self.family.schedule, self.family.prediction_type
        target = target_of(prediction_type, fake.latents, noisy.noise, noisy.timesteps, schedule)
        loss = self.denoising.loss(prediction.output, target)
        self.note("fake_score/", loss=loss)
        if self.gan is not None:
            adversarial, scalars = self.gan.discriminator_loss(
                fake, self._data(batch, fake), self.context, fake_features
            )
            self.note("discriminator/", **scalars)
            loss = loss + adversarial
        self.accumulate(loss)

    # ------------------------------------------------------------------------------------------------ parts of the step

    @property
    def progress(self) -> float:
        """See `DistillationNetworks`."""
        return self.update_schedule.progress(self.student_updates)

    def _data(self, batch: TrainingBatch, fake: Sample) -> Data:
        """The batch with its own prompts, which are the sample's unless that came with a pair."""
        own = fake.conditioning if fake.target is None else self.family.encode_prompts(batch.captions)
        return Data(batch, own, self.seed)

    def on_train_start(self) -> None:
        """Makes the pairs unless their time is over; by now a resumed run knows its counters, with FSDP2 too."""
        if self.student_updates >= self.update_schedule.max_student_updates:
            self.trainer.should_stop = True
            return
        if self.pairs is not None and self._pairs_are_needed:
            real_score = self.real_score.module if self.real_score is not None else None
            with self.trainer.precision_plugin.forward_context():
                self.pairs.start(real_score, getattr(self.trainer, "datamodule", None))

    @property
    def _pairs_are_needed(self) -> bool:
        """Whether a student's iteration with pairs is still to come."""
        return (
            self.update_schedule.updates_at(self.iterations).warmup
            or "feature_matching" in self.student_terms
        )

    # ------------------------------------------------------------------------------------------------------ memory plan

    def plan_step(self, batch: TrainingBatch) -> Iterator[PlannedPhase]:
        """See `Plannable`: an iteration that updates every network, after the warm-up if there is one."""
        if self.pairs is not None:
            real_score = self.real_score.module if self.real_score is not None else None
            if self.pairs.plan(real_score):
                yield PlannedPhase("making the pairs", ())
        warmup_only = self.fake_score is None
        sample = self._sample(batch, Updates(student=True, critic=not warmup_only, warmup=warmup_only))
        self._student_backward(sample, self.warmup_terms if warmup_only else self.student_terms)
        yield PlannedPhase("student's iteration", ("student",))
        if not warmup_only:
            self._fake_score_and_discriminator_backward(sample.detach(), batch)
            yield PlannedPhase(
                "critic's iteration", tuple(name for name in self.networks if name != "student")
            )
        self._scalars.clear()
        if self.pairs is not None:
            self.pairs.forget()
