"""What a pruned student keeps of its teacher's U-Net, and reading that from YAML; `README.md` here is the manual.

A U-Net is described by resolution: stage 0 is the outermost and holds `down_blocks.0` and the last up block. A *layer* is a
ResNet with the Transformer after it; a down stage of SD has two, an up stage three. The *depth* of a layer is the number of
blocks in its Transformer, 0 in a stage of ResNets only.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

MidBlock = Literal["full", "resnet", "none"]
"""ResNet, Transformer, ResNet; the first ResNet alone; nothing."""

BlockRule = Literal["spaced", "first", "mean"]
"""Which of D Transformer blocks become d: evenly spaced ones, the first among them; the first d; means of D/d neighbours."""


@dataclass(frozen=True)
class Stage:
    """One resolution of the student; what is not given stays as in the teacher."""

    down_layers: tuple[int, ...] | None = None
    """Teacher layers kept on the way down, in order; the first has to be 0, which changes the width."""
    up_layers: tuple[int, ...] | None = None
    """Teacher layers kept on the way up, one more than on the way down; -1 is the last, which has to be among them."""
    down_depths: int | tuple[int, ...] | None = None
    """Transformer blocks of the kept down layers: one number for all, or one each; 0 removes the Transformers."""
    up_depths: int | tuple[int, ...] | None = None
    """As `down_depths`, on the way up."""
    attention_heads: int | None = None
    """Number of heads (diffusers names it attention_head_dim). Q, K, V are copied in the teacher's order of rows."""
    only_cross_attention: bool | None = None
    """True: the first attention of each block reads the prompt too; it starts as a copy of the second."""

    def __post_init__(self) -> None:
        """Refuses what no U-Net can have.

        Raises:
            ValueError: for an empty list of layers, a negative depth, or no heads.
        """
        for name, layers in (("down_layers", self.down_layers), ("up_layers", self.up_layers)):
            if layers is not None and not layers:
                raise ValueError(f"{name} must keep at least one layer, got none; leave it out to keep all.")
        for name, depths in (("down_depths", self.down_depths), ("up_depths", self.up_depths)):
            given = () if depths is None else (depths,) if isinstance(depths, int) else depths
            if any(depth < 0 for depth in given):
                raise ValueError(f"{name} must be 0 or more, got {_shown(given)}.")
            if any(given) and not all(given):
                raise ValueError(
                    f"{name} must be 0 for all layers of a stage or for none, got {_shown(given)}; diffusers has no stage "
                    "with a Transformer after some of its ResNets."
                )
        if self.attention_heads is not None and self.attention_heads < 1:
            raise ValueError(f"attention_heads must be 1 or more, got {self.attention_heads}.")


@dataclass(frozen=True)
class Topology:
    """Which stages, layers and Transformer blocks of a teacher a student keeps; the default keeps everything."""

    stages: tuple[Stage, ...] | None = None
    """The kept stages, outermost first; those further inside are removed. None keeps all unchanged."""
    mid_block: MidBlock | None = None
    """What is kept of the middle; None keeps it unchanged."""
    transformer_blocks: BlockRule = "spaced"
    """Which blocks a Transformer of smaller depth gets."""
    added_conditioning: Literal["any", "none", "text_time"] = "any"
    """The added conditioning (`addition_embed_type`) of the U-Nets that this is meant for; others are refused."""
    name: str = "custom"
    """For messages and reports."""
    note: str = ""
    """Source, for the list of presets."""

    def __post_init__(self) -> None:
        """Refuses a student without stages.

        Raises:
            ValueError: for an empty list of stages.
        """
        if self.stages is not None and not self.stages:
            raise ValueError("stages must keep at least one stage, got none; leave it out to keep all.")


_WORDS: dict[Any, str] = {
    types.NoneType: "null",
    int: "an integer",
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
        raise ValueError(f"'{path}' is not valid YAML: {' '.join(str(error).split())}.") from error
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
    """Whether a value read from YAML has the type of a field."""
    if _is_union(hint):
        return any(_fits(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(_fits(one, inner) for one in value)
    return type(value) is hint  # True is not an integer here


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (
        types.UnionType,
        typing.Union,
    )  # the same type in two spellings before Python 3.14


def _plain(hint: Any) -> str:
    if _is_union(hint):
        return " or ".join(_plain(one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return ", ".join(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"a list of {_plain(typing.get_args(hint)[0])}"
    return _WORDS.get(hint) or str(hint.__name__)


def _shown(depths: Sequence[int]) -> str:
    return str(depths[0]) if len(depths) == 1 else str(list(depths))
