"""Resuming: verifies the checkpoint, rejects another run's, applies changed optimizer settings, and reports every change.

Lightning loads whatever fits the shapes. So two methods of its checkpoint connector are wrapped: all checks here run before
weights change, with the same result on every rank.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from sdxs_lightning.callbacks import checkpoint_folder as folders
from sdxs_lightning.callbacks.ranks import Ranks
from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.frozen import Frozen
from sdxs_lightning.objectives.term import StudentTerm

KEY = "run"
"""Key of the checkpoint's entry with identity, optimizer settings and configuration."""
NOT_COMPARED = ("ckpt_path", "config", "plan")
"""Options that do not affect training."""
PROGRESS = (
    "last_epoch",
    "_step_count",
    "_last_lr",
    "_get_lr_called_within_step",
    "_is_initial",
    "lr_lambdas",
)
"""Entries of a scheduler's state that are no settings: they change with each step."""

WEIGHTS, ROUNDED = "frozen weights", "frozen weights in bfloat16"
"""Entries of the identity: fingerprints of the frozen networks by attribute path, as loaded and rounded."""
ADVICE = {
    "prediction_type": "the base that the run began with (model.init_args.family)",
    "noise schedule": "the base that the run began with (model.init_args.family)",
    "timesteps": "the conditioning timestep that the run began with (family.init_args.conditioning_timestep, or "
    "conditioning_timestep or timesteps of student.init_args)",
    WEIGHTS: "the frozen network that the run began with (model.init_args.family.init_args.base, or the path of its "
    "weights)",
}

Settings = list[dict[str, Any]]


class Resume:
    """Wraps a Trainer's loading of a checkpoint.

    Args:
        trainer: the Trainer, before `fit`.
        config: the run's resolved configuration, to report what changed; {} reports nothing.
        older_ones: whether to fall back to an older complete checkpoint if the newest has changed on disk.
    """

    def __init__(self, trainer: pl.Trainer, config: Mapping[str, Any], older_ones: bool) -> None:
        self.trainer, self.older_ones = trainer, older_ones
        self.config = flat(config)
        self.ranks = Ranks()
        self.path: Path | None = None
        """The checkpoint that was loaded: the one asked for, or an older one."""
        self.settings: Settings | None = None
        """Settings of optimizers and schedulers as configured, before any step or restoring."""
        self._saved: dict[str, Any] = {}
        self._not_compared: list[str] = []
        """Frozen networks whose fingerprints cannot be compared, since their files now have another precision."""
        connector = trainer._checkpoint_connector
        self._load, self._restore_optimizers = (
            connector.resume_start,
            connector.restore_optimizers_and_schedulers,
        )
        connector.resume_start = self._resume_start  # type: ignore[method-assign]
        connector.restore_optimizers_and_schedulers = self._restore  # type: ignore[method-assign]

    def entry(self) -> dict[str, Any]:
        """The checkpoint's entry that describes this run."""
        module = self.trainer.lightning_module
        if self.settings is None:
            self.settings = settings_of(self.trainer)
        return {"identity": identity_of(module), "settings": self.settings, "config": self.config}

    # ----------------------------------------------------------------------------------------------------------- loading

    def _resume_start(
        self, checkpoint_path: str | Path | None = None, weights_only: bool | None = None
    ) -> None:
        if not checkpoint_path:
            self._load(checkpoint_path, weights_only)
            return
        path = self.path = self.verified(Path(checkpoint_path))
        module = self.trainer.lightning_module
        if path.is_dir():
            self._saved = torch.load(path / "meta.pt", map_location="cpu", weights_only=True)
            self._check_identity()
            names = FileSystemReader(path).read_metadata().state_dict_metadata.items()
            sizes = {name: tuple(one.size) for name, one in names if hasattr(one, "size")}
            prefix = "state_dict."
            saved = {
                name.removeprefix(prefix): size for name, size in sizes.items() if name.startswith(prefix)
            }
            check_shapes(saved, module)
        else:
            self._saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            self._check_identity()
            state = self._saved.pop("state_dict", {})
            check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, module)
        if (
            self.trainer.optimizers
        ):  # with FSDP2 they exist already and are restored together with the weights
            self._before_optimizers()
        self._load(path, weights_only)

    def verified(self, path: Path) -> Path:
        """Returns the checkpoint, or an older one, whose files match the checksums of its manifest. A collective.

        Args:
            path: its `state.ckpt`; without a manifest next to it checksums are not verified.

        Raises:
            UserError: on all ranks, if no checkpoint matches.
        """
        path = Path(self.ranks.of_first(str(path)))
        candidates = [path.parent]
        if self.older_ones:
            complete = self.ranks.of_first(
                [str(one) for one in folders.complete_checkpoints(path.parents[1])]
            )
            older = [Path(one) for one in complete if Path(one) != path.parent]
            candidates += reversed(older)
        for folder in candidates:
            state = path if folder == path.parent else folder / folders.STATE
            changed = self._changed_file(folder, state)
            if changed is None:
                if folder != path.parent:
                    self._say(f"resuming from the older checkpoint {folder} instead.")
                return state
            problem = (
                f"the checkpoint {folder} has changed since it was written ({changed} cannot be read, or does not match its "
                "checksum)"
            )
            if self.older_ones:
                self._say(f"{problem}; it is left where it is.")
        way = "every other one has too" if self.older_ones else "take an older one, or --ckpt_path last"
        raise UserError(f"{problem}; {way}.")

    def _changed_file(self, folder: Path, state: Path) -> str | None:
        manifest = folders.read_manifest(folder)
        if manifest is None or manifest.checksums is None:
            return self.ranks.of_first(None if self.ranks.first and _is_readable(state) else state.name)
        own = sorted(manifest.checksums)[self.ranks.number :: self.ranks.count]
        sums: dict[str, str] = {}
        for part in self.ranks.gathered(folders.checksums(folder, own)):
            sums |= part
        return folders.changed_file(folder, sums)

    # ---------------------------------------------------------------------------------------------------------- checking

    def _check_identity(self) -> None:
        saved: dict[str, Any] = self._saved.get(KEY, {}).get("identity", {})
        now = identity_of(self.trainer.lightning_module, frozen_like=saved.get(WEIGHTS, {}))
        differences: dict[str, str | None] = {
            name: None if before == now.get(name) else f"{name} {before}, and this run has {now.get(name)}"
            for name, before in saved.items()
            if name not in (WEIGHTS, ROUNDED)
        }
        differences[WEIGHTS], self._not_compared = compare_weights(saved, now)
        for name, difference in differences.items():
            if difference:
                raise UserError(
                    f"the checkpoint was written with {difference}: resuming would train something else. Set back "
                    f"{ADVICE.get(name, name)}, or start a new run from the student's weights."
                )

    def _before_optimizers(self) -> None:
        self.settings = settings_of(self.trainer)
        saved: Settings = self._saved.get(KEY, {}).get("settings", [])
        for key, what in (("class", "optimizers"), ("schedule", "learning rate schedules")):
            classes = [[one.get(key) for one in settings] for settings in (saved, self.settings)]
            if saved and all(key in one for one in saved) and classes[0] != classes[1]:
                raise UserError(
                    f"the checkpoint's {what} are {_named(classes[0], self._roles)}, and this run's are "
                    f"{_named(classes[1], self._roles)}; their states do not fit. Set the {what} back, or start a new run from "
                    "the student's weights."
                )

    @property
    def _roles(self) -> list[str]:
        networks = getattr(self.trainer.lightning_module, "networks", None)
        return list(networks) if isinstance(networks, dict) else []

    # ---------------------------------------------------------------------------------------------------------- settings

    def _restore(self) -> None:
        if not self._saved:
            self._restore_optimizers()
            return
        if self.settings is None:
            self._before_optimizers()
        assert self.settings is not None
        saved: Settings = self._saved.get(KEY, {}).get("settings", [])
        if not saved:  # until version 0.1
            saved = [
                {"groups": _plain(state["param_groups"])}
                for state in self._saved.get("optimizer_states", [])
                if isinstance(state.get("param_groups"), list)
            ]
        try:
            self._restore_optimizers()
        except (KeyError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(
                f"the checkpoint's optimizer states do not fit this run's optimizers ({error}); set the optimizers back "
                "to those that the run began with, or start a new run from the student's weights."
            ) from error
        changes = []
        schedulers = {id(one.scheduler.optimizer): one.scheduler for one in self.trainer.lr_scheduler_configs}
        for i, (optimizer, before, now) in enumerate(
            zip(self.trainer.optimizers, saved, self.settings, strict=False)
        ):
            role = self._roles[i] if i < len(self._roles) else "optimizer"
            changes += [
                f"{role}: {line}"
                for line in apply_settings(optimizer, schedulers.get(id(optimizer)), before, now)
            ]
        self._report(changes)

    def _report(self, applied: list[str]) -> None:
        before: dict[str, Any] = self._saved.get(KEY, {}).get("config", {})
        changed = []
        if before and self.config:
            for name in sorted(before.keys() | self.config.keys()):
                old, new = before.get(name), self.config.get(name)
                if old != new and not name.startswith(NOT_COMPARED):
                    changed.append(f"{name}: {old} -> {new}")
        changed += self._not_compared
        if changed:
            self._say("\n  ".join(["changed since the checkpoint was written:", *changed]))
        if applied:
            self._say("\n  ".join(["applied to the restored optimizers:", *applied]))

    def _say(self, text: str) -> None:
        if self.ranks.first:
            sys.stderr.write(f"resume: {text}\n")


# -------------------------------------------------------------------------------------------------------------- identity


def identity_of(module: pl.LightningModule, frozen_like: Iterable[str] = ()) -> dict[str, Any]:
    """Everything that a stage trains against, besides its data, and that must not change on a resume.

    Args:
        module: a built stage.
        frozen_like: names of the frozen networks to include; those that load lazily are loaded.
    """
    identity: dict[str, Any] = {}
    family = getattr(module, "family", None)
    if family is not None:
        identity["prediction_type"] = family.prediction_type
        alpha = family.schedule.alpha.detach().cpu().double()
        identity["noise schedule"] = hashlib.sha256(alpha.round(decimals=5).numpy().tobytes()).hexdigest()[
            :16
        ]
    timesteps = getattr(getattr(module, "student", None), "timesteps", None)
    if timesteps is not None:
        identity["timesteps"] = [int(step) for step in timesteps]
    found = dict(_frozen(module, set()))
    missing = [name for name in frozen_like if name not in found]
    if missing:
        for name in missing:
            _load(module, name)
        found = dict(_frozen(module, set()))
    identity[WEIGHTS] = {name: one.fingerprint for name, one in found.items() if one.fingerprint is not None}
    identity[ROUNDED] = {name: found[name].rounded_fingerprint for name in identity[WEIGHTS]}
    return identity


def _frozen(holder: Any, seen: set[int], prefix: str = "") -> Iterable[tuple[str, Frozen[nn.Module]]]:
    """Yields the frozen networks of a stage and its parts, by attribute path."""
    seen.add(id(holder))
    for name, value in _items(holder):
        here = prefix + name.strip("_")
        if isinstance(value, Frozen):
            yield here, value
        elif _is_part(value) and id(value) not in seen:
            yield from _frozen(value, seen, f"{here}.")


def _items(holder: Any) -> list[tuple[str, Any]]:
    if isinstance(holder, Mapping):
        return [(str(name), value) for name, value in holder.items()]
    if isinstance(holder, list | tuple):  # a NamedTuple's by its fields
        return list(zip(getattr(holder, "_fields", map(str, range(len(holder)))), holder, strict=True))
    return list(vars(holder).items())


def _is_part(value: Any) -> bool:
    if isinstance(value, Mapping | list | tuple):
        return True
    ours = isinstance(value, StudentTerm) or type(value).__module__.partition(".")[0] == "sdxs_lightning"
    return ours and hasattr(value, "__dict__") and not isinstance(value, nn.Module | type)


def _load(holder: Any, path: str) -> None:
    """Reads the attribute that `_frozen` gave this name, so that a network that is loaded on its first use is loaded."""
    for name in path.split("."):
        found = dict(_items(holder)) if isinstance(holder, Mapping | list | tuple) else {}
        if not found:
            found = {name: getattr(holder, name, None) or getattr(holder, f"_{name}", None)}
        holder = found.get(name)
        if holder is None or isinstance(holder, Frozen):
            return


def compare_weights(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """Compares the frozen networks of two identities.

    Networks that load on first use are loaded before the run's dtype is known when resuming, and after it when saving. So
    fingerprints of float32 and bfloat16 are compared rounded to bfloat16.

    Returns:
        The first difference, or None, and a line for each network that cannot be compared: another precision is a setting.
    """
    lines = []
    for name, before in saved.get(WEIGHTS, {}).items():
        other = now[WEIGHTS].get(name)
        if other is None:
            continue
        old, new = _dtype(before), _dtype(other)
        rounded = saved.get(ROUNDED, {}).get(name)
        if old != new and (rounded is None or "float16" in (old, new)):
            lines.append(f"{name} weights: {old} -> {new} (other bits, so they were not compared)")
        elif (before != other) if old == new else (rounded != now[ROUNDED][name]):
            return f"{name} weights {before}, and this run loaded {other}", lines
    return None, lines


def _dtype(fingerprint: str) -> str:
    return fingerprint.partition(":")[0]


def check_shapes(saved: Mapping[str, tuple[int, ...]], module: pl.LightningModule) -> None:
    """Compares the checkpoint's tensors with the networks of this run.

    Raises:
        UserError: naming what is missing, or the first tensor of another shape.
    """
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    networks = {name.partition(".")[0] for name in own}
    saved_networks = {name.partition(".")[0] for name in saved}
    missing = sorted(networks - saved_networks)
    if missing:
        raise UserError(
            f"the checkpoint holds no {', '.join(missing)} (but {', '.join(sorted(saved_networks))}), which this run trains or "
            "averages; resume a checkpoint of this stage, or start a new run."
        )
    for name in sorted(own.keys() | saved.keys()):
        there, here = saved.get(name), own.get(name)
        if there != here:
            network = name.partition(".")[0]
            shapes = [f"has shape {one}" if one is not None else "does not exist" for one in (there, here)]
            raise UserError(
                f"the checkpoint's {network} has another architecture: {name} {shapes[0]} in the checkpoint and {shapes[1]} in "
                f"this run; give the {network} that the run began with, or start a new run."
            )


# -------------------------------------------------------------------------------------------------------------- settings


def settings_of(trainer: pl.Trainer) -> Settings:
    """Returns the hyperparameters of the optimizers and their schedulers."""
    schedulers = {id(one.scheduler.optimizer): one.scheduler for one in trainer.lr_scheduler_configs}
    settings = []
    for optimizer in trainer.optimizers:
        scheduler = schedulers.get(id(optimizer))
        state = {} if scheduler is None else scheduler.state_dict()
        kept = {name: value for name, value in state.items() if name not in PROGRESS and _is_plain(value)}
        settings.append(
            {
                "class": type(optimizer).__name__,
                "schedule": None if scheduler is None else type(scheduler).__name__,
                "groups": _plain(optimizer.param_groups),
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


def _is_readable(path: Path) -> bool:
    """Whether a checkpoint without checksums can be opened; of a folder of shards only the metadata is read."""
    try:
        torch.load(
            path / "meta.pt" if path.is_dir() else path, map_location="cpu", mmap=True, weights_only=True
        )
    except Exception:
        return False
    return True


def _plain(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in group.items() if name != "params" and _is_plain(value)}
        for group in groups
    ]


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(one) for one in value)
    return value is None or isinstance(value, bool | int | float | str)


def _named(classes: Sequence[str | None], roles: list[str]) -> str:
    kinds = [kind or "none" for kind in classes]
    names = [f"{role} {kind}" for role, kind in zip(roles, kinds, strict=False)] if roles else kinds
    return ", ".join(names + kinds[len(names) :])


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens a nested configuration to dotted names; values that are not plain become strings."""
    if isinstance(config, Mapping):
        items: Iterable[tuple[Any, Any]] = config.items()
    elif isinstance(config, list | tuple) and not _is_plain(config):
        items = enumerate(config)
    else:
        return {prefix.removesuffix("."): config if _is_plain(config) else str(config)}
    found: dict[str, Any] = {}
    for name, value in items:
        found |= flat(value, f"{prefix}{name}.")
    return found
