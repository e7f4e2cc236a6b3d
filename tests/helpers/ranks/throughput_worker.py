"""A rank of a run in which rank 1 is slow, for `tests/evaluation/test_throughput.py`."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer

from data.shards.datamodule import ShardDataModule
from evaluation.callbacks.progress import Throughput
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from sdxs_lightning.training.csv_log import RunCSVLogger
from sdxs_lightning.training.run_logs import RunJSONLogger, RunTensorBoardLogger
from sdxs_lightning.training.sharding import ShardedNetworks
from tests.helpers.tiny_distillation import distillation

SLOW_SECONDS = 1.0


def train_with_a_slow_rank(world: Path, out: Path) -> int:
    """Trains three iterations of one kind under each strategy."""
    for name, strategy in (("fsdp2", ShardedNetworks()), ("ddp", "ddp")):
        schedule = UpdateSchedule(max_student_updates=3, fake_score_updates_per_student_update=1)
        module = distillation(world / "sd-epsilon", update_schedule=schedule)
        sample = module._sample

        def slow(*args: Any, sample: Any = sample) -> Any:
            if os.environ["LOCAL_RANK"] == "1":
                time.sleep(SLOW_SECONDS)
            return sample(*args)

        vars(module)["_sample"] = slow
        throughput = Throughput(every_n_batches=1)
        folder = out if name == "ddp" else out / "sharded"
        trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy=strategy,
            max_epochs=-1,
            default_root_dir=folder,
            logger=[
                RunCSVLogger(str(folder)),
                RunTensorBoardLogger(str(folder)),
                RunJSONLogger(str(folder)),
            ],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
            callbacks=[throughput],
        )
        trainer.fit(module, datamodule=ShardDataModule(str(world / "shards"), 2))
        if dist.get_rank() == 0:
            (out / f"{name}.json").write_text(json.dumps(throughput.latest))
            (out / "host.json").write_text(json.dumps(socket.gethostname()))
    return 0
