"""Resuming: verifies the checkpoint, rejects another run's, applies changed optimizer settings, and reports every change.

Lightning loads whatever fits the shapes. So two methods of its checkpoint connector are wrapped: all checks here run before
weights change, with the same result on every rank.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader

from sdxs_lightning.callbacks import checkpoint_folder as folders
from sdxs_lightning.callbacks.checkpoint_writer import META
from sdxs_lightning.callbacks.optimizer_settings import (
    Settings,
    apply_settings,
    is_plain,
    plain_groups,
    settings_of,
)
from sdxs_lightning.callbacks.ranks import Ranks
from sdxs_lightning.callbacks.run_identity import (
    ADVICE,
    ROUNDED,
    SETTINGS,
    TOKENIZERS,
    WEIGHTS,
    check_shapes,
    compare_settings,
    compare_weights,
    identity_of,
)
from sdxs_lightning.core.errors import UserError, first_line

KEY = "run"
"""Key of the checkpoint's entry with identity, optimizer settings and configuration."""
NOT_COMPARED = ("ckpt_path", "config", "plan")
"""Options that do not affect training."""


class Resume:
    """Wraps a Trainer's loading of a checkpoint.

    Args:
        trainer: the Trainer, before `fit`.
        config: the run's resolved configuration, to report what changed; {} reports nothing.
        newest: whether the checkpoint is to be the newest one of its folder: one that has changed on disk is then passed over
            for another of the run's.
    """

    def __init__(self, trainer: pl.Trainer, config: Mapping[str, Any], newest: bool) -> None:
        self.trainer, self.newest = trainer, newest
        self.config = flat(config)
        self.ranks = Ranks()
        self.path: Path | None = None
        """The checkpoint that was loaded: the one asked for, or another one."""
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
        # The command line chooses once the ranks are connected and the folder is locked, after Lightning has looked.
        checkpoint_path = self.trainer.ckpt_path or checkpoint_path
        if not checkpoint_path:
            self._load(checkpoint_path, weights_only)
            return
        path = self.path = self.verified(Path(checkpoint_path))
        module = self.trainer.lightning_module
        if path.is_dir():
            self._saved = read_state(path / META)
            self._check_identity()
            names = FileSystemReader(path).read_metadata().state_dict_metadata.items()
            sizes = {name: tuple(one.size) for name, one in names if hasattr(one, "size")}
            prefix = "state_dict."
            saved = {
                name.removeprefix(prefix): size for name, size in sizes.items() if name.startswith(prefix)
            }
            check_shapes(saved, module)
        else:
            self._saved = read_state(path)
            self._check_identity()
            state = self._saved.pop("state_dict", {})
            check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, module)
        if (
            self.trainer.optimizers
        ):  # with FSDP2 they exist already and are restored together with the weights
            self._before_optimizers()
        self._load(path, True)

    def verified(self, path: Path) -> Path:
        """Returns the checkpoint, or else the newest other one, whose files match the checksums of its manifest. A collective.

        Args:
            path: its `state.ckpt`; without a manifest next to it checksums are not verified.

        Raises:
            UserError: on all ranks, if no checkpoint matches.
        """
        path = Path(self.ranks.of_first(str(path)))
        candidates = [path.parent]
        if self.newest:
            complete = self.ranks.of_first(
                [str(one) for one in folders.complete_checkpoints(path.parents[1])]
            )
            candidates += reversed([Path(one) for one in complete if Path(one) != path.parent])
        for folder in candidates:
            state = path if folder == path.parent else folder / folders.STATE
            changed = self._changed_file(folder, state)
            if changed is None:
                if folder != path.parent:
                    self._say(f"resuming from {folder} instead.")
                return state
            problem = (
                f"the checkpoint {folder} has changed since it was written ({changed} cannot be read, or does not match its "
                "checksum)"
                if folders.read_manifest(folder) is not None
                else f"'{state}' is not a checkpoint that can be read"
            )
            if self.newest:
                self._say(f"{problem}; it is left where it is.")
        way = "every other one has too" if self.newest else "take another one, or --ckpt_path last"
        raise UserError(f"{problem}; {way}.")

    def _changed_file(self, folder: Path, state: Path) -> str | None:
        manifest = folders.read_manifest(folder)
        if manifest is None or manifest.checksums is None:
            return self.ranks.of_first(_unreadable(state) if self.ranks.first else None)
        own = sorted(manifest.checksums)[self.ranks.number :: self.ranks.count]
        sums: dict[str, str] = {}
        for part in self.ranks.gathered(folders.checksums(folder, own)):
            sums |= part
        return folders.changed_file(folder, sums)

    # ---------------------------------------------------------------------------------------------------------- checking

    def _check_identity(self) -> None:
        saved: dict[str, Any] = self._saved.get(KEY, {}).get("identity", {})
        now = identity_of(self.trainer.lightning_module, saved.get(WEIGHTS, {}), TOKENIZERS in saved)
        differences: dict[str, str | None] = {
            name: None if before == now.get(name) else f"{name} {before}, and this run has {now.get(name)}"
            for name, before in saved.items()
            if name not in (WEIGHTS, ROUNDED, SETTINGS)
        }
        differences[WEIGHTS], self._not_compared = compare_weights(saved, now)
        differences[SETTINGS] = compare_settings(saved.get(SETTINGS, {}), now[SETTINGS])
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
                {"groups": plain_groups(state["param_groups"])}
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


def _unreadable(path: Path) -> str | None:
    """The name of a checkpoint without checksums if it cannot be read; of a folder of shards only the metadata is read."""
    try:
        read_state(path / META if path.is_dir() else path)
    except UserError:
        return path.name
    return None


def read_state(path: Path) -> dict[str, Any]:
    """A file of a checkpoint, its tensors mapped.

    Raises:
        UserError: if it is not one.
    """
    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"'{path}' is not a checkpoint of this program ({first_line(error)}); take another one."
        ) from error
    if not isinstance(loaded, dict):
        raise UserError(f"'{path}' is not a checkpoint of this program; take another one.")
    return loaded


def _named(classes: Sequence[str | None], roles: list[str]) -> str:
    kinds = [kind or "none" for kind in classes]
    names = [f"{role} {kind}" for role, kind in zip(roles, kinds, strict=False)] if roles else kinds
    return ", ".join(names + kinds[len(names) :])


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens a nested configuration to dotted names; values that are not plain become strings."""
    if isinstance(config, Mapping):
        items: Iterable[tuple[Any, Any]] = config.items()
    elif isinstance(config, list | tuple) and not is_plain(config):
        items = enumerate(config)
    else:
        return {prefix.removesuffix("."): config if is_plain(config) else str(config)}
    found: dict[str, Any] = {}
    for name, value in items:
        found |= flat(value, f"{prefix}{name}.")
    return found
