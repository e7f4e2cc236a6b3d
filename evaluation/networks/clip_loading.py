"""Loading CLIP models: folders of open_clip or transformers, open_clip's named models, checkpoint files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evaluation.networks.network_features import hash_settings
from sdxs_lightning.core.errors import first_line
from sdxs_lightning.core.hub_ids import is_hub_id
from sdxs_lightning.families.foreign import check_open_clip, check_transformers, without_hub
from sdxs_lightning.families.quiet import quiet_libraries

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class LoadedClip:
    """A CLIP model with its tokenizer and preprocessing, independent of its library."""

    name: str
    """Short name."""
    model: nn.Module
    """Float32 model with `logit_scale`."""
    encode_image: Callable[[Tensor], Tensor]
    """(B,3,size,size) normalised pixels to (B, d), not normalised."""
    encode_text: Callable[[Tensor], Tensor]
    """(B, context length) ids to (B, d), not normalised."""
    tokenizer: Callable[[Sequence[str]], Tensor]
    """Captions to (B, context length) int64 ids."""
    eos_token_id: int
    """Token at which the text embedding is read."""
    size: int
    """Image size in pixels."""
    mean: tuple[float, ...]
    """Mean of the normalisation, for pixels in [0, 1]."""
    std: tuple[float, ...]
    """Standard deviation of the normalisation."""
    image_settings: str
    """Hash of the image tower's configuration (heads, activation), which the weights do not determine."""
    text_settings: str
    """Hash of the text tower's configuration and the tokenizer."""


def load_folder(folder: str | Path) -> LoadedClip:
    """Load a CLIP from a local folder in open_clip's or transformers' layout.

    Raises:
        FileNotFoundError: if it is neither, or incomplete.
        ValueError: for pickled weights, or a part that would come from the hub.
    """
    folder = Path(folder)
    if (folder / "open_clip_config.json").is_file():
        settings = check_open_clip(folder)
        import open_clip  # takes seconds: with timm

        with without_hub():
            model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
            tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        return _of_open_clip(f"clip-{folder.name}", model, tokenizer, settings)
    if (folder / "config.json").is_file():
        return load_transformers(folder)
    raise FileNotFoundError(
        f"no CLIP in open_clip layout at {folder} (open_clip_config.json is missing), nor in transformers' (config.json); set "
        "the protocol's `clip` to such a folder"
    )


def load_open_clip(model: str, tag: str, weights: str | Path | None = None) -> LoadedClip:
    """Load an open_clip model by name, with the weights of a tag or a file.

    Args:
        model: such as "ViT-g-14".
        tag: such as "laion2b_s34b_b88k"; its weights come from the Hugging Face cache, or from the hub.
        weights: file to use instead: .safetensors, or a checkpoint that torch.load reads with weights_only.

    Raises:
        FileNotFoundError: if the weights are not available.
    """
    import open_clip  # takes seconds: with timm

    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(
            f"no CLIP weights at {weights}; give a file, or none to take {model}/{tag} from the hub"
        )
    # OpenAI's weights were trained with QuickGELU, which the architecture name does not imply.
    quick_gelu = tag == "openai"
    try:
        network = open_clip.create_model(
            model, pretrained=tag if weights is None else str(weights), force_quick_gelu=quick_gelu
        )
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"weights of CLIP {model}/{tag} could not be loaded ({first_line(error)[:200]}); without a network, "
            "put them into the Hugging Face cache beforehand, or name a file or a folder"
        ) from error
    settings = {**(open_clip.get_model_config(model) or {}), "quick_gelu": quick_gelu}
    return _of_open_clip(f"{model}/{tag}", network, open_clip.get_tokenizer(model), settings)


def _of_open_clip(name: str, model: Any, tokenizer: Any, settings: Mapping[str, Any]) -> LoadedClip:
    preprocessing = model.visual.preprocess_cfg
    # open_clip's tokenizer and the transformers tokenizer that it may wrap name this token differently.
    eos = tokenizer.eot_token_id if hasattr(tokenizer, "eot_token_id") else tokenizer.tokenizer.eos_token_id
    size = preprocessing["size"]
    return LoadedClip(
        name,
        model.float(),
        model.encode_image,
        model.encode_text,
        lambda captions: tokenizer(list(captions)),
        int(eos),
        int(size if isinstance(size, int) else size[0]),
        tuple(preprocessing["mean"]),
        tuple(preprocessing["std"]),
        hash_settings({key: value for key, value in settings.items() if key != "text_cfg"}),
        hash_settings([settings.get("text_cfg"), _tokenizer_settings(tokenizer)]),
    )


def load_transformers(model: str | Path, processor: str | Path | None = None) -> LoadedClip:
    """Load a CLIPModel of transformers from a folder or by hub id.

    Args:
        model: folder or id.
        processor: folder or id of tokenizer and preprocessing, if not the model's.

    Raises:
        FileNotFoundError: if it cannot be loaded.
        ValueError: for a folder with pickled weights or with code.
    """
    from transformers import AutoTokenizer, CLIPModel

    tokenizer_of = processor or model
    for source in (model, tokenizer_of):
        check_source(source, "CLIP")
    quiet_libraries()
    try:
        network = CLIPModel.from_pretrained(
            str(model), dtype=torch.float32, use_safetensors=True, local_files_only=Path(model).is_dir()
        )
        tokenizer = AutoTokenizer.from_pretrained(
            str(tokenizer_of), local_files_only=Path(tokenizer_of).is_dir(), trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no CLIP of transformers at {model} ({first_line(error)[:200]}); it needs config.json, weights "
            "and tokenizer files"
        ) from error
    tokenizer_settings = _tokenizer_settings(tokenizer)
    settings = _image_settings(Path(processor or model))
    length = network.config.text_config.max_position_embeddings

    def tokenize(captions: Sequence[str]) -> Tensor:
        encoded = tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        ids: Tensor = encoded.input_ids
        return ids

    return LoadedClip(
        f"transformers-{Path(model).name}",
        network,
        lambda pixels: _tensor(network.get_image_features(pixel_values=pixels)),
        lambda token_ids: _tensor(network.get_text_features(input_ids=token_ids)),
        tokenize,
        int(tokenizer.eos_token_id),
        int(network.config.vision_config.image_size),
        tuple(settings.get("image_mean", OPENAI_MEAN)),
        tuple(settings.get("image_std", OPENAI_STD)),
        architecture_hash(network.config.vision_config),
        hash_settings([architecture_hash(network.config.text_config), tokenizer_settings]),
    )


def check_source(model: str | Path, what: str) -> None:
    """Check a folder before transformers reads it; a name that is no folder must be a hub id.

    Raises:
        FileNotFoundError: for a path at which there is no folder.
        ValueError: for a folder with pickled weights or with code.
    """
    if Path(model).is_dir():
        check_transformers(Path(model))
    elif not is_hub_id(str(model)):
        raise FileNotFoundError(
            f"there is no folder '{model}' with a {what} of transformers; a hub id is org/name"
        )


def architecture_hash(config: Any) -> str:
    """16-digit hex hash of a transformers configuration, without fields about its storage."""
    incidental = ("name_or_path", "transformers_version", "dtype", "architectures", "attn_implementation")
    return hash_settings(
        {
            key: value
            for key, value in config.to_dict().items()
            if not key.lstrip("_").removeprefix("torch_").startswith(incidental)
        }
    )


def _tokenizer_settings(tokenizer: Any) -> str:
    """Vocabulary and rules; read before the first call, which would add padding settings."""
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    if hasattr(inner, "backend_tokenizer"):
        return str(inner.backend_tokenizer.to_str())
    return hash_settings(sorted(getattr(tokenizer, "encoder", {}).items()))


def _image_settings(folder: Path) -> dict[str, Any]:
    file = folder / "preprocessor_config.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _tensor(output: Any) -> Tensor:
    """The tensor in the output object of transformers 5; transformers 4 returns the tensor itself."""
    found: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return found
