"""One-step distillation in the DMD2 scheme: a student against a frozen real score, a fake score and a discriminator.

Words of this file. A *micro-batch* is one batch of the loader. A *turn* is `accumulate_grad_batches` of them; on its last
one the optimizers step. A *student update* is a step of the student's optimizer; progress, schedules and the run's end
are counted in these, because Lightning's `global_step` counts every optimizer's step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from sdxs_lightning.batch import TrainingBatch
from sdxs_lightning.families import Family
from sdxs_lightning.latents import scale
from sdxs_lightning.modules.curriculum import Curriculum, Turn
from sdxs_lightning.modules.discriminator import Discriminator
from sdxs_lightning.modules.ema import StudentEma
from sdxs_lightning.modules.fake_score import FakeScore
from sdxs_lightning.modules.gradients import clip_gradients
from sdxs_lightning.modules.network import Network, resting
from sdxs_lightning.modules.regression_warmup import CaptionSource, RegressionWarmup, WarmupPairs, make_pairs
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


class OneStepDistillation(LightningModule):
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
        super().__init__()
        self.automatic_optimization = False
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
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_norm = gradient_clip_norm
        self.seed = seed
        self.real_score_dtype: torch.dtype = getattr(torch, real_score_dtype)
        self.student_terms = self._make_student_terms()
        self.warmup_terms: list[StudentTerm] = [] if warmup is None else [RegressionTerm(warmup.objective)]
        self._check_parts()
        self.turns = 0
        self.student_updates = 0
        self.micro_batches = 0
        self._pairs: WarmupPairs | None = None
        self._scalars: dict[str, list[Tensor | float]] = defaultdict(list)

    # ------------------------------------------------------------------------------------------------ the training step

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> None:
        """One micro-batch: the student makes a sample, learns from its judges on its turns, then the judges learn."""
        turn = self.curriculum.turn(self.turns)
        with self._gradient_sync():
            sample = self._warmup_sample(batch) if turn.warmup else self._sample(batch, turn)
            if turn.student:
                self._student_update(sample, self.warmup_terms if turn.warmup else self.student_terms)
            if turn.critic:
                self._critic_update(sample.detach(), self._data(batch, sample))
        self._end_micro_batch()

    def _sample(self, batch: TrainingBatch, turn: Turn) -> Sample:
        """The student's sample for the batch's prompts; only the student's turns need its graph."""
        conditioning = self.family.encode_prompts(batch.captions)
        noise = normal(self.seed, Stream.STUDENT_NOISE, batch.positions, self.family.latent_shape())
        with torch.set_grad_enabled(turn.student):
            latents = self.student(noise, conditioning)
        self._note(student_mean=latents.detach().mean(), student_std=latents.detach().std())
        return Sample(latents=latents, conditioning=conditioning, positions=batch.positions, seed=self.seed)

    def _student_update(self, sample: Sample, terms: list[StudentTerm]) -> None:
        """The student descends the sum of its terms; its judges only pass gradients on."""
        with resting(self.fake_score, self.discriminator):
            loss = torch.zeros((), device=self.device)
            for term in terms:
                weighted, scalars = term(sample, self.roles)
                loss = loss + weighted
                self._note(**{f"student/{name}": value for name, value in scalars.items()})
            self.manual_backward(loss / self.accumulate_grad_batches)
        if self.turn_is_ending:
            self._apply_update("student", self.student)
            self.student_updates += 1
            assert self.ema is not None
            self.ema.update(self.student)

    def _critic_update(self, fake: Sample, real: Sample | None) -> None:
        """The fake score learns to denoise the sample; it and the discriminator learn to tell it from data."""
        noisy = self._renoise(fake, Stream.FAKE_TIMESTEP, Stream.FAKE_NOISE)
        prediction, fake_features = self.fake_score.predict_with_features(
            noisy.latents, noisy.timesteps, fake.conditioning
        )
        schedule, prediction_type = self.family.schedule, self.family.prediction_type
        target = target_of(prediction_type, fake.latents, noisy.noise, noisy.timesteps, schedule)
        loss = self.denoising.loss(prediction.output, target)
        self._note(**{"fake_score/loss": loss.detach()})
        if real is not None:
            loss = loss + self._adversarial_loss(fake_features, real)
        self.manual_backward(loss / self.accumulate_grad_batches)
        if self.turn_is_ending:
            self._apply_update("fake_score", self.fake_score)
            if self.discriminator is not None:
                self._apply_update("discriminator", self.discriminator)

    def _adversarial_loss(self, fake_features: Tensor, real: Sample) -> Tensor:
        """The critic's share of the GAN; its gradient also trains the fake score's encoder."""
        assert self.discriminator is not None and self.adversarial is not None
        noisy = self._renoise(real, Stream.REAL_TIMESTEP, Stream.REAL_NOISE)
        real_features = self.fake_score.features(noisy.latents, noisy.timesteps, real.conditioning)
        fake_logits, real_logits = self.discriminator(torch.cat([fake_features, real_features])).chunk(2)
        loss = self.adversarial.critic_loss(real_logits, fake_logits)
        right = torch.cat([real_logits > 0, fake_logits < 0]).float().mean()
        self._note(**{"discriminator/loss": loss.detach(), "discriminator/accuracy": right})
        return loss

    def _apply_update(self, role: str, network: Network) -> None:
        """Clips, steps, clears, and moves the learning rate: the one place where weights change."""
        optimizer = self._optimizer_of(role)
        norm = clip_gradients(network.parameters(), self.gradient_clip_norm)
        self._note(**{f"{role}/gradient_norm": norm, f"{role}/lr": optimizer.param_groups[0]["lr"]})
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if role in self._scheduler_roles:
            self._scheduler_of(role).step()

    def _end_micro_batch(self) -> None:
        """Counts; at the end of a turn logs it once, and ends the run after the last student update."""
        self.micro_batches += 1
        if self.micro_batches < self.accumulate_grad_batches:
            return
        self.micro_batches = 0
        self.turns += 1
        self._log_turn()
        if self.student_updates >= self.curriculum.max_student_updates:
            self.trainer.should_stop = True

    # ------------------------------------------------------------------------------------------------ parts of the step

    @property
    def roles(self) -> Roles:
        """The networks that the student's terms may ask."""
        real_score = self.real_score.module if self.real_score is not None else None
        return Roles(self.family.schedule, self.fake_score, real_score, self.discriminator)

    @property
    def turn_is_ending(self) -> bool:
        """Whether this micro-batch is the last of its turn."""
        return self.micro_batches + 1 == self.accumulate_grad_batches

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

    def _gradient_sync(self) -> AbstractContextManager[None]:
        """DDP averages over ranks on a turn's last micro-batch only. FSDP2 scatters each time, to keep memory sharded."""
        model = self.trainer.model
        if isinstance(model, DistributedDataParallel) and not self.turn_is_ending:
            return cast(AbstractContextManager[None], model.no_sync())
        return nullcontext()

    def _note(self, **scalars: Tensor | float) -> None:
        for name, value in scalars.items():
            self._scalars[name].append(value)

    def _log_turn(self) -> None:
        """Means over the turn's micro-batches, as tensors: only the logger turns them into numbers."""
        means = {
            name: torch.stack([torch.as_tensor(value, device=self.device) for value in values]).mean()
            if isinstance(values[0], Tensor)
            else values[-1]
            for name, values in self._scalars.items()
        }
        self._scalars.clear()
        self.log_dict(means | {"student_updates": float(self.student_updates), "turns": float(self.turns)})

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

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Each network's own, in the order of `networks`."""
        configured = {
            role: cast(dict[str, Any], net.configure_optimizers()) for role, net in self.networks.items()
        }
        self._scheduler_roles = [role for role, config in configured.items() if "lr_scheduler" in config]
        schedulers = [configured[role]["lr_scheduler"] for role in self._scheduler_roles]
        return [config["optimizer"] for config in configured.values()], schedulers

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
            self._pairs = make_pairs(self.warmup, captions, self.family, self.real_score.module, self.seed)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the counters. Random state is not needed: noise has addresses."""
        if self.micro_batches:
            rank_zero_warn(
                f"This checkpoint was taken {self.micro_batches} micro-batch(es) into a turn; their gradients are not in it."
            )
        checkpoint["one_step_distillation"] = {"turns": self.turns, "student_updates": self.student_updates}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the counters."""
        counters: Mapping[str, int] = checkpoint["one_step_distillation"]
        self.turns, self.student_updates = counters["turns"], counters["student_updates"]

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
        noise = noise.to(self.device)
        return self.family.decode(generator(noise, self.family.encode_prompts(captions)))

    # ---------------------------------------------------------------------------------------------------------- helpers

    def _optimizer_of(self, role: str) -> LightningOptimizer:
        optimizers = cast(list[LightningOptimizer], self.optimizers())
        return optimizers[list(self.networks).index(role)]

    def _scheduler_of(self, role: str) -> torch.optim.lr_scheduler.LRScheduler:
        configs = self.trainer.lr_scheduler_configs
        return cast(
            torch.optim.lr_scheduler.LRScheduler, configs[self._scheduler_roles.index(role)].scheduler
        )

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
        if self.accumulate_grad_batches < 1:
            raise ValueError(
                f"accumulate_grad_batches must be 1 or more, got {self.accumulate_grad_batches}."
            )

    def _train_captions(self, count: int) -> list[str]:
        source = getattr(self.trainer, "datamodule", None)
        if not isinstance(source, CaptionSource):
            raise TypeError(
                f"the warm-up takes its prompts from data.train_captions(count), which {type(source).__name__} does not "
                "have; set warmup to null and curriculum.warmup_updates to 0, or use a DataModule that has it."
            )
        return source.train_captions(count)
