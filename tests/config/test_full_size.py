"""The reference configs of `miniaturise` at full size, without weights: the right student, and its taps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from evaluation.benchmarks.full_size import save_configs, sd21_unet_config
from sdxs_lightning.cli import TrainingCLI
from sdxs_lightning.memory_plan.weightless import WeightlessFamily
from sdxs_lightning.stages.prune_distill import PrunedUNetDistillation
from tests.config.test_configs import stack

STUDENTS = {
    # METHOD: SDXS-512 on SD-1.5 (315.75 M) and on SD-2.1 (318.70 M); BK-SDM tiny; Vega (745.2 M).
    "sd15/miniaturise.yaml": (859_520_964, 315_746_244),
    "sd21/miniaturise.yaml": (865_910_724, 318_695_364),
    "sdxl/miniaturise.yaml": (2_567_463_684, 745_225_604),
    "sd15/miniaturise_bk.yaml": (859_520_964, 323_384_964),
}


def base_of(name: str, folder: Path) -> Path:
    base = save_configs("sdxl" if name.startswith("sdxl") else "sd15", folder)
    if name.startswith("sd21"):
        (base / "unet" / "config.json").write_text(json.dumps(sd21_unet_config()))
    return base


@pytest.mark.parametrize(("name", "sizes"), STUDENTS.items())
def test_student_and_teacher_at_full_size(name: str, sizes: tuple[int, int], tmp_path: Path) -> None:
    base = base_of(name, tmp_path)
    arguments = [f"--model.init_args.family.init_args.base={base}", "--trainer.accelerator=cpu"]
    module = TrainingCLI([*stack(name), *arguments]).model
    assert isinstance(module, PrunedUNetDistillation)
    module.family = WeightlessFamily(module.family)
    with torch.device("meta"):
        module.configure_model()
    assert module.teacher is not None and module.ema is not None
    counts = [
        sum(p.numel() for p in m.parameters()) for m in (module.teacher.module, module.student, module.ema)
    ]
    assert counts == [sizes[0], sizes[1], sizes[1]]
    blocks = len(module.student.unet.up_blocks)
    assert len(module.taps) == 2 * blocks + (module.student.unet.mid_block is not None)
    if name.endswith("bk.yaml"):
        assert module.taps == {  # BK-SDM, as METHOD lists them
            "down_blocks.0": "down_blocks.0",
            "down_blocks.1": "down_blocks.1",
            "down_blocks.2.attentions.0.proj_out": "down_blocks.2.attentions.1.proj_out",
            "up_blocks.0": "up_blocks.1",
            "up_blocks.1": "up_blocks.2",
            "up_blocks.2": "up_blocks.3",
        }
        assert module.task is not None and module.task.weight == 1.0
