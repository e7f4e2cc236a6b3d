"""One-step distillation in the DMD2 scheme: a student against a frozen real score, a fake score and a discriminator.

A *student update* is a step of the student's optimizer; progress, schedules and the run's end are counted in these. For
*turn* and *micro-batch* see `manual_turns.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from sdxs_lightning.batch import TrainingBatch
from sdxs_lightning.families import Family
from sdxs_lightning.latents import scale
from sdxs_lightning.modules.curriculum import Curriculum, Turn
from sdxs_lightning.modules.discriminator import Discriminator
from sdxs_lightning.modules.ema import StudentEma
from sdxs_lightning.modules.fake_score import FakeScore
from sdxs_lightning.modules.manual_turns import ManualTurns
from sdxs_lightning.modules.network import Network, resting
from sdxs_lightning.modules.planned import PlannedNetwork, PlannedPhase
from sdxs_lightning.modules.regression_warmup import (
    CaptionSource,
    RegressionWarmup,
    WarmupPairs,
    make_pairs,
    planned_pairs,
)
from sdxs_lightning.modules.sample import Noisy, Roles, Sample
from sdxs_lightning.modules.sharding import mixed_precision, shard_head, shard_unet
from sdxs_lightning.modules.student_generator import StudentGenerator
from sdxs_lightning.modules.student_terms import (
    AdversarialTerm,
    DistributionMatchingTerm,
    RegressionTerm,
    StudentTerm,
)
from sdxs_lightning.noise_schedule import target_of
from sdxs_lightning.objectives.adversarial import DiffusionAdversarial
from sdxs_lightning.objectives.denoising import Denoising
from sdxs_lightning.objectives.distribution_matching import DistributionMatching
from sdxs_lightning.seeding import Stream, normal
from sdxs_lightning.teacher.denoiser import Denoiser
from sdxs_lightning.teacher.frozen import Frozen

Dtype = Literal["float32", "bfloat16", "float16"]


class OneStepDistillation(ManualTurns):
    """Trains a one-step student from a base, without sampling the base (but for an optional warm-up).

    Args:
        family: the base.
        student: the network that will be exported.
        fake_score: learns, on every turn, to denoise what the student makes.
        curriculum: which networks learn on which turn, and when the run ends.
        distribution_matching: the score-difference loss of the student; None leaves it out.
        denoising: the fake score's own loss.
        discriminator: tells noised data from noised samples by the fake score's features; None means no GAN.
        adversarial: the GAN's weights; goes with the discriminator.
        warmup: regression on the target sampler's pairs, before distribution matching; None starts without.
        ema_decay: of the averaged student that is evaluated and exported, per student update.
        accumulate_grad_batches: micro-batches of a turn; their gradients are averaged.
        gradient_clip_norm: of each network by itself; None does not clip.
        seed: of every random number of the step, together with a sample's position in the run.
        real_score_dtype: of the frozen networks in the step, real score and text encoders; bfloat16 on GPUs.

    Raises:
        ValueError: for parts that do not go together.

    Source: DMD2, arXiv:2405.14867, algorithm 1 and its released code. Departures: fake score and discriminator have one
        optimizer each; the discriminator's fake half is read from the denoising pass (noise and timesteps have the same
        distribution there, so one pass serves both); the averaged student; the loss of a v-prediction base is in v.
    """

    def __init__(
        self,
        family: Family,
        student: StudentGenerator,
        fake_score: FakeScore,
        curriculum: Curriculum,
        distribution_matching: DistributionMatching | None = DistributionMatching(),
        denoising: Denoising = Denoising(),
        discriminator: Discriminator | None = None,
        adversarial: DiffusionAdversarial | None = None,
        warmup: RegressionWarmup | None = None,
        ema_decay: float = 0.999,
        accumulate_grad_batches: int = 1,
        gradient_clip_norm: float | None = 10.0,
        seed: int = 0,
        real_score_dtype: Dtype = "float32",
    ) -> None:
        super().__init__(accumulate_grad_batches, gradient_clip_norm)
        self.family = family
        self.student = student
        self.fake_score = fake_score
        self.discriminator = discriminator
        self.ema: StudentEma | None = None  # made in configure_model, as everything with weights
        self.real_score: Frozen[Denoiser] | None = None
        self.curriculum = curriculum
        self.denoising = denoising
        self.adversarial = adversarial
        self.distribution_matching = distribution_matching
        self.warmup = warmup
        self.ema_decay = ema_decay
        self.seed = seed
        self.real_score_dtype: torch.dtype = getattr(torch, real_score_dtype)
        self.student_terms = self._make_student_terms()
        self.warmup_terms: list[StudentTerm] = [] if warmup is None else [RegressionTerm(warmup.objective)]
        self._check_parts()
        self.student_updates = 0
        self._pairs: WarmupPairs | None = None

    # ------------------------------------------------------------------------------------------------ the training step

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> None:
        """One micro-batch: the student makes a sample, learns from its judges on its turns, then the judges learn."""
        turn = self.curriculum.turn(self.turns)
        with self.without_reducer():
            sample = self._warmup_sample(batch) if turn.warmup else self._sample(batch, turn)
            if turn.student:
                self._student_update(sample, self.warmup_terms if turn.warmup else self.student_terms)
            if turn.critic:
                self._critic_update(sample.detach(), self._data(batch, sample))
        self.end_micro_batch(student_updates=self.student_updates)
        if self.student_updates >= self.curriculum.max_student_updates:
            self.trainer.should_stop = True

    def _sample(self, batch: TrainingBatch, turn: Turn) -> Sample:
        """The student's sample for the batch's prompts; only the student's turns need its graph."""
        conditioning = self.family.encode_prompts(batch.captions)
        noise = normal(self.seed, Stream.STUDENT_NOISE, batch.positions, self.family.latent_shape())
        with torch.set_grad_enabled(turn.student):
            latents = self.student(noise, conditioning)
        self.note("student/", mean=latents.mean(), std=latents.std())
        return Sample(latents=latents, conditioning=conditioning, positions=batch.positions, seed=self.seed)

    def _student_update(self, sample: Sample, terms: list[StudentTerm]) -> None:
        """The student descends the sum of its terms."""
        self._student_backward(sample, terms)
        if self.turn_is_ending:
            self.apply_update("student")
            self.student_updates += 1
            assert self.ema is not None
            self.ema.update(self.student)

    def _student_backward(self, sample: Sample, terms: list[StudentTerm]) -> None:
        """The student's gradients; its judges only pass gradients on."""
        with resting(self.fake_score, self.discriminator):
            loss = torch.zeros((), device=self.device)
            for term in terms:
                weighted, scalars = term(sample, self.roles)
                loss = loss + weighted
                self.note("student/", **scalars)
            self.accumulate(loss)

    def _critic_update(self, fake: Sample, real: Sample | None) -> None:
        """The fake score learns to denoise the sample; it and the discriminator learn to tell it from data."""
        self._critic_backward(fake, real)
        if self.turn_is_ending:
            self.apply_update("fake_score")
            if self.discriminator is not None:
                self.apply_update("discriminator")

    def _critic_backward(self, fake: Sample, real: Sample | None) -> None:
        """The gradients of fake score and discriminator."""
        noisy = self._renoise(fake, Stream.FAKE_TIMESTEP, Stream.FAKE_NOISE)
        prediction, fake_features = self.fake_score.predict_with_features(
            noisy.latents, noisy.timesteps, fake.conditioning
        )
        schedule, prediction_type = self.family.schedule, self.family.prediction_type
        target = target_of(prediction_type, fake.latents, noisy.noise, noisy.timesteps, schedule)
        loss = self.denoising.loss(prediction.output, target)
        self.note("fake_score/", loss=loss)
        if real is not None:
            loss = loss + self._adversarial_loss(fake_features, real)
        self.accumulate(loss)

    def _adversarial_loss(self, fake_features: Tensor, real: Sample) -> Tensor:
        """The critic's share of the GAN; its gradient also trains the fake score's encoder."""
        assert self.discriminator is not None and self.adversarial is not None
        noisy = self._renoise(real, Stream.REAL_TIMESTEP, Stream.REAL_NOISE)
        real_features = self.fake_score.features(noisy.latents, noisy.timesteps, real.conditioning)
        fake_logits, real_logits = self.discriminator(torch.cat([fake_features, real_features])).chunk(2)
        loss = self.adversarial.critic_loss(real_logits, fake_logits)
        right = torch.cat([real_logits > 0, fake_logits < 0]).float().mean()
        self.note("discriminator/", loss=loss, accuracy=right)
        return loss

    # ------------------------------------------------------------------------------------------------ parts of the step

    @property
    def roles(self) -> Roles:
        """The networks that the student's terms may ask."""
        real_score = self.real_score.module if self.real_score is not None else None
        return Roles(self.family.schedule, self.fake_score, real_score, self.discriminator)

    def _warmup_sample(self, batch: TrainingBatch) -> Sample:
        """The student's sample for stored pairs; of the batch only its positions count."""
        assert self._pairs is not None
        noise, conditioning, target = self._pairs.pick(batch.positions)
        latents = self.student(noise, conditioning)
        return Sample(
            latents=latents,
            conditioning=conditioning,
            positions=batch.positions,
            seed=self.seed,
            target=target,
        )

    def _data(self, batch: TrainingBatch, sample: Sample) -> Sample | None:
        """The batch's own latents with the sample's prompts; None without a discriminator."""
        if self.discriminator is None:
            return None
        if batch.latents is None or tuple(batch.latents.shape[1:]) != self.family.latent_shape():
            found = "none" if batch.latents is None else f"shape {tuple(batch.latents.shape[1:])}"
            raise ValueError(
                f"the discriminator needs latents of shape {self.family.latent_shape()} in every batch and got {found}; "
                "make latent shards for this base and resolution, or set discriminator and adversarial to null."
            )
        latents = scale(batch.latents, self.family.scaling_factor)
        return Sample(
            latents=latents, conditioning=sample.conditioning, positions=batch.positions, seed=self.seed
        )

    def _renoise(self, sample: Sample, timestep_stream: Stream, noise_stream: Stream) -> Noisy:
        return sample.renoise(self.family.schedule, self.denoising.timesteps, timestep_stream, noise_stream)

    # -------------------------------------------------------------------------------------------------- building, saving

    def configure_model(self) -> None:
        """Loads every network, once; shards each by itself where the strategy gives a device mesh."""
        if self.ema is not None:
            return
        self.student.build(self.family)
        self.fake_score.build(self.family)
        if self.discriminator is not None:
            self.discriminator.build(self.fake_score.feature_shape(self.family.latent_shape()))
        self.ema = StudentEma(self.student, self.ema_decay)
        if self.distribution_matching is not None or self.warmup is not None:
            real = Denoiser(self.family.load_unet(), self.family.schedule, self.family.prediction_type)
            self.real_score = Frozen(real).to(dtype=self.real_score_dtype)
        if self.device_mesh is not None:
            self._shard()

    def _shard(self) -> None:
        assert self.device_mesh is not None and self.ema is not None
        mesh, policy = self.device_mesh["data_parallel"], mixed_precision(str(self.trainer.precision))
        for denoiser in (self.student.denoiser, self.fake_score.denoiser, self.ema.denoiser):
            shard_unet(denoiser.unet, mesh, policy)
        if self.discriminator is not None:
            shard_head(self.discriminator.head, mesh, policy)
        if self.real_score is not None:
            shard_unet(self.real_score.module.unet, mesh, policy)

    @property
    def networks(self) -> dict[str, Network]:
        """The networks that learn, by role."""
        networks: dict[str, Network] = {"student": self.student, "fake_score": self.fake_score}
        return networks if self.discriminator is None else networks | {"discriminator": self.discriminator}

    def on_fit_start(self) -> None:
        """Moves what Lightning does not see."""
        self.family.to(self.device, self.real_score_dtype)
        if self.real_score is not None:
            self.real_score.to(self.device)

    def on_train_start(self) -> None:
        """Makes the warm-up's pairs unless it is over; by now a resumed run knows its counters, with FSDP2 too."""
        if self.student_updates >= self.curriculum.max_student_updates:
            self.trainer.should_stop = True
        elif self.warmup is not None and self.curriculum.turn(self.turns).warmup:
            assert self.real_score is not None
            rank_zero_info(
                f"Making {self.warmup.pairs} pairs with {self.warmup.sampler_steps} steps of the base."
            )
            captions = self._train_captions(self.warmup.pairs)
            with self.trainer.precision_plugin.forward_context():
                self._pairs = make_pairs(
                    self.warmup, captions, self.family, self.real_score.module, self.seed
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["student_updates"] = self.student_updates

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.student_updates = checkpoint["student_updates"]

    # --------------------------------------------------------------------------------------------------------- sampling

    @torch.no_grad()
    def generate(self, captions: list[str], noise: Tensor, use_ema: bool = True) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] in one step, of the averaged student or of the current one.

        Args:
            captions: B prompts.
            noise: (B, C, h, w), N(0, 1).
            use_ema: the averaged student.
        """
        assert self.ema is not None
        generator = self.ema if use_ema else self.student
        attached = self._trainer is not None
        with self.trainer.precision_plugin.forward_context() if attached else nullcontext():
            latents = generator(noise.to(self.device), self.family.encode_prompts(captions))
        return self.family.decode(latents)

    # ------------------------------------------------------------------------------------------------------ memory plan

    def plan_networks(self) -> list[PlannedNetwork]:
        """See `Plannable`."""
        networks = [
            PlannedNetwork(role, network, "trained", network.optimizer)
            for role, network in self.networks.items()
        ]
        if self.ema is not None:
            networks.append(PlannedNetwork("ema", self.ema, "averaged"))
        if self.real_score is not None:
            networks.append(PlannedNetwork("real_score", self.real_score.module, "frozen"))
        return networks

    def plan_step(self, batch: TrainingBatch) -> Iterator[PlannedPhase]:
        """See `Plannable`: a turn that updates every network, after the warm-up if there is one."""
        if self.warmup is not None:
            assert self.real_score is not None
            self._pairs = planned_pairs(self.warmup, self.family, self.real_score.module)
            yield PlannedPhase("making the warm-up's pairs", ())
        sample = self._sample(batch, Turn(student=True, critic=True, warmup=False))
        self._student_backward(sample, self.student_terms)
        yield PlannedPhase("student's turn", ("student",))
        sample = sample.detach()
        self._critic_backward(sample, self._data(batch, sample))
        yield PlannedPhase("critic's turn", tuple(name for name in self.networks if name != "student"))
        self._scalars.clear()
        self._pairs = None

    # ---------------------------------------------------------------------------------------------------------- helpers

    def _make_student_terms(self) -> list[StudentTerm]:
        terms: list[StudentTerm] = []
        if self.distribution_matching is not None:
            terms.append(DistributionMatchingTerm(self.distribution_matching))
        if self.adversarial is not None:
            terms.append(AdversarialTerm(self.adversarial))
        return terms

    def _check_parts(self) -> None:
        if (self.discriminator is None) != (self.adversarial is None):
            raise ValueError("discriminator and adversarial go together: set both, or both to null.")
        if not self.student_terms:
            raise ValueError(
                "the student has no objective: set distribution_matching, or discriminator and adversarial."
            )
        if self.adversarial is not None and self.adversarial.timesteps != self.denoising.timesteps:
            raise ValueError(
                f"adversarial.timesteps ({self.adversarial.timesteps}) must equal denoising.timesteps "
                f"({self.denoising.timesteps}), because the discriminator reads the denoising pass."
            )
        if (self.warmup is None) != (self.curriculum.warmup_updates == 0):
            raise ValueError(
                f"curriculum.warmup_updates is {self.curriculum.warmup_updates} and warmup is {self.warmup}: give both, or 0 "
                "and null."
            )

    def _train_captions(self, count: int) -> list[str]:
        source = getattr(self.trainer, "datamodule", None)
        if not isinstance(source, CaptionSource):
            raise TypeError(
                f"the warm-up takes its prompts from data.train_captions(count), which {type(source).__name__} does not "
                "have; set warmup to null and curriculum.warmup_updates to 0, or use a DataModule that has it."
            )
        return source.train_captions(count)
