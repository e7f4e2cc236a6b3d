"""Resolves a folder, hub id or single file to a diffusers folder on disk."""

from __future__ import annotations

from pathlib import Path

from sdxs_lightning.core.hub_ids import is_hub_id
from sdxs_lightning.core.model_hash import NOT_MEASURED
from sdxs_lightning.families import hub, single_file
from sdxs_lightning.families.folders import Layout, check_base, check_unet, read_json, unet_folder
from sdxs_lightning.families.weights import PICKLES


def resolve_base(base: str, config: str | None, layout: Layout) -> Path:
    """Returns the checked diffusers folder of a base.

    Args:
        base: a diffusers folder; a hub id, `org/name` or `org/name@revision`; or a .safetensors file in the original
            layout of Stable Diffusion.
        config: for a single file, folder or hub id of its configs and tokenizers; otherwise None.
        layout: the family's layout.

    Raises:
        FileNotFoundError: if the base does not exist or is incomplete.
        ValueError: for a base of another family, a pickle, a corrupt file, or a missing or superfluous `config`.
    """
    path = Path(base)
    _refuse_pickle(base, f"{layout.family}: base")
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise FileNotFoundError(f"{layout.family}: there is no file '{base}'; see family.init_args.base.")
        return single_file.convert(path, _configs(base, config, layout), layout)
    if config is not None:
        raise ValueError(
            f"{layout.family}: config '{config}' is for a base that is a single .safetensors file, got the base '{base}'; "
            "remove family.init_args.config."
        )
    return _folder_or_hub(base, layout, weights=True)


def resolve_unet(weights: str, option: str = "weights") -> Path:
    """Returns the folder of a U-Net, from a U-Net folder, a pipeline folder or a hub id of either.

    Args:
        weights: the user's value.
        option: name of the option, for the error message.

    Raises:
        FileNotFoundError: if there is no U-Net.
        ValueError: for a pickle or a single file.
    """
    _refuse_pickle(weights, option)
    path, named = Path(weights), f"{option} '{weights}'"
    if path.is_file():
        raise ValueError(
            f"{named} is a file; give a U-Net folder (config.json and .safetensors) or a pipeline folder."
        )
    if path.is_dir() or not is_hub_id(weights):
        return unet_folder(path, named)
    try:
        return unet_folder(hub.fetch(weights, "unet/config.json", ("unet", "scheduler")), named)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{named} is neither a U-Net folder (config.json) nor a pipeline folder (unet/config.json); and "
            f"{error}"
        ) from error


def fitting_unet(weights: str, option: str, base: Path, prompt_width: int) -> Path:
    """Returns the folder of a U-Net that fits a base, by its config.

    Args:
        weights: as for `resolve_unet`.
        option: name of the option, for the error message.
        base: the base's folder.
        prompt_width: total width of the base's text encoders.

    Raises:
        FileNotFoundError: if there is no U-Net.
        ValueError: for a pickle, a single file, or a U-Net that does not fit.
    """
    folder = resolve_unet(weights, option)
    try:
        check_unet(folder, base, prompt_width)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error
    return folder


def pipeline_folder(name: str, option: str) -> Path | None:
    """The folder of a complete pipeline, with every component that its model_index.json names; None for a U-Net folder.

    Args:
        name: a pipeline folder, a U-Net folder, or the hub id of a pipeline.
        option: name of the option, for the error message.

    Raises:
        FileNotFoundError: for a pipeline without one of its components.
        ValueError: for a component on the hub that has only pickled weights.
    """
    folder = Path(name)
    on_hub = not folder.exists() and is_hub_id(name)
    if on_hub:
        folder = hub.fetch(name, "model_index.json", ())
    if not (folder / "model_index.json").is_file():
        return None
    index = read_json(folder / "model_index.json")
    named = [part for part, value in index.items() if isinstance(value, list) and value[0] is not None]
    if on_hub:
        folder = hub.fetch(name, "model_index.json", (*named, "vae_large"))
    missing = [part for part in named if part not in NOT_MEASURED and not (folder / part).is_dir()]
    if missing:
        raise FileNotFoundError(f"{option} '{name}' lacks the component folder(s) {', '.join(missing)}.")
    return folder


def _configs(base: str, config: str | None, layout: Layout) -> Path:
    if config is None:
        raise ValueError(
            f"{layout.family}: '{base}' is a single file, which has neither configs nor tokenizers; name a diffusers folder "
            "or hub id of the model that it was made from as family.init_args.config."
        )
    return _folder_or_hub(config, layout, weights=False)


def _folder_or_hub(name: str, layout: Layout, weights: bool) -> Path:
    path = Path(name)
    key = "base" if weights else "config"
    absent = (
        f"{layout.family}: there is no folder '{name}'; give a diffusers folder (one with model_index.json) as "
        f"family.init_args.{key}, or a hub id (org/name)"
    )
    if path.is_file():
        raise ValueError(
            f"{layout.family}: '{name}' is a file; give a diffusers folder (one with model_index.json), a hub id or a "
            f".safetensors file as family.init_args.{key}."
        )
    if path.is_dir():
        return check_base(path, layout)
    if not is_hub_id(name):
        raise FileNotFoundError(f"{absent}.")
    try:
        folder = hub.fetch(name, "model_index.json", (*layout.components, "vae_large"), weights=weights)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{absent}: {error}") from error
    return check_base(folder, layout)


def _refuse_pickle(name: str, what: str) -> None:
    if name.endswith(PICKLES):
        raise ValueError(
            f"{what} '{name}' is a pickle, which runs code when it is loaded; give the .safetensors file of the same "
            "model, or convert it on a machine that you can lose."
        )
