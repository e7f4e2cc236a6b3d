"""The families know which base is which: every other file asks a family for what it needs, and its kind is no question."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdxs_lightning.families.detect import FAMILIES, detect_family
from tests.helpers.tiny import save_tiny_sd, save_tiny_sdxl

ROOT = Path(__file__).parents[2]
FAMILY_NAMES = {family.__name__ for family in FAMILIES.values()}
FLAGS = ("sdxl", "is_sdxl", "is_xl", "is_sd")


def questions(tree: ast.AST) -> Iterator[str]:
    """Comparisons with a pipeline's class name, checks for a family's class, and attributes or parameters that are flags."""
    for node in ast.walk(tree):
        match node:
            case ast.Compare():
                operands = [node.left, *node.comparators]
                literals = {
                    one.value for part in operands for one in ast.walk(part) if isinstance(one, ast.Constant)
                }
                attributes = {one.attr for one in operands if isinstance(one, ast.Attribute)}
                if literals & FAMILIES.keys() or "pipeline_class" in attributes:
                    yield f"line {node.lineno}: {ast.unparse(node)}"
            case ast.Call(func=ast.Name("isinstance" | "issubclass"), args=[_, kinds]):
                if FAMILY_NAMES & {one.id for one in ast.walk(kinds) if isinstance(one, ast.Name)}:
                    yield f"line {node.lineno}: {ast.unparse(node)}"
            case ast.Attribute(attr=name) | ast.arg(arg=name) | ast.AnnAssign(target=ast.Name(id=name)):
                if name in FLAGS:
                    yield f"line {node.lineno}: {name}"


@pytest.mark.parametrize("package", ["sdxs_lightning", "data", "evaluation"])
def test_no_other_file_asks_which_family_it_is(package: str) -> None:
    families = ROOT / "sdxs_lightning" / "families"
    found = {
        path.relative_to(ROOT).as_posix(): asked
        for path in (ROOT / package).rglob("*.py")
        if families not in path.parents and (asked := list(questions(ast.parse(path.read_text()))))
    }
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "if family.pipeline_class == 'StableDiffusionPipeline': pass",
        "if name != 'StableDiffusionXLPipeline': pass",
        "if isinstance(family, (int, StableDiffusionXL)): pass",
        "def build(sdxl: bool): pass",
        "if teacher.sdxl: pass",
    ],
)
def test_such_a_question_is_found(source: str) -> None:
    assert list(questions(ast.parse(source)))


def test_a_base_is_loaded_by_the_family_that_its_pipeline_names(tmp_path: Path) -> None:
    assert list(FAMILIES) == ["StableDiffusionPipeline", "StableDiffusionXLPipeline"]
    for save, pipeline_class in zip((save_tiny_sd, save_tiny_sdxl), FAMILIES, strict=True):
        family = detect_family(str(save(tmp_path / pipeline_class)))
        assert type(family) is FAMILIES[pipeline_class] and family.pipeline_class == pipeline_class
    index = tmp_path / "StableDiffusionPipeline" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "FluxPipeline"}))
    accepted = "accepted are StableDiffusionPipeline, StableDiffusionXLPipeline"
    with pytest.raises(ValueError, match=f"holds a FluxPipeline, {accepted}"):
        detect_family(str(index.parent))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        detect_family(str(tmp_path / "nowhere"))
