"""Converts a single .safetensors file in the original Stable Diffusion layout (LDM, sgm) to a diffusers folder.

The file is converted once, by diffusers' own loader, into a cache folder from which all processes read:
`$HF_HOME/sdxs-lightning/<name>-<fingerprint of file and configs>`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from huggingface_hub import constants
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from sdxs_lightning.core.file_modes import apply_umask
from sdxs_lightning.families.folders import Layout, vae_class

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


def convert(file: Path, configs: Path, layout: Layout) -> Path:
    """Returns the diffusers folder of a single file; converts the file at the first call.

    The folder is written atomically. Processes of one machine wait for the first one; on a file system without locks each
    writes its own, and the first to finish wins.

    Args:
        file: .safetensors with U-Net, VAE and text encoder(s).
        configs: diffusers folder of the configs and tokenizers; its weights, if any, are not used.
        layout: the family's layout.

    Raises:
        ValueError: for a corrupt file, another family or layout, or a file that does not fit the configs.
        OSError: if the cache cannot be written.
    """
    from diffusers import AutoencoderKL

    header = read_header(file)
    _check_contents(file, header, layout)
    if vae_class(configs / "vae") is not AutoencoderKL:
        raise ValueError(
            f"{layout.family}: '{configs}' has an AutoencoderTiny as vae, which no single file holds; give the "
            "base that it was made from as family.init_args.config."
        )
    cache = Path(constants.HF_HOME) / "sdxs-lightning"
    folder = cache / f"{file.stem}-{_fingerprint(file, configs, layout)}"
    if folder.is_dir():
        return folder
    rank_zero_info(f"{layout.family}: '{file}' is converted once, to {folder}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _write(file, configs, layout, header, folder)
    except OSError as error:
        raise OSError(
            f"{layout.family}: '{file}' could not be converted into {cache} ({error.strerror or error}); set the "
            "environment variable HF_HOME to a writable folder with space."
        ) from error
    return folder


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Reads dtype, shape and data_offsets of each tensor in a safetensors file, by name, without its weights.

    Raises:
        ValueError: for another format or a truncated file.

    Source: the safetensors format, https://github.com/huggingface/safetensors#format.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            # safetensors' own limit; in another format the length could be gigabytes.
            content = json.loads(stream.read(length)) if length <= 100_000_000 else None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"'{file}' is not a safetensors file, whatever its name says.")
    header = {name: entry for name, entry in content.items() if name != "__metadata__"}
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise ValueError(f"'{file}' has {size} bytes and should have {end}; was its download cut off?")
    return header


def _check_contents(file: Path, header: Mapping[str, Any], layout: Layout) -> None:
    holds = {
        "an SDXL model": any(name.startswith("conditioner.embedders.") for name in header),
        "an SD-1.x/2.x model": any(name.startswith("cond_stage_model.") for name in header),
    }
    missing = [
        part
        for part, beginnings in layout.single_file.items()
        if not any(name.startswith(beginnings) for name in header)
    ]
    if not missing:
        return
    if "unet" in missing:
        raise ValueError(
            f"{layout.family}: '{file}' is not in the original layout of Stable Diffusion: no tensor's name begins with "
            f"{layout.single_file['unet'][0]}, the first is {min(header, default='none')}."
        )
    kind = next((kind for kind, found in holds.items() if found), None)
    if kind is not None and any(part.startswith("text_encoder") for part in missing):
        raise ValueError(
            f"{layout.family}: '{file}' holds {kind}, and this family needs a {layout.pipeline_class}; choose the other "
            "family.class_path."
        )
    raise ValueError(
        f"{layout.family}: '{file}' lacks the weights of {', '.join(missing)}; a base needs all of "
        f"{', '.join(layout.single_file)} in one file."
    )


def _fingerprint(file: Path, configs: Path, layout: Layout) -> str:
    """Hash of the file, the configs and the converter.

    Of the file it hashes size, time, tensor names and samples of its bytes; reading 7 GB per process would take half a minute.
    """
    import diffusers

    status = file.stat()
    digest = hashlib.sha256(f"{diffusers.__version__} {status.st_size} {status.st_mtime_ns}".encode())
    with file.open("rb") as stream:
        digest.update(stream.read(8 + int.from_bytes(stream.read(8), "little")))
        for sample in range(_SAMPLES):
            stream.seek(status.st_size * sample // _SAMPLES)
            digest.update(stream.read(_SAMPLE_BYTES))
    for name in ("", *layout.components):
        for path in sorted((configs / name).iterdir()):
            if path.suffix in (".json", ".txt"):
                digest.update(f"{name}/{path.name}".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _write(file: Path, configs: Path, layout: Layout, header: Mapping[str, Any], folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        written = Path(temporary) / "base"
        _load(file, configs, layout, header).save_pretrained(written, safe_serialization=True)
        apply_umask(written)
        try:
            os.rename(written, folder)
        except OSError:
            if not folder.is_dir():
                raise  # otherwise another process was first, with the same content
            shutil.rmtree(written)


def _load(file: Path, configs: Path, layout: Layout, header: Mapping[str, Any]) -> DiffusionPipeline:
    import diffusers

    pipeline_class: type[DiffusionPipeline] = getattr(diffusers, layout.pipeline_class)
    unused: dict[str, Any] = {"feature_extractor": None, "image_encoder": None, **layout.pipeline_options}
    try:
        pipeline = pipeline_class.from_single_file(
            str(file),
            config=str(configs),
            local_files_only=True,
            extract_ema=True,  # if a file has both, the averaged U-Net is the released one
            **unused,
        )
    except NotImplementedError as error:  # tensors without values are moved
        raise ValueError(
            f"{layout.family}: '{file}' lacks tensors that '{configs}' describes; is it cut off or of another version of "
            "the model?"
        ) from error
    except (ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{layout.family}: '{file}' does not fit the configs of '{configs}' ({_shortened(error)}); is it of "
            "another version of the model?"
        ) from error
    _check_complete(pipeline, file, configs, layout)
    for network in pipeline.components.values():
        if isinstance(network, nn.Module):
            nn.Module.to(network, dtype=_dtype(header, layout))  # diffusers' override warns about every cast
    return pipeline


def _dtype(header: Mapping[str, Any], layout: Layout) -> torch.dtype:
    """The file's dtype; float32 if it mixes several, so that nothing is rounded."""
    names = tuple(beginning for parts in layout.single_file.values() for beginning in parts)
    found = {entry["dtype"] for name, entry in header.items() if name.startswith(names)} & set(_DTYPES)
    return _DTYPES[found.pop()] if len(found) == 1 else torch.float32


def _check_complete(pipeline: DiffusionPipeline, file: Path, configs: Path, layout: Layout) -> None:
    """Raises ValueError if the file lacks tensors, which diffusers silently leaves on the meta device in text encoders."""
    for component, network in pipeline.components.items():
        if not isinstance(network, nn.Module):
            continue
        lacking = [name for name, value in network.state_dict().items() if value.is_meta]
        if lacking:
            raise ValueError(
                f"{layout.family}: '{file}' lacks {len(lacking)} tensor(s) of the {component} that '{configs}' describes, such "
                f"as {lacking[0]}; is it of another version of the model?"
            )


def _shortened(error: Exception) -> str:
    text = str(error).split(" If you want to")[0].strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
