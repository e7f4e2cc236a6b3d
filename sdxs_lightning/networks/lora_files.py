"""LoRA files: reading those of diffusers, PEFT and kohya, writing them, and adding them to weights.

A file holds one low-rank update for each adapted layer, W + alpha / rank * up @ down, and names the layer in the way of its
trainer. `Adapters` is the common form: updates by the layer's name in a diffusers U-Net.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sdxs_lightning.core.errors import UserError, first_line
from sdxs_lightning.families.folders import read_json
from sdxs_lightning.families.weights import PICKLES

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

Format = Literal["diffusers", "peft", "kohya"]

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
"""The name that `pipe.load_lora_weights(folder)` looks for."""
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
KOHYA_FILE = "lora.safetensors"

_METADATA = "lora_adapter_metadata"
"""Entry of a safetensors header in which diffusers stores ranks and alphas."""
_OTHER_KINDS = ("dora_scale", "lora_magnitude_vector", "hada_", "lokr_", "lora_mid", "oft_", ".diff")
"""Parts of tensor names that mark adapters which are not of the form above (DoRA, LoHa, LoKr, CP, OFT, full differences)."""
_TEXT = ("text_encoder", "lora_te")
"""Beginnings of the names of text encoders' layers, in every format."""
_PART = re.compile(
    r"^(?P<layer>.+?)(?:\.|_)(?P<part>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.default)?\.weight$"
)

_ALPHA = re.compile(r"(_lora)?(\.down\.weight)?\.alpha$")
"""End of the name of an alpha: kohya's, and what diffusers makes of it."""


class LowRank(NamedTuple):
    """The update of one layer."""

    down: Tensor
    """A: (rank, in) for a linear layer, (rank, in, kernel, kernel) for a convolution; float32."""
    up: Tensor
    """B: (out, rank), or (out, rank, 1, 1) for a convolution; float32."""
    alpha: float
    """The update is scaled by alpha / rank."""

    @property
    def rank(self) -> int:
        return len(self.down)

    def delta(self) -> Tensor:
        """The update in the shape of the layer's weight, float64."""
        product = self.up.double().flatten(1) @ self.down.double().flatten(1)
        return self.alpha / self.rank * product.view(len(self.up), *self.down.shape[1:])


Adapters = dict[str, LowRank]
"""Updates by the name of the layer in the U-Net."""


class LoraFile(NamedTuple):
    """A LoRA file as read."""

    adapters: Adapters
    text_encoder_layers: int
    """Layers of text encoders in the file, which are not read."""


# ----------------------------------------------------------------------------------------------------------------- reading


def read_lora(source: str | Path, unet: UNet2DConditionModel, option: str = "lora") -> LoraFile:
    """Reads the U-Net's part of a LoRA, and checks every layer of it against a U-Net.

    Args:
        source: a .safetensors file, or a folder with the file of diffusers or PEFT, or a single .safetensors file.
        unet: the U-Net that the LoRA was trained for, or one of its shape; it is not changed.
        option: name of the user's option, for messages.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a pickle, a damaged file, an adapter that is no LoRA, or a LoRA of another network.
    """
    path = lora_file(source, option)
    tensors, metadata = _read_tensors(path, option)
    named = f"{option} '{path}'"
    _check_kind(tensors, named)
    settings = _settings_of(metadata, path, named)
    text = {name for name in tensors if name.startswith(_TEXT)}
    others = len({match["layer"] for name in text if (match := _PART.match(name))})
    tensors = {name: tensor for name, tensor in tensors.items() if name not in text}
    if any(
        f"{block}_" in name for name in tensors for block in ("input_blocks", "middle_block", "output_blocks")
    ):
        tensors = _from_original_names(tensors, unet, named)
    layers = {name: module for name, module in unet.named_modules() if _is_layer(module)}
    adapters = _grouped(tensors, layers, named)
    alphas = _alphas(tensors, settings, layers, named)
    found: Adapters = {}
    for name, (down, up) in adapters.items():
        found[name] = _checked(name, down, up, alphas.get(name), layers[name], named)
    if not found:
        raise ValueError(
            f"{named} adapts no layer of a U-Net ({others} of text encoders); give a LoRA that does."
        )
    if not any(one.alpha and one.up.any() and one.down.any() for one in found.values()):
        raise ValueError(f"{named} changes nothing, since its matrices or alphas are 0; was it ever trained?")
    return LoraFile(found, others)


def lora_file(source: str | Path, option: str = "lora") -> Path:
    """The safetensors file of a LoRA given as file or folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: for a pickle, or a folder with several unknown files.
    """
    path = Path(source)
    if path.suffix in PICKLES:
        raise ValueError(
            f"{option} '{source}' is a pickle, which runs code when it is loaded; give the .safetensors file of the same LoRA."
        )
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(
            f"{option}: there is no file or folder '{source}'; give a .safetensors file, or a folder with one."
        )
    for name in (DIFFUSERS_FILE, PEFT_FILE):
        if (path / name).is_file():
            return path / name
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    found = ", ".join(file.name for file in files) or "no .safetensors file"
    raise (ValueError if files else FileNotFoundError)(
        f"{option} '{source}' is a folder with {found}; name one file, or put {DIFFUSERS_FILE} there."
    )


def hash_lora(source: str | Path) -> str:
    """16-digit hex hash of a LoRA's file, for results; moving or renaming it does not change the hash."""
    return hashlib.sha256(lora_file(source).read_bytes()).hexdigest()[:16]


def _read_tensors(path: Path, option: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return tensors, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{option} '{path}' cannot be read as safetensors ({error}); was its download cut off?"
        ) from error


def _check_kind(tensors: Iterable[str], named: str) -> None:
    for name in tensors:
        if any(mark in name for mark in _OTHER_KINDS):
            raise ValueError(
                f"{named} has the tensor '{name}', so it is no plain LoRA (DoRA, LoHa, LoKr or full weights); only LoRA of "
                "linear layers and convolutions is read."
            )


def _settings_of(metadata: Mapping[str, str], path: Path, named: str) -> dict[str, Any]:
    """The settings that diffusers writes into the header, or PEFT beside the file; empty without either."""
    if _METADATA in metadata:
        try:
            whole = json.loads(metadata[_METADATA])
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{named} has a header whose {_METADATA} is not readable as JSON ({error}); write the file again."
            ) from error
        if not isinstance(whole, dict):
            raise ValueError(
                f"{named} has a header whose {_METADATA} is no JSON object; write the file again."
            )
        return {key.removeprefix("unet."): value for key, value in whole.items()}
    if path.name == PEFT_FILE and (path.parent / PEFT_CONFIG).is_file():
        return read_json(path.parent / PEFT_CONFIG)
    return {}


def _from_original_names(
    tensors: dict[str, Tensor], unet: UNet2DConditionModel, named: str
) -> dict[str, Tensor]:
    """Names of kohya for the original (sgm) U-Net as those of diffusers, by diffusers' own table."""
    from diffusers import StableDiffusionXLPipeline

    try:
        converted, alphas = StableDiffusionXLPipeline.lora_state_dict(dict(tensors), unet_config=unet.config)
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
    ) as error:  # TypeError: where stages have unlike numbers of layers
        raise ValueError(f"{named}: its layer names cannot be read ({first_line(error)}).") from error
    named_alphas: dict[str, Tensor] = {name: torch.tensor(alpha) for name, alpha in (alphas or {}).items()}
    return {**converted, **named_alphas}


def _is_layer(module: nn.Module) -> bool:
    return isinstance(getattr(module, "base_layer", module), nn.Linear | nn.Conv2d)


def _flat(name: str) -> str:
    """The spelling of a layer in which all formats agree."""
    for prefix in ("base_model.model.", "unet.", "lora_unet_"):
        name = name.removeprefix(prefix)
    return name.replace(".processor", "").replace(".", "_")


def _grouped(
    tensors: Mapping[str, Tensor], layers: Mapping[str, nn.Module], named: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """(down, up) by layer."""
    names = {_flat(name): name for name in layers}
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        if key.endswith("alpha"):
            continue
        match = _PART.match(key)
        if match is None:
            raise ValueError(f"{named} has the tensor '{key}', which is no part of a LoRA.")
        flat = _flat(match["layer"])
        layer = names.get(flat) or names.get(f"{flat}_0")  # diffusers once wrote to_out for to_out.0
        if layer is None:
            unknown.append(match["layer"])
            continue
        part = "down" if match["part"] in ("lora_A", "lora_down", "lora.down") else "up"
        if part in parts.setdefault(layer, {}):
            raise ValueError(
                f"{named} has the layer {layer} under two names, such as '{key}'; remove one of them."
            )
        parts[layer][part] = tensor
    if unknown:
        raise ValueError(
            f"{named} adapts {len(set(unknown))} layer(s) that this U-Net does not have, such as {unknown[0]}; it was trained "
            "for another base."
        )
    for layer, found in parts.items():
        if len(found) != 2:
            raise ValueError(f"{named} has only one of the two matrices of {layer}; was the file cut off?")
    return {layer: (found["down"], found["up"]) for layer, found in parts.items()}


def _alphas(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], layers: Iterable[str], named: str
) -> dict[str, float]:
    """Alphas by layer, from tensors (kohya), or the settings of diffusers and PEFT."""
    names = {_flat(name): name for name in layers}
    found = {
        _flat(_ALPHA.sub("", key)): _alpha(tensor, key, named)
        for key, tensor in tensors.items()
        if key.endswith("alpha")
    }
    by_tensor = {names.get(flat) or names.get(f"{flat}_0", flat): value for flat, value in found.items()}
    if "lora_alpha" not in settings:
        return by_tensor
    usual = _alpha(settings["lora_alpha"], "lora_alpha", named)
    patterns = _patterns(settings.get("alpha_pattern") or {}, named)
    by_config = {
        # The first that a name ends with counts, as in PEFT.
        name: next((value for pattern, value in patterns if pattern.match(name)), usual)
        for name in layers
    }
    if settings.get("use_rslora"):  # scaled by alpha / sqrt(rank), which is alpha' / rank for this alpha'
        ranks = {
            _flat(m["layer"]): len(t) for k, t in tensors.items() if (m := _PART.match(k)) and "lora_A" in k
        }
        by_config = {n: a * ranks[_flat(n)] ** 0.5 for n, a in by_config.items() if _flat(n) in ranks}
    return by_config | by_tensor


def _alpha(value: Any, key: str, named: str) -> float:
    single = value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, int | float)
    alpha = float(value) if single else math.nan
    if not math.isfinite(alpha):
        found = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) and not single else value
        raise ValueError(
            f"{named}: '{key}' is {found}, and an alpha is one finite number; the file is unusable."
        )
    return alpha


def _patterns(given: Any, named: str) -> list[tuple[re.Pattern[str], float]]:
    """PEFT's `alpha_pattern`: alphas by regular expressions of the ends of layers' names."""
    try:
        return [
            (re.compile(rf"(.*\.)?({key})$"), _alpha(value, f"alpha_pattern.{key}", named))
            for key, value in given.items()
        ]
    except (AttributeError, re.error) as error:
        raise ValueError(f"{named}: alpha_pattern cannot be read ({error}); write the file again.") from error


def _checked(
    name: str, down: Tensor, up: Tensor, alpha: float | None, layer: nn.Module, named: str
) -> LowRank:
    weight = getattr(layer, "base_layer", layer).weight
    assert isinstance(weight, Tensor)
    if not (down.is_floating_point() and up.is_floating_point()):
        raise ValueError(
            f"{named}: the matrices of {name} are {down.dtype}; a quantised LoRA cannot be read, give it in float16 or float32."
        )
    rank, convolution = len(down) if down.dim() else 0, weight.dim() == 4
    if rank == 0 or up.dim() < 2 or up.shape[1] != rank:
        raise ValueError(
            f"{named}: the matrices of {name}, {tuple(down.shape)} and {tuple(up.shape)}, have no common rank of 1 or more; "
            "the file is unusable."
        )
    if convolution and down.dim() == 2:  # a 1x1 convolution stored as a linear layer
        down, up = down[:, :, None, None], up[:, :, None, None]
    if not convolution and down.dim() == 4:
        down, up = down.flatten(1), up.flatten(1)
    expected = (rank, *weight.shape[1:]), (weight.shape[0], rank, *((1, 1) if convolution else ()))
    if (tuple(down.shape), tuple(up.shape)) != expected:
        raise ValueError(
            f"{named}: the matrices of {name} are {tuple(down.shape)} and {tuple(up.shape)}, and this U-Net needs "
            f"{expected[0]} and {expected[1]}; it was trained for another base."
        )
    down, up = down.float(), up.float()
    if not (down.isfinite().all() and up.isfinite().all()):
        raise ValueError(f"{named}: the matrices of {name} hold NaN or infinity; the file is unusable.")
    return LowRank(down, up, float(rank) if alpha is None else alpha)


# --------------------------------------------------------------------------------------------------------- adding, live


@torch.no_grad()
def add_to_weights(unet: UNet2DConditionModel, adapters: Adapters, scale: float = 1.0) -> None:
    """Adds scale * alpha / rank * up @ down to the weights of a U-Net, in place; computed in float64, rounded once."""
    for name, update in adapters.items():
        weight = unet.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.copy_(weight.double() + scale * update.delta().to(weight.device))


def live_adapters(weights: Mapping[str, Tensor], alpha: float | None, adapter: str = "default") -> Adapters:
    """The adapters of a U-Net with live ones (`networks/lora.py`).

    Args:
        weights: `unet.state_dict()`, unsharded.
        alpha: as in the settings; None is the rank.
        adapter: peft's name of the adapter.
    """
    end = f".lora_A.{adapter}.weight"
    found: Adapters = {}
    for name, tensor in weights.items():
        if name.endswith(end):
            layer = name.removesuffix(end)
            up = weights[f"{layer}.lora_B.{adapter}.weight"]
            down, up = (one.detach().float().cpu().clone() for one in (tensor, up))
            found[layer] = LowRank(down, up, float(len(down)) if alpha is None else alpha)
    return found


def parameter_count(adapters: Adapters) -> int:
    """Number of values in the matrices."""
    return sum(one.down.numel() + one.up.numel() for one in adapters.values())


# ----------------------------------------------------------------------------------------------------------------- writing


def write_lora(
    folder: Path, adapters: Adapters, form: Format = "diffusers", dtype: torch.dtype = torch.float16
) -> Path:
    """Writes a LoRA into an existing folder; returns the file.

    In every form alpha equals the rank: it is multiplied into the matrices B, so that readers which ignore alpha are right.

    Args:
        folder: gets `pytorch_lora_weights.safetensors` for `pipe.load_lora_weights(folder)`; or `adapter_model.safetensors` and
            `adapter_config.json` for `PeftModel.from_pretrained(unet, folder)`; or `lora.safetensors` with kohya's names.
        adapters: the updates.
        form: whose names.
        dtype: of the matrices.

    Raises:
        UserError: if a value is too large for the dtype.
    """
    tensors: dict[str, Tensor] = {}
    for layer, update in adapters.items():
        down, up = update.down.to(dtype), (update.alpha / update.rank * update.up).to(dtype)
        if not (down.isfinite().all() and up.isfinite().all()):
            raise UserError(
                f"the LoRA of {layer} has values that {dtype} cannot hold; write float32 instead."
            )
        if form == "kohya":
            kohya = f"lora_unet_{layer.replace('.', '_')}"
            tensors[f"{kohya}.lora_down.weight"], tensors[f"{kohya}.lora_up.weight"] = down, up
            tensors[f"{kohya}.alpha"] = torch.tensor(float(update.rank))
        else:
            prefix = "unet" if form == "diffusers" else "base_model.model"
            tensors[f"{prefix}.{layer}.lora_A.weight"], tensors[f"{prefix}.{layer}.lora_B.weight"] = down, up
    names = {"diffusers": DIFFUSERS_FILE, "peft": PEFT_FILE, "kohya": KOHYA_FILE}
    path = folder / names[form]
    metadata, settings = {"format": "pt"}, _peft_config(adapters)
    if form == "diffusers":
        # Without it, diffusers before 0.40 takes the first layer's rank for every layer's alpha.
        metadata[_METADATA] = json.dumps(
            {f"unet.{key}": value for key, value in settings.items()}, sort_keys=True
        )
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    if form == "peft":
        (folder / PEFT_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    return path


def _peft_config(adapters: Adapters) -> dict[str, Any]:
    """The settings that `PeftModel.from_pretrained` needs; layers by their full names."""
    ranks = {layer: update.rank for layer, update in adapters.items()}
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {f"^{layer}$": rank for layer, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": usual,
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": others,
        "bias": "none",
        "inference_mode": True,
    }
