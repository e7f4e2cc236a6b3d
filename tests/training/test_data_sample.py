"""Data as a training step sees it: which prompts are left out, what they become, and what is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdxs_lightning.core.seeding import Stream, uniform
from sdxs_lightning.stages.data_sample import data_sample
from tests.helpers.tiny import tiny_batch
from tests.helpers.tiny_distillation import family_of


@pytest.mark.parametrize("kind", ["sd-epsilon", "sdxl-epsilon"])
def test_left_out_prompts_are_the_unconditional_ones(base: Callable[[str], Path], kind: str) -> None:
    family = family_of(base(kind))
    batch = replace(tiny_batch(8), original_sizes=torch.full((8, 2), 48), crops=torch.full((8, 2), 5))
    usual, sample = (
        data_sample(batch, family, seed=1),
        data_sample(batch, family, seed=1, caption_dropout=0.5),
    )
    assert batch.latents is not None
    torch.testing.assert_close(sample.latents, batch.latents * family.scaling_factor)
    dropped = uniform(1, Stream.DROPOUT, batch.positions) < 0.5
    assert 0 < int(dropped.sum()) < 8
    kept, before = sample.conditioning, usual.conditioning
    empty = before.negative_prompt_embeds
    assert empty is not None
    assert torch.equal(kept.prompt_embeds[~dropped], before.prompt_embeds[~dropped])
    assert torch.equal(kept.prompt_embeds[dropped], empty[dropped])
    assert not torch.equal(before.prompt_embeds[dropped], empty[dropped])
    if kind == "sd-epsilon":
        words = family.encode_prompts([""]).prompt_embeds
        torch.testing.assert_close(kept.prompt_embeds[dropped], words.expand_as(empty)[dropped])
        return
    assert kept.pooled_prompt_embeds is not None and before.pooled_prompt_embeds is not None
    assert not kept.prompt_embeds[dropped].any() and not kept.pooled_prompt_embeds[dropped].any()
    assert torch.equal(kept.pooled_prompt_embeds[~dropped], before.pooled_prompt_embeds[~dropped])
    assert kept.add_time_ids is not None
    assert kept.add_time_ids.tolist() == [[48, 48, 5, 5, 32, 32]] * 8
