"""A set of pairs as a job for several processes, one a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data.prepare.common.machine import device_of, same_bits
from data.prepare.common.processes import OnProgress
from data.prepare.pairs.prompts import open_prompts
from data.prepare.pairs.sampler import PairSampler
from data.prepare.pairs.settings import PairSettings
from data.prepare.pairs.shards import make_shards
from sdxs_lightning.callbacks.checkpoint_folder import write_failure
from sdxs_lightning.core.errors import CheckpointNotWritten, UserError


@dataclass(frozen=True)
class PairJob:
    """What every process has to know."""

    settings: PairSettings
    folder: Path
    batch_size: int
    device: str
    """ "cpu" or "cuda"."""
    processes: int

    def work(self, process: int, parts: Sequence[int], told: OnProgress) -> None:
        """Makes shards; see `processes.Job`."""
        torch.backends.cudnn.deterministic = True
        with same_bits(self.device):
            try:
                prompts = open_prompts(self.settings.captions)
                sampler = PairSampler(self.settings, prompts, device_of(self.device, process))
            except (OSError, ValueError) as error:
                raise UserError(f"--model or --unet: {error}") from error
            try:
                make_shards(sampler, self.folder, parts, self.batch_size, told)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"{self.batch_size} pairs at once do not fit the GPU; give a smaller --batch-size ({error})."
                ) from error
            except OSError as error:
                raise CheckpointNotWritten(
                    f"a shard could not be written to '{self.folder}': {write_failure(error)}."
                ) from error
