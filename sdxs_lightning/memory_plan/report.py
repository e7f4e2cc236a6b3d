"""Formats the plan as text and as JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from sdxs_lightning.memory_plan.checkpoint_bytes import CheckpointFolder
from sdxs_lightning.memory_plan.hardware import GIB
from sdxs_lightning.memory_plan.planner import MARGIN, MemoryPlan, SuggestedChange


def print_plan(
    plan: MemoryPlan, changes: Sequence[SuggestedChange] = (), folders: Sequence[CheckpointFolder] = ()
) -> None:
    """Prints the plan as tables and sentences."""
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(heading(plan), markup=False, soft_wrap=True)
    console.print(_networks(plan))
    console.print(_phases(plan))
    for sentence in [*sentences(plan, changes), *checkpoint_sentences(plan, folders)]:
        console.print(sentence, markup=False, soft_wrap=True)


def heading(plan: MemoryPlan) -> str:
    """One line on the planned run."""
    hardware = plan.hardware
    checkpointed = ", ".join(plan.checkpointed) or "none"
    return (
        f"Memory plan of {plan.stage}, for each device: batch {plan.batch_size} x {plan.accumulate}, {plan.resolution} px, "
        f"{hardware.precision}, {hardware.layout}; gradient checkpointing: {checkpointed}."
    )


def sentences(plan: MemoryPlan, changes: Sequence[SuggestedChange] = ()) -> list[str]:
    """The assumptions, whether the plan fits, and suggested changes."""
    needed, most, memory = plan.needed(), plan.needed_at_most(), plan.hardware.memory
    lines = [
        "Networks: exact. Activations: counted on the meta device under CUDA's attention and autocast, an estimate within "
        f"{MARGIN:.0%} (kernels' workspaces, fragments). Gathering: an upper bound. Context: an allowance."
    ]
    if plan.hardware.assumed:
        lines.append(f"Assumed: {plan.hardware.assumed}.")
    size = f"{gib(memory)} ({plan.hardware.memory_source})"
    numbers = f"{gib(needed)} of {size}, at most {gib(most)} with {MARGIN:.0%} more activations"
    largest = plan.largest_batch
    batch = (
        f"the largest batch per device that fits is {largest}" if largest else "not even a batch of 1 fits"
    )
    if plan.fits:
        verdict = "Fits"
    elif needed <= memory:
        verdict = "May not fit"
    else:
        verdict = "Does not fit"
    lines.append(f"{verdict}: {numbers}; {batch}.")
    lines += _traffic(plan)
    lines += [f"Change: {_outcome(change)}." for change in changes]
    return lines


def checkpoint_sentences(plan: MemoryPlan, folders: Sequence[CheckpointFolder]) -> list[str]:
    """The size of a checkpoint, and the room that each folder of checkpoints needs."""
    size = plan.checkpoint
    lines = [
        f"Checkpoint: {gib(size.total)} in float32 (weights {gib(size.weights)}, averages {gib(size.averages)}, optimizers "
        f"{gib(size.optimizers)})."
    ]
    for folder in folders:
        free = f"{gib(folder.free)} are free there" if folder.free >= 0 else "its free space cannot be read"
        room = (
            f"'{folder.path}' keeps {folder.keep} of {gib(folder.checkpoint)} and needs {gib(folder.needed)} with the one that "
            f"is being written; {free}"
        )
        lines.append(f"{'Disk' if folder.fits else 'Too little disk'}: {room}.")
        if folder.asynchronous:
            shards = plan.hardware.shards
            where = "of each rank" if shards > 1 else "of rank 0"
            lines.append(
                f"Host memory {where} for asynchronous checkpoints: {gib(folder.checkpoint // shards)} (asynchronous: false of "
                "Checkpointing needs none, and stops training while it writes)."
            )
    return lines


def as_json(
    plan: MemoryPlan, changes: Sequence[SuggestedChange] = (), folders: Sequence[CheckpointFolder] = ()
) -> dict[str, Any]:
    """The plan as plain values; all sizes are bytes, per device except those of checkpoints."""
    hardware = plan.hardware
    return {
        "stage": plan.stage,
        "batch_size": plan.batch_size,
        "accumulate_grad_batches": plan.accumulate,
        "resolution_px": plan.resolution,
        "precision": hardware.precision,
        "strategy": hardware.strategy,
        "devices": hardware.processes,
        "replicas": hardware.replicas,
        "shards": hardware.shards,
        "assumed": hardware.assumed,
        "gradient_checkpointing": list(plan.checkpointed),
        "networks": {
            one.name: {
                "role": one.role,
                "dtype": one.dtype,
                "parameters": one.parameters,
                "trainable": one.trainable,
                "weights": one.weights,
                "gradients": one.gradients,
                "optimizer": one.optimizer,
            }
            for one in plan.networks
        },
        "buffers": dict(plan.buffers),
        "phases": {
            peak.phase: {
                "peak": peak.total,
                "gradients": peak.gradients,
                "activations": peak.activations,
            }
            for peak in plan.step.phase_peaks(plan.batch_size)
        },
        "kept_for_backward": plan.step.kept_bytes(plan.batch_size),
        "traffic": {
            "gathered": plan.traffic.gathered,
            "scattered": plan.traffic.scattered,
            "reduced": plan.traffic.reduced,
            "averaged": plan.traffic.averaged,
            "sent_within": plan.traffic.sent_within,
            "sent_across": plan.traffic.sent_across,
            "sent_to_all": plan.traffic.sent_to_all,
        },
        "needed": plan.needed(),
        "needed_at_most": plan.needed_at_most(),
        "device_memory": hardware.memory,
        "fits": plan.fits,
        "largest_batch": plan.largest_batch,
        "checkpoint": {**asdict(plan.checkpoint), "total": plan.checkpoint.total},
        "checkpoint_folders": [{**asdict(one), "needed": one.needed, "fits": one.fits} for one in folders],
        "changes": [
            {
                "what": change.what,
                "needed": change.plan.needed(),
                "needed_at_most": change.plan.needed_at_most(),
                "fits": change.plan.fits,
                "largest_batch": change.plan.largest_batch,
            }
            for change in changes
        ],
    }


def _traffic(plan: MemoryPlan) -> list[str]:
    """What a device sends in an iteration; nothing for a single device."""
    hardware, traffic = plan.hardware, plan.traffic
    if hardware.processes == 1:
        return []
    parts = []
    if hardware.shards > 1:
        parts.append(
            f"{gib(traffic.sent_within)} to the {hardware.shards - 1} others that share its copy of the networks (weights "
            "gathered, gradients scattered)"
        )
    if traffic.sent_across:
        parts.append(f"{gib(traffic.sent_across)} across {hardware.replicas} replicas (gradients)")
    if traffic.sent_to_all:
        parts.append(f"{gib(traffic.sent_to_all)} to average gradients that are not sharded")
    return [f"Traffic: in an iteration that updates every network, each device sends {', and '.join(parts)}."]


def gib(size: int) -> str:
    """Formats bytes as GiB, or as MiB below 0.1 GiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB // 10 else f"{size / 2**20:.2f} MiB"


def _outcome(change: SuggestedChange) -> str:
    plan = change.plan
    outcome = "fits" if plan.fits else "is not enough"
    return (
        f"{change.what}: {gib(plan.needed())}, at most {gib(plan.needed_at_most())}, which {outcome} (largest batch "
        f"{plan.largest_batch})"
    )


def _networks(plan: MemoryPlan) -> Table:
    table = Table(title="Permanent (gradients: during the step)", title_justify="left")
    for name in ("network", "role", "type"):
        table.add_column(name)
    for name in ("parameters", "trainable", "weights", "gradients", "optimizer"):
        table.add_column(name, justify="right")
    for one in plan.networks:
        table.add_row(
            one.name,
            one.role,
            one.dtype,
            f"{one.parameters:,}",
            f"{one.trainable:,}",
            *(gib(size) if size else "-" for size in (one.weights, one.gradients, one.optimizer)),
        )
    for name, size in plan.buffers.items():
        table.add_row(name, "", "", "", "", gib(size), "-", "-")
    table.add_section()
    sums = [sum(getattr(one, column) for one in plan.networks) for column in ("parameters", "trainable")]
    weights = sum(one.weights for one in plan.networks) + sum(plan.buffers.values())
    sizes = [weights, *(sum(getattr(one, n) for one in plan.networks) for n in ("gradients", "optimizer"))]
    table.add_row("sum", "", "", *(f"{count:,}" for count in sums), *(gib(size) for size in sizes))
    return table


def _phases(plan: MemoryPlan) -> Table:
    table = Table(title=f"The training step at batch {plan.batch_size}, at its peak", title_justify="left")
    table.add_column("phase")
    for name in ("kept for backward", "activations", "gradients", "with permanent memory"):
        table.add_column(name, justify="right")
    kept = plan.step.kept_bytes(plan.batch_size)
    for peak in plan.step.phase_peaks(plan.batch_size):
        table.add_row(
            peak.phase,
            gib(kept[peak.phase]) if peak.phase in kept else "-",
            gib(peak.activations),
            gib(peak.gradients),
            gib(plan.permanent + peak.total),
        )
    return table
