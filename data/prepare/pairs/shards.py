"""Writing the shards of a set of pairs: each by itself, whole or not at all, so that any number of processes can share them
and a run that was cut off loses no more than the shards it was at.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from data.prepare.pairs.sampler import PairSampler
from data.prepare.pairs.settings import PairSettings
from data.shards.writer import LATENT_MEMBER, Member, ShardWriter, encode_latents
from sdxs_lightning.core.errors import UserError

_UNFINISHED = ".making-"


def shard_path(folder: Path, shard: int) -> Path:
    """Where a shard of the set lies."""
    return folder / f"{shard:05d}.tar"


def missing(folder: Path, settings: PairSettings, part: int = 0, parts: int = 1) -> list[int]:
    """The shards that are not there yet, of those that belong to one of several parts."""
    return [i for i in range(part, settings.shards, parts) if not shard_path(folder, i).exists()]


def make_shards(
    sampler: PairSampler,
    folder: Path,
    shards: Sequence[int],
    batch_size: int,
    told: Callable[[int], None],
) -> None:
    """Makes shards one after another.

    Args:
        sampler: of the set.
        folder: of the set.
        shards: which ones.
        batch_size: pairs that are sampled at once; batches do not reach from one shard into another, so that a shard does
            not depend on where a run was cut off.
        told: called with the number of pairs after each batch; may raise to stop.

    Raises:
        UserError: for latents that are not finite.
        OSError: where the disk does not take a shard.
    """
    for shard in shards:
        with tempfile.TemporaryDirectory(dir=folder, prefix=_UNFINISHED) as temporary:
            indices = sampler.settings.indices(shard)
            with ShardWriter(temporary, samples_per_shard=len(indices)) as writer:
                for start in range(0, len(indices), batch_size):
                    batch = indices[start : start + batch_size]
                    _write(writer, sampler, batch)
                    told(len(batch))
            os.replace(writer.paths[0], shard_path(folder, shard))


def tidy(folder: Path) -> None:
    """Removes what killed runs left; for a set that is complete."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _write(writer: ShardWriter, sampler: PairSampler, indices: Sequence[int]) -> None:
    side = sampler.settings.resolution
    # What SDXL was told when it sampled; a training that reads `sizes` tells the student the same.
    sizes = {"original_height": side, "original_width": side, "crop_top": 0, "crop_left": 0}
    for index, prompt, seed, latents in zip(indices, *sampler(indices), strict=True):
        try:
            encoded = encode_latents(latents)
        except ValueError as error:
            raise UserError(
                f"pair {index} ('{prompt}'): {error} Take another --dtype, or less --guidance."
            ) from error
        members: dict[str, Member] = {
            LATENT_MEMBER: encoded,
            "txt": prompt,
            "json": {"noise_seed": int(seed), **sizes},
        }
        writer.write(members, key=f"{index:09d}")
