"""What the tiny decoder is compared with: the VAE's images, or the images that the latents were encoded from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdxs_lightning.core.batch import TrainingBatch
from sdxs_lightning.stages.decoder import DecoderDistillation
from tests.helpers.tiny import tiny_batch
from tests.helpers.tiny_decoding import SAMPLER, decoding

Base = Callable[[str], Path]


def built(base: Path) -> DecoderDistillation:
    module = decoding(base, target="images")
    module.configure_model()
    return module


def target_images(count: int, side: int = 32) -> Tensor:
    return 2 * torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(2)) - 1


@pytest.mark.parametrize("kind", ["sd-epsilon", "sdxl-epsilon"])
def test_images_are_the_target_and_are_encoded_where_no_latents_come(base: Base, kind: str) -> None:
    module = built(base(kind))
    batch = replace(tiny_batch(3), images=target_images(3))
    stored = module.pairs.latents(batch)
    assert batch.latents is not None and torch.equal(stored, batch.latents * 0.5)
    assert torch.equal(module.pairs.targets(batch, stored), target_images(3))

    encoded = module.pairs.latents(replace(batch, latents=None))
    vae = module.family.load_vae()
    with torch.no_grad():
        expected = vae.encode(target_images(3)).latent_dist.mean * 0.5
    torch.testing.assert_close(encoded, expected, rtol=1e-5, atol=1e-6)


def test_the_loss_pulls_at_the_images_and_not_at_the_vae(base: Base) -> None:
    module = built(base("sd-epsilon"))
    batch = replace(tiny_batch(2), images=target_images(2))
    latents = module.pairs.latents(batch)
    perfect = module.pairs.targets(batch, latents)
    assert module.reconstruction.loss(perfect, perfect, 2).item() == 0
    by_vae = module.pairs.decode_by_vae(latents)
    assert module.reconstruction.loss(by_vae, perfect, 2).item() > 0.1


@pytest.mark.parametrize(
    ("images", "message"),
    [(None, "got no images"), (target_images(2, 16), "got images 16 px wide")],
)
def test_images_are_needed_at_the_size_of_their_latents(
    base: Base, images: Tensor | None, message: str
) -> None:
    module = built(base("sd-epsilon"))
    batch: TrainingBatch = tiny_batch(2)
    latents = module.pairs.latents(batch)
    with pytest.raises(ValueError, match=f"32 px wide for its latents.* and {message}; set data.contents to"):
        module.pairs.targets(replace(batch, images=images), latents)


def test_sampled_latents_have_no_images(base: Base) -> None:
    with pytest.raises(ValueError, match="set sampler to null, or target to vae"):
        decoding(base("sd-epsilon"), target="images", sampler=SAMPLER)
