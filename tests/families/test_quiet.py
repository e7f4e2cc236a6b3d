"""Loading prints nothing of the libraries: neither bars nor the warning of a LoRA that leaves the text encoder as it is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPConfig, CLIPModel
from transformers.utils import logging as transformers_logging

from evaluation.images.samples import load_pipeline
from evaluation.networks.clip_loading import load_transformers
from sdxs_lightning.inference.generator import OneStepGenerator
from tests.helpers.tiny import tiny_tokenizer

TOY = Path(__file__).parents[2] / "data" / "toy"


def in_diffusers(folder: Path) -> None:
    load_pipeline(TOY / "student").load_lora_weights(TOY / "style_lora")


def in_the_generator(folder: Path) -> None:
    OneStepGenerator.load(TOY / "student", lora=TOY / "style_lora", device="cpu").generate("a red circle")


def as_a_metric(folder: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = tiny_tokenizer()
    config = CLIPConfig(
        text_config={
            **small,
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    transformers_logging.disable_progress_bar()  # writing has a bar, too
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers_logging.enable_progress_bar()
    load_transformers(folder)


@pytest.mark.parametrize("load", [in_diffusers, in_the_generator, as_a_metric])
def test_loading_prints_nothing(
    load: Callable[[Path], None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for library in (diffusers_logging, transformers_logging):
        library.enable_progress_bar()
    logging.getLogger("diffusers.loaders.lora_base").filters.clear()
    load(tmp_path)
    assert capfd.readouterr() == ("", "")
