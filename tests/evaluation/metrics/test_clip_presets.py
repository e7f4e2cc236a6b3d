"""CLIP models of published numbers: token ids and pixels of their authors' scripts, both libraries, preference scores."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from evaluation.metrics.clip_score import ClipScore, PreferenceScore
from evaluation.networks.clip_loading import load_folder, load_open_clip
from evaluation.networks.clip_models import CLIP_PRESETS, DMD2_RULE, ClipPreset, load_clip
from evaluation.networks.frozen_clip import FrozenClip
from tests.helpers.metric_networks import CONTEXT_LENGTH, write_tokenizer
from tests.helpers.tiny import tiny_tokenizer

SIZE = 24
CAPTIONS = [
    "A man riding a wave on top of a surfboard.",
    "",
    "two &amp; three  dogs, 's leash!",
    "word " * 72,
    "word " * 73 + "last",
    "word " * 75,
    "a red bicycle " * 60,
    "a blue bicycle " * 60,
]


def config() -> dict[str, object]:
    """A tiny CLIP with open_clip's own tokenizer: 49408 tokens, 77 of them."""
    return {
        "embed_dim": 8,
        "vision_cfg": {"image_size": SIZE, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In open_clip's layout, with OpenAI's normalisation."""
    out = tmp_path_factory.mktemp("presets") / "tiny"
    out.mkdir()
    (out / "open_clip_config.json").write_text(json.dumps({"model_cfg": config(), "preprocess_cfg": {}}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model(f"local-dir:{out}", load_weights=False)
    save_file(model.state_dict(), out / "open_clip_model.safetensors")
    return out


@pytest.fixture(scope="module")
def named(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same architecture, known to open_clip by name."""
    file = tmp_path_factory.mktemp("configs") / "tiny-for-tests.json"
    file.write_text(json.dumps(config()))
    open_clip.add_model_config(file)
    return "tiny-for-tests"


def noise(height: int = 60, width: int = 80, count: int = len(CAPTIONS)) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def pil_images(images_uint8: Tensor) -> list[Image.Image]:
    return [Image.fromarray(array) for array in images_uint8.permute(0, 2, 3, 1).numpy()]


def dmd2_token_ids() -> Tensor:
    """The evaluator of DMD2 in words of our own: plain rows of numbers."""
    rows = []
    for caption in CAPTIONS:
        tokens = open_clip.tokenizer.SimpleTokenizer()(caption)[0].tolist()
        row = [tokens[0], *open_clip.tokenizer.SimpleTokenizer().encode("A photo depicts"), *tokens[1:]][:77]
        rows.append([*row[:76], 49407 if row[76] > 0 else 0])
    return torch.tensor(rows)


def test_dmd2_puts_its_prefix_between_start_and_caption_token_by_token(folder: Path) -> None:
    clip = FrozenClip(folder, DMD2_RULE)
    found = clip.tokenize(CAPTIONS)
    assert torch.equal(found, dmd2_token_ids())
    assert found[0, :5].tolist() == [49406, 320, 1125, 29340, 320]  # start, a, photo, depicts, a
    assert (found == 49407).any(dim=1).all()
    assert CLIP_PRESETS["dmd2"] == ClipPreset("ViT-g-14", "laion2b_s12b_b42k", DMD2_RULE)


def test_bk_sdm_takes_captions_as_open_clip_does(folder: Path) -> None:
    expected = open_clip.tokenizer.SimpleTokenizer()(CAPTIONS)
    assert torch.equal(FrozenClip(folder, CLIP_PRESETS["bk-sdm"].rule).tokenize(CAPTIONS), expected)
    assert (CLIP_PRESETS["bk-sdm"].model, CLIP_PRESETS["bk-sdm"].tag) == ("ViT-g-14", "laion2b_s34b_b88k")


def test_long_captions_keep_their_end_and_differ(folder: Path) -> None:
    for rule in (DMD2_RULE, CLIP_PRESETS["bk-sdm"].rule):
        clip = FrozenClip(folder, rule)
        assert clip.tokenize(CAPTIONS[-2:])[:, -1].tolist() == [49407, 49407]
        red, blue = clip.text_features(CAPTIONS[-2:])
        assert not torch.allclose(red, blue, atol=1e-4)


def test_pixels_of_both_presets_are_those_of_their_scripts(folder: Path) -> None:
    images = noise(300, 280, 2)
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    plain = torch.stack([transform(image) for image in pil_images(images)])
    assert torch.equal(FrozenClip(folder).preprocess(images), plain)

    squares = []
    for image in pil_images(images):
        left, top = 0, 10
        square = image.crop((left, top, left + 280, top + 280))
        squares.append(transform(square.resize((256, 256), Image.Resampling.LANCZOS)))
    assert torch.equal(FrozenClip(folder, DMD2_RULE).preprocess(images), torch.stack(squares))


def test_the_score_is_that_of_open_clip_on_images_of_any_size(folder: Path) -> None:
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    images = noise()
    with torch.no_grad():
        pixels = torch.stack([transform(image) for image in pil_images(images)])
        image_features = model.eval().encode_image(pixels, normalize=True)
        text_features = model.encode_text(open_clip.get_tokenizer("ViT-g-14")(CAPTIONS), normalize=True)
    metric = ClipScore(FrozenClip(folder))
    metric.update(images, CAPTIONS)
    expected = float((image_features * text_features).sum(-1).double().mean())
    assert float(metric.compute()) / 100 == pytest.approx(expected, abs=1e-6)


def test_a_named_model_with_a_checkpoint_is_the_folders(
    folder: Path, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FrozenClip(folder).model
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "HPS_v2.1_compressed.pt")
    monkeypatch.setitem(CLIP_PRESETS, "hpsv2", ClipPreset(named, "laion2b_s32b_b79k"))
    clip = load_clip("hpsv2", tmp_path / "HPS_v2.1_compressed.pt")
    plain, preference = ClipScore(FrozenClip(folder)), PreferenceScore(clip, 1.0, "hpsv2")
    for metric in (plain, preference):
        metric.update(noise(), CAPTIONS)
    assert 100 * float(preference.compute()) == pytest.approx(float(plain.compute()), rel=1e-6)
    assert preference.estimates()["hpsv2"].samples == len(CAPTIONS)
    assert clip.identity()["weights_sha256"] == FrozenClip(folder).identity()["weights_sha256"]
    by_file = load_open_clip(named, "laion2b_s34b_b88k", folder / "open_clip_model.safetensors")
    assert torch.equal(FrozenClip(by_file).text_features(CAPTIONS), clip.text_features(CAPTIONS))


@pytest.fixture(scope="module")
def of_transformers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIPModel with its tokenizer and preprocessing, as PickScore's folder is laid out."""
    out = tmp_path_factory.mktemp("pickscore")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(out)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = CLIPModel(
            CLIPConfig(
                text_config=text,
                vision_config=vision | {"image_size": SIZE, "patch_size": 8},
                projection_dim=8,
            )
        )
    model.save_pretrained(out)
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (out / "preprocessor_config.json").write_text(json.dumps(settings))
    return out


def test_pickscore_is_the_scaled_cosine_of_transformers_clip(of_transformers: Path) -> None:
    clip = FrozenClip(load_folder(of_transformers))
    captions = ["a red circle", "a blue square left of a cat on gray " * 5]
    images = noise(SIZE, SIZE, 2)
    model = CLIPModel.from_pretrained(of_transformers).eval()
    token_ids = tiny_tokenizer()(
        captions, padding="max_length", truncation=True, max_length=16, return_tensors="pt"
    ).input_ids
    pixels = (images / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor(
        [0.2, 0.3, 0.4]
    ).view(3, 1, 1)
    with torch.no_grad():
        expected = model(input_ids=token_ids, pixel_values=pixels).logits_per_image.diagonal()
    metric = PreferenceScore(clip)
    metric.update(images, captions)
    assert float(metric.compute()) == pytest.approx(float(expected.double().mean()), rel=1e-5)
    assert float(model.logit_scale.detach().exp()) == pytest.approx(metric.scale)
    assert int(clip.tokenize(captions)[1, -1]) == clip.eos_token_id
    assert load_clip("pickscore", of_transformers).dimensions == 8


def test_what_cannot_be_loaded_says_so(folder: Path, tmp_path: Path, named: str) -> None:
    with pytest.raises(
        ValueError, match=r"no CLIP named 'vit-x': neither a folder nor one of vit-g-14-s12b, "
    ):
        load_clip("vit-x")
    with pytest.raises(ValueError, match=r"hpsv2 needs the file of its weights"):
        load_clip("hpsv2")
    with pytest.raises(FileNotFoundError, match=r"no CLIP weights at .*missing\.pt"):
        load_open_clip(named, "any", tmp_path / "missing.pt")
    with pytest.raises(FileNotFoundError, match=r"nor in transformers' \(config\.json\)"):
        load_folder(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no CLIP of transformers at"):
        load_folder(tmp_path)
    with pytest.raises(ValueError, match="CLIP score needs the captions"):
        ClipScore(FrozenClip(folder)).update(noise(SIZE, SIZE, 1))
    assert CONTEXT_LENGTH < 77
