"""Settings of optimizers and learning rate schedules: as stored in a checkpoint, and applied to restored ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

PROGRESS = (
    "last_epoch",
    "_step_count",
    "_last_lr",
    "_get_lr_called_within_step",
    "_is_initial",
    "lr_lambdas",
)
"""Entries of a scheduler's state that are no settings: they change with each step."""

Settings = list[dict[str, Any]]


def settings_of(trainer: pl.Trainer) -> Settings:
    """Returns the hyperparameters of the optimizers and their schedulers."""
    schedulers = {id(one.scheduler.optimizer): one.scheduler for one in trainer.lr_scheduler_configs}
    settings = []
    for optimizer in trainer.optimizers:
        scheduler = schedulers.get(id(optimizer))
        state = {} if scheduler is None else scheduler.state_dict()
        kept = {name: value for name, value in state.items() if name not in PROGRESS and is_plain(value)}
        settings.append(
            {
                "class": type(optimizer).__name__,
                "schedule": None if scheduler is None else type(scheduler).__name__,
                "groups": plain_groups(optimizer.param_groups),
                "scheduler": kept,
            }
        )
    return settings


def apply_settings(
    optimizer: Optimizer, scheduler: LRScheduler | None, before: Mapping[str, Any], now: Mapping[str, Any]
) -> list[str]:
    """Applies settings that have changed since the checkpoint to a restored optimizer and its scheduler.

    The restored learning rate becomes that of the new settings at the current step. Unchanged settings are not touched.

    Args:
        optimizer: the restored optimizer.
        scheduler: its restored scheduler, or None.
        before: settings that the checkpoint was written with.
        now: settings of this run, as configured.

    Returns:
        One line per change.
    """
    lines = []
    for group, old, new in zip(optimizer.param_groups, before["groups"], now["groups"], strict=False):
        for name in new.keys() & old.keys() - {"lr", "initial_lr"}:
            if old[name] != new[name]:
                group[name] = new[name]
                lines.append(f"{name} {old[name]} -> {new[name]}")
        old_lr, new_lr = (one.get("initial_lr", one.get("lr")) for one in (old, new))
        if old_lr is not None and new_lr is not None and old_lr != new_lr:
            group["lr"] = group["lr"] * new_lr / old_lr if old_lr else new_lr
            lines.append(f"lr {old_lr:g} -> {new_lr:g}")
        if "initial_lr" in group:
            group["initial_lr"] = new_lr
    if scheduler is not None:
        lines += _apply_to_scheduler(scheduler, before.get("scheduler", {}), now["scheduler"], bool(lines))
    return list(dict.fromkeys(lines))


def _apply_to_scheduler(
    scheduler: LRScheduler, before: Mapping[str, Any], now: Mapping[str, Any], changed: bool
) -> list[str]:
    lines = []
    for name in now.keys() & before.keys() - {"base_lrs"}:
        if before[name] != now[name]:
            setattr(scheduler, name, now[name])
            lines.append(f"{type(scheduler).__name__}.{name} {before[name]} -> {now[name]}")
    groups = scheduler.optimizer.param_groups
    if all("initial_lr" in group for group in groups):
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
    rates = None
    if isinstance(
        scheduler, LambdaLR
    ):  # its functions are in no checkpoint, so they are the new ones already
        steps = scheduler.last_epoch
        rates = [
            base * one(steps) for base, one in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
    elif (changed or lines) and hasattr(scheduler, "_get_closed_form_lr"):
        rates = scheduler._get_closed_form_lr()
    for group, rate in zip(groups, rates or [], strict=False):
        if group["lr"] != rate:
            lines.append(f"lr by the schedule, now {group['lr']:g} -> {rate:g}")
            group["lr"] = rate
    if changed or lines:
        scheduler._last_lr = [group["lr"] for group in groups]
    return lines


def plain_groups(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups without their parameters, and only what a checkpoint stores as it is."""
    return [
        {name: value for name, value in group.items() if name != "params" and is_plain(value)}
        for group in groups
    ]


def is_plain(value: Any) -> bool:
    """Whether a value consists of numbers, strings, booleans, None and lists of them."""
    if isinstance(value, list | tuple):
        return all(is_plain(one) for one in value)
    return value is None or isinstance(value, bool | int | float | str)
