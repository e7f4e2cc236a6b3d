"""Stage `teacher`: trains a U-Net by denoising, from scratch or from another; the toy bases were made this way."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sdxs_lightning.core.batch import TrainingBatch
from sdxs_lightning.core.noise_schedule import target_of
from sdxs_lightning.core.seeding import Stream
from sdxs_lightning.core.timesteps import TimestepRange
from sdxs_lightning.families import Family
from sdxs_lightning.families.sources import resolve_unet
from sdxs_lightning.families.weights import load_network
from sdxs_lightning.networks.denoiser import Denoiser
from sdxs_lightning.networks.ema import check_decay
from sdxs_lightning.objectives.denoising import denoising_loss
from sdxs_lightning.stages.data_sample import data_sample
from sdxs_lightning.training.averaged_training import AveragedTraining
from sdxs_lightning.training.plannable import PlannedNetwork, PlannedPhase

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


BRANCH_OUTPUTS = ("to_out.0", "ff.net.2", "proj_out", "conv2", "add_embedding.linear_2")
"""Last layers of what a U-Net adds to its state: attentions, feed-forward layers, transformers, ResNet blocks, conditions."""
UP_RESNET = re.compile(r"up_blocks\.\d+\.resnets\.\d+\.conv1\.weight")
UP_LAYER = re.compile(r"(up_blocks\.\d+)\.(resnets|attentions)\.(\d+)")


def begin_from(unet: UNet2DConditionModel, weights: Mapping[str, Tensor]) -> list[str]:
    """Copies into a fresh U-Net the tensors of another that have its names and shapes.

    Last layers of branches that the other lacks become zero, and ResNet blocks that it lacks in an up block pass on their
    state without the skip connection, so that a U-Net which only adds these computes what the other does. All else that is
    not copied keeps its random values.

    Args:
        unet: changed in place.
        weights: of the other U-Net.

    Returns:
        Names of the tensors that were not copied.

    Raises:
        ValueError: if not one tensor fits.
    """
    own = unet.state_dict()
    added = _added_up_resnets(own, weights)
    weights = {_counted_from_the_last(name, added): tensor for name, tensor in weights.items()}
    fits = {
        name: tensor for name, tensor in weights.items() if name in own and own[name].shape == tensor.shape
    }
    if not fits:
        raise ValueError(
            "not one tensor of weights has the name and shape of one of this U-Net's: take a U-Net of the same kind, or set "
            "model.init_args.weights to null."
        )
    unet.load_state_dict(fits, strict=False)
    new = [name for name in own if name not in fits]
    with torch.no_grad():
        for name in new:
            if name not in weights and name.rpartition(".")[0].endswith(BRANCH_OUTPUTS):
                own[name].zero_()
        for block, count in added.items():
            for number in range(1, 1 + count):
                shortcut = f"{block}.resnets.{number}.conv_shortcut"
                torch.nn.init.dirac_(own[f"{shortcut}.weight"])
                own[f"{shortcut}.bias"].zero_()
    return new


def _added_up_resnets(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, int]:
    """By up block that both U-Nets have, how many more ResNet blocks the first has in it; without those of none."""

    def counts(names: Iterable[str]) -> Counter[str]:
        return Counter(name.split(".resnets.")[0] for name in names if UP_RESNET.fullmatch(name))

    found, before = counts(own), counts(weights)
    return {block: found[block] - before[block] for block in found if 0 < before[block] < found[block]}


def _counted_from_the_last(name: str, added: Mapping[str, int]) -> str:
    """The name that a layer of an up block has when ResNet blocks are added behind the first.

    An up block reads the skip connections in reverse order: those of the added blocks of the down block come first, and equal
    the one that the first block read before. The first may narrow the state, and the others not, so the added follow it.
    """
    part = UP_LAYER.match(name)
    if part is None or part[1] not in added or part[3] == "0":
        return name
    return f"{part[1]}.{part[2]}.{int(part[3]) + added[part[1]]}{name[part.end() :]}"


class DenoisingTraining(AveragedTraining):
    """Trains a U-Net of the base's config with the base's text encoder, latents and schedule.

    The loss is the mean square error of the network's raw output (epsilon or v). For v it weighs errors of the clean
    latents by SNR + 1, so that the high noise levels, where layout and binding are decided, count as much as the low ones.

    Args:
        family: the base; its `unet/config.json` is read, its U-Net weights are not.
        optimizer: called with the U-Net's parameters.
        lr_scheduler: called with the optimizer; stepped once per optimizer step.
        output: folder for the averaged U-Net, written at the end in fp16.
        caption_dropout: probability of dropping a caption ("" in SD, zeros in SDXL), for classifier-free guidance.
        ema_decay: decay of the averaged weights, per step.
        seed: seed of noise, timesteps and dropout, which are drawn per sample position.
        weights: U-Net or pipeline folder to begin from (see `begin_from`), whose architecture and prediction may be others;
            None begins from random weights.

    Raises:
        ValueError: if `weights` has no tensor that fits, unless caption_dropout is a share, or later for an `output` that
            cannot be a folder.
    """

    def __init__(
        self,
        family: Family,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable,
        output: str,
        caption_dropout: float = 0.1,
        ema_decay: float = 0.999,
        seed: int = 0,
        weights: str | None = None,
    ) -> None:
        from diffusers import UNet2DConditionModel

        super().__init__(optimizer, lr_scheduler)
        check_decay(ema_decay)
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"caption_dropout is a share in [0, 1], got {caption_dropout}.")
        self.family = family
        self.output, self.caption_dropout, self.seed = output, caption_dropout, seed
        unet = UNet2DConditionModel.from_config(family.unet_config)
        if weights is not None:
            new = begin_from(unet, load_network(UNet2DConditionModel, resolve_unet(weights)).state_dict())
            count = len(unet.state_dict())
            fresh = f"; fresh are {len(new)}, such as {new[0]}" if new else ""
            rank_zero_info(f"Began from '{weights}' with {count - len(new)} of {count} tensors{fresh}.")
        self.denoiser = Denoiser(unet, family.schedule, family.prediction_type)
        self.denoiser.to(memory_format=torch.channels_last)
        self.ema = AveragedModel(self.denoiser, multi_avg_fn=get_ema_multi_avg_fn(ema_decay)).requires_grad_(
            False
        )

    @property
    def learner(self) -> Denoiser:
        return self.denoiser

    def average(self) -> None:
        self.ema.update_parameters(self.denoiser)

    def setup(self, stage: str) -> None:
        """Makes the folder of the result: diffusers says at the end that it is none, and writes nothing."""
        try:
            Path(self.output).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"output is '{self.output}', which cannot be a folder ({error.strerror}); change model.init_args.output."
            ) from error

    def on_fit_start(self) -> None:
        """Moves the frozen text encoder to the device."""
        self.family.to(self.device)

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        """Denoising loss at uniformly drawn timesteps."""
        sample = data_sample(batch, self.family, self.seed, self.caption_dropout)
        schedule, kind = self.family.schedule, self.family.prediction_type
        noisy = sample.renoise(schedule, TimestepRange(0, 999), Stream.FAKE_TIMESTEP, Stream.FAKE_NOISE)
        prediction = self.denoiser(noisy.latents, noisy.timesteps, sample.conditioning)
        target = target_of(kind, sample.latents, noisy.noise, noisy.timesteps, schedule)
        loss = denoising_loss(prediction.output, target)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_fit_end(self) -> None:
        """Saves the averaged U-Net."""
        if self.trainer.is_global_zero:
            averaged = cast(Denoiser, self.ema.module)
            averaged.unet.half().save_pretrained(Path(self.output))

    def plan_networks(self) -> list[PlannedNetwork]:
        return [
            PlannedNetwork("denoiser", self.denoiser, "trained", self.optimizer, sharded=False),
            PlannedNetwork("ema", self.ema, "averaged", sharded=False),
        ]

    def plan_step(self, batch: TrainingBatch) -> Iterator[PlannedPhase]:
        self.training_step(batch, 0).backward()
        yield PlannedPhase("training step", ("denoiser",))
