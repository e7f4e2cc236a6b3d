"""The tiny run that tests of resuming take up, and what they look at in its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sdxs_lightning.callbacks import checkpoint_folder as folders

ADAM = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
SCHEDULE = {
    "class_path": "sdxs_lightning.training.lr_schedules.TwoPhaseLR",
    "init_args": {"total_updates": 10, "final_factor": 0.5},
}
Change = Callable[[dict[str, Any]], None]


def checkpoints(folder: Path) -> list[str]:
    return [path.name for path in folders.complete_checkpoints(folder / "run" / "checkpoints")]


def written(folder: Path) -> dict[str, bytes]:
    """Contents of the small files of a run."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".ckpt")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def refused_beside_logs(resume: Callable[..., tuple[int, str]], folder: Path) -> bool:
    """Whether a new start is refused before it sets the logs aside that are in the run's folder."""
    run = folder / "run"
    (run / "logs").mkdir()
    (run / "logs" / "metrics.csv").write_text("step,loss\n1,2\n")
    before = written(run)

    def logged(config: dict[str, Any]) -> None:
        logger = {"class_path": "sdxs_lightning.training.csv_log.RunCSVLogger"}
        config["trainer"]["logger"] = [logger | {"init_args": {"save_dir": str(run)}}]

    code, _ = resume(logged, "null")
    return code == 2 and written(run) == before


def saved(folder: Path) -> dict[str, Any]:
    newest = folders.newest_complete_checkpoint(folder / "run" / "checkpoints")
    assert newest is not None
    loaded: dict[str, Any] = torch.load(newest / folders.STATE, weights_only=True)
    return loaded


def same(one: Any, two: Any, where: str = "") -> None:
    """Equal to the last bit, through dicts, lists and tensors."""
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            same(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for i, (first, second) in enumerate(zip(one, two, strict=True)):
            same(first, second, f"{where}[{i}]")
    else:
        assert one == two, where
