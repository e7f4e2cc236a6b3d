"""A whole distillation at tiny size: real networks, real shards, a real Trainer, on the CPU and within seconds."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data.prepare.images.image_files import encode_image
from data.shards.datamodule import ShardDataModule
from data.shards.layout import Content
from data.shards.writer import Member, ShardWriter, encode_latents
from sdxs_lightning.core.seeding import Stream, normal
from sdxs_lightning.families.sd import StableDiffusion
from sdxs_lightning.families.sdxl import StableDiffusionXL
from sdxs_lightning.networks.discriminator import Discriminator
from sdxs_lightning.networks.fake_score import FakeScore
from sdxs_lightning.networks.student_generator import StudentGenerator
from sdxs_lightning.objectives.adversarial import DiffusionAdversarial
from sdxs_lightning.objectives.regression import Regression
from sdxs_lightning.objectives.term import LatentSample
from sdxs_lightning.pairs.target_pairs import PairSettings
from sdxs_lightning.stages.distillation.step import OneStepDistillation
from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule
from tests.helpers.tiny import LATENT_SHAPE, save_tiny_sd, save_tiny_sdxl, tiny_batch

Stage = TypeVar("Stage", bound=OneStepDistillation)
WARMUP_ONLY = UpdateSchedule(max_student_updates=9, warmup_updates=9)
WARMUP: dict[str, Any] = {
    "pairs": PairSettings(count=8, sampler_steps=2, sampler_batch_size=4),
    "regression": Regression(),
}
KINDS = ("sd-epsilon", "sd-v_prediction", "sdxl-epsilon")


class Captions:
    """What of a DataModule the pairs in memory ask for."""

    def train_captions(self, count: int) -> list[str]:
        return tiny_batch(5).captions


def save_base(kind: str, folder: Path, stages: int = 3) -> Path:
    """Writes the base of one of KINDS with so many stages, once."""
    path = folder / kind
    if not path.exists():
        family, prediction_type = kind.split("-")
        save = save_tiny_sd if family == "sd" else save_tiny_sdxl
        save(path, prediction_type, stages=stages)  # type: ignore[arg-type]
    return path


def save_shards(folder: Path, samples: int = 96) -> Path:
    """Writes latent shards of the samples of `tiny_batch` with condition images, once."""
    if not folder.exists():
        batch = tiny_batch(samples)
        assert batch.latents is not None
        with ShardWriter(folder, samples_per_shard=samples // 2) as writer:
            for caption, latents in zip(batch.captions, batch.latents, strict=True):
                control = Image.fromarray(tiny_control(latents))
                members: dict[str, Member] = {"txt": caption, "latent.safetensors": encode_latents(latents)}
                writer.write(members | {"cond.png": encode_image(control, "png", 100)})
    return folder


def tiny_control(latents: Tensor) -> NDArray[np.uint8]:
    """A condition image (32, 32, 3) that depends on the latents: white where the first channel is positive."""
    mask = (latents[0] > 0).numpy().repeat(2, 0).repeat(2, 1)
    return np.repeat(mask[:, :, None].astype(np.uint8) * 255, 3, axis=2)


def control_batch(size: int) -> Any:
    """A batch with the condition images of its latents."""
    batch = tiny_batch(size)
    assert batch.latents is not None
    controls = torch.stack([torch.from_numpy(tiny_control(one)).permute(2, 0, 1) for one in batch.latents])
    return replace(batch, control_images=controls.float() / 255)


def family_of(base: Path) -> StableDiffusion | StableDiffusionXL:
    """The family of a tiny base."""
    return (StableDiffusionXL if base.name.startswith("sdxl") else StableDiffusion)(str(base))


def distillation(
    base: Path, *, gan: bool = True, optimizer: Any = None, **settings: Any
) -> OneStepDistillation:
    """A distillation with the defaults of the tests: SGD, ratio 1, GAN weights that can be seen in gradients."""
    optimizer = optimizer or partial(torch.optim.SGD, lr=0.1)
    settings.setdefault(
        "update_schedule", UpdateSchedule(max_student_updates=10**6, fake_score_updates_per_student_update=1)
    )
    if gan:
        settings.setdefault("discriminator", Discriminator(optimizer))
        settings.setdefault("adversarial", DiffusionAdversarial(student_weight=0.3, discriminator_weight=0.3))
    settings.setdefault("student", StudentGenerator(optimizer))
    settings.setdefault("fake_score", FakeScore(optimizer))
    return OneStepDistillation(family=family_of(base), ema_decay=settings.pop("ema_decay", 0.9), **settings)


def fit(
    module: OneStepDistillation,
    shards: Path,
    batches: int,
    batch_size: int = 4,
    ckpt_path: str | None = None,
    callbacks: list[Callback] | None = None,
    shuffled: bool = True,
    contents: list[Content] | None = None,
    **settings: Any,
) -> Trainer:
    """Trains for so many micro-batches in all, counted from the start of the run."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(
        max_epochs=-1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[StopAfter(batches), *(callbacks or [])],
        **defaults | settings,
    )
    window = 2 if shuffled else 0
    data = ShardDataModule(str(shards), batch_size, shuffle_window_shards=window, contents=contents)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


class StopAfter(Callback):
    """Ends a run after a number of batches; Trainer(max_steps) would count optimizers instead."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if batches_of(trainer) >= self.batches:
            trainer.should_stop = True


def batches_of(trainer: Trainer) -> int:
    """Batches of the run, called in on_train_batch_end; Lightning counts the batch as completed after that hook."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.completed + 1


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A detached copy of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def moved(before: dict[str, Tensor], module: torch.nn.Module, role: str) -> float:
    """Share of a role's tensors that changed."""
    now = weights(module)
    names = [name for name in before if name.split(".")[0] == role]
    return sum(not torch.equal(before[name], now[name]) for name in names) / len(names)


def built(module: Stage) -> Stage:
    """With its networks."""
    module.configure_model()
    return module


def sample_of(module: OneStepDistillation, seed: int = 0) -> LatentSample:
    """The student's sample for three prompts, with its graph."""
    batch = tiny_batch(3)
    noise = normal(seed, Stream.STUDENT_NOISE, batch.positions, LATENT_SHAPE)
    conditioning = module.family.encode_prompts(batch.captions)
    latents = module.student(noise, conditioning)
    return LatentSample(latents=latents, conditioning=conditioning, positions=batch.positions, seed=seed)
