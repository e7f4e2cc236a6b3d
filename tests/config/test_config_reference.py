"""configs/REFERENCE.md is current, and says something about every option."""

from __future__ import annotations

from sdxs_lightning.config_reference import CONFIGS, reference


def test_the_reference_is_current() -> None:
    assert (CONFIGS / "REFERENCE.md").read_text() == reference(), (
        "run python -m sdxs_lightning.config_reference"
    )


def test_every_option_has_a_meaning() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 300
    assert [row for row in rows if row.endswith("|  |")] == []
