"""One-step distillation by distribution matching, a GAN, and (noise, latents) pairs.

A *student update* is a step of the student's optimizer; progress, schedules and the run's end are counted in these.
*Iteration* and *micro-batch* are defined in `training/manual_optimization.py`; `setup.py` builds the student's loss terms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from sdxs_lightning.core.batch import TrainingBatch
from sdxs_lightning.core.frozen import Dtype
from sdxs_lightning.core.noise_schedule import target_of
from sdxs_lightning.core.seeding import Stream, integers, normal, uniform
from sdxs_lightning.families import Family
from sdxs_lightning.networks.discriminator import Discriminator
from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.networks.image_features import ImageFeatures
from sdxs_lightning.networks.network import no_param_grad
from sdxs_lightning.networks.projected_discriminator import ProjectedDiscriminator
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.objectives.adversarial import DiffusionAdversarial
from sdxs_lightning.objectives.denoising import Denoising
from sdxs_lightning.objectives.diagnostics import latent_stats
from sdxs_lightning.objectives.distribution_matching import DistributionMatching
from sdxs_lightning.objectives.feature_matching import FeatureMatching
from sdxs_lightning.objectives.matched_features import MatchedFeatures
from sdxs_lightning.objectives.pixel_adversarial import PixelAdversarial
from sdxs_lightning.objectives.regression import Regression
from sdxs_lightning.objectives.segmented_score_distillation import SegmentedScoreDistillation
from sdxs_lightning.objectives.term import LatentSample, StudentTerm, compare_gradients, term_gradients
from sdxs_lightning.pairs.target_pairs import PairSettings
from sdxs_lightning.stages.data_sample import without_prompts
from sdxs_lightning.stages.distillation.gan import (
    RealBatch,
    check_caption_dropout,
    check_discriminator_timesteps,
    check_f_divergence,
)
from sdxs_lightning.stages.distillation.networks import DistillationNetworks
from sdxs_lightning.stages.distillation.pair_checks import (
    check_guidance_of_pairs,
    check_mixing_of_pairs,
    check_pairs,
)
from sdxs_lightning.stages.distillation.setup import (
    check_timesteps,
    gan_of,
    terms_of,
)
from sdxs_lightning.stages.distillation.student_inputs import (
    StudentInputs,
    image_starts,
    mixed_inputs,
    with_guidance,
)
from sdxs_lightning.stages.distillation.update_schedule import Updates, UpdateSchedule
from sdxs_lightning.training.plannable import PlannedPhase


class OneStepDistillation(DistillationNetworks):
    """Trains a one-step student from a base: stages `warmup`, `distill` (DMD2, or segmented) and `finish`.

    Args:
        family: the base.
        student: the network to train and export.
        fake_score: trained on every iteration after the warm-up to denoise the student's samples; None if the run is
            warm-up only.
        update_schedule: which networks are updated on which iteration, and when the run ends.
        distribution_matching: the student's score-difference loss after the warm-up; None disables it.
        segmented: restricts distribution matching to low noise and adds feature matching; None disables this.
        pairs: the target sampler's (noise, latents) pairs; None if no term needs them.
        regression: mean square error to the pairs' latents, in the warm-up or as its `phase` says; None disables it.
        feature_matching: distance to the pairs' features, in the warm-up or as its `phase` says, and in the segmented mode;
            None disables it.
        features: the features that feature matching compares; set together with it.
        objectives: further loss terms by name, subclasses of `StudentTerm` from any importable module; null removes one that
            an earlier configuration file set.
        denoising: the fake score's loss.
        discriminator: the GAN's discriminator; None means no GAN.
        adversarial: the GAN on latents; set together with a Discriminator.
        pixel_adversarial: the GAN on images (stage `finish`); set together with a ProjectedDiscriminator and image_features.
        image_features: the frozen feature network of a discriminator on images.
        ema_decay: decay per student update of the averaged student, which is evaluated and exported.
        accumulate_grad_batches: micro-batches per iteration; their gradients are averaged.
        gradient_clip_norm: maximum gradient norm, per network; None does not clip.
        seed: with a sample's position in the run it determines every random number of the step.
        real_score_dtype: dtype of the frozen networks, real score and text encoders; bfloat16 on GPUs.

    Raises:
        ValueError: if the arguments are inconsistent.

    Source: DMD2, arXiv:2405.14867, algorithm 1 and its released code; SDXS, arXiv:2403.16627, section 3.2, for the warm-up
        and the segmented mode. Departures: fake score and discriminator have one optimizer each; the discriminator's fake
        half is read from the denoising pass (noise and timesteps have the same distribution there, so one pass serves both);
        the real half of the discriminator's batch has the captions of the fake half, where DMD2 reads data with prompts of its
        own; the averaged student; the loss of a v-prediction base is in v.
    """

    reads_conditions: ClassVar[bool] = False
    """Whether the student sees condition images, so that noise need not say what its image is."""

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
        objectives: dict[str, StudentTerm | None] | None = None,
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
        check_pairs(pairs, self.reads_conditions, family.schedule.num_train_timesteps)
        check_discriminator_timesteps(adversarial, denoising)
        check_f_divergence(distribution_matching, adversarial)
        check_caption_dropout(
            denoising, {"distribution_matching": distribution_matching, **(objectives or {})}, adversarial
        )
        check_guidance_of_pairs(student, pairs)
        check_mixing_of_pairs(student, pairs, self.reads_conditions, update_schedule)
        gan = gan_of(discriminator, adversarial, pixel_adversarial, image_features)
        super().__init__(
            family=family,
            student=student,
            fake_score=fake_score,
            discriminator=discriminator,
            gan=gan,
            pairs=pairs,
            update_schedule=update_schedule,
            terms=terms_of(
                distribution_matching, segmented, regression, feature_matching, features, gan, objectives
            ),
            ema_decay=ema_decay,
            accumulate_grad_batches=accumulate_grad_batches,
            gradient_clip_norm=gradient_clip_norm,
            seed=seed,
            real_score_dtype=getattr(torch, real_score_dtype),
        )
        check_timesteps(
            self.terms, None if fake_score is None else denoising, family.schedule.num_train_timesteps
        )
        self.denoising = denoising
        self._kept_samples: list[tuple[LatentSample, TrainingBatch]] = []
        """The iteration's samples, if the fake score is updated on them more than once."""

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> None:
        """One micro-batch: sample, update the student, then update fake score and discriminator."""
        updates = self.update_schedule.updates_at(self.iterations)
        terms = self._terms_at(updates)
        if self.update_schedule.distils and (updates.warmup or not updates.student):
            # Refused in the first iteration, not after the warm-up and the fake score's head start.
            self.update_schedule.for_fake_score(batch)
            if self.pairs is not None:
                self.pairs.part(batch)
        part = self.update_schedule.for_fake_score(batch) if updates.fake_score else batch
        with self.without_reducer():
            sample = self._sample(batch if updates.student else part, terms)
            if updates.student:
                self._student_update(sample, terms)
                sample = sample.every(len(batch) // len(part))
            if updates.fake_score:
                self._fake_score_and_discriminator_update(sample.detach(), part)
            elif self.gan is not None and self.gan.acts_in_warmup:
                self._discriminator_update(sample.detach(), batch)
        self.end_micro_batch(student_updates=self.student_updates)
        if self.pairs is not None and not self.pairs_are_needed:
            self.pairs.forget()
        if self.student_updates >= self.update_schedule.max_student_updates:
            self.trainer.should_stop = True

    @property
    def iteration_kind(self) -> tuple[str, int]:
        """Name of the current iteration's kind, for logs, and what else its work depends on: the student's step.

        "student" updates the student and then the fake score, "fake_score" the fake score alone, "warmup" the student alone.
        """
        updates = self.update_schedule.updates_at(self.iterations)
        name = "warmup" if updates.warmup else "student" if updates.student else "fake_score"
        return name, self._step_index() if len(self.student.timesteps) > 1 else 0

    def _terms_at(self, updates: Updates) -> Mapping[str, StudentTerm]:
        """The student's loss terms in this iteration; empty if it is not updated."""
        if not updates.student:
            return {}
        return self.terms.warmup if updates.warmup else self.terms.distillation

    def _step_index(self) -> int:
        """The step that a student of several steps trains in this iteration: the same for all ranks and micro-batches."""
        steps = len(self.student.timesteps)
        drawn = integers(self.seed, Stream.STEP_INDEX, torch.tensor([self.iterations]), 0, steps)
        return int(drawn)  # on the CPU, so nothing waits for the device

    def _sample(
        self, batch: TrainingBatch, terms: Mapping[str, StudentTerm], step: int | None = None
    ) -> LatentSample:
        """Generates with the student: from pairs' noise and prompts if a term needs them (all, or every n-th sample), else from
        the batch's prompts.

        Args:
            batch: the training batch.
            terms: the student's loss terms; without any, the sample has no graph.
            step: index of the step of a student of several; None draws it.

        Raises:
            ValueError: if a term needs images and the batch has none.
        """
        noise, conditioning, target = self._inputs(batch, terms)
        scale = None if target is None or self.pairs is None else self.pairs.settings.guidance_scale
        conditioning = with_guidance(
            self.student, self.family, conditioning, batch.positions, scale, self.seed
        )
        needing_images = [name for name, term in terms.items() if term.needs_images]
        if needing_images and batch.images is None:
            raise ValueError(
                f"objective {needing_images[0]} needs images, and the batch has none: let data.contents name images, or set "
                f"{needing_images[0]} to null."
            )
        with torch.set_grad_enabled(bool(terms)):
            trained = self._step_index() if step is None else step
            starts = image_starts(self.student, self.family, batch, target, trained, self.seed)
            latents = self.student.simulate(noise, conditioning, trained, starts)
        data = None if batch.latents is None else self.family.scale_latents(batch.latents)
        self.note("student/", **latent_stats(latents, data))
        return LatentSample(
            latents=latents,
            conditioning=conditioning,
            positions=batch.positions,
            seed=self.seed,
            target=target,
            pairs_every_nth=1 if target is None else len(batch) // len(target),
            images=batch.images if needing_images else None,
        )

    def _inputs(self, batch: TrainingBatch, terms: Mapping[str, StudentTerm]) -> StudentInputs:
        """The student's noise and conditioning, with the target sampler's latents if a term needs pairs, of every n-th sample
        after the warm-up if `pairs.every_nth_sample` says so.
        """
        if any(term.needs_pairs for term in terms.values()):
            assert self.pairs is not None  # checked in setup.py
            part = self.pairs.part(batch) if terms is self.terms.distillation else batch
            picked = StudentInputs(*self.pairs.pick(part))
            return picked if part is batch else mixed_inputs(self._fresh_inputs(batch), picked)
        return self._fresh_inputs(batch)

    def _fresh_inputs(self, batch: TrainingBatch) -> StudentInputs:
        conditioning = self.family.encode_prompts(batch.captions)
        noise = normal(self.seed, Stream.STUDENT_NOISE, batch.positions, self.family.latent_shape())
        return StudentInputs(noise, conditioning, None)

    def _student_update(self, sample: LatentSample, terms: Mapping[str, StudentTerm]) -> None:
        """Updates the student, and its average, on the sum of its loss terms."""
        self._student_backward(sample, terms)
        if self.iteration_is_ending:
            if self.student_updates == self.update_schedule.warmup_updates > 0:
                # Second moments of the warm-up's gradients, which fall with its error, would make steps of many times lr.
                self.forget_moments("student")
            self.apply_update("student")
            self.student_updates += 1
            assert self.ema is not None
            self.ema.update(self.student)
            if self.fake_score is not None:
                self.fake_score.align(self.student)

    def _student_backward(self, sample: LatentSample, terms: Mapping[str, StudentTerm]) -> None:
        """Accumulates the student's gradients; fake score and discriminator accumulate none."""
        with no_param_grad(self.fake_score, self.discriminator):
            gradients, scalars = term_gradients(terms, sample, self.context)
        self.note("student/", **scalars, **compare_gradients(gradients))
        # Each term was differentiated down to the latents separately, so that its gradient can be logged and balanced; this
        # costs no more than differentiating the sum, since terms share only the student. One backward pass of
        # <latents, total>, with total constant, now applies the chain rule through the student.
        total = torch.stack(list(gradients.values())).sum(dim=0)
        self.accumulate((sample.latents * total).sum(), ["student"])

    def _fake_score_and_discriminator_update(self, fake: LatentSample, batch: TrainingBatch) -> None:
        """Updates the fake score on its denoising loss, and the discriminator on its own."""
        self._fake_score_and_discriminator_backward(fake, batch)
        uses = self.update_schedule.fake_score_updates_per_sample
        if uses > 1:
            self._kept_samples.append((fake, batch))
        if not self.iteration_is_ending:
            return
        self._step_fake_score_and_discriminator()
        for use in range(1, uses):
            for kept, (sample, its_batch) in enumerate(self._kept_samples, start=1):
                last = kept == len(self._kept_samples)
                self._fake_score_and_discriminator_backward(sample.used(use), its_batch, last)
            self._step_fake_score_and_discriminator()
        self._kept_samples.clear()

    def _step_fake_score_and_discriminator(self) -> None:
        self.apply_update("fake_score")
        if self.gan is not None and self.gan.acts_in_distillation:
            self.apply_update("discriminator")

    def _fake_score_and_discriminator_backward(
        self, fake: LatentSample, batch: TrainingBatch, last: bool | None = None
    ) -> None:
        """Accumulates the gradients of fake score and discriminator; `last` as in `accumulate`."""
        assert self.fake_score is not None  # checked in setup.py
        schedule, prediction_type = self.family.schedule, self.family.prediction_type
        noisy = fake.renoise(schedule, self.denoising.timesteps, Stream.FAKE_TIMESTEP, Stream.FAKE_NOISE)
        conditioning = fake.conditioning
        if self.denoising.caption_dropout:
            drawn = uniform(fake.drawing_seed, Stream.DROPOUT, fake.positions)
            conditioning = without_prompts(conditioning, drawn < self.denoising.caption_dropout)
        fake_features = None
        if self.gan is not None and self.gan.reads_denoising_pass:
            prediction, fake_features = self.fake_score.predict_with_features(
                noisy.latents, noisy.timesteps, conditioning
            )
        else:
            prediction = self.fake_score.predict(noisy.latents, noisy.timesteps, conditioning)
        target = target_of(prediction_type, fake.latents, noisy.noise, noisy.timesteps, schedule)
        loss = self.denoising.loss(prediction.output, target)
        self.note("fake_score/", loss=loss)
        if self.gan is not None and self.gan.acts_in_distillation:
            loss = loss + self._discriminator_loss(fake, batch, fake_features)
        self.accumulate(loss, [role for role in self.networks if role != "student"], last)

    def _discriminator_update(self, fake: LatentSample, batch: TrainingBatch) -> None:
        """Updates the discriminator alone, in the warm-up."""
        self.accumulate(self._discriminator_loss(fake, batch, None), ["discriminator"])
        if self.iteration_is_ending:
            self.apply_update("discriminator")

    def _discriminator_loss(
        self, fake: LatentSample, batch: TrainingBatch, fake_features: Tensor | None
    ) -> Tensor:
        assert self.gan is not None
        real = self._real_batch(batch, fake)
        loss, scalars = self.gan.discriminator_loss(fake, real, self.context, fake_features)
        self.note("discriminator/", **scalars)
        return loss

    def _real_batch(self, batch: TrainingBatch, fake: LatentSample) -> RealBatch:
        """The batch with its encoded prompts, which equal the sample's unless that was made from a pair."""
        own = fake.conditioning
        if fake.target is not None:
            # Whatever the halves do not share would tell them apart.
            own = self.family.encode_prompts(batch.captions).guided_as(fake.conditioning)
        return RealBatch(batch, own, self.seed, fake.use)

    def plan_step(self, batch: TrainingBatch) -> Iterator[PlannedPhase]:
        """An iteration that updates every network, after the warm-up if the run goes on."""
        if self.pairs is not None:
            real_score = self.real_score.module if self.real_score is not None else None
            if self.pairs.plan(real_score):
                yield PlannedPhase("making the pairs", ())
        terms = self.terms.distillation if self.update_schedule.distils else self.terms.warmup
        sample = self._sample(batch, terms, len(self.student.timesteps) - 1)
        self._student_backward(sample, terms)
        yield PlannedPhase("student's iteration", ("student",))
        if self.update_schedule.distils:
            # All samples, whatever fake_score_every_nth_sample is: an upper bound, at any batch size.
            self._fake_score_and_discriminator_backward(sample.detach(), batch)
            others = tuple(name for name in self.networks if name != "student")
            yield PlannedPhase("iteration of fake score and discriminator", others)
        elif self.gan is not None and self.gan.acts_in_warmup:
            self.accumulate(self._discriminator_loss(sample.detach(), batch, None), ["discriminator"])
            yield PlannedPhase("iteration of the discriminator", ("discriminator",))
        self._scalars.clear()
        if self.pairs is not None:
            self.pairs.forget()
