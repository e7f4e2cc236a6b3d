"""The result files of evaluation/results and the manual pages that quote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "evaluation" / "results"
PAGES = {name: (ROOT / "evaluation" / name).read_text() for name in ("README.md", "results/README.md")}
PAGE = PAGES["results/README.md"]


def result(name: str) -> dict[str, Any]:
    """The content of a result file."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content
