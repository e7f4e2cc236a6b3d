"""Finds and loads the weight files of a folder.

Safetensors only, since unpickling a .bin or .ckpt executes arbitrary code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn

from sdxs_lightning.families.quiet import quiet_libraries

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
TEXT_PREFIX = "text_model."

_Network = TypeVar("_Network", bound=nn.Module)
_VARIANTS = (None, "fp16", "bf16")


class WeightFiles(NamedTuple):
    """Weight files, and the `variant` argument with which diffusers and transformers load them."""

    variant: str | None
    names: list[str]


def weight_files(names: Iterable[str]) -> WeightFiles | None:
    """Selects the weight files among a folder's file names: plain ones, or fp16 ones if there are no others.

    Args:
        names: file names without folder; may include shards, other variants (`non_ema`) and formats.

    Returns:
        The files of one precision, with the shards' index; None if there are none.
    """
    names = list(names)
    for variant in _VARIANTS:
        mark = f"\\.{variant}" if variant else ""
        # Libraries disagree on whether the variant comes before or after a shard's number.
        shard = r"-\d+-of-\d+"
        tensors = re.compile(
            rf"(diffusion_pytorch_model|model)({mark}|{mark}{shard}|{shard}{mark})\.safetensors"
        )
        index = re.compile(rf"(diffusion_pytorch_model|model)\.safetensors\.index{mark}\.json")
        found = sorted(name for name in names if tensors.fullmatch(name))
        if found:
            return WeightFiles(variant, found + sorted(name for name in names if index.fullmatch(name)))
    return None


def pickled(names: Iterable[str]) -> str | None:
    """Returns a pickled weight file among the names if there are no safetensors, else None."""
    names = list(names)
    if weight_files(names) is not None:
        return None
    return next((name for name in sorted(names) if name.endswith(PICKLES)), None)


def check_not_pickled(folder: Path) -> None:
    """Raises ValueError if a network's folder has only pickled weights."""
    name = pickled(path.name for path in folder.iterdir())
    if name is not None:
        raise ValueError(
            f"'{folder}' has only pickled weights ({name}), which run code when they are loaded; give a folder with "
            ".safetensors (save_pretrained(..., safe_serialization=True) writes them)."
        )


def load_network(
    network: type[_Network], folder: Path, dtype: torch.dtype = torch.float32, strict: bool = False
) -> _Network:
    """Loads the network of a folder, from one file or shards, without a second copy and without initialising weights.

    Args:
        network: a model class of diffusers or transformers.
        folder: folder with config.json and safetensors.
        dtype: dtype of the loaded weights, whatever that of the files.
        strict: whether to reject tensors that the network does not have.

    Raises:
        FileNotFoundError: if there are no safetensors.
        ValueError: for pickles, unreadable files, missing tensors or other shapes; with `strict` for unexpected tensors.
    """
    from diffusers import ModelMixin

    quiet_libraries()
    check_not_pickled(folder)
    files = weight_files(path.name for path in folder.iterdir())
    if files is None:
        raise FileNotFoundError(
            f"'{folder}' has no weights: expected diffusion_pytorch_model.safetensors or model.safetensors."
        )
    named: dict[str, Any] = {"variant": files.variant} if files.variant is not None else {}
    if not issubclass(network, ModelMixin):
        # transformers defaults to the config's dtype; diffusers always loads in float32.
        named["dtype"] = dtype
    try:
        named |= {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
        loaded, report = network.from_pretrained(folder, **named)  # type: ignore[attr-defined]
        if lacks_only_the_prefix(report["missing_keys"], report["unexpected_keys"]):
            named["key_mapping"] = {r"^((?!text_projection\.).*)$": TEXT_PREFIX + r"\1"}
            loaded, report = network.from_pretrained(folder, **named)  # type: ignore[attr-defined]
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"the weights in '{folder}' cannot be loaded: {_first_line(error)}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"the weights in '{folder}' lack {len(missing)} tensor(s) of the network in its config.json, such as "
            f"{missing[0]}; was a file cut off or of another network?"
        )
    if strict and report["unexpected_keys"]:
        unexpected = sorted(report["unexpected_keys"])
        raise ValueError(
            f"the weights in '{folder}' have {len(unexpected)} tensor(s) that the network in its config.json lacks, such as "
            f"{unexpected[0]}; are they of another network?"
        )
    # nn.Module's own to(): that of diffusers warns of modules to keep in float32, of which these classes have none.
    nn.Module.to(loaded, dtype=dtype)
    result: _Network = loaded
    return result


def lacks_only_the_prefix(missing: Iterable[str], unexpected: Iterable[str]) -> bool:
    """Whether the file is a CLIP text encoder's of a newer transformers than this one.

    Newer ones read and write the names without "text_model." in front, and read those with it; older ones have only the latter.
    """
    found = {TEXT_PREFIX + name for name in unexpected}
    return bool(found) and found == set(missing)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
