"""The public names of the package: complete, lazy, and typed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sdxs_lightning


def test_importing_the_package_loads_no_framework() -> None:
    code = (
        "import sys, sdxs_lightning as s; assert 'OneStepDistillation' in dir(s)\n"
        "print(sorted({'torch', 'diffusers', 'lightning', 'transformers'} & set(sys.modules)))\n"
        "s.TimestepRange; print('torch' in sys.modules, 'diffusers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "True False"]


def test_every_public_name_is_what_type_checkers_see() -> None:
    tree = ast.parse(Path(sdxs_lightning.__file__).read_text())
    seen = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == {name: f"sdxs_lightning.{module}" for name, module in sdxs_lightning._MODULES.items()}
    assert sorted(seen) == sdxs_lightning.__all__
    for name, module in seen.items():
        found = getattr(sdxs_lightning, name)
        assert found.__name__ == name and found.__module__ == (
            module if name != "Family" else found.__module__
        )


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="module 'sdxs_lightning' has no attribute 'Nothing'"):
        _ = sdxs_lightning.Nothing
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        from sdxs_lightning import Nothing  # noqa: F401
