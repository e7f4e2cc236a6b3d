"""The validation set of the DataModule: the same batches after every epoch, and a training that does not notice."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden

from data.shards.datamodule import ShardDataModule
from data.shards.order.buckets import Buckets
from data.shards.writer import ShardWriter, encode_latents
from sdxs_lightning.core.batch import TrainingBatch


def shards(path: Path, name: str, count: int) -> str:
    with ShardWriter(path / name, samples_per_shard=7) as writer:
        for number in range(count):
            latents = torch.full((4, 2, 2), float(number))
            writer.write({"latent.safetensors": encode_latents(latents), "txt": f"{name} {number}"})
    return str(path / name)


class Recorder(pl.LightningModule):
    """Writes down what it is given; has nothing to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.trained: list[list[str]] = []
        self.validated: list[list[str]] = []

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> None:
        self.trained.append(batch.captions)

    def validation_step(self, batch: TrainingBatch, batch_idx: int) -> None:
        self.validated.append(batch.captions)

    def configure_optimizers(self) -> None:
        return None


def run(folder: str, **data: Any) -> Recorder:
    module = Recorder()
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, num_sanity_val_steps=0, enable_model_summary=False, **quiet
    )
    trainer.fit(module, ShardDataModule(folder, 4, **data))
    return module


@pytest.mark.parametrize("workers", [0, 1])
def test_the_same_batches_in_written_order_after_every_epoch(tmp_path: Path, workers: int) -> None:
    train, val = shards(tmp_path, "train", 17), shards(tmp_path, "val", 10)
    plain = run(train, num_workers=workers)
    with_val = run(train, num_workers=workers, val_shards=val)
    epoch = [[f"val {number}" for number in range(first, first + 4)] for first in (0, 4)]
    assert with_val.validated == epoch + epoch
    assert plain.validated == [] and with_val.trained == plain.trained and len(plain.trained) == 8


def test_without_a_validation_set_lightning_sees_no_loader_for_one(tmp_path: Path) -> None:
    train = shards(tmp_path, "train", 4)
    assert not is_overridden("val_dataloader", ShardDataModule(train, 4))
    assert is_overridden("val_dataloader", ShardDataModule(train, 4, val_shards=train))


def test_buckets_are_refused_beside_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.val_shards is read at one size and data.buckets makes many"):
        ShardDataModule("train", 4, contents=["images"], buckets=Buckets(), val_shards="val")
