"""Tokenizes and embeds prompts, each once."""

from __future__ import annotations

import textwrap
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdxs_lightning.core.errors import UserError, first_line
from sdxs_lightning.inference.model_folder import ModelFolder
from sdxs_lightning.inference.networks import Networks, Prompts

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

CAPACITY = 256
"""Embedded prompts that are kept: 40 MB for SD in half precision, 85 MB for SDXL."""


class PromptEncoder:
    """Embeds prompts like diffusers' pipelines: padded, truncated, no attention mask; the last used ones are kept.

    The first prompt that is truncated is named in a warning.

    Args:
        model: whose tokenizers are read.
        networks: whose text encoders run.

    Raises:
        UserError: for unreadable tokenizers.
    """

    def __init__(self, model: ModelFolder, networks: Networks) -> None:
        from transformers import CLIPTokenizer

        folders = [model.path / name.replace("text_encoder", "tokenizer") for name in model.encoders]
        try:
            self._tokenizers: list[CLIPTokenizer] = [
                CLIPTokenizer.from_pretrained(folder, local_files_only=True) for folder in folders
            ]
        except (OSError, ValueError) as error:
            raise UserError(
                f"the tokenizer in '{model.path}' cannot be read ({first_line(error)}); was a file cut off?"
            ) from error
        self._networks = networks
        self._kept: OrderedDict[str, Prompts] = OrderedDict()
        self._named_a_truncated_one = False

    def __call__(self, prompts: Sequence[str]) -> Prompts:
        """Embeds B prompts."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept]
        if new:
            self._warn_of_truncation(new)
            embedded = self._networks.encode_prompts(self._token_ids(new))
            for i, prompt in enumerate(new):
                pooled = None if embedded.pooled is None else embedded.pooled[i : i + 1].clone()
                self._kept[prompt] = Prompts(embedded.embeds[i : i + 1].clone(), pooled)
        found = [self._kept[prompt] for prompt in prompts]
        for prompt in prompts:
            self._kept.move_to_end(prompt)
        while len(self._kept) > CAPACITY:
            self._kept.popitem(last=False)
        embeds = torch.cat([one.embeds for one in found])
        pooled_rows = [one.pooled for one in found if one.pooled is not None]
        return Prompts(embeds, torch.cat(pooled_rows) if pooled_rows else None)

    def _warn_of_truncation(self, prompts: list[str]) -> None:
        if self._named_a_truncated_one:
            return
        tokenizer = self._tokenizers[0]
        longest = tokenizer.model_max_length
        for prompt, ids in zip(prompts, tokenizer(prompts, verbose=False).input_ids, strict=True):
            if len(ids) > longest:
                lost = tokenizer.decode(ids[longest - 1 : -1])
                warnings.warn(
                    f"the prompt {textwrap.shorten(prompt, 60)!r} has {len(ids)} tokens and the text encoder takes {longest}: "
                    f"{textwrap.shorten(lost, 60)!r} is left out. Further ones are not named.",
                    stacklevel=3,
                )
                self._named_a_truncated_one = True
                return

    def _token_ids(self, prompts: list[str]) -> list[Tensor]:
        return [
            tokenizer(
                prompts,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for tokenizer in self._tokenizers
        ]
