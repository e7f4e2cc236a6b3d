"""Section `inference`: images per second of the one-step students and of their bases."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn

from evaluation.benchmarks.full_size import VAE
from evaluation.benchmarks.gpu.random_base import Kind, RandomBase
from evaluation.benchmarks.gpu.section import SectionRun, seconds_of
from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.surgery.config import prune_config
from sdxs_lightning.surgery.presets import topology_of

STUDENTS: dict[Kind, str] = {"sd15": "sdxs-512", "sdxl": "sdxs-1024"}
BASE_STEPS: dict[Kind, int] = {"sd15": 16, "sdxl": 32}
"""As in the table of SDXS, arXiv:2403.16627."""
BATCH_SIZES = (1, 4, 16)


def run(run: SectionRun) -> None:
    """U-Net, decoders and the complete step in half precision: eager, compiled, as a CUDA graph."""
    kinds: tuple[Kind, ...] = ("sd15", "sdxl")
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            base = RandomBase.of(kind, Path(folder) / kind, run.device, run.tiny)
            base.to(dtype=torch.float16 if run.device.type == "cuda" else torch.float32)
            for size in BATCH_SIZES[:1] if run.tiny else BATCH_SIZES:
                _student(run, kind, base, size)
                _decoders(run, kind, base, size)
            run.attempt(partial(_base, run, kind, base), kind=kind, what=f"base, {BASE_STEPS[kind]} steps")


def _student(run: SectionRun, kind: Kind, base: RandomBase, size: int) -> None:
    config = base.unet_config if run.tiny else prune_config(base.unet_config, topology_of(STUDENTS[kind]))
    unet = _network(run, lambda: UNet2DConditionModel.from_config(config))
    decoder = _network(run, AutoencoderTiny)
    conditioning = base.encode_prompts(["a photo"] * size)
    dtype = unet.dtype
    noise = torch.randn(size, *base.latent_shape(), device=run.device, dtype=dtype)
    timestep = torch.tensor(base.conditioning_timestep, device=run.device)
    alpha, sigma = (
        float(
            getattr(base.schedule, name)(
                timestep.reshape(1).cpu() if run.device.type == "cpu" else timestep.reshape(1)
            )
        )
        for name in ("alpha_t", "sigma_t")
    )

    def generate(noise: Tensor, conditioning: Conditioning) -> Tensor:
        output = unet(noise, timestep, **conditioning.to(dtype=dtype).unet_kwargs()).sample
        images: Tensor = decoder.decode((noise - sigma * output) / alpha).sample
        return (images.clamp(-1, 1) * 127.5 + 127.5).to(torch.uint8)

    labels = {
        "kind": kind,
        "what": f"student {STUDENTS[kind]}, one step and tiny decoder",
        "batch_size": size,
    }
    for mode, call in _modes(run, generate, noise, conditioning).items():
        run.attempt(partial(_prepared_rate, run, call, size), mode=mode, **labels)


def _modes(
    run: SectionRun,
    generate: Callable[[Tensor, Conditioning], Tensor],
    noise: Tensor,
    conditioning: Conditioning,
) -> dict[str, Callable[[], Callable[[], Any]]]:
    """By name, what prepares a call."""

    def eager() -> Callable[[], Any]:
        return lambda: generate(noise, conditioning)

    def graph() -> Callable[[], Any]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                generate(noise, conditioning)
        torch.cuda.current_stream().wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        expected = generate(noise, conditioning)
        with torch.cuda.graph(captured):
            images = generate(noise, conditioning)
        captured.replay()
        torch.cuda.synchronize()
        if not torch.equal(images, expected):
            raise RuntimeError("the captured graph's images are not those of eager execution")
        return captured.replay

    def compiled() -> Callable[[], Any]:
        fast = torch.compile(generate, mode="max-autotune-no-cudagraphs", fullgraph=False)
        return lambda: fast(noise, conditioning)

    if run.device.type != "cuda":
        return {"eager": eager}
    modes = {"eager": eager, "CUDA graph": graph}
    return modes | ({"compiled": compiled} if len(noise) == 1 else {})


def _decoders(run: SectionRun, kind: Kind, base: RandomBase, size: int) -> None:
    makers: dict[str, Callable[[], Any]] = {"tiny decoder": AutoencoderTiny}
    if not run.tiny:
        makers["KL decoder"] = lambda: AutoencoderKL.from_config(VAE)
    for name, maker in makers.items():

        def measure(maker: Callable[[], Any] = maker) -> dict[str, Any]:
            decoder = _network(run, maker)
            latents = torch.randn(size, *base.latent_shape(), device=run.device, dtype=decoder.dtype)
            return _rate(run, lambda: decoder.decode(latents), size)

        run.attempt(measure, kind=kind, what=name, batch_size=size, mode="eager")


def _base(run: SectionRun, kind: Kind, base: RandomBase) -> dict[str, Any]:
    """Guided steps of the base's U-Net, without its decoder."""
    unet = _network(run, base.load_unet)
    conditioning = base.encode_prompts(["a photo"]).to(dtype=unet.dtype).doubled()
    noise = torch.randn(2, *base.latent_shape(), device=run.device, dtype=unet.dtype)
    timestep = torch.tensor(500, device=run.device)

    def steps() -> None:
        for _ in range(2 if run.tiny else BASE_STEPS[kind]):
            unet(noise, timestep, **conditioning.unet_kwargs())

    return _rate(run, steps, 1) | {"batch_size": 1, "mode": "eager"}


def _prepared_rate(run: SectionRun, prepare: Callable[[], Callable[[], Any]], size: int) -> dict[str, Any]:
    return _rate(run, prepare(), size)


@torch.inference_mode()
def _rate(run: SectionRun, call: Callable[[], Any], size: int) -> dict[str, Any]:
    seconds = seconds_of(call, run.device, repeats=2 if run.tiny else 20)
    return {"milliseconds": 1000 * seconds, "images_per_second": size / seconds}


def _network(run: SectionRun, maker: Callable[[], Any]) -> Any:
    """In half precision on a GPU, channels last."""
    with run.device:
        network: Any = maker()
    dtype = torch.float16 if run.device.type == "cuda" else torch.float32
    nn.Module.to(network, device=run.device, dtype=dtype)
    return nn.Module.to(network, memory_format=torch.channels_last).eval().requires_grad_(False)
