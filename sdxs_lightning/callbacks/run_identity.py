"""What identifies a run in its checkpoints: what it trains against, and the shapes of its networks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
from torch import nn

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.frozen import Frozen, is_comparable
from sdxs_lightning.core.image_condition import description_of
from sdxs_lightning.objectives.term import StudentTerm

WEIGHTS, ROUNDED = "frozen weights", "frozen weights in bfloat16"
"""Entries of the identity: fingerprints of the frozen networks by attribute path, as loaded and rounded."""
SETTINGS, TOKENIZERS = "network settings", "tokenizers"
CONDITION = "condition images by"
_BASE = "the base that the run began with (model.init_args.family)"
ADVICE = {
    "prediction_type": _BASE,
    "noise schedule": _BASE,
    "latent scale": _BASE,
    TOKENIZERS: _BASE,
    SETTINGS: "the config.json that the run began with, of the base (model.init_args.family.init_args.base) or of the weights' "
    "own folder",
    "timesteps": "the conditioning timestep that the run began with (family.init_args.conditioning_timestep, or "
    "conditioning_timestep or timesteps of student.init_args)",
    CONDITION: "the condition that the run began with (data.init_args.condition; model.init_args.condition)",
    WEIGHTS: "the frozen network that the run began with (model.init_args.family.init_args.base, or the path of its "
    "weights)",
}


_NO_SETTING = ("dtype", "torch_dtype", "transformers_version", "architectures")
"""Entries of a config.json that say how a network was stored."""


def identity_of(
    module: pl.LightningModule, frozen_like: Iterable[str] = (), with_tokenizers: bool = False
) -> dict[str, Any]:
    """Everything that a stage trains against, besides its samples, and that must not change on a resume.

    Args:
        module: a built stage.
        frozen_like: names of the frozen networks to include; those that load lazily are loaded.
        with_tokenizers: whether to load the tokenizers if they have not been used.
    """
    identity: dict[str, Any] = {}
    family = getattr(module, "family", None)
    if family is not None:
        identity["prediction_type"] = family.prediction_type
        alpha = family.schedule.alpha.detach().cpu().double()
        identity["noise schedule"] = hashlib.sha256(alpha.round(decimals=5).numpy().tobytes()).hexdigest()[
            :16
        ]
        identity["latent scale"] = [family.scaling_factor, family.shift_factor]
        tokenizers = family.tokenizer_digest(with_tokenizers)
        if tokenizers is not None:
            identity[TOKENIZERS] = tokenizers
    timesteps = getattr(getattr(module, "student", None), "timesteps", None)
    if timesteps is not None:
        identity["timesteps"] = [int(step) for step in timesteps]
    condition = _condition_of(module)
    if condition is not None:
        identity[CONDITION] = condition
    found = dict(_frozen(module, set()))
    missing = [name for name in frozen_like if name not in found]
    if missing:
        for name in missing:
            _load(module, name)
        found = dict(_frozen(module, set()))
    identity[WEIGHTS] = {name: one.fingerprint for name, one in found.items() if one.fingerprint is not None}
    identity[ROUNDED] = {name: found[name].rounded_fingerprint for name in identity[WEIGHTS]}
    networks: dict[str, nn.Module] = {"": module, **{name: one.module for name, one in found.items()}}
    identity[SETTINGS] = {
        name: own for prefix, one in networks.items() for name, own in _settings_in(one, prefix).items()
    }
    return identity


def _condition_of(module: pl.LightningModule) -> str | None:
    """What makes condition images: the data's, or those of pairs; None if there are none."""
    data = getattr(getattr(module._trainer, "datamodule", None), "settings", None)
    # Where both are made, the stage checks that they are the same.
    made = getattr(data, "condition", None) or getattr(module, "condition", None)
    if made is not None:
        return description_of(made)
    stored = "control_images" in (getattr(data, "contents", None) or ())
    return "nobody, since the shards bring them" if stored else None


def _settings_in(module: nn.Module, prefix: str) -> dict[str, dict[str, Any]]:
    """What the weights of each network in a module do not tell, such as its number of heads: its config.json."""
    from diffusers import ConfigMixin
    from transformers import PreTrainedModel

    found: dict[str, dict[str, Any]] = {}
    for path, network in module.named_modules(prefix=prefix):
        inside = any(path.startswith(f"{outer}.") for outer in found)  # whose settings follow from that one's
        if isinstance(network, ConfigMixin | PreTrainedModel) and not inside:
            config = network.config
            settings = config.to_dict() if isinstance(network, PreTrainedModel) else dict(config)
            kept = {name: one for name, one in settings.items() if name[0] != "_" and name not in _NO_SETTING}
            found[path] = json.loads(json.dumps(kept, default=str))
    return found


def _frozen(holder: Any, seen: set[int], prefix: str = "") -> Iterable[tuple[str, Frozen[nn.Module]]]:
    """Yields the frozen networks of a stage and its parts, by attribute path."""
    seen.add(id(holder))
    for name, value in _items(holder):
        here = prefix + name.strip("_")
        if isinstance(value, Frozen):
            yield here, value
        elif _is_part(value) and id(value) not in seen:
            yield from _frozen(value, seen, f"{here}.")


def _items(holder: Any) -> list[tuple[str, Any]]:
    if isinstance(holder, Mapping):
        return [(str(name), value) for name, value in holder.items()]
    if isinstance(holder, list | tuple):  # a NamedTuple's by its fields
        return list(zip(getattr(holder, "_fields", map(str, range(len(holder)))), holder, strict=True))
    return list(vars(holder).items())


def _is_part(value: Any) -> bool:
    if isinstance(value, Mapping | list | tuple):
        return True
    ours = isinstance(value, StudentTerm) or type(value).__module__.partition(".")[0] == "sdxs_lightning"
    return ours and hasattr(value, "__dict__") and not isinstance(value, nn.Module | type)


def _load(holder: Any, path: str) -> None:
    """Reads the attribute that `_frozen` gave this name, so that a network that is loaded on its first use is loaded."""
    for name in path.split("."):
        found = dict(_items(holder)) if isinstance(holder, Mapping | list | tuple) else {}
        if not found:
            found = {name: getattr(holder, name, None) or getattr(holder, f"_{name}", None)}
        holder = found.get(name)
        if holder is None or isinstance(holder, Frozen):
            return


def compare_weights(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """Compares the frozen networks of two identities.

    Networks that load on first use are loaded before the run's dtype is known when resuming, and after it when saving. So
    fingerprints of float32 and bfloat16 are compared rounded to bfloat16.

    Returns:
        The first difference, or None, and a line for each network that cannot be compared: another precision is a setting.
    """
    lines = []
    for name, before in saved.get(WEIGHTS, {}).items():
        other = now[WEIGHTS].get(name)
        if other is None:
            continue
        if not is_comparable(before):
            lines.append(f"{name} weights (the checkpoint is of an older version, so they were not compared)")
            continue
        old, new = _dtype(before), _dtype(other)
        rounded = saved.get(ROUNDED, {}).get(name)
        if old != new and (rounded is None or "float16" in (old, new)):
            lines.append(f"{name} weights: {old} -> {new} (other bits, so they were not compared)")
        elif (before != other) if old == new else (rounded != now[ROUNDED][name]):
            return f"{name} weights {before}, and this run loaded {other}", lines
    return None, lines


def compare_settings(
    saved: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]
) -> str | None:
    """The first difference between the settings of networks, or None.

    Settings that only one side has are those of another version of a library.
    """
    for network in sorted(saved.keys() & now.keys()):
        before, after = saved[network], now[network]
        for name in sorted(before.keys() & after.keys()):
            if before[name] != after[name]:
                return f"{name} {before[name]} of {network}, and this run has {after[name]}"
    return None


def _dtype(fingerprint: str) -> str:
    return fingerprint.partition(":")[0]


def check_shapes(saved: Mapping[str, tuple[int, ...]], module: pl.LightningModule) -> None:
    """Compares the checkpoint's tensors with the networks of this run.

    Raises:
        UserError: naming what is missing, or the first tensor of another shape.
    """
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    networks = {name.partition(".")[0] for name in own}
    saved_networks = {name.partition(".")[0] for name in saved}
    missing = sorted(networks - saved_networks)
    if missing:
        raise UserError(
            f"the checkpoint holds no {', '.join(missing)} (but {', '.join(sorted(saved_networks))}), which this run trains or "
            "averages; resume a checkpoint of this stage, or start a new run."
        )
    for name in sorted(own.keys() | saved.keys()):
        there, here = saved.get(name), own.get(name)
        if there != here:
            network = name.partition(".")[0]
            shapes = [f"has shape {one}" if one is not None else "does not exist" for one in (there, here)]
            raise UserError(
                f"the checkpoint's {network} has another architecture: {name} {shapes[0]} in the checkpoint and {shapes[1]} in "
                f"this run; give the {network} that the run began with, or start a new run."
            )
