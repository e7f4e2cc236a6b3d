"""A run of the real command line at tiny size: a base, shards and a YAML file in one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.helpers.tiny_distillation import save_base, save_shards

ROOT = Path(__file__).resolve().parents[2]


def tiny_config(folder: Path, **update_schedule: int) -> dict[str, Any]:
    """The configuration of a tiny distillation; base and shards are written to `folder`, its run to `folder/run`."""
    base, shards = save_base("sd-epsilon", folder, stages=2), save_shards(folder / "shards")
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}}
    networks = "sdxs_lightning.networks"
    callbacks = "sdxs_lightning.callbacks"
    return {
        "seed_everything": 0,
        "model": {
            "class_path": "sdxs_lightning.stages.distillation.step.OneStepDistillation",
            "init_args": {
                "seed": "${seed_everything}",
                "family": {
                    "class_path": "sdxs_lightning.families.sd.StableDiffusion",
                    "init_args": {"base": str(base)},
                },
                "student": {
                    "class_path": f"{networks}.student_generator.StudentGenerator",
                    "init_args": {"optimizer": sgd},
                },
                "fake_score": {
                    "class_path": f"{networks}.fake_score.FakeScore",
                    "init_args": {"optimizer": sgd},
                },
                "update_schedule": {"max_student_updates": 4, "fake_score_updates_per_student_update": 1}
                | update_schedule,
            },
        },
        "data": {
            "class_path": "data.shards.datamodule.ShardDataModule",
            "init_args": {"shards": str(shards), "batch_size": 2, "seed": "${seed_everything}"},
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": str(folder / "run"),
            "max_epochs": -1,
            "use_distributed_sampler": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": False,
            "callbacks": [
                {"class_path": f"{callbacks}.nan_guard.NanGuard", "init_args": {"read_every_n_batches": 1}},
                {
                    "class_path": f"{callbacks}.checkpointing.Checkpointing",
                    "init_args": {"every_n_student_updates": 2},
                },
                {"class_path": f"{callbacks}.interruption.Interruption"},
            ],
        },
    }


def write_config(path: Path, config: dict[str, Any]) -> Path:
    """The configuration as YAML."""
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path
