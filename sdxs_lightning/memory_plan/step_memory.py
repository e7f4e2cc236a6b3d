"""Runs a stage's training step on the meta device and records its memory, for every batch size at once."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from sdxs_lightning.core.batch import TrainingBatch
from sdxs_lightning.memory_plan.as_on_cuda import AsOnCuda
from sdxs_lightning.memory_plan.hardware import Hardware
from sdxs_lightning.memory_plan.live_bytes import LiveBytes, ShapeMemory
from sdxs_lightning.memory_plan.network_bytes import sharded_numel
from sdxs_lightning.memory_plan.traffic import TrafficCount
from sdxs_lightning.memory_plan.weightless import META
from sdxs_lightning.training.plannable import Plannable, PlannedNetwork

PROBES = 2, 3
"""Batch sizes to run. Not 1, since some operations copy less with a batch dimension of 1."""


@dataclass(frozen=True)
class BatchShape:
    """Contents of a micro-batch, and the number of accumulated micro-batches."""

    latents: tuple[int, int, int] | None
    """(C, h, w); None if the data has no latents."""
    images: int | None = None
    """Side in pixels; None if the data has no images."""
    accumulate: int = 1
    """Micro-batches whose gradients are averaged; from 2 on, gradients outlive a micro-batch."""
    control_images: int | None = None
    """Side of the condition images in pixels; None if the data has none."""

    def make(self, size: int) -> TrainingBatch:
        """Creates a batch of the given size on the meta device."""
        latents = None if self.latents is None else torch.empty(size, *self.latents, device=META)
        images, controls = (
            None if side is None else torch.empty(size, 3, side, side, device=META)
            for side in (self.images, self.control_images)
        )
        return TrainingBatch(
            captions=[""] * size,
            positions=torch.empty(size, dtype=torch.int64, device=META),
            sample_ids=[str(i) for i in range(size)],
            latents=latents,
            images=images,
            control_images=controls,
            pair_noise_seeds=torch.empty(size, dtype=torch.int64, device=META),
            original_sizes=torch.empty(size, 2, dtype=torch.int64, device=META),
            crops=torch.empty(size, 2, dtype=torch.int64, device=META),
        )


class PhasePeak(NamedTuple):
    """Peak memory of one phase: bytes on one device, excluding weights and optimizer states."""

    phase: str
    total: int
    gradients: int

    @property
    def activations(self) -> int:
        """Bytes other than gradients."""
        return self.total - self.gradients


@dataclass
class _Line:
    """One phase of one run."""

    name: str
    live: list[tuple[int, int]]
    kept: int
    """Bytes that the forward pass keeps for the backward pass: activations, and autocast's copies of weights."""


@dataclass(frozen=True)
class StepProfile:
    """Memory of a training step at any batch size, as constants plus linear growth with the batch."""

    phases: tuple[str, ...]
    constants: tuple[np.ndarray, ...] = field(repr=False)
    """Per phase (n, 2), int64: live bytes and gradient bytes over time, extrapolated to batch size 0."""
    slopes: tuple[np.ndarray, ...] = field(repr=False)
    """The growth of `constants` per sample."""
    kept: tuple[tuple[int, int], ...]
    """Per phase: bytes that the forward pass keeps for the backward pass, constant and per sample."""

    def phase_peaks(self, batch_size: int) -> list[PhasePeak]:
        """The peak of each phase."""
        result = []
        for name, constant, slope in zip(self.phases, self.constants, self.slopes, strict=True):
            line = constant + batch_size * slope
            total, gradients = line[int(line[:, 0].argmax())]
            result.append(PhasePeak(name, int(total), int(gradients)))
        return result

    def peak(self, batch_size: int) -> PhasePeak:
        """The peak of the step."""
        return max(self.phase_peaks(batch_size), key=lambda peak: peak.total)

    def kept_bytes(self, batch_size: int) -> dict[str, int]:
        """Bytes that the forward pass of each phase keeps for its backward pass."""
        pairs = zip(self.phases, self.kept, strict=True)
        return {name: constant + batch_size * slope for name, (constant, slope) in pairs if constant or slope}


def profile_step(
    stage: LightningModule,
    networks: Sequence[PlannedNetwork],
    hardware: Hardware,
    batch: BatchShape,
    workspaces: Mapping[str, int],
    traffic: TrafficCount,
) -> StepProfile:
    """Runs the step at two batch sizes, and separates constant memory from growth with the batch.

    Args:
        stage: a `Plannable` on the meta device.
        networks: all networks of the stage, in their compute dtypes.
        hardware: precision, sharding and number of processes.
        batch: contents of a micro-batch.
        workspaces: temporary bytes of the optimizer's step, by trained network.
        traffic: counts what travels in the last of the runs.
    """
    shapes = ShapeMemory()
    known = stage, networks, hardware, batch, workspaces, shapes
    first = run_step(*known, PROBES[0])
    with traffic.counting():
        second = run_step(*known, PROBES[1], traffic)
    constants, slopes, kept = [], [], []
    step = PROBES[1] - PROBES[0]
    for low, high in zip(first, second, strict=True):
        below, above = np.array(low.live, dtype=np.int64), np.array(high.live, dtype=np.int64)
        if below.shape != above.shape:  # the runs took different paths: keep the peak of the phase only
            below, above = (line[[int(line[:, 0].argmax())]] for line in (below, above))
        slope = (above - below) // step
        slopes.append(slope)
        constants.append(below - PROBES[0] * slope)
        grown = (high.kept - low.kept) // step
        kept.append((low.kept - PROBES[0] * grown, grown))
    return StepProfile(tuple(low.name for low in first), tuple(constants), tuple(slopes), tuple(kept))


def run_step(
    stage: LightningModule,
    networks: Sequence[PlannedNetwork],
    hardware: Hardware,
    batch: BatchShape,
    workspaces: Mapping[str, int],
    shapes: ShapeMemory,
    size: int,
    traffic: TrafficCount | None = None,
) -> list[_Line]:
    """Runs the step at one batch size; further arguments as in `profile_step`."""
    assert isinstance(stage, Plannable)
    trained = {one.name: one for one in networks if one.role == "trained"}
    modules = [stage, *(one.module for one in networks)]
    live = LiveBytes(modules, shapes)
    kept: list[int] = []
    cuda = AsOnCuda(hardware.autocast, lambda: kept.append(live.live - live.gradients))
    lines: list[_Line] = []
    gradients = _Gradients(live, trained, hardware, carried=batch.accumulate > 1)
    with _quiet(), _outside_a_trainer(stage), gradients, live, cuda, cuda.islands():
        before = len(live.line)
        for phase in stage.plan_step(batch.make(size)):
            workspace = sum(workspaces[name] for name in phase.updates)
            line = [*live.line[before:], (live.live + workspace, live.gradients)]
            if not phase.updates:  # before the first training step, without gradients
                line = [(total - gradient, 0) for total, gradient in line]
                if traffic is not None:
                    traffic.restart()
            lines.append(_Line(phase.name, line, max(kept, default=0)))
            if batch.accumulate == 1:
                gradients.clear(phase.updates)
            before = len(live.line)
            kept.clear()
        cuda.forget_casts()
    return lines


class _Gradients:
    """Counts the gradients of the trained networks: complete, or the shards that remain after reduce-scatter."""

    def __init__(
        self, live: LiveBytes, trained: Mapping[str, PlannedNetwork], hardware: Hardware, carried: bool
    ) -> None:
        self._live, self._carried = live, carried
        self._itemsize = 4 if hardware.weights is None else hardware.weights.itemsize
        self._trained = {
            name: [p for p in one.module.parameters() if p.requires_grad] for name, one in trained.items()
        }
        self._shards = {
            id(p): hardware.shards if trained[name].sharded else 1
            for name, parameters in self._trained.items()
            for p in parameters
        }
        self._sizes: dict[int, int] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for parameters in self._trained.values():
            for parameter in parameters:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._arrived))
                if self._carried:
                    # From earlier micro-batches: allocated outside of the count, then counted as a gradient.
                    parameter.grad = torch.empty_like(parameter)
                    self._arrived(parameter)

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.clear(tuple(self._trained))

    def clear(self, names: Sequence[str]) -> None:
        """Frees gradients, like an optimizer's `zero_grad(set_to_none=True)`."""
        for name in names:
            for parameter in self._trained[name]:
                parameter.grad = None
                if id(parameter) in self._sizes:
                    self._live.add(-self._sizes.pop(id(parameter)), gradients=True)

    def _arrived(self, parameter: nn.Parameter | Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        shards = self._shards[id(parameter)]
        if shards == 1:
            self._live.mark_gradient(gradient)
            return
        # FSDP2 reduces the gradient and keeps its own shard, in the dtype of the master weights.
        parameter.grad = None
        if id(parameter) not in self._sizes:
            self._sizes[id(parameter)] = sharded_numel(parameter, shards) * self._itemsize
            self._live.add(self._sizes[id(parameter)], gradients=True)


@contextmanager
def _outside_a_trainer(stage: LightningModule) -> Iterator[None]:
    """Replaces methods that need a Trainer: a plain backward pass, and no logging, which would read values."""
    replaced = {"manual_backward": lambda loss: loss.backward(), "log": _nothing, "log_dict": _nothing}
    vars(stage).update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            del vars(stage)[name]


def _nothing(*_: Any, **__: Any) -> None:
    pass


@contextmanager
def _quiet() -> Iterator[None]:
    """Disables compilation, warnings, and garbage collection, whose timing would differ between the two runs."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
            warnings.simplefilter("ignore")
            yield
    finally:
        if collecting:
            gc.enable()
