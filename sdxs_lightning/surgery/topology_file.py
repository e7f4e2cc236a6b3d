"""A topology of one's own, read from a YAML file (`topology.py` shows one)."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from sdxs_lightning.surgery.topology import Stage, Topology

_WORDS: dict[Any, str] = {
    types.NoneType: "null",
    int: "a whole number",
    bool: "true or false",
    Stage: "stages",
}

_Class = TypeVar("_Class", Stage, Topology)


def read_topology(path: str | Path) -> Topology:
    """Reads a topology; the fields may also be under one key `topology`, as in a training configuration.

    Args:
        path: of the YAML file; without a `name` the topology gets that of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for broken YAML, an unknown field, a wrong value; each in one sentence.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no topology file '{path}'.")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is no YAML: {' '.join(str(error).split())}.") from error
    if isinstance(content, dict) and list(content) == ["topology"]:
        content = content["topology"]
    try:
        topology = _build(Topology, content, "the topology")
    except ValueError as error:
        raise ValueError(f"'{path}': {error}") from error
    return topology if isinstance(content, dict) and "name" in content else replace(topology, name=path.stem)


def _build(kind: type[_Class], content: Any, where: str) -> _Class:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must be fields with values, got {content!r}.")
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key not in hints:
            raise ValueError(f"{where} has no field '{key}'; it has {', '.join(hints)}.")
        if key == "stages" and isinstance(value, list):
            values[key] = tuple(_build(Stage, stage, f"stages[{r}]") for r, stage in enumerate(value))
            continue
        values[key] = tuple(value) if isinstance(value, list) else value
        if not _fits(values[key], hints[key]):
            raise ValueError(f"{where}: {key} is {value!r}, but {_plain(hints[key])} is accepted.")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from YAML is of a type as the topology's fields have them."""
    if _is_union(hint):
        return any(_fits(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(_fits(one, inner) for one in value)
    return type(value) is hint  # True is no number here


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (
        types.UnionType,
        typing.Union,
    )  # two spellings of one thing before Python 3.14


def _plain(hint: Any) -> str:
    if _is_union(hint):
        return " or ".join(_plain(one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return ", ".join(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"a list of {_plain(typing.get_args(hint)[0])}"
    return _WORDS.get(hint) or str(hint.__name__)
