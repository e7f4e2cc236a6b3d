"""Reading and checking diffusers folders."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sdxs_lightning.families.weights import check_not_pickled, load_network, weight_files

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny


VAE_FOLDERS = ("vae", "vae_large")
"""Folders that may hold a VAE. Released SDXS folders have a tiny VAE in the first and the KL VAE in the second."""


@dataclass(frozen=True)
class Layout:
    """The files of a family's bases."""

    family: str
    """Name of the class, for messages."""
    pipeline_class: str
    """The `_class_name` that `model_index.json` must have."""
    components: tuple[str, ...]
    """Required sub-folders."""
    single_file: Mapping[str, tuple[str, ...]]
    """Prefixes of tensor names in a single file by component; one of each must occur."""
    pipeline_options: Mapping[str, Any]
    """Arguments of the pipeline's `from_pretrained` that omit components not needed by students."""


def check_base(folder: Path, layout: Layout) -> Path:
    """Checks that a folder is a complete base of this family, and returns it; reads one small file.

    A U-Net or VAE without weights is accepted, because it may be trained from scratch.

    Raises:
        FileNotFoundError: if `model_index.json` or a component is missing.
        ValueError: for a base of another family, pickled weights only, or components of other libraries.
    """
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{layout.family}: '{folder}' has no model_index.json, so it is not a diffusers pipeline folder."
        )
    model_index = read_json(folder / "model_index.json")
    found = model_index.get("_class_name")
    if found != layout.pipeline_class:
        raise ValueError(
            f"{layout.family}: '{folder}' holds a {found}, and this family needs a {layout.pipeline_class}; choose the "
            "other family.class_path."
        )
    missing = [name for name in layout.components if not (folder / name).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"{layout.family}: '{folder}' lacks the component folder(s) {', '.join(missing)}."
        )
    check_libraries(folder, model_index)
    for name in layout.components:
        check_not_pickled(folder / name)
    return folder


def check_libraries(folder: Path, model_index: Mapping[str, Any]) -> None:
    """Checks that a pipeline's components are classes of diffusers and transformers: diffusers imports what is named.

    Raises:
        ValueError: for another library, or a pipeline class of the folder's own.
    """
    for name, value in model_index.items():
        library = value[0] if isinstance(value, list) and value else None
        # Safety checkers of SD-1.5 name the pipeline's package, which is a part of diffusers.
        known = library in (None, "diffusers", "transformers", "stable_diffusion")
        if not known or (name == "_class_name" and not isinstance(value, str)):
            raise ValueError(
                f"'{folder / 'model_index.json'}' takes {name} from '{library}', which would be imported; components of "
                "diffusers and transformers are accepted."
            )


def read_json(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a file.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is no valid JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' is missing.")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is not readable as JSON ({error}); was its download cut off?") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' must hold a JSON object, got a {type(content).__name__}.")
    return content


def unet_config(folder: Path) -> dict[str, Any]:
    """Reads the config of the U-Net in a folder, including defaults, without loading its weights.

    Raises:
        FileNotFoundError: if config.json is missing.
        ValueError: for another class of network.
    """
    from diffusers import UNet2DConditionModel

    config = read_json(folder / "config.json")
    found = config.get("_class_name", "UNet2DConditionModel")
    if found != "UNet2DConditionModel":
        raise ValueError(f"'{folder}' holds a {found}, expected a UNet2DConditionModel.")
    parameters = inspect.signature(UNet2DConditionModel.__init__).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}
    return defaults | {name: value for name, value in config.items() if not name.startswith("_")}


def unet_folder(source: Path, named: str) -> Path:
    """Returns the U-Net's folder: the source itself, or its `unet`.

    Args:
        source: a U-Net folder or a pipeline folder.
        named: the user's option and value, for the error message.

    Raises:
        FileNotFoundError: if it is neither.
    """
    # Pipeline folders first, since some repositories have a config.json next to model_index.json.
    for folder in (source / "unet", source):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(
        f"{named} is neither a U-Net folder (config.json) nor a pipeline folder (unet/config.json)."
    )


def check_unet(folder: Path, base: Path, prompt_width: int) -> None:
    """Checks by its config that a U-Net fits a base.

    Args:
        folder: the U-Net's folder.
        base: the base's folder.
        prompt_width: total width of the base's text encoders.

    Raises:
        ValueError: for a U-Net with another text encoder, other latents or another prediction type.
    """
    found, expected = unet_config(folder), unet_config(base / "unet")
    if _prompt_widths(found) != {prompt_width}:
        widths = ", ".join(str(width) for width in sorted(_prompt_widths(found)))
        raise ValueError(
            f"the U-Net in '{folder}' reads prompts of width {widths}, and the text encoders of '{base}' give "
            f"{prompt_width}; they are not of one family."
        )
    for name in (
        "in_channels",
        "out_channels",
        "addition_embed_type",
        "projection_class_embeddings_input_dim",
    ):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"the U-Net in '{folder}' has {name} {found.get(name)}, and that of '{base}' has {expected.get(name)}; "
                "they are not of one family."
            )
    _check_prediction(folder.parent, base)


def _prompt_widths(config: Mapping[str, Any]) -> set[int]:
    widths = config["cross_attention_dim"]
    return set(widths) if isinstance(widths, list | tuple) else {widths}


def _check_prediction(pipeline: Path, base: Path) -> None:
    """Raises ValueError if a pipeline folder's scheduler has another prediction type than the base's."""
    name = Path("scheduler") / "scheduler_config.json"
    if not (pipeline / name).is_file():
        return
    found, expected = (
        read_json(folder / name).get("prediction_type", "epsilon") for folder in (pipeline, base)
    )
    if found != expected:
        raise ValueError(
            f"the U-Net in '{pipeline}' predicts {found} (its {name}), and that of '{base}' {expected}; choose a base with "
            "the same prediction_type."
        )


def kl_folder(base: Path) -> Path | None:
    """Returns the folder of a base's KL VAE, or None."""
    from diffusers import AutoencoderKL

    for name in VAE_FOLDERS:
        if (base / name).is_dir() and vae_class(base / name) is AutoencoderKL:
            return base / name
    return None


def vae_class(folder: Path) -> type[AutoencoderKL] | type[AutoencoderTiny]:
    """Returns the class of the VAE in a folder.

    Raises:
        ValueError: for any other class.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny

    found = read_json(folder / "config.json").get("_class_name", "AutoencoderKL")
    if found not in ("AutoencoderKL", "AutoencoderTiny"):
        raise ValueError(f"'{folder}' holds a {found}, expected an AutoencoderKL or an AutoencoderTiny.")
    chosen: type[AutoencoderKL] | type[AutoencoderTiny]
    chosen = AutoencoderKL if found == "AutoencoderKL" else AutoencoderTiny
    return chosen


def latent_scale(folder: Path, default: float) -> tuple[float, float]:
    """Returns scaling_factor (`default` if missing) and shift_factor of the VAE in a folder.

    Raises:
        ValueError: for a VAE whose latents are normalised per channel.
    """
    config = read_json(folder / "config.json")
    by_channel = [key for key in ("latents_mean", "latents_std") if config.get(key) is not None]
    if by_channel:
        raise ValueError(
            f"'{folder / 'config.json'}' sets {' and '.join(by_channel)}, and latents are scaled by scaling_factor and "
            "shift_factor alone here; choose a base whose VAE does without, or set these keys to null if the U-Net was "
            "trained without them."
        )
    return config.get("scaling_factor", default), config.get("shift_factor") or 0.0


def read_vae(base: Path) -> AutoencoderKL:
    """Loads the KL VAE of a base, float32.

    Raises:
        FileNotFoundError: if the base has only a tiny VAE.
    """
    from diffusers import AutoencoderKL

    folder = kl_folder(base)
    if folder is None:
        raise FileNotFoundError(
            f"'{base}' has an AutoencoderTiny as vae and no vae_large, and an AutoencoderKL is needed here; take the base "
            "that this folder was made from, or add its VAE as vae_large."
        )
    return load_network(AutoencoderKL, folder)


def vae_factor(config: Mapping[str, Any]) -> int:
    """Upscaling factor of the VAE per side."""
    # Older configs of AutoencoderTiny lack the first name.
    widths = config.get("block_out_channels") or config["decoder_block_out_channels"]
    return int(2 ** (len(widths) - 1))


def pipeline_variant(folder: Path) -> str | None:
    """Returns the `variant` for loading a complete pipeline: "fp16" if some component has only such files."""
    found = (weight_files(path.name for path in one.iterdir()) for one in folder.iterdir() if one.is_dir())
    return next((files.variant for files in found if files is not None and files.variant), None)


def card_licence(folder: Path) -> str | None:
    """The licence in the header of a model card (README.md), in the hub's spelling; None where none can be read."""
    card = folder / "README.md"
    header = (
        re.match(r"---\s*?\n(.*?)\n---", card.read_text(errors="replace"), re.DOTALL)
        if card.is_file()
        else None
    )
    try:
        found = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError:
        return None
    licence = found.get("license") if isinstance(found, dict) else None
    return licence if isinstance(licence, str) else None
