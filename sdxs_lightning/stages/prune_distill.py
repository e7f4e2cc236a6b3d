"""Stage `miniaturise`: distils the base into a pruned U-Net by output and feature distillation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from sdxs_lightning.core.batch import TrainingBatch
from sdxs_lightning.core.frozen import Dtype, Frozen
from sdxs_lightning.core.noise_schedule import target_of
from sdxs_lightning.core.seeding import Stream
from sdxs_lightning.core.timesteps import TimestepRange
from sdxs_lightning.export import gathered_unet, write_unet
from sdxs_lightning.families import Family
from sdxs_lightning.families.network_types import UNet2DConditionModel
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.ema import DenoiserEma
from sdxs_lightning.networks.feature_taps import FeatureTap
from sdxs_lightning.networks.network import prepare_unet
from sdxs_lightning.objectives.knowledge_distillation import (
    FeatureDistillation,
    OutputDistillation,
    TaskLoss,
)
from sdxs_lightning.objectives.term import LatentSample, NoisyLatents
from sdxs_lightning.stages.data_sample import data_sample
from sdxs_lightning.surgery.feature_pairs import feature_pairs
from sdxs_lightning.surgery.presets import topology_of
from sdxs_lightning.surgery.pruning import prune
from sdxs_lightning.surgery.topology import Topology
from sdxs_lightning.training.averaged_training import AveragedTraining
from sdxs_lightning.training.plannable import PlannedNetwork, PlannedPhase
from sdxs_lightning.training.sharding import shard_unet, sharding_of


class PrunedUNetDistillation(AveragedTraining):
    """Prunes the base's U-Net and distils the original into it, on the same noisy latents and prompts.

    Each step runs the frozen base once, without guidance and under no_grad, and no VAE.

    Args:
        family: the base: both the network to prune and the teacher.
        topology: what the student keeps: a preset's name or a description; None keeps the network of `weights` unpruned.
        optimizer: called with the student's parameters.
        lr_scheduler: stepped once per optimizer step; None keeps the rate constant.
        output_distillation: distance between the outputs (epsilon or v, as the base predicts); None disables it.
        feature_distillation: distances between the features of the kept stages; None disables it.
        task: the student's denoising loss on the data, as in BK-SDM; None disables it, as in SDXS.
        timesteps: timesteps at which the networks are compared.
        weights: U-Net or pipeline folder to prune instead of the base, such as an earlier result of this stage
            (progressive removal); the teacher stays the base, so feature_distillation.taps has to name the pairs.
        weight_transfer: False keeps the pruned architecture but reinitialises its weights, as a control experiment.
        ema_decay: decay per optimizer step of the averaged student, which is exported.
        caption_dropout: probability of dropping a caption; 0 because knowledge distillation uses no guidance.
        gradient_checkpointing: recompute the student's blocks in the backward pass: less memory, about a third more compute.
        compile_blocks: torch.compile the blocks of both networks; worthwhile on a GPU for runs longer than minutes.
        seed: seed of noise, timesteps, dropout and fresh weights; the first three are drawn per sample position.
        real_score_dtype: dtype of the frozen networks, teacher and text encoders; bfloat16 on GPUs.

    Raises:
        ValueError: if the arguments are inconsistent.

    Source: BK-SDM, arXiv:2305.15798, section 3.2, and SDXS, arXiv:2403.16627, section 3.1, which drops the task loss.
        The losses are in v for a v-prediction base.
    """

    log_prefix = "student/"
    export_name = "unet"

    def __init__(
        self,
        family: Family,
        topology: str | Topology | None,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        output_distillation: OutputDistillation | None = OutputDistillation(),
        feature_distillation: FeatureDistillation | None = FeatureDistillation(),
        task: TaskLoss | None = None,
        timesteps: TimestepRange = TimestepRange(0, 999),
        weights: str | None = None,
        weight_transfer: bool = True,
        ema_decay: float = 0.999,
        caption_dropout: float = 0.0,
        gradient_checkpointing: bool = False,
        compile_blocks: bool = False,
        seed: int = 0,
        real_score_dtype: Dtype = "float32",
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.family = family
        self.topology = None if topology is None else topology_of(topology)
        self.weights, self.weight_transfer = weights, weight_transfer
        self.output_distillation, self.feature_distillation = output_distillation, feature_distillation
        self.task = task
        self.timesteps = timesteps
        self.ema_decay, self.caption_dropout, self.seed = ema_decay, caption_dropout, seed
        self.gradient_checkpointing, self.compile_blocks = gradient_checkpointing, compile_blocks
        self.real_score_dtype: torch.dtype = getattr(torch, real_score_dtype)
        self.ema: DenoiserEma | None = None  # built in configure_model, like all weights
        self.teacher: Frozen[Denoiser] | None = None
        self.taps: dict[str, str] = {}
        """Block of the student -> block of the teacher."""
        self._check_parts()

    # ------------------------------------------------------------------------------------------------ the training step

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        terms, by_tap = self._terms(batch)
        loss = torch.stack(list(terms.values())).sum()
        self.log_dict({f"student/{name}": value.detach() for name, value in (terms | {"loss": loss}).items()})
        self.log_dict({f"student/features/{tap}": value.detach() for tap, value in by_tap.items()})
        return loss

    def _terms(self, batch: TrainingBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns the weighted loss terms, and the feature losses by tap."""
        sample = data_sample(batch, self.family, self.seed, self.caption_dropout)
        schedule = self.family.schedule
        noisy = sample.renoise(schedule, self.timesteps, Stream.TEACHER_TIMESTEP, Stream.TEACHER_NOISE)
        wanted, teacher_features = self._teacher_output(noisy, sample)
        output, features = self._predict(self.student, list(self.taps), noisy, sample)
        terms: dict[str, Tensor] = {}
        by_tap: dict[str, Tensor] = {}
        if self.output_distillation is not None:
            assert wanted is not None
            terms["output"] = self.output_distillation.loss(output, wanted)
        if self.feature_distillation is not None:
            by_tap = self.feature_distillation.losses(features, teacher_features)
            terms["features"] = torch.stack(list(by_tap.values())).sum()
        if self.task is not None:
            kind = self.family.prediction_type
            target = target_of(kind, sample.latents, noisy.noise, noisy.timesteps, schedule)
            terms["task"] = self.task.loss(output, target)
        return terms, by_tap

    @torch.no_grad()
    def _teacher_output(
        self, noisy: NoisyLatents, sample: LatentSample
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Returns the teacher's output, and its features keyed by the student's blocks; (None, {}) without a teacher."""
        if self.teacher is None:
            return None, {}
        wanted, seen = self._predict(self.teacher.module, list(self.taps.values()), noisy, sample)
        return wanted, {own: seen[block] for own, block in self.taps.items()}

    @staticmethod
    def _predict(
        denoiser: Denoiser, blocks: list[str], noisy: NoisyLatents, sample: LatentSample
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the network's raw output (epsilon or v), and its features by block."""
        with FeatureTap(denoiser.unet, *blocks) as tap:
            prediction = denoiser(noisy.latents, noisy.timesteps, sample.conditioning)
        return prediction.output, {block: tap[block] for block in blocks}

    # -------------------------------------------------------------------------------------------------- building, saving

    def configure_model(self) -> None:
        """Loads and prunes the U-Net, and shards each network if the strategy has a device mesh. Idempotent."""
        if self.ema is not None:
            return
        base = self.family.load_unet()
        source = base if self.weights is None else self.family.load_unet(self.weights)
        self.taps = self._pair_blocks(base, source)
        unet = prepare_unet(self._prune(source), self.gradient_checkpointing, self.compile_blocks, self.taps)
        self.student = self._denoiser(unet)
        self.ema = DenoiserEma(self.student, self.ema_decay)
        if self.output_distillation is not None or self.feature_distillation is not None:
            prepare_unet(base, False, self.compile_blocks, list(self.taps.values()))
            self.teacher = Frozen(self._denoiser(base)).to(dtype=self.real_score_dtype)
        self._check_taps()
        sharding = sharding_of(self)
        for denoiser in self._denoisers:
            if sharding is not None:
                shard_unet(denoiser.unet, *sharding)
            else:
                # Faster convolutions on GPUs. Not with FSDP2, which accepts contiguous weights only.
                denoiser.to(memory_format=torch.channels_last)

    def _prune(self, source: UNet2DConditionModel) -> UNet2DConditionModel:
        if self.topology is None:
            return copy.deepcopy(source)
        student, report = prune(source, self.topology, self.weight_transfer, self.seed)
        rank_zero_info(str(report))
        return student

    def _pair_blocks(self, base: UNet2DConditionModel, source: UNet2DConditionModel) -> dict[str, str]:
        """The configured taps, or those of the stages that the topology keeps."""
        objective = self.feature_distillation
        if objective is None:
            return {}
        if objective.taps is not None or self.topology is None:
            return objective.pairs({})
        if _shape_of(source) != _shape_of(base):
            raise ValueError(
                f"weights '{self.weights}' has another shape than the base, so it does not follow which of the base's blocks "
                "the student's are compared with; name the pairs in feature_distillation.taps."
            )
        return objective.pairs(feature_pairs(base.config, self.topology))

    def _check_taps(self) -> None:
        """Raises ValueError for an unknown tap before training starts."""
        if self.teacher is not None and self.taps:
            FeatureTap(self.student.unet, *self.taps)
            FeatureTap(self.teacher.module.unet, *self.taps.values())

    def _denoiser(self, unet: UNet2DConditionModel) -> Denoiser:
        return Denoiser(unet, self.family.schedule, self.family.prediction_type)

    @property
    def _denoisers(self) -> list[Denoiser]:
        assert self.ema is not None
        frozen = [] if self.teacher is None else [self.teacher.module]
        return [self.student, self.ema.denoiser, *frozen]

    def plan_networks(self) -> list[PlannedNetwork]:
        assert self.ema is not None
        networks = [
            PlannedNetwork("student", self.student, "trained", self.optimizer),
            PlannedNetwork("ema", self.ema, "averaged"),
        ]
        if self.teacher is not None:
            networks.append(PlannedNetwork("teacher", self.teacher.module, "frozen"))
        return networks

    def plan_step(self, batch: TrainingBatch) -> Iterator[PlannedPhase]:
        terms, _ = self._terms(batch)
        torch.stack(list(terms.values())).sum().backward()
        del terms
        yield PlannedPhase("student's step", ("student",))

    @property
    def learner(self) -> Denoiser:
        return self.student

    def average(self) -> None:
        """Moves the averaged student towards the student."""
        assert self.ema is not None
        self.ema.follow(self.student)

    def write_export(self, folder: Path, average: bool, dtype: torch.dtype) -> None:
        """Writes a U-Net folder for `UNet2DConditionModel.from_pretrained`."""
        assert self.ema is not None
        source = self.ema.denoiser.unet if average else self.student.unet
        unet = gathered_unet(source, first_rank=self.global_rank == 0)
        if unet is not None:
            write_unet(unet, folder, dtype)

    def on_fit_start(self) -> None:
        """Moves the frozen networks, which Lightning does not know about."""
        self.family.to(self.device, self.real_score_dtype)
        if self.teacher is not None:
            self.teacher.to(self.device)

    def _check_parts(self) -> None:
        if self.output_distillation is None and self.task is None:
            # Feature losses do not train the last layers, and DDP raises for parameters without gradients.
            raise ValueError(
                "the student's output has no objective: set output_distillation, or task, or both."
            )
        if self.topology is None and not self.weight_transfer:
            raise ValueError(
                "weight_transfer: false makes fresh weights for a topology, but topology is null; name one."
            )
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout is a share in [0, 1], got {self.caption_dropout}.")


def _shape_of(unet: UNet2DConditionModel) -> dict[str, object]:
    """The config entries that determine the architecture."""
    return {name: value for name, value in unet.config.items() if not name.startswith("_")}
