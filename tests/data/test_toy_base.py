"""The shipped toy base and its metric networks, and the shards of the toy world."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from data.toy.datamodule import ToyDataModule, encode
from data.toy.rendered import render_batch
from data.toy.training.autoencoder import whiten_latents
from data.toy.training.classifier import AttributeClassifier
from data.toy.training.style_classifier import STYLES, StyleClassifier
from data.toy.training.text_encoder import TextEncoderPairTraining
from data.toy.world import captions
from sdxs_lightning.core.latents import to_uint8
from sdxs_lightning.families.sd import StableDiffusion

BASE = Path(__file__).parents[2] / "data" / "toy"


def test_shipped_files_stay_within_twenty_megabytes() -> None:
    shipped = [path for path in BASE.rglob("*") if path.suffix in {".safetensors", ".npz", ".json"}]
    assert (
        5e6 < sum(path.stat().st_size for path in shipped) < 20e6
    )  # base, student, ControlNet, metrics; of their weights


def test_classifier_is_right_on_real_and_reconstructed_images() -> None:
    classifier = AttributeClassifier.from_pretrained(BASE / "classifier")
    images, stated = render_batch("val", 200), captions("val", 200)
    assert classifier.right(images, stated).all(dim=1).float().mean() >= 0.99
    autoencoder = AutoencoderKL.from_pretrained(BASE / "base" / "vae", torch_dtype=torch.float32).eval()
    with torch.no_grad():
        decoded = autoencoder.decode(encode(autoencoder, images)).sample
    reconstructed = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    assert classifier.right(reconstructed, stated).all(dim=1).float().mean() >= 0.99
    error = (reconstructed.double() - images.double()).square().mean(dim=(1, 2, 3))
    assert (10 * torch.log10(255**2 / error)).mean() > 36


def test_classifier_checks_stated_attributes_and_their_binding() -> None:
    classifier = AttributeClassifier.from_pretrained(BASE / "classifier")
    images, stated = render_batch("val", 200), captions("val", 200)
    index = next(i for i, caption in enumerate(stated) if " above " in caption)
    first, second = stated[index].split(" above ")
    one = images[index : index + 1].repeat(3, 1, 1, 1)
    right = classifier.right(
        one, [f"{first} above {second}", f"{second} below {first}", f"{second} above {first}"]
    )
    assert right.all(dim=1).tolist() == [True, True, False]
    assert right[:, 1:3].all(), "size and background of a pair are not stated"


def test_the_style_classifier_is_right_on_real_and_reconstructed_images() -> None:
    classifier = StyleClassifier.from_pretrained(BASE / "style")
    autoencoder = AutoencoderKL.from_pretrained(BASE / "base" / "vae", torch_dtype=torch.float32).eval()
    textured = STYLES.index("textured")
    for style, least, most in ((None, 0.0, 0.03), ("textured", 0.95, 1.0)):
        images = render_batch("val", 200, 0, [style])  # type: ignore[list-item]
        with torch.no_grad():
            again = to_uint8(autoencoder.decode(encode(autoencoder, images)).sample)
        for shown in (images, again):
            assert least <= float((classifier.predict(shown) == textured).float().mean()) <= most
    with pytest.raises(FileNotFoundError, match="style_classifier.yaml"):
        StyleClassifier.from_pretrained(BASE / "none")


def test_missing_classifier_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no attribute classifier at .* configs/toy/classifier.yaml"):
        AttributeClassifier.from_pretrained(tmp_path)


def test_whitening_changes_latents_and_no_reconstruction() -> None:
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        mid_block_add_attention=False,
    ).eval()
    images = render_batch("train", 64).float() / 127.5 - 1
    with torch.no_grad():
        before = autoencoder.encode(images).latent_dist
        decoded_before = autoencoder.decode(before.mode()).sample
        whiten_latents(autoencoder, images)
        after = autoencoder.encode(images).latent_dist
        decoded_after = autoencoder.decode(after.mode()).sample
    torch.testing.assert_close(decoded_after, decoded_before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.mean.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(after.mean.std(dim=(0, 2, 3)), torch.ones(4), rtol=1e-3, atol=0)
    ratio = before.mean.std(dim=(0, 2, 3)).view(1, 4, 1, 1)
    torch.testing.assert_close(after.std * ratio, before.std, rtol=1e-4, atol=1e-6)


def test_shards_hold_the_vae_means_and_captions(tmp_path: Path) -> None:
    module = ToyDataModule(str(BASE / "base"), train_images=40, cache=str(tmp_path), batch_size=8)
    module.prepare_data()
    module.setup("fit")
    loader = module.train_dataloader()
    batches = list(iter(loader))
    assert len(batches) == 5
    autoencoder = AutoencoderKL.from_pretrained(BASE / "base" / "vae", torch_dtype=torch.float32).eval()
    expected = dict(zip(captions("train", 40), encode(autoencoder, render_batch("train", 40)), strict=True))
    for batch in batches:
        assert batch.latents is not None
        for caption, latents in zip(batch.captions, batch.latents, strict=True):
            torch.testing.assert_close(latents.float(), expected[caption], rtol=1e-3, atol=1e-3)
    assert module.train_captions(12) == captions("train", 12)
    assert module.train_captions(100) == captions("train", 40)
    assert sorted(caption for batch in batches for caption in batch.captions) == sorted(expected)


def test_incomplete_shards_are_written_again(tmp_path: Path) -> None:
    module = ToyDataModule(str(BASE / "base"), train_images=16, cache=str(tmp_path), batch_size=8)
    module.prepare_data()
    shard = module.folder / "00000.tar"
    good = shard.read_bytes()
    (module.folder / "complete").unlink()
    shard.write_bytes(good[:1000])
    ToyDataModule(str(BASE / "base"), train_images=16, cache=str(tmp_path), batch_size=8).prepare_data()
    assert shard.read_bytes() == good


def test_a_base_without_autoencoder_is_one_sentence(tmp_path: Path) -> None:
    shutil.copytree(BASE / "base" / "unet", tmp_path / "unet")
    with pytest.raises(FileNotFoundError, match="no autoencoder at .* configs/toy/autoencoder.yaml"):
        ToyDataModule(str(tmp_path))


def pair_training(**settings: Any) -> TextEncoderPairTraining:
    schedule = partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0)
    return TextEncoderPairTraining(torch.optim.SGD, schedule, "unused", **settings)


def test_the_text_encoder_pair_misses_all_variance_at_the_mean_and_none_at_the_imitated_states() -> None:
    training = pair_training(imitated=str(BASE / "base"))
    texts = captions("val", 64)
    tokens = training.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    states = (
        StableDiffusion(str(BASE / "base")).encode_prompts(texts).prompt_embeds
    )  # what the base's U-Net reads
    training.log = lambda *_args, **_kwargs: None  # type: ignore[method-assign]
    mean = states.mean(dim=(0, 1), keepdim=True).expand_as(states)
    assert training.further_loss(tokens, states) == 0
    assert training.further_loss(tokens, mean).item() == pytest.approx(1, abs=1e-3)
    assert pair_training().further_loss(tokens, mean) == 0
    own, pooled = training.states(tokens)
    assert own.shape == states.shape and pooled is not None and pooled.shape == (64, 64)
    assert not any("imitated" in name for name in training.state_dict())


def test_an_imitated_text_encoder_of_another_width_is_refused() -> None:
    with pytest.raises(
        ValueError, match="has states of width 128, and both encoders together 64: set hidden_size"
    ):
        pair_training(hidden_size=32, imitated=str(BASE / "base"))
