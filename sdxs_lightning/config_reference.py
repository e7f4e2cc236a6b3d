"""Writes configs/REFERENCE.md: every class that the configurations name, its options, types, defaults and meaning.

python -m sdxs_lightning.config_reference

Read from signatures and docstrings, so it cannot differ from the code; a test compares the file.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docstring_parser
from jsonargparse._parameter_resolvers import get_signature_parameters

from sdxs_lightning.config_files import read_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
OURS = ("sdxs_lightning.", "data.", "evaluation.")

REFERENCE_SECTIONS = {
    "Stages (`model`)": ("sdxs_lightning.stages.",),
    "Bases (`model.init_args.family`)": ("sdxs_lightning.families.",),
    "Networks": ("sdxs_lightning.networks.",),
    "Objectives and other settings of a stage": (
        "sdxs_lightning.objectives.",
        "sdxs_lightning.pairs.",
        "sdxs_lightning.core.",
    ),
    "Pruned U-Nets (`topology`)": ("sdxs_lightning.surgery.",),
    "Learning rates, optimizers and sharding": ("sdxs_lightning.training.",),
    "Data (`data`)": ("data.shards.", "data.conditions"),
    "Callbacks (`trainer.callbacks`)": ("sdxs_lightning.callbacks.", "evaluation."),
    "The toy world": ("data.toy.",),
    "Others": OURS,
}
"""Heading -> modules; a class comes under the first that fits."""

HEADER = """\
# Configuration reference

Written by `python -m sdxs_lightning.config_reference` from signatures and docstrings: all classes of this project that a
shipped configuration names, and the settings in them. An option without a default is required. Not listed: options of
[Lightning's Trainer](https://lightning.ai/docs/pytorch/stable/common/trainer.html) and of torch's optimizers and schedulers.
Merging, `include`, `null` and `${...}` are explained in [README.md](README.md).
"""


def reference() -> str:
    """The text of configs/REFERENCE.md."""
    classes = dict.fromkeys(_reachable(sorted(_named_in_configs())))
    text = HEADER
    left = sorted(classes, key=lambda each: f"{each.__module__}.{each.__qualname__}")
    for heading, modules in REFERENCE_SECTIONS.items():
        here = [each for each in left if f"{each.__module__}.".startswith(modules)]
        left = [each for each in left if each not in here]
        if here:
            text += f"\n## {heading}\n" + "".join(_described(each) for each in here)
    return text


def _named_in_configs() -> set[str]:
    return {
        text
        for path in CONFIGS.rglob("*.yaml")
        for file in read_config(str(path))
        for key, text in file.texts.items()
        if key.endswith("class_path") and text.startswith(OURS)
    }


def _reachable(paths: list[str]) -> Iterator[type]:
    """The classes, and the dataclasses and classes of ours that their options are annotated with."""
    waiting = [getattr(importlib.import_module(module), name) for module, _, name in map(_split, paths)]
    seen = set[type]()
    while waiting:
        found = waiting.pop(0)
        if found in seen:
            continue
        seen.add(found)
        yield found
        try:
            hints = typing.get_type_hints(found if dataclasses.is_dataclass(found) else found.__init__)
            if (settings := _settings(found)) is not found:
                hints |= typing.get_type_hints(settings)
        except (NameError, TypeError):
            continue
        waiting += [
            each for hint in hints.values() for each in _parts(hint) if dataclasses.is_dataclass(each)
        ]


def _settings(described: type) -> type:
    """The dataclass of a class's `**settings`, which the class declares as an attribute; else the class."""
    found = inspect.get_annotations(described).get("settings")
    return found if isinstance(found, type) and dataclasses.is_dataclass(found) else described


def _parts(hint: Any) -> Iterator[type]:
    if isinstance(hint, type) and hint.__module__.startswith(OURS):
        yield hint
    for inner in typing.get_args(hint):
        yield from _parts(inner)


def _split(path: str) -> tuple[str, str, str]:
    return path.rpartition(".")


def _described(described: type) -> str:
    documented = docstring_parser.parse_from_object(described)
    settings = docstring_parser.parse_from_object(_settings(described))
    help_of = {each.arg_name: each.description or "" for each in (*settings.params, *documented.params)}
    is_settings = dataclasses.is_dataclass(described)
    title = described.__name__ if is_settings else f"{described.__module__}.{described.__qualname__}"
    summary = " ".join((documented.short_description or "").split())
    written = inspect.signature(described).parameters
    rows = list[str]()
    for each in get_signature_parameters(described, None if is_settings else "__init__"):
        hint = _hint(written[each.name].annotation if each.name in written else each.annotation)
        if hint.rpartition(".")[2] == "Optimizer":  # comes from the optimizer beside the scheduler
            continue
        cells = f"`{each.name}`", _cell(hint), _cell(_default(each.default))
        meaning = _cell(help_of.get(each.name) or each.doc or "", code=False)
        rows.append(f"| {' | '.join(cells)} | {meaning} |")
    table = (
        "\n| option | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
        if rows
        else ""
    )
    return f"\n### {title}\n\n{summary}\n{table}"


def _hint(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:[a-z_]\w*\.)+(\w+)", r"\1", text)


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return ""
    if dataclasses.is_dataclass(value):
        return f"{type(value).__name__}()"
    names = {"None": "null", "True": "true", "False": "false"}
    shown = repr(value)
    return names.get(shown, "" if "factory" in shown else shown)


def _cell(text: str, code: bool = True) -> str:
    flat = " ".join(text.split()).replace("|", "\\|")
    return f"`{flat}`" if flat and code else flat


if __name__ == "__main__":
    (CONFIGS / "REFERENCE.md").write_text(reference())
