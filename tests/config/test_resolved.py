"""What every documented combination of files says, compared with `resolved.json`.

`python -m tests.config.test_resolved` writes that file anew; its diff shows what a change of the configurations changes. The
first version was compared with what `--print_config` printed before the files were built on each other: no difference.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from sdxs_lightning.config_files import read_arguments
from tests.config.test_configs import CONFIGS, OVERLAYS, names
from tests.helpers.tiny_run import ROOT

SNAPSHOT = Path(__file__).with_name("resolved.json")


def documented() -> Iterator[tuple[str, ...]]:
    """The files of each train.py command in a manual, a configuration's header or the batch script."""
    manuals = [path for path in ROOT.rglob("*.md") if ".venv" not in path.parts]
    for path in sorted([*manuals, *CONFIGS.rglob("*.yaml"), *CONFIGS.rglob("*.sbatch")]):
        text = re.sub(r"\\\n#?", " ", path.read_text())
        for command in re.findall(r"train\.py[^\n`|]*", text):
            files = re.findall(r"--config[ =](?:\.\.\.)?(?:configs/)?([\w/]+\.yaml)", command)
            if files and all((CONFIGS / file).is_file() for file in files):
                yield tuple(files)


def stacks() -> list[str]:
    """Documented combinations, and every file on what it is laid over; shorter ones first."""
    every = {*documented(), *((*OVERLAYS.get(name, []), name) for name in names())}
    return [" ".join(files) for files in sorted(every, key=lambda files: (len(files), files))]


def resolve(stack: str) -> dict[str, Any]:
    """All that the files of a stack set, by dotted key."""
    arguments = [part for file in stack.split() for part in ("--config", str(CONFIGS / file))]
    settings = OmegaConf.to_container(OmegaConf.create(read_arguments(arguments).settings), resolve=True)
    return dict(_flat(settings, ""))


def _flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, below in value.items():
            yield from _flat(below, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, below in enumerate(value):
            yield from _flat(below, f"{key}.{index}")
    else:
        yield key, value


def difference(stack: str) -> dict[str, Any]:
    """What the last file of a stack changes; all that it says, where it is alone. An absent key is "-"."""
    below, _, _ = stack.rpartition(" ")
    before, after = resolve(below) if below else {}, resolve(stack)
    return {
        key: after.get(key, "-")
        for key in sorted(before.keys() | after.keys())
        if key not in before or key not in after or before[key] != after[key]
    }


@pytest.mark.parametrize("stack", stacks())
def test_a_combination_says_what_it_said(stack: str) -> None:
    said = difference(stack)
    expected = json.loads(SNAPSHOT.read_text())
    if (
        stack in expected or " " not in stack
    ):  # a combination that a manual mentions newly has only to resolve
        assert said == expected[stack]


def test_combinations_of_manuals_are_found() -> None:
    found = set(documented())
    assert ("sd21/miniaturise.yaml", "sd21/miniaturise_8gpu.yaml") in found
    assert ("quickstart.yaml",) in found
    assert ("sdxl/distill.yaml", "sdxl/distill_segmented.yaml", "sdxl/distill_8gpu.yaml") in found


if __name__ == "__main__":
    lines = [f"{json.dumps(stack)}: {json.dumps(difference(stack))}" for stack in stacks()]
    SNAPSHOT.write_text("{\n" + ",\n".join(lines) + "\n}\n")
