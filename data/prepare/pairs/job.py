"""The job that writes a set of pairs in several processes, one per GPU: shard by shard, each atomically, so that an interrupted
run loses only the shards in progress.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data.prepare.common.claims import ShardTask
from data.prepare.common.machine import device_of, same_bits
from data.prepare.common.options import SetPart
from data.prepare.common.processes import OnProgress
from data.prepare.common.set_folder import SetFolder
from data.prepare.common.settings_file import json_content
from data.prepare.common.shard_files import size_and_hash, stats_name, tar_name, unless_superseded
from data.prepare.pairs.pair_set import PairSet
from data.prepare.pairs.prompts import open_prompts
from data.prepare.pairs.sampler import PairSampler
from data.shards.writer import LATENT_MEMBER, Member, ShardWriter, encode_latents
from sdxs_lightning.callbacks.checkpoint_folder import write_failure
from sdxs_lightning.core.errors import CheckpointNotWritten, UserError


@dataclass(frozen=True)
class PairJob:
    """Makes shards of pairs; a `shared_work.ShardJob`."""

    pair_set: PairSet
    folder: SetFolder
    batch_size: int
    """Pairs per batch. Batches do not span shards, so that a shard does not depend on where a run was interrupted."""
    device: str
    """ "cpu" or "cuda"."""

    def is_complete(self, shard: int) -> bool:
        return self.folder.size(tar_name(shard)) is not None

    def work(self, process: int, tasks: Iterable[ShardTask], on_progress: OnProgress) -> None:
        torch.backends.cudnn.deterministic = True
        with same_bits(self.device):
            try:
                prompts = open_prompts(self.pair_set.captions)
                sampler = PairSampler(self.pair_set, prompts, device_of(self.device, process))
            except (OSError, ValueError) as error:
                raise UserError(str(error)) from error
            try:
                for task in tasks:
                    self._make_shard(task, sampler, on_progress)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"{self.batch_size} pairs at once do not fit the GPU; give a smaller --batch_size ({error})."
                ) from error
            except OSError as error:
                raise CheckpointNotWritten(
                    f"a shard could not be written to '{self.folder}': {write_failure(error)}."
                ) from error

    def _make_shard(self, task: ShardTask, sampler: PairSampler, on_progress: OnProgress) -> None:
        with unless_superseded(task.claim), self.folder.temporary_folder() as temporary:
            indices = self.pair_set.indices(task.number)
            with ShardWriter(temporary, samples_per_shard=len(indices)) as writer:
                for start in range(0, len(indices), self.batch_size):
                    batch = indices[start : start + self.batch_size]
                    _write(writer, sampler, batch)
                    on_progress(len(batch))
            stats: dict[str, Any] = {"count": len(indices), "successes": len(indices), "status_dict": {}}
            stats |= size_and_hash(writer.paths[0])
            if task.claim.held():
                # Before the tar, which alone decides whether a shard of pairs is complete: sets of earlier versions have no
                # statistics.
                self.folder.write(stats_name(task.number), json_content(stats))
                self.folder.publish(writer.paths[0], tar_name(task.number))


def missing_pair_shards(folder: SetFolder, pair_set: PairSet, part: SetPart = SetPart(0, 1)) -> list[int]:
    """The shards of one part of a set that do not exist yet."""
    names = folder.names()
    return [
        shard for shard in range(part.number, pair_set.shards, part.parts) if tar_name(shard) not in names
    ]


def least_pair_bytes(latent_shape: Sequence[int]) -> int:
    """What a pair takes of a tar at least: three members, each with a header of one block, of which latents fill more."""
    block, float16_bytes = 512, 2
    latents = -(-float16_bytes * math.prod(latent_shape) // block) * block
    return latents + (3 + 2) * block


def _write(writer: ShardWriter, sampler: PairSampler, indices: Sequence[int]) -> None:
    side = sampler.pair_set.resolution
    # The sizes that SDXL was conditioned on when it sampled; a training that reads `sizes` conditions the student on the same.
    sizes = {"original_height": side, "original_width": side, "crop_top": 0, "crop_left": 0}
    for index, prompt, seed, latents in zip(indices, *sampler(indices), strict=True):
        try:
            encoded = encode_latents(latents)
        except ValueError as error:
            raise UserError(
                f"pair {index} ('{prompt}'): {error} Give another --dtype, or a smaller --guidance_scale."
            ) from error
        members: dict[str, Member] = {
            LATENT_MEMBER: encoded,
            "txt": prompt,
            "json": {"noise_seed": int(seed), **sizes},
        }
        writer.write(members, key=f"{index:09d}")
