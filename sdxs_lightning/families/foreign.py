"""Model folders of others in the layouts of open_clip and transformers: checked before a library reads them.

The libraries follow what a folder's JSON files say: fetch a tower or a tokenizer from the hub, unpickle `.bin`, import code
beside the weights. A folder is loaded from its own files or refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdxs_lightning.families.folders import read_json
from sdxs_lightning.families.weights import PICKLES, check_not_pickled

OPEN_CLIP = "open_clip_config.json"
_CODE = ("auto_map", "custom_pipelines", "trust_remote_code")
"""Keys of the JSON files of a folder that make transformers import code from it."""


def check_open_clip(folder: Path) -> dict[str, Any]:
    """Returns the `model_cfg` of a folder in open_clip's layout that can be loaded from its own files.

    Raises:
        FileNotFoundError: if there are no weights.
        ValueError: for pickled weights only, a part that would come from the hub, or one that brings code.
    """
    _check_no_code(folder)
    names = [path.name for path in folder.iterdir()]
    if not any(name.endswith(".safetensors") for name in names):
        pickled = next((name for name in sorted(names) if name.endswith(PICKLES)), None)
        if pickled is None:
            raise FileNotFoundError(f"'{folder}' has no weights: expected open_clip_model.safetensors.")
        raise ValueError(
            f"'{folder}' has only pickled weights ({pickled}), which run code when they are loaded; convert them to "
            "open_clip_model.safetensors (safetensors.torch.save_file)."
        )
    settings = read_json(folder / OPEN_CLIP).get("model_cfg")
    if not isinstance(settings, dict):
        raise ValueError(f"'{folder / OPEN_CLIP}' has no model_cfg, so it is no model of open_clip.")
    text, vision = (settings.get(f"{tower}_cfg") or {} for tower in ("text", "vision"))
    if text.get("hf_model_name"):
        raise ValueError(
            f"'{folder / OPEN_CLIP}' takes its text tower '{text['hf_model_name']}' from the hub (hf_model_name), and a folder "
            "is loaded from its own files; give the model by its open_clip name, or as a folder of transformers."
        )
    timm_name = str(vision.get("timm_model_name") or "")
    if ":" in timm_name or "/" in timm_name:
        raise ValueError(
            f"'{folder / OPEN_CLIP}' takes its image tower '{timm_name}' from elsewhere (timm_model_name); a name of timm's "
            "own models is accepted."
        )
    if text.get("hf_tokenizer_name") and not any(name.startswith("tokenizer") for name in names):
        raise FileNotFoundError(
            f"'{folder}' has no tokenizer files, though its {OPEN_CLIP} names the tokenizer '{text['hf_tokenizer_name']}'; "
            "copy them (tokenizer.json, tokenizer_config.json) into it."
        )
    return settings


def check_transformers(folder: Path) -> None:
    """Checks that a folder in transformers' layout brings neither pickled weights only, nor code.

    Raises:
        ValueError: if it does.
    """
    _check_no_code(folder)
    check_not_pickled(folder)


@contextmanager
def without_hub() -> Iterator[None]:
    """Makes every request of huggingface_hub fail, and forbids reading its cache for what a folder lacks."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _check_no_code(folder: Path) -> None:
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith(".index.json") or path.name in ("tokenizer.json", "vocab.json"):
            continue  # large, and without settings
        found = _code_key(json.loads(path.read_text(encoding="utf-8", errors="replace") or "null"))
        if found is not None:
            raise ValueError(
                f"'{path}' has '{found}', which imports code from a model's folder; remove it if the model does without."
            )


def _code_key(value: Any) -> str | None:
    if isinstance(value, list):
        return next((found for one in value if (found := _code_key(one))), None)
    if not isinstance(value, dict):
        return None
    key = next((name for name in _CODE if value.get(name)), None)
    return key or _code_key(list(value.values()))
