"""Who imports whom: the rules of the rooms, read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("sdxs_lightning", "data", "evaluation", "tests", "train")

PURE = {"batch", "noise_schedule", "timesteps", "guidance", "latents", "seeding", "pair_noise", "errors"}
"""Modules of sdxs_lightning that know neither Lightning nor how models are loaded."""

MIDDLE = {"families", "surgery", "teacher", "objectives"}
"""They see the pure layer, and of each other what MIDDLE_MAY_SEE names."""

MIDDLE_MAY_SEE = {
    "families": {"teacher"},
    "surgery": {"families", "teacher"},
    "teacher": {"families"},
    "objectives": set[str](),
}

TOP = {
    "callbacks",
    "inference",
    "demo",
    "cli",
    "export",
    "config_errors",
    "null_flags",
    "checkpoint_folder",
    "plan",
    "prune",
}
"""They see everything of sdxs_lightning."""

EVALUATION_MAY_SEE = {"toy", "shards", "conditions", "prepare"}
"""Of data."""

PREPARING = ("data/prepare.py", "data/prepare/", "data/toy/")
"""Files of data that load models: they may see families, teacher and what trains the toy base."""


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


def layer_of(dotted: str) -> str:
    """`sdxs_lightning.modules.ema.StudentEma` -> `modules`."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else ""


def allowed(layer: str) -> set[str]:
    """Layers of sdxs_lightning that a layer of it may import."""
    if layer in PURE:
        return PURE
    if layer in MIDDLE:
        return PURE | {layer} | MIDDLE_MAY_SEE[layer]
    if layer == "modules":
        return PURE | MIDDLE | {"modules"}
    return PURE | MIDDLE | TOP | {"modules"}


def broken_rules(relative: str, source: str) -> list[str]:
    """Every import of a file that its place forbids."""
    package = ".".join(Path(relative).parent.parts)
    broken = []
    for name in imports(source, package):
        room = name.split(".")[0]
        if relative.startswith("sdxs_lightning/"):
            layer = layer_of(relative.removesuffix(".py").replace("/", "."))
            if room in ("data", "evaluation", "tests", "train"):
                broken.append(f"{relative} imports {name}: sdxs_lightning knows neither data nor evaluation")
            elif room == "sdxs_lightning" and layer != "__init__" and layer_of(name) not in allowed(layer):
                broken.append(
                    f"{relative} imports {name}: {layer} may import {', '.join(sorted(allowed(layer)))}"
                )
            elif layer in PURE and room in ("lightning", "diffusers", "transformers"):
                broken.append(
                    f"{relative} imports {name}: the pure layer has no Lightning and loads no models"
                )
        elif relative.startswith("data/"):
            if room in ("evaluation", "tests", "train"):
                broken.append(f"{relative} imports {name}: data knows sdxs_lightning only")
            elif (
                room == "sdxs_lightning" and not relative.startswith(PREPARING) and layer_of(name) not in PURE
            ):
                broken.append(f"{relative} imports {name}: of sdxs_lightning, data sees the pure layer")
        elif room in ("tests", "train") or (room == "data" and layer_of(name) not in EVALUATION_MAY_SEE):
            seen = ", ".join(f"data.{name}" for name in sorted(EVALUATION_MAY_SEE))
            broken.append(f"{relative} imports {name}: evaluation sees sdxs_lightning and {seen}")
    return broken


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_imports_only_what_its_room_may_see(path: Path) -> None:
    assert broken_rules(path.relative_to(ROOT).as_posix(), path.read_text()) == []


def test_every_layer_is_known() -> None:
    entries = {
        path.stem for path in (ROOT / "sdxs_lightning").iterdir() if path.suffix == ".py" or path.is_dir()
    }
    entries -= {"__init__", "__pycache__"}
    unknown = {name for name in entries if not name.startswith(".")} - PURE - MIDDLE - TOP - {"modules"}
    assert unknown == set(), "say in this test which layer it belongs to"


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("sdxs_lightning/latents.py", "import lightning.pytorch as pl"),
        ("sdxs_lightning/latents.py", "from sdxs_lightning.families import Family"),
        ("sdxs_lightning/families/sd.py", "def f():\n    from sdxs_lightning.modules import ema"),
        ("sdxs_lightning/modules/ema.py", "from ..callbacks import export"),
        ("sdxs_lightning/modules/ema.py", "import data.shards.index"),
        ("data/shards/index.py", "from sdxs_lightning.families.sd import StableDiffusion"),
        ("data/toy/world.py", "import evaluation.frechet"),
        ("evaluation/frechet.py", "import data.something"),
    ],
)
def test_a_broken_rule_is_seen(relative: str, source: str) -> None:
    assert len(broken_rules(relative, source)) == 1


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("sdxs_lightning/modules/ema.py", "from sdxs_lightning.families import Family\nimport torch"),
        ("data/prepare.py", "from sdxs_lightning.families.sd import StableDiffusion"),
        ("data/shards/index.py", "from sdxs_lightning.batch import TrainingBatch"),
        ("evaluation/report.py", "from data.toy.world import caption_of"),
        ("evaluation/shard_images.py", "from data.shards.index import ShardSet"),
    ],
)
def test_what_is_allowed_passes(relative: str, source: str) -> None:
    assert broken_rules(relative, source) == []
