"""Section `evaluation`: features of FID and CLIP score per second, and resizing to the same bits as on a CPU."""

from __future__ import annotations

import torch

from evaluation.benchmarks.gpu.section import SectionRun, seconds_of
from evaluation.networks.inception import PX
from evaluation.networks.inception_network import Inception
from evaluation.networks.resize import Filter, resize_uint8


def run(run: SectionRun) -> None:
    """Inception with random weights in full precision, its resize, and Pillow's arithmetic on both devices."""
    size, px = (2, 64) if run.tiny else (64, 512)
    with run.device:
        network = Inception().eval().requires_grad_(False)
    pixels = torch.rand(size, 3, PX, PX, device=run.device)
    repeats = 1 if run.tiny else 10

    def inception() -> dict[str, float]:
        with torch.no_grad():
            return {"images_per_second": size / seconds_of(lambda: network(pixels), run.device, repeats)}

    run.attempt(inception, what="Inception features")
    images = torch.randint(0, 256, (size, 3, px, px), dtype=torch.uint8)
    there = images.to(run.device)
    kinds: tuple[Filter, ...] = ("lanczos", "bicubic")
    for kind in kinds:

        def resize(kind: Filter = kind) -> dict[str, float | bool]:
            equal = torch.equal(
                resize_uint8(there, (256, 256), kind).cpu(), resize_uint8(images, (256, 256), kind)
            )
            seconds = seconds_of(lambda: resize_uint8(there, (256, 256), kind), run.device, repeats)
            return {"images_per_second": size / seconds, "bits_equal_cpu": equal}

        run.attempt(resize, what=f"resize to 256 px, {kind}")
