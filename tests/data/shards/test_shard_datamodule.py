"""Global batches independent of ranks and workers; resume at the exact sample under Lightning."""

import json
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint

from data.shards.datamodule import ShardDataModule
from data.shards.dataset import ShardDataset
from data.shards.faults import Faults
from data.shards.index import ShardSet
from data.shards.loader import Pass, ShardLoader
from data.shards.order.buckets import Buckets
from data.shards.order.mixture import Source
from data.shards.order.sample_order import SampleOrder
from data.shards.writer import ShardWriter, encode_latents
from sdxs_lightning.core.batch import TrainingBatch

SAMPLES, BATCH = 50, 8  # six batches in an epoch, two samples left for the next


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    with ShardWriter(path, samples_per_shard=11) as writer:
        for number in range(SAMPLES):
            latents = torch.full((4, 2, 2), float(number))
            writer.write({"latent.safetensors": encode_latents(latents), "txt": f"caption {number}"})
    return path


def loader_of(folder: Path, batch_size: int, rank: int, world_size: int, workers: int) -> ShardLoader:
    shards = ShardSet.open(folder)
    dataset = ShardDataset(shards, SampleOrder(shards.sizes, seed=1, shuffle_window_shards=2))
    return ShardLoader(dataset, batch_size, rank, world_size, workers)


def global_batches(
    folder: Path, world_size: int, workers: int, epochs: int
) -> list[list[tuple[int, str, str, float]]]:
    """What all ranks together read, batch by batch: position, id, caption, a value of the latents."""
    ranks = []
    for rank in range(world_size):
        loader = loader_of(folder, 24 // world_size, rank, world_size, workers)
        ranks.append([batch for _ in range(epochs) for batch in loader])
        loader.close()
    return [[sample for batch in batches for sample in rows(batch)] for batches in zip(*ranks, strict=True)]


def rows(batch: TrainingBatch) -> list[tuple[int, str, str, float]]:
    assert batch.latents is not None
    values = batch.latents[:, 0, 0, 0].tolist()
    return list(zip(batch.positions.tolist(), batch.sample_ids, batch.captions, values, strict=True))


@pytest.mark.parametrize(
    ("world_size", "workers"), [*((n, 0) for n in (2, 3, 4, 6, 8)), (1, 1), (1, 2), (3, 2)]
)
def test_global_batches_do_not_depend_on_ranks_and_workers(
    folder: Path, world_size: int, workers: int
) -> None:
    expected = global_batches(folder, 1, 0, epochs=2)
    assert [[sample[0] for sample in batch] for batch in expected] == [
        list(range(g * 24, g * 24 + 24)) for g in range(4)
    ]
    assert all(caption == f"caption {value:.0f}" for batch in expected for _, _, caption, value in batch)
    assert global_batches(folder, world_size, workers, epochs=2) == expected


def test_exactly_once_though_the_batch_does_not_divide(folder: Path) -> None:
    loader = loader_of(folder, BATCH, 0, 1, 0)
    assert len(loader) == 6
    ids = [sample_id for _ in range(25) for batch in loader for sample_id in batch.sample_ids]
    for epoch in range(len(ids) // SAMPLES):
        assert len(set(ids[epoch * SAMPLES : (epoch + 1) * SAMPLES])) == SAMPLES


def test_reading_leaves_the_global_random_state_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    next(iter(loader_of(folder, BATCH, 0, 1, 0)))
    assert torch.equal(before, torch.get_rng_state())


def test_too_few_samples(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"hold 50 samples, fewer than one global batch of 64 \(data.batch_size 32 on 2"
    ):
        loader_of(folder, 32, 0, 2, 0)


class Recorder(pl.LightningModule):
    """Trains one number, by manual optimisation, and keeps what it was given."""

    def __init__(self, report: Path | None = None, fail_at: int | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[list[int], list[str]]] = []
        self.report, self.fail_at = report, fail_at

    def training_step(self, batch: TrainingBatch, batch_index: int) -> None:
        """One step on the batch."""
        if len(self.seen) == self.fail_at:
            raise RuntimeError("interrupted")
        self.seen.append((batch.positions.tolist(), batch.sample_ids))
        assert batch.latents is not None
        self.manual_backward((self.weight * batch.latents.mean()).sum())
        optimizer: Any = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()

    def on_train_end(self) -> None:
        """Leave what this rank saw, for the test of several processes."""
        if self.report is not None:
            Path(f"{self.report}-{self.global_rank}.json").write_text(json.dumps(self.seen))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(
    folder: Path | None,
    *,
    workers: int = 0,
    batch_size: int = BATCH,
    checkpoint: Path | None = None,
    module: Recorder | None = None,
    data: dict[str, Any] | None = None,
    **trainer_options: Any,
) -> list[tuple[list[int], list[str]]]:
    module = module or Recorder()
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 3,
        "logger": False,
        "enable_checkpointing": False,
    }
    options |= {"enable_progress_bar": False, "enable_model_summary": False, **trainer_options}
    shards: str | list[str] = [] if folder is None else str(folder)
    datamodule = ShardDataModule(shards, batch_size, num_workers=workers, **(data or {}))
    pl.Trainer(**options).fit(module, datamodule, ckpt_path=checkpoint)
    return module.seen


@pytest.fixture(scope="module")
def uninterrupted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path]:
    """Three epochs with a checkpoint after each step and after each epoch."""
    kept = tmp_path_factory.mktemp("checkpoints")
    every: dict[str, Any] = {"dirpath": kept, "save_top_k": -1, "auto_insert_metric_name": False}
    callbacks = [
        ModelCheckpoint(filename="step-{step}", every_n_train_steps=1, **every),
        ModelCheckpoint(filename="epoch-{epoch}", every_n_epochs=1, save_on_train_epoch_end=True, **every),
    ]
    seen = fit(folder, callbacks=callbacks, enable_checkpointing=True)
    assert [positions for positions, _ in seen] == [
        list(range(g * BATCH, g * BATCH + BATCH)) for g in range(18)
    ]
    return seen, kept


@pytest.mark.parametrize(("workers", "steps"), [(0, range(1, 18)), (2, (4, 6, 13))])
def test_resume_after_any_step(
    uninterrupted: tuple[list[Any], Path], folder: Path, workers: int, steps: range
) -> None:
    seen, kept = uninterrupted
    for step in steps:
        assert fit(folder, workers=workers, checkpoint=kept / f"step-{step}.ckpt") == seen[step:], step


def test_resume_after_an_epoch(uninterrupted: tuple[list[Any], Path], folder: Path) -> None:
    seen, kept = uninterrupted
    for epoch in (0, 1):
        assert fit(folder, checkpoint=kept / f"epoch-{epoch}.ckpt") == seen[6 * (epoch + 1) :]


def test_resume_after_a_failure(uninterrupted: tuple[list[Any], Path], folder: Path, tmp_path: Path) -> None:
    """The batch in which a run fails is given again."""
    seen, _ = uninterrupted
    saving = ModelCheckpoint(tmp_path, filename="failed", save_on_exception=True, every_n_train_steps=1000)
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(folder, module=Recorder(fail_at=9), callbacks=[saving], enable_checkpointing=True)
    checkpoint = next(tmp_path.glob("*.ckpt"))
    assert fit(folder, workers=2, checkpoint=checkpoint) == seen[9:]


def test_short_epochs_pass_no_sample_over(uninterrupted: tuple[list[Any], Path], folder: Path) -> None:
    seen, _ = uninterrupted
    assert fit(folder, workers=2, limit_train_batches=4, max_epochs=4) == seen[:16]


def test_only_what_is_left_of_an_epoch_is_read_ahead(
    uninterrupted: tuple[list[Any], Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[Pass] = []
    decide = ShardDataModule._next_pass

    def recorded(self: ShardDataModule, batches_per_epoch: int) -> Pass:
        passes.append(decide(self, batches_per_epoch))
        return passes[-1]

    monkeypatch.setattr(ShardDataModule, "_next_pass", recorded)
    fit(folder, checkpoint=uninterrupted[1] / "step-4.ckpt")
    assert passes == [Pass(4, 2), Pass(6, 6), Pass(12, 6)]
    passes.clear()
    fit(folder, limit_train_batches=4, max_epochs=2)
    assert passes == [Pass(0, 4), Pass(4, 4)]


@pytest.mark.timeout(120)  # ranks that wait for each other would wait for ever
def test_two_processes_continue_what_one_began(
    uninterrupted: tuple[list[Any], Path], folder: Path, tmp_path: Path
) -> None:
    """Lightning leaves our loader alone under DDP; half the batch on two ranks is the same global batch."""
    seen, kept = uninterrupted
    fit(
        folder,
        batch_size=BATCH // 2,
        checkpoint=kept / "step-4.ckpt",
        module=Recorder(report=tmp_path / "rank"),
        strategy="ddp_fork",
        devices=2,
        max_epochs=2,
    )
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    together = [(first[0] + second[0], first[1] + second[1]) for first, second in zip(*ranks, strict=True)]
    assert together == seen[4:12]


@pytest.mark.parametrize(
    ("batch_size", "data", "message"),
    [
        (4, {}, r"written with global_batch_size 8, but this run has 4: .* choose data.batch_size so that"),
        (8, {"seed": 1}, r"with seed 0, but this run has 1: .* set data.seed back"),
        (8, {"shuffle_window_shards": 2}, "with shuffle_window_shards 64, but this run has 2"),
    ],
)
def test_resume_into_another_order_is_refused(
    uninterrupted: tuple[list[Any], Path], folder: Path, batch_size: int, data: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(folder, batch_size=batch_size, data=data, checkpoint=uninterrupted[1] / "step-4.ckpt")


def test_resume_into_other_shards_is_refused(uninterrupted: tuple[list[Any], Path], tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        for number in range(SAMPLES):
            writer.write(
                {"latent.safetensors": encode_latents(torch.zeros(4, 2, 2)), "txt": f"other {number}"}
            )
    with pytest.raises(
        ValueError, match=r"written with shards .* point data.shards at the shards that the run began with"
    ):
        fit(tmp_path, checkpoint=uninterrupted[1] / "step-4.ckpt")


def test_latents_of_another_vae_are_other_samples(folder: Path, tmp_path: Path) -> None:
    """They have the same keys and sizes; `prepare latents` keeps what they were made with beside them."""

    def data(vae: str | None, name: str) -> ShardDataModule:
        copy = shutil.copytree(folder, tmp_path / name)
        if vae is not None:
            (copy / "latents.json").write_text(json.dumps({"vae_fingerprint": vae, "model": name}))
        return ShardDataModule(str(copy), 2)

    before = data("a", "first").state_dict()
    for same in (data("a", "moved"), data(None, "without settings")):
        same.load_state_dict(before)
    with pytest.raises(ValueError, match=r"written with vae_fingerprint \(set 0\) a, but this run has b"):
        data("b", "again").load_state_dict(before)


def test_every_setting_can_stand_in_a_yaml(folder: Path, tmp_path: Path) -> None:
    """The types are those that LightningCLI reads."""
    parser = ArgumentParser()
    parser.add_class_arguments(ShardDataModule, "data")
    file = tmp_path / "data.yaml"
    file.write_text(
        f"""
data:
  shards: []
  sources: [{{shards: "{folder}", weight: 3}}, {{shards: ["{folder}"]}}]
  batch_size: 4
  contents: [latents]
  buckets: {{side_px: 512, step_px: 64, max_aspect: 1.5}}
  crop: random
  flip: true
  faults: {{budget: 5, quarantine: "{tmp_path}/bad.jsonl"}}
  cache_folder: "{tmp_path}/cache"
  cache_gb: 2.5
  condition: {{class_path: data.conditions.Canny}}
"""
    )
    made = parser.instantiate(parser.parse_path(file))
    assert isinstance(made.data, ShardDataModule)
    assert made.data.settings.sources == [Source(str(folder), 3.0), Source([str(folder)])]
    assert made.data.settings.buckets == Buckets(512, 64, 1.5) and made.data.settings.faults == Faults(
        5, f"{tmp_path}/bad.jsonl"
    )
    made.data.setup()
    assert made.data.dataset is not None and len(made.data.dataset) == 2 * SAMPLES


def test_resume_with_mixture_and_buckets_is_one_integer_too(tmp_path: Path) -> None:
    """Under Lightning: the same two-size latents after a checkpoint in the middle of an epoch."""
    for name, count in (("a", 30), ("b", 20)):
        with ShardWriter(tmp_path / name, samples_per_shard=7) as writer:
            for number in range(count):
                latents = torch.full((4, 2, 2 + number % 2), float(number))
                writer.write({"latent.safetensors": encode_latents(latents), "txt": f"{name} {number}"})
    sources = [Source(str(tmp_path / "a"), 2.0), Source(str(tmp_path / "b"))]
    data: dict[str, Any] = {"sources": sources, "buckets": Buckets()}
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    seen = fit(None, batch_size=4, data=data, callbacks=[saving], enable_checkpointing=True)
    assert len(seen) == 36
    assert fit(None, batch_size=4, data=data, workers=2, checkpoint=tmp_path / "step=20.ckpt") == seen[20:]
    with pytest.raises(ValueError, match="written with buckets Buckets.* but this run has None"):
        fit(None, batch_size=4, data={"sources": sources}, checkpoint=tmp_path / "step=20.ckpt")


def test_refuses_bad_settings(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.batch_size is 0"):
        ShardDataModule(str(folder), 0)
    with pytest.raises(ValueError, match=r"data\.num_workers is -1"):
        ShardDataModule(str(folder), 8, num_workers=-1)
    with pytest.raises(ValueError, match=r"trainer\.overfit_batches has no meaning"):
        fit(folder, overfit_batches=2)
    with pytest.raises(FileNotFoundError, match="There is no shard or folder"):
        fit(folder / "nowhere")
