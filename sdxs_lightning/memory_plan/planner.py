"""The memory plan of a stage, and the configuration changes that would make it fit."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.memory_plan.checkpoint_bytes import CheckpointBytes, checkpoint_bytes
from sdxs_lightning.memory_plan.hardware import ASSUMED_GPUS, Hardware
from sdxs_lightning.memory_plan.network_bytes import (
    NetworkBytes,
    each_network_bytes,
    gathered_bytes,
    network_bytes,
    update_workspace,
)
from sdxs_lightning.memory_plan.step_memory import BatchShape, StepProfile, profile_step
from sdxs_lightning.memory_plan.traffic import Traffic, TrafficCount
from sdxs_lightning.memory_plan.weightless import META, WeightlessFamily
from sdxs_lightning.training.plannable import Plannable, PlannedNetwork

MARGIN = 0.15
"""Allowed excess of activations over the count, for kernel workspaces and allocator fragmentation."""
LARGEST_BATCH = 1 << 16


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one device of a run."""

    stage: str
    hardware: Hardware
    batch_size: int
    accumulate: int
    resolution: int | None
    networks: tuple[NetworkBytes, ...]
    buffers: Mapping[str, int]
    """Permanent bytes besides the networks."""
    checkpointed: tuple[str, ...]
    """Trained networks with gradient checkpointing."""
    step: StepProfile
    checkpoint: CheckpointBytes
    """One checkpoint on disk, all shards together."""
    traffic: Traffic

    @property
    def permanent(self) -> int:
        """Permanent bytes: weights, optimizer states, buffers."""
        return sum(one.weights + one.optimizer for one in self.networks) + sum(self.buffers.values())

    def needed(self, batch_size: int | None = None) -> int:
        """Peak bytes as counted."""
        return self.permanent + self.step.peak(batch_size or self.batch_size).total

    def needed_at_most(self, batch_size: int | None = None) -> int:
        """Peak bytes with the margin on activations."""
        peaks = self.step.phase_peaks(batch_size or self.batch_size)
        return self.permanent + max(peak.total + int(MARGIN * peak.activations) for peak in peaks)

    @property
    def fits(self) -> bool:
        """Whether the run fits, with the margin."""
        return self.needed_at_most() <= self.hardware.memory

    @property
    def largest_batch(self) -> int:
        """The largest batch per device that fits with the margin; 0 if none does."""
        low, high = 0, 1
        while high < LARGEST_BATCH and self.needed_at_most(high) <= self.hardware.memory:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (
                (middle, high) if self.needed_at_most(middle) <= self.hardware.memory else (low, middle)
            )
        return low


@dataclass(frozen=True)
class SuggestedChange:
    """A change of the configuration that reduces memory."""

    what: str
    plan: MemoryPlan


class Planner:
    """Computes plans of one stage, as configured and with variations.

    Args:
        stage: a newly constructed stage; it gets a family without weights, is built, and moved to the meta device.
        hardware: the hardware.
        batch_size: batch size per device.
        contents: contents of the data besides captions, as in data.contents.
        accumulate: micro-batches per update, for stages that leave accumulation to the Trainer.
        decodes: whether a callback decodes images, for which the VAE stays on the device.

    Raises:
        UserError: for a stage that is not `Plannable`.
    """

    def __init__(
        self,
        stage: LightningModule,
        hardware: Hardware,
        batch_size: int,
        contents: Collection[str] = ("latents",),
        accumulate: int = 1,
        decodes: bool = False,
    ) -> None:
        if not isinstance(stage, Plannable):
            raise UserError(
                f"--plan does not know {type(stage).__name__}: it has no plan_networks and plan_step (see "
                "sdxs_lightning/training/plannable.py)."
            )
        self.stage, self.hardware, self.batch_size = stage, hardware, batch_size
        self._accumulate = int(getattr(stage, "accumulate_grad_batches", accumulate))
        self._decodes = decodes
        self.family = _without_weights(stage)
        self.networks: list[PlannedNetwork] = stage.plan_networks()
        if hardware.weights is not None:
            for one in self.networks:
                if one.role != "frozen":
                    one.module.to(hardware.weights)
        self._images, self._controls = (
            self.family.resolution if content in contents else None
            for content in ("images", "control_images")
        )
        self._latents = None if self._images and "latents" not in contents else self.family.latent_shape()

    def plan(self, hardware: Hardware | None = None, accumulate: int | None = None) -> MemoryPlan:
        """Computes the plan, as configured or with other hardware or accumulation."""
        hardware, accumulate = hardware or self.hardware, accumulate or self._accumulate
        trained = [one for one in self.networks if one.role == "trained"]
        workspaces = {
            one.name: update_workspace(one, hardware.shards if one.sharded else 1) if hardware.on_gpu else 0
            for one in trained
        }
        batch = BatchShape(self._latents, self._images, accumulate, self._controls)
        with _gathered(self.networks, hardware):
            traffic = TrafficCount(self.networks, hardware, accumulate)
            step = profile_step(self.stage, self.networks, hardware, batch, workspaces, traffic)
        networks = [*self.networks, *self._family_networks()]
        return MemoryPlan(
            stage=type(self.stage).__name__,
            hardware=hardware,
            batch_size=self.batch_size,
            accumulate=accumulate,
            resolution=self.family.resolution,
            networks=each_network_bytes(networks, hardware.shards),
            buffers=self._buffers(hardware),
            checkpointed=tuple(one.name for one in trained if _is_checkpointed(one)),
            step=step,
            checkpoint=checkpoint_bytes(self.stage, self.networks),
            traffic=traffic.traffic(),
        )

    def changes(self, plan: MemoryPlan) -> list[SuggestedChange]:
        """Returns changes that reduce memory, from cheapest to most expensive, up to the first with which the plan fits.

        Gradient checkpointing that a change has enabled stays enabled on the networks.
        """
        changes = []
        for change in self._possible(plan):
            changes.append(change)
            if change.plan.fits:
                break
        return changes

    def _possible(self, plan: MemoryPlan) -> Iterator[SuggestedChange]:
        carried = plan if plan.accumulate > 1 else self.plan(accumulate=2)
        if 0 < carried.largest_batch < plan.batch_size:
            smaller = replace(carried, batch_size=carried.largest_batch)
            factor = -(-plan.batch_size // smaller.batch_size) * plan.accumulate
            yield SuggestedChange(
                f"data.init_args.batch_size {smaller.batch_size} with accumulate_grad_batches {factor}, for the same "
                "global batch",
                smaller,
            )
        text = ""
        switched = [one.name for one in self.networks if one.role == "trained" and _checkpoint(one)]
        if switched:
            text = f"gradient_checkpointing: true of {' and '.join(switched)}"
            yield SuggestedChange(text, self.plan())
        if not self.hardware.on_gpu:
            return
        together = f"{text}, and " if text else ""
        if self.hardware.strategy != "fsdp2":
            processes = max(self.hardware.processes, ASSUMED_GPUS)
            sharded = replace(self.hardware, strategy="fsdp2", processes=processes, shards=processes)
            yield SuggestedChange(
                f"{together}--config configs/hardware/fsdp2.yaml on {processes} GPUs", self.plan(sharded)
            )
        else:
            processes = 2 * self.hardware.processes
            twice = replace(self.hardware, processes=processes, shards=processes)
            yield SuggestedChange(f"{together}twice as many GPUs (--trainer.num_nodes)", self.plan(twice))

    def _family_networks(self) -> list[PlannedNetwork]:
        family = self.family
        encoders = family.text_encoders if family.encodes else {}
        networks = [
            PlannedNetwork(name, encoder, "frozen", sharded=False) for name, encoder in encoders.items()
        ]
        if self._decodes or family.decodes:
            networks.append(PlannedNetwork("vae", family.vae, "frozen", sharded=False))
        return networks

    def _buffers(self, hardware: Hardware) -> dict[str, int]:
        buffers = {}
        if hardware.strategy == "ddp":
            # DDP allocates them when it wraps the stage, although its reducer is not used (training/gradient_average.py).
            buffers["DDP buckets"] = sum(
                network_bytes(one, 1).gradients for one in self.networks if one.role == "trained"
            )
        if hardware.shards > 1:
            sharded = [one for one in self.networks if one.sharded and one.role != "averaged"]
            buffers["FSDP2 gathering"] = max(
                (gathered_bytes(one, hardware.gathered) for one in sharded), default=0
            )
        if hardware.allowance:
            buffers["CUDA context" + (", NCCL" if hardware.processes > 1 else "")] = hardware.allowance
        return buffers


def _without_weights(stage: LightningModule) -> WeightlessFamily:
    stage_: Any = stage
    if not hasattr(stage_, "family"):
        raise UserError(f"--plan needs a stage with a family, and {type(stage).__name__} has none.")
    family = WeightlessFamily(stage_.family)
    stage_.family = family
    with META:
        stage.configure_model()
    stage.to(META)
    stage.on_fit_start()
    return family


def _is_checkpointed(network: PlannedNetwork) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in network.module.modules())


def _checkpoint(network: PlannedNetwork) -> bool:
    """Enables gradient checkpointing; returns whether this changed anything."""
    from diffusers import ModelMixin

    changed = False
    for module in network.module.modules():
        if not isinstance(module, ModelMixin) or module.is_gradient_checkpointing:
            continue
        if module._supports_gradient_checkpointing:
            module.enable_gradient_checkpointing()
            changed = True
    return changed


@contextmanager
def _gathered(networks: Sequence[PlannedNetwork], hardware: Hardware) -> Iterator[None]:
    """Context in which sharded networks have the dtype in which FSDP2 gathers them."""
    dtype = hardware.gathered if hardware.shards > 1 else None
    changed: list[tuple[torch.nn.Parameter, torch.dtype]] = []
    if dtype is not None:
        for one in networks:
            changed += [(p, p.dtype) for p in one.module.parameters() if one.sharded]
    for parameter, _ in changed:
        parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        for parameter, before in changed:
            parameter.data = parameter.data.to(before)
