"""Hashes of model folders: which weights and settings a measurement or a published number belongs to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

NOT_MEASURED = ("safety_checker", "feature_extractor", "requires_safety_checker", "image_encoder")
"""Pipeline components that are not used in measurements."""


def files_below(folder: str | Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """All files below a folder, those of linked folders too: a pipeline may take its VAE from another one by a link.

    Args:
        folder: where to begin.
        above: folders that it is in, so that a link to one of them is not followed for ever.
    """
    if (real := os.path.realpath(folder)) in above:
        return
    for path in Path(folder).iterdir():
        if path.is_dir():
            yield from files_below(path, above | {real})
        elif path.is_file():
            yield path


def hash_weights(folder: str | Path) -> str:
    """16-digit hex hash of the safetensors files of a folder and their relative paths.

    Raises:
        FileNotFoundError: if there are none.
    """
    files = sorted(file for file in files_below(folder) if file.suffix == ".safetensors")
    if not files:
        raise FileNotFoundError(f"no .safetensors under {folder}")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(folder).as_posix().encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


NOT_READ = {
    ".md", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".log", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx",
    ".partial", ".lock",
}  # fmt: skip
"""File extensions that loading a model with safetensors does not read."""


def hash_model(folder: str | Path) -> str:
    """16-digit hex hash of the files in a model folder that affect its images: weights and configurations.

    For a pipeline these are the components in model_index.json without the safety checker, which is disabled here. Model
    cards, sample images and weights in formats that are not loaded are ignored.

    Raises:
        FileNotFoundError: if there are no weights.
    """
    folder = Path(folder)
    found = list(files_below(folder))
    if not any(file.suffix == ".safetensors" for file in found):
        raise FileNotFoundError(f"no .safetensors under {folder}")
    files = sorted(file for file in found if _is_read(file.relative_to(folder)))
    states = [file.stat() for file in files]
    return _hash_files(
        folder, tuple((file, one.st_mtime_ns, one.st_size) for file, one in zip(files, states, strict=True))
    )


def _is_read(path: Path) -> bool:
    """Whether loading a model reads this file."""
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.suffix.lower() not in NOT_READ and path.parts[0] not in NOT_MEASURED


@lru_cache(maxsize=8)
def _hash_files(folder: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    """Hash of files, given with their times and sizes so that each model is read once per process."""
    digest, index = hashlib.sha256(), folder / "model_index.json"
    named = json.loads(index.read_text()) if index.is_file() else None
    for file, _, size in files:
        path = file.relative_to(folder)
        if named is not None and file != index and path.parts[0] not in named:
            continue
        digest.update(f"\0{path.as_posix()}\0".encode())
        if file.suffix == ".json" and size < 1 << 26:
            digest.update(_settings_in(file.read_bytes()))
            continue
        with file.open("rb") as content:
            while block := content.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


def _settings_in(content: bytes) -> bytes:
    """Content of a JSON file without fields about its storage and without white space."""
    try:
        found = json.loads(content)
    except ValueError:
        return content
    if isinstance(found, dict):
        left_out = (*NOT_MEASURED, "_name_or_path", "_diffusers_version", "transformers_version")
        found = {key: value for key, value in found.items() if key not in left_out}
    return json.dumps(found, sort_keys=True).encode()
