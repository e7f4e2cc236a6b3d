"""Complete pipelines at full size against the tools.

`python -m tests.helpers.full_parity --out evaluation/results/metrics_parity.json`.

With fewer images than dimensions the product of the covariances is singular, and the tools' roots of it turn rounding errors of
1e-16 into 1e-8 each; `ours_by_their_root` are our features in the tool's own formula, which has the same errors.

The suite compares 64 features of a few images; this compares the 2048 of FID, from PNG files to the number. It takes minutes,
most of them in the tools' matrix roots. Random weights, unless a file is given: the numbers mean nothing, the differences do.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cleanfid.fid
import pytorch_fid.fid_score
import torch
import torch_fidelity
from PIL import Image
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from evaluation.metrics.frechet import FrechetDistance
from evaluation.metrics.kernel_distance import KernelDistance
from evaluation.networks.inception import WEIGHT_FILES, InceptionFeatures, InceptionResize
from evaluation.runner.machine import where
from tests.helpers.random_inception import textures, write_inception


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=32, help="per side")
    parser.add_argument("--weights", type=Path, help="Inception weights; random ones otherwise")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    with tempfile.TemporaryDirectory() as scratch:
        result = compared(Path(scratch), options.images, options.weights)
    options.out.write_text(json.dumps(result | where(torch.device("cpu")), indent=2) + "\n")


def compared(scratch: Path, count: int, weights: Path | None) -> dict[str, Any]:
    """Each tool's number beside ours."""
    cached = scratch / "checkpoints" / WEIGHT_FILES[1]
    if weights is None:
        write_inception(cached)
    else:
        cached.parent.mkdir()
        cached.symlink_to(weights.resolve())
    torch.hub.set_dir(str(scratch))
    folders = [write_images(scratch / name, count, seed) for name, seed in (("fake", 1), ("real", 2))]
    found: dict[str, Any] = {
        "images_per_side": count,
        "weights": "random" if weights is None else weights.name,
    }
    for name, (tool, resize, root) in TOOLS.items():
        start = time.perf_counter()
        theirs = tool(folders[0], folders[1], cached)
        middle = time.perf_counter()
        ours, features = by_ours(cached, resize, count)
        found[name] = {
            key: {"theirs": number, "ours": ours[key], "relative": abs(ours[key] / number - 1)}
            for key, number in theirs.items()
        } | {
            "fid_ours_by_their_root": (by_their_root := root(*features)),
            "relative_by_their_root": abs(by_their_root / theirs["fid"] - 1),
            "seconds_theirs": middle - start,
            "seconds_ours": time.perf_counter() - middle,
        }
        print(name, json.dumps(found[name]), flush=True)
    return found


def write_images(folder: Path, count: int, seed: int) -> Path:
    """PNGs of 128 pixels."""
    folder.mkdir()
    for index, image in enumerate(textures(count, seed, size=128)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:04d}.png")
    return folder


def by_ours(weights: Path, resize: InceptionResize, count: int) -> tuple[dict[str, float], list[Tensor]]:
    """FID and KID of the same images, and their features: fake, real."""
    features = InceptionFeatures(weights, resize)
    metrics = {
        "fid": FrechetDistance(features),
        "kid": KernelDistance(features, subsets=10, subset_size=count // 2),
    }
    both = []
    for seed, real in ((1, False), (2, True)):
        images = textures(count, seed, size=128)
        rows = torch.cat([features(part) for part in images.split(8)])
        both.append(rows)
        for metric in metrics.values():
            metric.add(rows, range(count), real)
    found: dict[str, float] = {}
    for metric in metrics.values():
        found |= {name: estimate.value for name, estimate in metric.estimates().items()}
    return found, both


def root_of_torch_fidelity(fake: Tensor, real: Tensor) -> float:
    """Its Frechet distance of features (n, 2048)."""
    sides = [fid_features_to_statistics(side) for side in (fake, real)]
    return float(fid_statistics_to_metric(*sides, False)["frechet_inception_distance"])


def root_of_clean_fid(fake: Tensor, real: Tensor) -> float:
    """Likewise; pytorch-fid's is the same."""
    return float(cleanfid.fid.fid_from_feats(fake.numpy(), real.numpy()))


def by_torch_fidelity(fake: Path, real: Path, weights: Path) -> dict[str, float]:
    """FID and KID by its API."""
    count = len(list(fake.iterdir()))
    found = torch_fidelity.calculate_metrics(
        input1=str(fake), input2=str(real), fid=True, kid=True, cuda=False, cache=False, verbose=False,
        kid_subsets=10, kid_subset_size=count // 2, feature_extractor_weights_path=str(weights), batch_size=8,
        save_cpu_ram=True,
    )  # fmt: skip
    return {
        "fid": found["frechet_inception_distance"],
        "kid": found["kernel_inception_distance_mean"],
    }


def by_clean_fid(fake: Path, real: Path, weights: Path) -> dict[str, float]:
    """FID with its resize and formula; its own network file is another format of the same weights."""
    network = InceptionFeatures(weights).network

    def model(pixels: Tensor) -> Tensor:
        features: Tensor = network((pixels - 128) / 128)
        return features

    number = cleanfid.fid.compare_folders(
        str(fake), str(real), model, mode="clean", num_workers=0, device=torch.device("cpu"), verbose=False
    )
    return {"fid": float(number)}


def by_pytorch_fid(fake: Path, real: Path, weights: Path) -> dict[str, float]:
    """FID by its own network, from the hub cache."""
    number = pytorch_fid.fid_score.calculate_fid_given_paths(
        [str(fake), str(real)], 8, torch.device("cpu"), 2048, num_workers=0
    )
    return {"fid": float(number)}


Tool = Callable[[Path, Path, Path], dict[str, float]]

Root = Callable[[Tensor, Tensor], float]

TOOLS: dict[str, tuple[Tool, InceptionResize, Root]] = {
    "torch-fidelity": (by_torch_fidelity, "torch-fidelity", root_of_torch_fidelity),
    "clean-fid": (by_clean_fid, "clean", root_of_clean_fid),
    "pytorch-fid": (by_pytorch_fid, "pytorch-fid", root_of_clean_fid),
}

if __name__ == "__main__":
    main()
