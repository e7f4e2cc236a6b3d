"""Parts and data that do not go together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxs_lightning.objectives.adversarial import DiffusionAdversarial
from sdxs_lightning.objectives.denoising import Denoising
from sdxs_lightning.timesteps import TimestepRange
from tests.tiny import tiny_batch
from tests.training.tiny_distillation import (
    WARMUP,
    WARMUP_ONLY,
    built,
    distillation,
    sample_of,
)

Base = Callable[[str], Path]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gan": False, "adversarial": DiffusionAdversarial()}, "go together"),
        ({"gan": False, "distribution_matching": None}, "the student has no objective"),
        ({"denoising": Denoising(timesteps=TimestepRange(0, 500))}, "must equal denoising.timesteps"),
        ({"warmup": WARMUP}, "warmup_updates is 0 and warmup is RegressionWarmup"),
        ({"curriculum": WARMUP_ONLY}, "give both, or 0 and null"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches must be 1 or more"),
    ],
)
def test_parts_that_do_not_go_together(base: Base, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distillation(base("sd-epsilon"), **settings)


def test_latents_of_another_size_are_refused(base: Base) -> None:
    module = built(distillation(base("sd-epsilon")))
    batch = tiny_batch(2)
    sample = sample_of(module)
    small = type(batch)(
        captions=batch.captions,
        positions=batch.positions,
        sample_ids=batch.sample_ids,
        latents=torch.zeros(2, 4, 8, 8),
    )
    with pytest.raises(
        ValueError, match=r"latents of shape \(4, 16, 16\) in every batch and got shape \(4, 8, 8\)"
    ):
        module._data(small, sample)
    none = type(batch)(captions=batch.captions, positions=batch.positions, sample_ids=batch.sample_ids)
    with pytest.raises(ValueError, match="got none; make latent shards"):
        module._data(none, sample)
