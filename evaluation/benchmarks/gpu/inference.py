"""Section `inference`: images per second of the one-step students and of their bases."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn

from evaluation.benchmarks.full_size import VAE
from evaluation.benchmarks.gpu.onnx_inference import onnx_rows
from evaluation.benchmarks.gpu.random_base import Kind, RandomBase
from evaluation.benchmarks.gpu.section import SectionRun, seconds_of
from sdxs_lightning.core.batch import Conditioning
from sdxs_lightning.networks.controlnet import controlnet_from_unet
from sdxs_lightning.surgery.config import prune_config
from sdxs_lightning.surgery.presets import topology_of

STUDENTS: dict[Kind, str] = {"sd15": "sdxs-512", "sdxl": "sdxs-1024"}
BASE_STEPS: dict[Kind, int] = {"sd15": 16, "sdxl": 32}
"""As in the table of SDXS, arXiv:2403.16627."""
BATCH_SIZES = (1, 4, 16)
GUIDANCE = 7.5


def run(run: SectionRun) -> None:
    """Students, decoders and bases in half precision: eager, as a CUDA graph, with ControlNet, by ONNX Runtime, compiled.

    What takes minutes to prepare comes last.
    """
    kinds: tuple[Kind, ...] = ("sd15", "sdxl")
    sizes = BATCH_SIZES[:1] if run.tiny else BATCH_SIZES
    with tempfile.TemporaryDirectory() as folder:
        bases = {}
        for kind in kinds:
            base = bases[kind] = RandomBase.of(kind, Path(folder) / kind, run.device, run.tiny)
            base.to(dtype=half(run.device))
            for size in sizes:
                for mode in ("eager", "CUDA graph") if run.device.type == "cuda" else ("eager",):
                    _student_row(run, kind, base, size, mode)
                _decoder_rows(run, kind, base, size)
            run.attempt(
                partial(_base, run, kind, base),
                kind=kind,
                what=f"base, {BASE_STEPS[kind]} guided steps, without decoder",
                batch_size=1,
                mode="eager",
            )
            _student_row(run, kind, base, 1, "eager", controlled=True)
        for kind, base in bases.items():
            onnx_rows(run, kind, partial(student_of, run, kind, base, 1))
        if run.device.type == "cuda":
            for kind, base in bases.items():
                _student_row(run, kind, base, 1, "compiled")


@dataclass
class Student:
    """A one-step student with its inputs; calling it makes images (B, 3, H, W), uint8."""

    unet: Any
    decoder: Any
    controlnet: Any
    noise: Tensor
    conditioning: Conditioning
    timestep: Tensor
    alpha: float
    sigma: float
    control_images: Tensor

    def __call__(self) -> Tensor:
        return self.generate(self.noise, self.conditioning)

    def generate(self, noise: Tensor, conditioning: Conditioning) -> Tensor:
        """One step and the tiny decoder."""
        arguments = conditioning.unet_kwargs()
        if self.controlnet is not None:
            down, mid = self.controlnet(
                noise, self.timestep, controlnet_cond=self.control_images, return_dict=False, **arguments
            )
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
            arguments = arguments | residuals
        output = self.unet(noise, self.timestep, return_dict=False, **arguments)[0]
        images: Tensor = self.decoder.decode((noise - self.sigma * output) / self.alpha, return_dict=False)[0]
        return (images.clamp(-1, 1) * 127.5 + 127.5).to(torch.uint8)


def half(device: torch.device) -> torch.dtype:
    """float16 on a GPU."""
    return torch.float16 if device.type == "cuda" else torch.float32


def student_of(run: SectionRun, kind: Kind, base: RandomBase, size: int, controlled: bool = False) -> Student:
    """A student with random weights, and its inputs; with `controlled` it has a ControlNet."""
    config = base.unet_config if run.tiny else prune_config(base.unet_config, topology_of(STUDENTS[kind]))
    unet = _network(run, lambda: UNet2DConditionModel.from_config(config))
    controlnet = _network(run, lambda: controlnet_from_unet(unet)) if controlled else None
    shape = base.latent_shape()
    on_device: dict[str, Any] = {"device": run.device, "dtype": half(run.device)}
    timesteps = torch.tensor([base.conditioning_timestep], device=run.device)
    return Student(
        unet,
        _network(run, partial(_tiny_decoder, run.tiny)),
        controlnet,
        torch.randn(size, *shape, **on_device),
        base.encode_prompts(["a photo"] * size).to(dtype=half(run.device)),
        timesteps[0],
        float(base.schedule.alpha_t(timesteps)),
        float(base.schedule.sigma_t(timesteps)),
        torch.rand(size, 3, 8 * shape[1], 8 * shape[2], **on_device),
    )


def _student_row(
    run: SectionRun, kind: Kind, base: RandomBase, size: int, mode: str, controlled: bool = False
) -> None:
    def measure() -> dict[str, Any]:
        student = student_of(run, kind, base, size, controlled)
        return _rate(run, MODES[mode](student), size)

    what = f"student {STUDENTS[kind]}{' with ControlNet' if controlled else ''}, one step and tiny decoder"
    run.attempt(measure, kind=kind, what=what, batch_size=size, mode=mode)


def captured(student: Student) -> Callable[[], Any]:
    """The student as a CUDA graph, whose images are those of eager execution."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            student()
    torch.cuda.current_stream().wait_stream(stream)
    graph, expected = torch.cuda.CUDAGraph(), student()
    with torch.cuda.graph(graph):
        images = student()
    graph.replay()
    torch.cuda.synchronize()
    if not torch.equal(images, expected):
        raise RuntimeError("the captured graph's images are not those of eager execution")
    return graph.replay


def _compiled(student: Student) -> Callable[[], Any]:
    """As `OneStepGenerator.load(compiled=True)` does."""
    fast = torch.compile(student.generate, dynamic=False, mode="reduce-overhead")
    return lambda: fast(student.noise, student.conditioning)


MODES: dict[str, Callable[[Student], Callable[[], Any]]] = {
    "eager": lambda student: student,
    "CUDA graph": captured,
    "compiled": _compiled,
}
"""What prepares a student for its calls."""


def _decoder_rows(run: SectionRun, kind: Kind, base: RandomBase, size: int) -> None:
    makers: dict[str, Callable[[], Any]] = {"tiny decoder": partial(_tiny_decoder, run.tiny)}
    if not run.tiny:
        makers["KL decoder"] = lambda: AutoencoderKL.from_config(VAE)
    for name, maker in makers.items():

        def measure(maker: Callable[[], Any] = maker) -> dict[str, Any]:
            decoder = _network(run, maker)
            latents = torch.randn(size, *base.latent_shape(), device=run.device, dtype=decoder.dtype)
            return _rate(run, lambda: decoder.decode(latents), size)

        run.attempt(measure, kind=kind, what=name, batch_size=size, mode="eager")


def _tiny_decoder(narrow: bool) -> AutoencoderTiny:
    widths = (8, 8, 8, 8) if narrow else (64, 64, 64, 64)
    return AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths)


def _base(run: SectionRun, kind: Kind, base: RandomBase) -> dict[str, Any]:
    """Guided steps of the base's U-Net."""
    unet = _network(run, base.load_unet)
    conditioning = base.encode_prompts(["a photo"]).to(dtype=unet.dtype).doubled()
    latents = torch.randn(1, *base.latent_shape(), device=run.device, dtype=unet.dtype)
    timestep = torch.tensor(500, device=run.device)

    def steps() -> None:
        sample = latents
        for _ in range(2 if run.tiny else BASE_STEPS[kind]):
            twice = torch.cat([sample, sample])
            uncond, cond = unet(twice, timestep, **conditioning.unet_kwargs()).sample.chunk(2)
            sample = sample - 0.01 * (uncond + GUIDANCE * (cond - uncond))

    return _rate(run, steps, 1, repeats=5)


@torch.no_grad()
def _rate(run: SectionRun, call: Callable[[], Any], size: int, repeats: int = 20) -> dict[str, Any]:
    seconds = seconds_of(call, run.device, repeats=2 if run.tiny else repeats)
    return {"milliseconds": 1000 * seconds, "images_per_second": size / seconds}


def _network(run: SectionRun, maker: Callable[[], Any]) -> Any:
    """In half precision on a GPU, channels last."""
    with run.device:
        network: Any = maker()
    nn.Module.to(network, device=run.device, dtype=half(run.device))
    return nn.Module.to(network, memory_format=torch.channels_last).eval().requires_grad_(False)
