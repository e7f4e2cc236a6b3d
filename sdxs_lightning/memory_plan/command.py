"""`--plan`: prints the memory plan of a parsed configuration and its stage."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.memory_plan.checkpoint_bytes import checkpoint_folders
from sdxs_lightning.memory_plan.hardware import read_hardware
from sdxs_lightning.memory_plan.planner import MemoryPlan, Planner
from sdxs_lightning.memory_plan.report import as_json, print_plan


def show_plan(stage: LightningModule, config: Mapping[str, Any]) -> MemoryPlan:
    """Computes and prints the plan, and writes it to the file of `--plan_json`.

    Args:
        stage: the stage constructed from the configuration.
        config: the complete parsed configuration, as plain values.

    Raises:
        UserError: for a configuration that the plan does not support, or a file that cannot be written.
    """
    trainer, data = config["trainer"], (config.get("data") or {}).get("init_args") or {}
    if not isinstance(data.get("batch_size"), int):
        raise UserError("--plan reads data.init_args.batch_size, and this configuration has none.")
    planner = Planner(
        stage,
        read_hardware(trainer, config.get("plan_gpu_gb")),
        batch_size=data["batch_size"],
        contents=_contents(data),
        accumulate=int(trainer.get("accumulate_grad_batches") or 1),
        decodes=_callbacks_decode(trainer.get("callbacks")),
    )
    plan = planner.plan()
    changes = [] if plan.fits else planner.changes(plan)
    folders = checkpoint_folders(plan.checkpoint, trainer.get("callbacks"), trainer.get("default_root_dir"))
    print_plan(plan, changes, folders)
    if config.get("plan_json"):
        path = Path(config["plan_json"])
        try:
            path.write_text(json.dumps(as_json(plan, changes, folders), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--plan_json '{path}' cannot be written ({error.strerror}).") from error
    return plan


def _contents(data: Mapping[str, Any]) -> list[str]:
    """Contents of the batches besides captions; the toy world's data names them by switches."""
    contents = [*(data.get("contents") or ["latents"]), *(["images"] if data.get("images") else [])]
    return [*contents, *(["control_images"] if data.get("condition") is not None else [])]


def _callbacks_decode(callbacks: Any) -> bool:
    """Whether a callback generates images, by its class attribute `decodes_images`."""
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        path = callback.get("class_path", "") if isinstance(callback, Mapping) else ""
        module, _, name = path.rpartition(".")
        if module and getattr(getattr(importlib.import_module(module), name, None), "decodes_images", False):
            return True
    return False
