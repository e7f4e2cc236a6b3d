"""The decoder's figures against plain numpy, and the command."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.toy.world import image_at
from evaluation.benchmarks.tables.__main__ import main
from evaluation.benchmarks.tables.decoder_quality import feature_distance, psnr_db, stored_images, toy_images
from sdxs_lightning.networks.image_features import FeatureNetwork
from sdxs_lightning.publishing.calling import Settings
from sdxs_lightning.publishing.runs import Run
from sdxs_lightning.publishing.scores import read_scores
from tests.helpers.refusals import refusal
from tests.helpers.tiny import save_tiny_sd
from tests.helpers.tiny_decoding import save_tiny_autoencoder


def bytes_image(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=generator)


def test_psnr_equals_numpy() -> None:
    one, other = bytes_image(0), bytes_image(1)
    error = one.numpy().astype(np.float64) - other.numpy()
    expected = 10 * np.log10(255**2 / (error**2).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(psnr_db(one, other).numpy(), expected, rtol=1e-12)
    assert psnr_db(one, one).isinf().all()


class Two(torch.nn.Module):
    """The image itself, and its mirror with other weights of the channels."""

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images, images.flip(3) * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)]


def test_feature_distance_equals_numpy() -> None:
    network = FeatureNetwork(Two(), (0.5,) * 3, (0.5,) * 3, None)
    one, other = (torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))

    def layer(weights: list[float]) -> np.ndarray:
        unit = []
        for images in (one, other):
            features = images.double().numpy() * np.array(weights).reshape(1, 3, 1, 1)
            unit.append(features / np.sqrt((features**2).sum(axis=1, keepdims=True)))
        squared: np.ndarray = ((unit[0] - unit[1]) ** 2).sum(axis=1).mean(axis=(1, 2))
        return squared

    expected = (layer([1, 1, 1]) + layer([1, 2, 3])) / 2
    np.testing.assert_allclose(feature_distance(network, one, other).numpy(), expected, rtol=1e-5)
    assert feature_distance(network, one, one).tolist() == [0, 0]
    assert feature_distance(network, one, -one).tolist() == pytest.approx([4, 4])


def test_sources_of_images(tmp_path: Path) -> None:
    toy = list(toy_images(2))
    assert np.array_equal(toy[1].permute(1, 2, 0).numpy(), image_at("test", 1))
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 10:30] = 200  # the centred square
    Image.fromarray(image).save(tmp_path / "wide.png")
    Image.fromarray(image).save(tmp_path / "another.png")
    (tmp_path / "words.txt").write_text("no image")
    (found,) = stored_images(str(tmp_path), 1, 10)
    assert found.shape == (3, 10, 10) and (found.int() - 200).abs().max() < 15  # Lanczos rings at the border


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("decoder")
    return str(save_tiny_sd(folder / "base")), str(save_tiny_autoencoder(folder / "tiny"))


def test_command(folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tiny = folders
    out = tmp_path / "new" / "result.json"
    main(f"decoder --base {base} --decoder {tiny} --out {out} --images 5 --batch_size 4 --columns 3".split())
    result = json.loads(out.read_text())
    assert result["images"] == 5 and result["parameters"]["tiny"] < result["parameters"]["kl"]
    assert set(result["psnr_db"]) == set(result["feature_distance"]) == {"kl_real", "tiny_real", "tiny_kl"}
    loss = result["psnr_db"]["kl_real"] - result["psnr_db"]["tiny_real"]
    assert result["psnr_loss_db"] == pytest.approx(loss)
    assert set(result["time_kl_over_tiny"]) == {"1", "4"} and result["time_kl_over_tiny"]["4"] > 0
    assert f"| tiny against real | {result['psnr_db']['tiny_real']:.1f} |" in capsys.readouterr().out
    found = result["metrics"]["psnr_db"]
    assert found["value"] == pytest.approx(result["psnr_db"]["tiny_real"])
    assert found["low"] < found["value"] < found["high"] and found["samples"] == 5
    run = Run(tmp_path / "new", "decoder", {}, {})
    shutil.copytree(tiny, run.exported)  # what publish reads of the file
    scores = read_scores(run, Settings(4, 3.0, None), Path(base))
    assert {one.metric: one.value for one in scores.numbers} == {
        name: one["value"] for name, one in result["metrics"].items()
    }
    with Image.open(out.with_suffix(".png")) as page:
        assert page.width > 3 * 112 and page.height > 4 * 112


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--decoder": "nowhere"}, "decoder: 'nowhere' holds neither config.json nor vae/config.json"),
        ({"--base": "nowhere"}, "nowhere"),
        ({"--images": "0"}, "decoder: --images is .0., but must be an integer of at least 1"),
        (
            {"--features": "vgg:16"},
            "decoder: --features takes open_clip:FOLDER:LAYERS, dinov2:FOLDER:LAYERS or timm",
        ),
        ({"--source": "tests/config"}, "decoder: 'tests/config' holds no image; images end in .png"),
    ],
)
def test_one_sentence_for_each_mistake(
    folders: tuple[str, str],
    changes: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    arguments = {"--base": folders[0], "--decoder": folders[1], "--images": "1"} | changes
    said = refusal(main, ["decoder", *(part for pair in arguments.items() for part in pair)], capsys)
    assert re.search(message, said), said
