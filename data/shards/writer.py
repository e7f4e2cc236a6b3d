"""Writes shards: plain WebDataset tars, byte-identical on every machine."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from webdataset.writer import TarWriter

from data.shards.decoders import LATENT_MEMBER, LATENT_TENSOR, READABLE

Member = bytes | str | Mapping[str, object]
"""Content for `ShardWriter.write`: bytes, text (stored as UTF-8), or a mapping (stored as JSON with sorted keys)."""

__all__ = ["LATENT_MEMBER", "Member", "ShardWriter", "encode_latents"]


def encode_latents(latents: torch.Tensor | NDArray[np.generic]) -> bytes:
    """The `latent.safetensors` member of one sample.

    Args:
        latents: (4, h, w), unscaled output of the VAE; stored as float16.

    Raises:
        ValueError: unless it has three axes, or if a value is not finite in float16.
    """
    array = latents.detach().cpu().float().numpy() if isinstance(latents, torch.Tensor) else latents
    with np.errstate(over="ignore"):  # reported below
        half = np.ascontiguousarray(array, dtype=np.float16)
    if half.ndim != 3:
        raise ValueError(
            f"Latents of one sample have the shape (4, h, w), but these have {tuple(half.shape)}."
        )
    if not np.isfinite(half).all():
        raise ValueError("These latents hold a value that is not finite in float16, so they are not written.")
    return safetensors.numpy.save({LATENT_TENSOR: half})


class ShardWriter:
    """Writes samples into `<folder>/<prefix>00000.tar`, `<prefix>00001.tar`, and so on.

    Shards are written atomically; an interrupted writer leaves a file that ends in `.partial`. Use it as a context manager: a
    normal exit completes the last shard, an exception discards it.
    """

    def __init__(
        self, folder: str | Path, prefix: str = "", samples_per_shard: int = 10_000, overwrite: bool = False
    ) -> None:
        """Create the folder, and check for existing shards.

        Args:
            folder: output folder, created if missing.
            prefix: prefix of the shard names.
            samples_per_shard: samples per shard; the last one may have fewer.
            overwrite: whether to remove existing shards of this prefix, with their indexes.

        Raises:
            ValueError: unless samples_per_shard is at least 1.
            FileExistsError: if shards of this prefix exist and `overwrite` is off.
        """
        if samples_per_shard < 1:
            raise ValueError(
                f"samples_per_shard is {samples_per_shard}, but a shard holds at least one sample."
            )
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.samples_per_shard = samples_per_shard
        self.paths: list[Path] = []
        self.samples_written = 0
        self._prefix = prefix
        self._stream: BinaryIO | None = None
        self._tar: TarWriter | None = None
        self._keys: set[str] = set()
        present = sorted(self.folder.glob(f"{prefix}[0-9][0-9][0-9][0-9][0-9].tar"))
        if present and not overwrite:
            raise FileExistsError(
                f"{self.folder} already holds {len(present)} shards named '{prefix}*.tar'; write to another "
                "folder or prefix, or pass overwrite=True to replace them."
            )
        for path in present:
            path.unlink()
            path.with_name(path.name + ".index.npz").unlink(missing_ok=True)

    def write(self, members: Mapping[str, Member], key: str | None = None) -> str:
        """Append one sample.

        Args:
            members: extension to content, for example {"latent.safetensors": ..., "txt": "a red square"}.
            key: the sample's name, without a dot; by default its running number with nine digits.

        Returns:
            The key.

        Raises:
            ValueError: for a key with a dot or a duplicate key, and for a sample without members or with one that the reader
                does not decode.
        """
        key = f"{self.samples_written:09d}" if key is None else key
        if "." in key or key.startswith("__") or not key or key != key.strip("/"):
            raise ValueError(
                f"'{key}' cannot be a sample's key: a reader ends the key at the first dot; use letters and "
                "digits."
            )
        unknown = ", ".join(sorted(set(members) - set(READABLE)))
        if unknown or not members:
            raise ValueError(
                f"Sample '{key}' has {f'the members {unknown}' if unknown else 'no member'}, but a shard "
                f"holds {', '.join(READABLE)}; see data/shards/decoders.py."
            )
        if self._tar is None:
            self._open()
        if key in self._keys:
            raise ValueError(
                f"The key '{key}' is already in {self._path.name}; keys are unique within a shard."
            )
        self._keys.add(key)
        assert self._tar is not None
        self._tar.write({"__key__": key} | {name: _encode(value) for name, value in members.items()})
        self.samples_written += 1
        if len(self._keys) == self.samples_per_shard:
            self._complete()
        return key

    def close(self) -> list[Path]:
        """Complete the last shard and return the paths of all written shards."""
        self._complete()
        return self.paths

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete or discard the last shard."""
        if kind is None:
            self._complete()
        elif self._tar is not None and self._stream is not None:
            with contextlib.suppress(OSError):  # a full disk is often the cause
                self._tar.close()
            self._stream.close()
            self._partial.unlink(missing_ok=True)
            self._tar = self._stream = None

    @property
    def _path(self) -> Path:
        return self.folder / f"{self._prefix}{len(self.paths):05d}.tar"

    @property
    def _partial(self) -> Path:
        return self._path.with_name(self._path.name + ".partial")

    def _open(self) -> None:
        self._stream = open(self._partial, "wb")  # noqa: SIM115 (closed with the shard)
        # Time, owner and mode are fixed, so that the bytes depend on the samples alone; members are already encoded.
        self._tar = TarWriter(self._stream, user="", group="", mode=0o644, mtime=0, encoder=False)

    def _complete(self) -> None:
        if self._tar is None or self._stream is None:
            return
        self._tar.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        os.replace(self._partial, self._path)
        self.paths.append(self._path)
        self._tar = self._stream = None
        self._keys.clear()


def _encode(value: Member) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode("utf-8")
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8")
