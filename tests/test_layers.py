"""Who imports whom: the rules of the rooms, read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ROOMS = {
    "core": set[str](),
    "families": {"core"},
    "surgery": {"core", "families"},
    "networks": {"core", "families"},
    "objectives": {"core", "families", "networks"},
    "training": {"core", "networks"},
    "pairs": {"core", "families", "networks"},
    "export": {"core", "families", "networks"},
    "inference": {"core", "families", "networks", "export"},
    "stages": {"core", "families", "surgery", "networks", "objectives", "training", "pairs", "export"},
}
"""Folders of sdxs_lightning, and which others each may import, beside itself."""

TOP = {
    "callbacks",
    "memory_plan",
    "cli",
    "command_line",
    "command_options",
    "config_errors",
    "config_files",
    "config_nulls",
    "environment_values",
    "config_reference",
    "lora",
    "demo",
    "export_runtime",
    "generate",
    "prune",
    "publish",
    "publishing",
    "renamed",
    "run_ends",
    "run_start",
    "train_command",
    "trust",
}
"""They see everything of sdxs_lightning."""

EVALUATION_MAY_SEE = {"toy", "shards", "conditions", "prepare"}
"""Of data."""

LOADING = ("data/prepare/", "data/toy/")
"""Files of data that load models: they see all of sdxs_lightning; the rest of data sees `core` only."""


def files() -> list[Path]:
    return [path for room in ("sdxs_lightning", "data", "evaluation") for path in (ROOT / room).rglob("*.py")]


def imports(source: str, package: str = "") -> Iterator[str]:
    """Dotted names that a module imports, wherever in it; `from a import b` is a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            )
            module = ".".join(part for part in (base, node.module or "") if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room_of(dotted: str) -> str:
    """`sdxs_lightning.networks.ema.StudentEma` -> `networks`."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else ""


def allowed(room: str) -> set[str]:
    """Rooms of sdxs_lightning that a room of it may import."""
    return ROOMS[room] | {room} if room in ROOMS else set(ROOMS) | TOP


def broken_rules(relative: str, source: str) -> list[str]:
    """Every import of a file that its place forbids."""
    package = ".".join(Path(relative).parent.parts)
    broken = []
    for name in imports(source, package):
        package_of_name = name.split(".")[0]
        if relative.startswith("sdxs_lightning/"):
            room = room_of(relative.removesuffix(".py").replace("/", "."))
            if package_of_name in ("data", "evaluation", "tests", "train"):
                broken.append(f"{relative} imports {name}: sdxs_lightning knows neither data nor evaluation")
            elif (
                package_of_name == "sdxs_lightning"
                and room != "__init__"
                and room_of(name) not in allowed(room)
            ):
                broken.append(
                    f"{relative} imports {name}: {room} may import {', '.join(sorted(allowed(room)))}"
                )
            elif room == "core" and package_of_name in ("lightning", "diffusers", "transformers"):
                broken.append(f"{relative} imports {name}: core has no Lightning and loads no models")
        elif relative.startswith("data/"):
            if package_of_name in ("evaluation", "tests", "train"):
                broken.append(f"{relative} imports {name}: data knows sdxs_lightning only")
            elif (
                package_of_name == "sdxs_lightning"
                and not relative.startswith(LOADING)
                and room_of(name) != "core"
            ):
                broken.append(f"{relative} imports {name}: of sdxs_lightning, data sees core")
        elif package_of_name in ("tests", "train") or (
            package_of_name == "data" and room_of(name) not in EVALUATION_MAY_SEE
        ):
            seen = ", ".join(f"data.{name}" for name in sorted(EVALUATION_MAY_SEE))
            broken.append(f"{relative} imports {name}: evaluation sees sdxs_lightning and {seen}")
    return broken


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_imports_only_what_its_room_may_see(path: Path) -> None:
    assert broken_rules(path.relative_to(ROOT).as_posix(), path.read_text()) == []


def test_every_room_is_known() -> None:
    entries = {
        path.stem for path in (ROOT / "sdxs_lightning").iterdir() if path.suffix == ".py" or path.is_dir()
    }
    entries -= {"__init__", "__pycache__"}
    assert {name for name in entries if not name.startswith(".")} == set(ROOMS) | TOP


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("sdxs_lightning/core/latents.py", "import lightning.pytorch as pl"),
        ("sdxs_lightning/core/latents.py", "from sdxs_lightning.families import Family"),
        ("sdxs_lightning/families/sd.py", "def f():\n    from sdxs_lightning.networks import ema"),
        ("sdxs_lightning/networks/ema.py", "from ..callbacks import export"),
        ("sdxs_lightning/networks/ema.py", "import data.shards.index"),
        ("data/shards/index.py", "from sdxs_lightning.families.sd import StableDiffusion"),
        ("data/toy/world.py", "import evaluation.metrics.frechet"),
        ("sdxs_lightning/families/sd.py", "from sdxs_lightning.networks.denoiser import Denoiser"),
        ("evaluation/metrics/frechet.py", "import data.something"),
    ],
)
def test_a_broken_rule_is_seen(relative: str, source: str) -> None:
    assert len(broken_rules(relative, source)) == 1


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("sdxs_lightning/networks/ema.py", "from sdxs_lightning.families import Family\nimport torch"),
        ("data/prepare/pairs/sampler.py", "from sdxs_lightning.families.sd import StableDiffusion"),
        ("data/shards/index.py", "from sdxs_lightning.core.batch import TrainingBatch"),
        ("evaluation/callbacks/run_report.py", "from data.toy.world import caption_of"),
        ("evaluation/images/shard_images.py", "from data.shards.index import ShardSet"),
    ],
)
def test_what_is_allowed_passes(relative: str, source: str) -> None:
    assert broken_rules(relative, source) == []
