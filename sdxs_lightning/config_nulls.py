"""Settings that are null, or a list or number in the place of a group of options, where their type does not accept it.

jsonargparse (4.53) takes null for "not given" and passes it on as the value, whatever the type: a batch size of None. A list
for a dataclass among a class's arguments passes too, and fails where it is built, without the setting's name.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from sdxs_lightning.config_files import MergedArguments
from sdxs_lightning.core.errors import UserError

ROOTS = {"trainer": "lightning.pytorch.Trainer"}
"""Groups of the command line whose class no setting names."""


def refuse_nulls(command_line: MergedArguments, config: Mapping[str, Any]) -> None:
    """Refuses a null that a file or a flag sets and the setting's type does not accept.

    Args:
        command_line: says what was set, and where.
        config: the configuration, for the classes; what it sets to another value than null is accepted.

    Raises:
        UserError: naming the setting, its type and its place.
    """
    for path in _nulls(command_line.settings, ()):
        hint = _refusing_hint(config, path)
        if hint is not None:
            _refuse(command_line, path, "null", hint)


def refuse_no_groups(command_line: MergedArguments, config: Mapping[str, Any]) -> None:
    """Refuses a list or a number where the setting is a group of options, a dataclass.

    Args:
        command_line: says where it was set.
        config: the configuration as it was parsed.

    Raises:
        UserError: naming the setting, its options and its place.
    """
    for path, value in _plain_values(config, ()):
        found = _hint(config, path)
        group = None if found is None else _group(found[0])
        if group is not None:
            names = ", ".join(one.name for one in dataclasses.fields(group))
            _refuse(command_line, path, repr(value), f"a mapping with {names}")


def _refuse(command_line: MergedArguments, path: tuple[str, ...], value: str, accepted: str) -> NoReturn:
    key = ".".join(path)
    place = command_line.place(key)
    where = f" (set {place})" if place else ""
    raise UserError(f"{key} is {value}, but {accepted} is accepted{where}.")


def _plain_values(settings: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Lists and numbers by their path; what is within a list has none."""
    if isinstance(settings, Mapping):
        for name, value in settings.items():
            yield from _plain_values(value, (*path, str(name)))
    elif isinstance(settings, list | int | float):
        yield path, settings


def _group(hint: Any) -> Any:
    """The dataclass, if a type accepts nothing else but null."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = [one for one in (typing.get_args(hint) if union else (hint,)) if one is not types.NoneType]
    return members[0] if len(members) == 1 and dataclasses.is_dataclass(members[0]) else None


def _nulls(settings: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if isinstance(settings, Mapping):
        for name, value in settings.items():
            if value is None:
                yield (*path, str(name))
            yield from _nulls(value, (*path, str(name)))


def _refusing_hint(config: Any, path: tuple[str, ...]) -> str | None:
    """The type of a setting that is null and must not be, in words; None where it may be, or is not null, or is unknown."""
    found = _hint(config, path)
    if found is None:
        return None
    hint, default, value = found
    return None if value is not None or default is None or _accepts_none(hint) else _in_words(hint)


def _hint(config: Any, path: tuple[str, ...]) -> tuple[Any, Any, Any] | None:
    """Type, default and value of a setting; None where there is no such setting, or its path ends at a class."""
    node, owner = config, None
    for depth, name in enumerate(path):
        if not isinstance(node, Mapping) or name not in node:
            return None
        last = depth == len(path) - 1
        if name in ("init_args", "dict_kwargs", "class_path"):
            node = node[name]
            continue
        hint, default = _parameters(owner).get(name, (Any, None))
        node = node[name]
        if last:
            return hint, default, node
        named = node.get("class_path") if isinstance(node, Mapping) else None
        owner = _class(named) if named else _class(ROOTS.get(name)) if depth == 0 else _dataclass(hint)
    return None


def _parameters(owner: Any) -> dict[str, tuple[Any, Any]]:
    """Type and default of each parameter, those of a class's `**settings` included."""
    if owner is None:
        return {}
    found: dict[str, tuple[Any, Any]] = {}
    for each in (inspect.get_annotations(owner).get("settings"), owner):
        described = (
            getattr(importlib.import_module(owner.__module__), each, None) if isinstance(each, str) else each
        )
        if not isinstance(described, type):
            continue
        try:
            annotated: Any = described
            if not dataclasses.is_dataclass(described):
                annotated = described.__init__  # type: ignore[misc]  # of the class, not of an instance
            hints = typing.get_type_hints(annotated)
            parameters = inspect.signature(described).parameters.values()
        except (NameError, TypeError, ValueError):
            continue
        found |= {one.name: (hints.get(one.name, Any), one.default) for one in parameters}
    return found


def _class(path: str | None) -> Any:
    module, _, name = (path or "").rpartition(".")
    try:
        return getattr(importlib.import_module(module), name) if module else None
    except (ImportError, AttributeError):
        return None


def _dataclass(hint: Any) -> Any:
    return next((one for one in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(one)), None)


def _accepts_none(hint: Any) -> bool:
    if hint is Any or hint is None or hint is types.NoneType:
        return True
    if typing.get_origin(hint) in (typing.Union, types.UnionType, typing.Annotated):
        return any(_accepts_none(one) for one in typing.get_args(hint))
    return isinstance(hint, str | typing.TypeVar)  # not resolved


def _in_words(hint: Any) -> str:
    return (
        hint.__name__
        if isinstance(hint, type) and not typing.get_args(hint)
        else str(hint).replace("typing.", "")
    )
