"""The networks of a one-step distillation: loading, sharding, device placement, checkpoints, export and sampling."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from sdxs_lightning.core.frozen import Frozen
from sdxs_lightning.export import export_pipeline, gathered_unet, write_unet
from sdxs_lightning.families import Family
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.discriminator import Discriminator
from sdxs_lightning.networks.ema import StudentEma
from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.networks.network import Network, check_frozen_weights
from sdxs_lightning.networks.projected_discriminator import ProjectedDiscriminator
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.objectives.term import DistillationContext, StudentTerm
from sdxs_lightning.pairs.target_pairs import PairSettings, TargetPairs
from sdxs_lightning.stages.distillation.gan import Gan
from sdxs_lightning.stages.distillation.setup import Terms, check_guidance_is_trained, check_needs
from sdxs_lightning.stages.distillation.student_inputs import drawn_guidance
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from sdxs_lightning.training.manual_optimization import ManualOptimization
from sdxs_lightning.training.plannable import PlannedNetwork
from sdxs_lightning.training.sharding import shard_head, shard_unet, sharding_of


class DistillationNetworks(ManualOptimization):
    """Holds the networks of `OneStepDistillation`, which documents the arguments.

    Args:
        family: the base.
        student: trained on the terms.
        fake_score: None if the run ends with the warm-up.
        discriminator: None without a GAN.
        gan: set together with the discriminator.
        pairs: source of the target sampler's pairs.
        update_schedule: which networks are updated on which iteration.
        terms: the student's loss terms.
        ema_decay: decay of the averaged student, per student update.
        accumulate_grad_batches: micro-batches per iteration.
        gradient_clip_norm: maximum gradient norm, per network; None does not clip.
        seed: seed of the run.
        real_score_dtype: dtype of the frozen networks.
    """

    export_name = "pipeline"

    def __init__(
        self,
        *,
        family: Family,
        student: StudentGenerator,
        fake_score: FakeScore | None,
        discriminator: Network | None,
        gan: Gan | None,
        pairs: PairSettings | None,
        update_schedule: UpdateSchedule,
        terms: Terms,
        ema_decay: float,
        accumulate_grad_batches: int,
        gradient_clip_norm: float | None,
        seed: int,
        real_score_dtype: torch.dtype,
    ) -> None:
        super().__init__(accumulate_grad_batches, gradient_clip_norm)
        check_needs(terms, update_schedule, pairs, fake_score, discriminator)
        check_guidance_is_trained(student, terms, update_schedule, pairs)
        self.family = family
        self.student = student
        self.fake_score = fake_score
        self.discriminator = discriminator
        self.ema: StudentEma | None = None  # built in configure_model, like all weights
        self.real_score: Frozen[Denoiser] | None = None
        self.gan = gan
        self.pairs = TargetPairs(pairs, seed) if pairs is not None else None
        self.update_schedule = update_schedule
        self.terms = terms
        self.ema_decay = ema_decay
        self.seed = seed
        self.real_score_dtype = real_score_dtype
        self.student_updates = 0
        self._needs_real_score = any(term.needs_real_score for term in self._all_terms) or (
            pairs is not None and pairs.samples_real_score
        )

    @property
    def progress(self) -> float:
        """Completed share of the student updates after the warm-up."""
        return self.update_schedule.progress(self.student_updates)

    @property
    def context(self) -> DistillationContext:
        """The networks and progress that the student's terms may use."""
        real_score = self.real_score.module if self.real_score is not None else None
        head = self.discriminator if isinstance(self.discriminator, Discriminator) else None
        return DistillationContext(self.family.schedule, self.fake_score, real_score, head, self.progress)

    @property
    def networks(self) -> dict[str, Network]:
        roles = {"student": self.student, "fake_score": self.fake_score, "discriminator": self.discriminator}
        return {role: network for role, network in roles.items() if network is not None}

    @property
    def _all_terms(self) -> list[StudentTerm]:
        """All terms, without duplicates."""
        terms = [*self.terms.warmup.values(), *self.terms.distillation.values()]
        return list({id(term): term for term in terms}.values())

    def frozen_image_networks(self) -> dict[str, nn.Module]:
        """Frozen networks of the terms by name: feature networks and their image decoders."""
        parts = [term.frozen_networks() for term in self._all_terms]
        return {name: network for part in parts for name, network in part.items()}

    # -------------------------------------------------------------------------------------------------- building, moving

    def configure_model(self) -> None:
        """Builds all networks, and shards each if the strategy has a device mesh. Idempotent."""
        if self.ema is not None:
            return
        self.student.build(self.family)
        if self.fake_score is not None:
            self.fake_score.build(self.family)
            if self.student.guidance is not None:
                self.fake_score.take_guidance(self.student.guidance)
            self.fake_score.check_alignment(self.student)
        self.ema = StudentEma(self.student, self.ema_decay)
        if self._needs_real_score:
            real_score = self._load_real_score()
            self._check_real_score(real_score)
            self.real_score = Frozen(real_score).to(dtype=self.real_score_dtype)
        for term in self._all_terms:
            term.build(self.family, self.context)
        self._build_pairs()
        sharding = sharding_of(self)
        if sharding is not None:
            self._shard(*sharding)

    def _load_real_score(self) -> Denoiser:
        """The base; shared with the fake score if that trains adapters on it."""
        shared = self.fake_score.shared_base(self.real_score_dtype) if self.fake_score is not None else None
        if shared is not None:
            return shared
        return Denoiser(self.family.load_unet(), self.family.schedule, self.family.prediction_type)

    def _check_real_score(self, real_score: Denoiser) -> None:
        """Refuses a base that has been distilled, such as an LCM: its output is no score, and has its guidance already."""
        taken = real_score.unet.config.get("time_cond_proj_dim") is not None
        if taken and any(term.needs_real_score for term in self._all_terms):
            raise ValueError(
                f"the base '{self.family.base}' takes the guidance scale as an input (time_cond_proj_dim), as LCMs do, and "
                "cannot be the real score: give the model that it was distilled from as model.init_args.family, and this one "
                "at most as student.init_args.weights."
            )

    def _build_pairs(self) -> None:
        """Loads the target sampler's own network, if it has one, and lets pairs have scales of their own, if they do."""
        if self.pairs is None:
            return
        self.pairs.build(self.family)
        guidance = self.student.guidance
        if self.pairs.settings.guidance_scale is None:
            assert guidance is not None  # checked in setup.py
            self.pairs.guide = partial(drawn_guidance, guidance, self.family, seed=self.seed)

    def _shard(self, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
        assert self.ema is not None
        denoisers = [self.student.denoiser, self.ema.denoiser]
        denoisers += [self.fake_score.denoiser] if self.fake_score is not None else []
        frozen = (self.real_score, self.pairs.own if self.pairs is not None else None)
        denoisers += [network.module for network in frozen if network is not None]
        for network in (one for denoiser in denoisers for one in denoiser.networks):
            shard_unet(network, mesh, policy)
        self.ema.after_sharding()
        if isinstance(self.discriminator, Discriminator):
            shard_head(self.discriminator.head, mesh, policy)

    def on_fit_start(self) -> None:
        """Moves the frozen networks, which Lightning does not know about."""
        self.family.to(self.device, self.real_score_dtype)
        if self.real_score is not None:
            self.real_score.to(self.device)
        for part in (*self._all_terms, self.pairs):
            if part is not None:
                part.to(self.device, self.real_score_dtype)

    def on_train_start(self) -> None:
        """Samples the pairs if a later update needs them.

        Not in `on_fit_start`: with FSDP2 a checkpoint's counters are restored after it.
        """
        if self.student_updates >= self.update_schedule.max_student_updates:
            self.trainer.should_stop = True
            return
        if self.pairs is not None and self.pairs_are_needed:
            real_score = self.real_score.module if self.real_score is not None else None
            with self.trainer.precision_plugin.forward_context():
                self.pairs.start(real_score, getattr(self.trainer, "datamodule", None))

    @property
    def pairs_are_needed(self) -> bool:
        """Whether a later student update needs pairs."""
        coming = list(self.terms.distillation.values()) if self.update_schedule.distils else []
        if self.update_schedule.updates_at(self.iterations).warmup:
            coming += self.terms.warmup.values()
        return any(term.needs_pairs for term in coming)

    # ------------------------------------------------------------------------------------------------- saving, sampling

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the student update counter, and fingerprints of the weights under adapters."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["student_updates"] = self.student_updates
        checkpoint["frozen_weights"] = self._frozen_weights()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the student update counter.

        Raises:
            ValueError: if adapters were trained on other frozen weights than those loaded.
        """
        super().on_load_checkpoint(checkpoint)
        self.student_updates = checkpoint["student_updates"]
        check_frozen_weights(checkpoint, self._frozen_weights(), {"student": "student.init_args.weights"})

    def _frozen_weights(self) -> dict[str, str]:
        """Fingerprints by role of the frozen weights under adapters, which checkpoints do not hold."""
        roles = {"student": self.student, "fake_score": self.fake_score}
        return {
            role: network.frozen_fingerprint
            for role, network in roles.items()
            if network is not None and network.frozen_fingerprint is not None
        }

    @torch.no_grad()
    def generate(self, captions: list[str], noise: Tensor, use_ema: bool = True) -> Tensor:
        """Generates images (B, 3, H, W) in [-1, 1].

        Args:
            captions: B prompts.
            noise: (B, C, h, w), N(0, 1).
            use_ema: whether to use the averaged student.
        """
        assert self.ema is not None
        generator = self.ema if use_ema else self.student
        attached = self._trainer is not None
        with self.trainer.precision_plugin.forward_context() if attached else nullcontext():
            conditioning = self.family.encode_prompts(captions)
            if self.student.guidance is not None:
                scales = torch.full((len(captions),), self.student.guidance.default, device=self.device)
                conditioning = replace(conditioning, guidance_scales=scales)
            latents = generator(noise.to(self.device), conditioning)
        return self.family.decode(latents)

    def write_export(self, folder: Path, average: bool, dtype: torch.dtype, vae: str | None = None) -> None:
        """Writes a diffusers pipeline folder; `export_pipeline` documents `vae`."""
        assert self.ema is not None
        source = self.ema if average else self.student
        with source.applied() if isinstance(source, StudentEma) else nullcontext():
            unet = gathered_unet(source.denoiser.unet, first_rank=self.global_rank == 0)
        if unet is not None:
            export_pipeline(unet, self.family, folder, dtype=dtype, vae=vae, timesteps=source.timesteps)

    def write_fake_score(self, folder: Path, dtype: torch.dtype) -> None:
        """Writes the fake score as a U-Net folder, for `weights` of a `FakeScore`; all ranks call it."""
        assert self.fake_score is not None
        unet = gathered_unet(self.fake_score.denoiser.unet, first_rank=self.global_rank == 0)
        if unet is not None:
            write_unet(unet, folder, dtype)

    def plan_networks(self) -> list[PlannedNetwork]:
        networks = [
            # As in _shard: the heads of the projected GAN are not sharded.
            PlannedNetwork(
                role,
                network,
                "trained",
                network.optimizer,
                sharded=not isinstance(network, ProjectedDiscriminator),
            )
            for role, network in self.networks.items()
        ]
        if self.ema is not None:
            networks.append(PlannedNetwork("ema", self.ema, "averaged"))
        if self.real_score is not None:
            networks.append(PlannedNetwork("real_score", self.real_score.module, "frozen"))
        of_terms = self.frozen_image_networks()
        networks += [PlannedNetwork(name, one, "frozen", sharded=False) for name, one in of_terms.items()]
        if self.pairs is not None:
            own = self.pairs.frozen_networks()
            networks += [PlannedNetwork(name, one, "frozen") for name, one in own.items()]
        return networks
