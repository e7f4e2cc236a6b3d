"""The report of a weight transfer: every tensor of student and teacher in one category each, or an error with its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch

from sdxs_lightning.surgery.key_map import TensorSource, block_of

Shapes = Mapping[str, torch.Size]


@dataclass(frozen=True)
class TransferReport:
    """What became of each tensor: name -> number of parameters."""

    name: str
    """Name of the topology."""
    copied: dict[str, int]
    """Tensors of the student equal to one of the teacher's."""
    averaged: dict[str, int]
    """Tensors of the student that are means of several."""
    partly_new: dict[str, int]
    """Tensors of the student of which only the columns of the skip connection are copied."""
    new: dict[str, int]
    """Newly initialised tensors of the student."""
    used: dict[str, int]
    """Tensors of the teacher that went into the student."""
    dropped: dict[str, int]
    """Tensors of the teacher that did not go into the student."""

    @property
    def student_parameters(self) -> int:
        """Parameters of the student."""
        return sum(sum(part.values()) for part in (self.copied, self.averaged, self.partly_new, self.new))

    @property
    def teacher_parameters(self) -> int:
        """Parameters of the teacher."""
        return sum(self.used.values()) + sum(self.dropped.values())

    def __str__(self) -> str:
        """A summary of a few lines."""
        share = self.student_parameters / self.teacher_parameters
        lines = [
            f"{self.name}: {self.student_parameters:,} parameters, {share:.1%} of the teacher's "
            f"{self.teacher_parameters:,}"
        ]
        for label, part in (
            ("copied", self.copied),
            ("averaged", self.averaged),
            ("partly new", self.partly_new),
            ("new", self.new),
            ("dropped", self.dropped),
        ):
            lines.append(f"  {label:<10} {len(part):>5} tensors {sum(part.values()):>13,} parameters")
        names = {*self.copied, *self.averaged, *self.partly_new, *self.new}
        for label, part in (("partly new", self.partly_new), ("new", self.new)):
            lines += [f"  {label}: {block}" for block in outermost(part, names)]
        lines += [f"  dropped: {block}" for block in outermost(self.dropped, {**self.used, **self.dropped})]
        return "\n".join(lines)


def account(
    name: str,
    sources: Mapping[str, TensorSource],
    student: Shapes,
    teacher: Shapes,
    removable: tuple[str, ...],
) -> TransferReport:
    """Checks a key map against two networks, before anything is copied.

    Args:
        name: of the topology.
        sources: the key map.
        student: names and shapes of the student's tensors.
        teacher: names and shapes of the teacher's tensors.
        removable: prefixes of the teacher's names that the topology removes.

    Raises:
        ValueError: for a tensor of the student without a source, a source that the teacher does not have, one of another
            shape, or a tensor of the teacher that is neither used nor removed; each by its name.
    """
    parts: dict[str, dict[str, int]] = {"copied": {}, "averaged": {}, "partly_new": {}, "new": {}}
    if strangers := sorted(student.keys() ^ sources.keys()):
        raise ValueError(
            f"the key map and the student do not agree on the tensor '{strangers[0]}' ({len(strangers)} in all)."
        )
    for key, source in sources.items():
        parts[_kind(source)][key] = prod(student[key])
        for teacher_key in source.keys:
            if teacher_key not in teacher:
                raise ValueError(
                    f"the student's '{key}' comes from '{teacher_key}', which the teacher does not have."
                )
            _check_shape(key, student[key], teacher_key, teacher[teacher_key], source.last_columns)
    taken = {teacher_key for source in sources.values() for teacher_key in source.keys}
    used = {key: prod(shape) for key, shape in teacher.items() if key in taken}
    dropped = {key: prod(shape) for key, shape in teacher.items() if key not in taken}
    for key in dropped:
        if block_of(key, removable) is None:
            raise ValueError(
                f"the teacher's tensor '{key}' is not accounted for: no tensor of the student comes from it, and the topology "
                f"'{name}' does not remove it."
            )
    return TransferReport(name, **parts, used=used, dropped=dropped)


def _kind(source: TensorSource) -> str:
    if source.last_columns is not None:
        return "partly_new"
    return {0: "new", 1: "copied"}.get(len(source.keys), "averaged")


def _check_shape(
    key: str, shape: torch.Size, teacher_key: str, teacher_shape: torch.Size, last_columns: int | None
) -> None:
    if last_columns is not None:
        axis = input_axis(shape)
        fits = min(shape[axis], teacher_shape[axis]) >= last_columns
        shape, teacher_shape = _without(shape, axis), _without(teacher_shape, axis)
        if fits and shape == teacher_shape:
            return
    elif shape == teacher_shape:
        return
    raise ValueError(
        f"the student's '{key}' is {list(shape)} and the teacher's '{teacher_key}' {list(teacher_shape)}: they do not fit."
    )


def input_axis(shape: torch.Size) -> int:
    """The axis of the input channels: the second of a convolution's weight, the only one of a norm's."""
    return min(1, len(shape) - 1)


def _without(shape: torch.Size, axis: int) -> torch.Size:
    return torch.Size([*shape[:axis], *shape[axis + 1 :]])


def outermost(names: Iterable[str], everything: Iterable[str]) -> list[str]:
    """The fewest blocks that together hold exactly `names`; numbered siblings are joined, as "blocks.{1,3}"."""
    names = list(names)
    others = {prefix for name in set(everything) - set(names) for prefix in _prefixes(name)}
    blocks = dict.fromkeys(
        next((prefix for prefix in _prefixes(name) if prefix not in others), name) for name in names
    )
    siblings: dict[str, list[str]] = {}
    for block in blocks:
        parent, _, number = block.rpartition(".")
        siblings.setdefault(parent if number.isdigit() else block, []).append(number)
    return [
        f"{parent}.{{{','.join(numbers)}}}" if len(numbers) > 1 else _joined(parent, numbers[0])
        for parent, numbers in siblings.items()
    ]


def _joined(parent: str, number: str) -> str:
    return f"{parent}.{number}" if number.isdigit() else parent


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
