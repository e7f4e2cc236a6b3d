"""What is measured: a student on a backend, the same folder in stock diffusers, a base at its many steps. One process each."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from evaluation.benchmarks.latency.stopwatch import Stopwatch
from evaluation.runner.memory import peak_resident_bytes

Kind = Literal["generator", "stock", "base"]
PROMPTS = ("a red circle above a blue square", "a green star", "a small yellow triangle", "a white square")


@dataclass(frozen=True)
class Subject:
    """What a process measures."""

    name: str
    """In tables."""
    kind: Kind
    folder: str
    """Of the model, or of its export."""
    backend: Literal["torch", "onnx", "openvino"] = "torch"
    dtype: str = "fp32"
    device: str = "cpu"
    compiled: bool = False
    controlnet: str | None = None
    """Folder of a ControlNet; None where an export has it inside."""
    kl_decoder: bool = False
    """Stock: decode with the VAE in vae_large."""
    steps: int = 1
    """Of a pipeline; a generator knows its own."""
    guidance_scale: float = 0.0
    composed: bool = False
    """Base: multiply one step."""
    size_px: int | None = None
    threads: int | None = None
    clock: Literal["wall", "cpu"] = "wall"


def serve_quietly(subject: Subject, connection: Connection) -> None:
    """Body of a process: `serve` without the progress bars of libraries."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    serve(subject, connection)


def serve(subject: Subject, connection: Connection) -> None:
    """Loads the subject, then times a call for each batch size that it is sent, until None comes.

    Sends "ready" or the text of an error, then one dict for each call: seconds by component, and `end_to_end`.
    """
    try:
        if subject.threads is not None:
            import torch

            torch.set_num_threads(subject.threads)
        measure = _prepared(subject)
        connection.send("ready")
        while (batch_size := connection.recv()) is not None:
            connection.send(measure(batch_size))
        connection.send(peak_megabytes(subject.device))
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


def peak_megabytes(device: str) -> float:
    """Peak memory of this process: of the GPU, or else resident."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    return peak_resident_bytes() / 1e6


def _prepared(subject: Subject) -> Callable[[int], dict[str, float]]:
    if subject.kind == "generator":
        return _generator(subject)
    return _stock(subject) if subject.kind == "stock" else _base(subject)


def _generator(subject: Subject) -> Callable[[int], dict[str, float]]:
    from sdxs_lightning.core.latents import to_uint8
    from sdxs_lightning.inference.generator import OneStepGenerator

    options: dict[str, Any] = {}
    if subject.backend == "torch":
        options["dtype"] = subject.dtype
    else:
        options["threads"] = subject.threads
    if subject.backend == "openvino":
        options["static_shapes"] = True
    generator = OneStepGenerator.load(
        subject.folder,
        subject.backend,
        subject.controlnet if subject.backend == "torch" else None,
        device=subject.device,
        compiled=subject.compiled,
        **options,
    )
    watch = Stopwatch(subject.device, subject.clock)
    if not subject.compiled:  # one graph has no parts, and a wrapper would break it
        watch_components(generator.networks, watch)
    call = _Calls()

    def draw(batch_size: int) -> None:
        given: dict[str, Any] = {"size": subject.size_px}
        if generator.networks.has_control:
            given["control_images"] = call.images(subject.size_px or generator.model.size[0])
        images = generator.sample(call.prompts(batch_size), 0, **given)
        with watch.part("copy"):
            to_uint8(images).cpu()

    return lambda batch_size: watch.timed(lambda: draw(batch_size))


def watch_components(networks: Any, watch: Stopwatch) -> None:
    """Times text, unet, controlnet and decoder of any backend."""
    names = {"vae_decoder": "decoder", "text_encoder": "text", "text_encoder_2": "text"}
    if hasattr(networks, "run"):
        run = networks.run

        def watched(part: str, inputs: Any) -> Any:
            with watch.part(names.get(part, part)):
                return run(part, inputs)

        networks.run = watched
        return
    networks.encode_prompts = watch.watch(networks.encode_prompts, "text")
    networks.decode = watch.watch(networks.decode, "decoder")
    for name in ("unet", "controlnet"):
        if name in networks.parts:
            networks.parts[name].forward = watch.watch(networks.parts[name].forward, name)


def _stock(subject: Subject) -> Callable[[int], dict[str, float]]:
    watch = Stopwatch(subject.device, subject.clock)
    draw = _pipeline_call(subject, watch, subject.steps)
    return lambda batch_size: watch.timed(lambda: draw(batch_size))


def _base(subject: Subject) -> Callable[[int], dict[str, float]]:
    if not subject.composed:
        return _stock(subject)
    watch = Stopwatch(subject.device, subject.clock)
    draw = _pipeline_call(subject, watch, steps=1)

    def measure(batch_size: int) -> dict[str, float]:
        """Of a call with one step, what each step repeats is multiplied: its scheduler takes the first of N."""
        found = watch.timed(lambda: draw(batch_size))
        for name in {"unet", "controlnet"} & found.keys():
            found["end_to_end"] += (subject.steps - 1) * found[name]
            found[name] *= subject.steps
        return found

    return measure


def _pipeline_call(subject: Subject, watch: Stopwatch, steps: int) -> Callable[[int], None]:
    """A call of the pipeline from prompts to images on the CPU."""
    import torch

    pipeline = _pipeline(subject)
    _watch_pipeline(pipeline, watch)
    side = subject.size_px or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    call = _Calls()

    def draw(batch_size: int) -> None:
        given: dict[str, Any] = {}
        if subject.controlnet is not None:
            given["image"] = call.images(side).float() / 255
        pipeline(
            call.prompts(batch_size),
            num_inference_steps=steps,
            guidance_scale=subject.guidance_scale,
            generator=[torch.Generator().manual_seed(i) for i in range(batch_size)],
            height=side,
            width=side,
            output_type="pil",
            **given,
        )

    return draw


def _pipeline(subject: Subject) -> Any:
    import diffusers
    from torch import nn

    from evaluation.images.samples import load_pipeline, with_controlnet
    from sdxs_lightning.inference.inputs import torch_dtype
    from sdxs_lightning.networks.controlnet import check_fits, load_controlnet

    dtype = torch_dtype(subject.dtype)
    given: dict[str, Any] = {"torch_dtype": dtype}
    if subject.kl_decoder:
        large = Path(subject.folder) / "vae_large"
        given["vae"] = diffusers.AutoencoderKL.from_pretrained(large, torch_dtype=dtype)
    pipeline = load_pipeline(subject.folder, **given)
    if subject.controlnet is not None:
        controlnet = load_controlnet(subject.controlnet)
        check_fits(controlnet, pipeline.unet, f"controlnet '{subject.controlnet}'")
        nn.Module.to(controlnet, dtype=dtype)
        pipeline = with_controlnet(pipeline, controlnet)
    pipeline.to(subject.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _watch_pipeline(pipeline: Any, watch: Stopwatch) -> None:
    """Times the networks of a pipeline."""
    for name, component in pipeline.components.items():
        if name.startswith("text_encoder"):
            component.forward = watch.watch(component.forward, "text")
    for name in ("unet", "controlnet"):
        if name in pipeline.components:
            network = pipeline.components[name]
            network.forward = watch.watch(network.forward, name)
    pipeline.vae.decode = watch.watch(pipeline.vae.decode, "decoder")


class _Calls:
    """Inputs of successive calls: a prompt is never the last one, or its embedding would be at hand."""

    def __init__(self) -> None:
        self._count = 0

    def prompts(self, batch_size: int) -> list[str]:
        """The next prompts."""
        self._count += 1
        words = PROMPTS[self._count % len(PROMPTS)]
        return [f"{words} {'a ' * (1 + self._count // len(PROMPTS) + i)}" for i in range(batch_size)]

    def images(self, side: int) -> Any:
        """A condition image."""
        import torch

        noise = torch.Generator().manual_seed(self._count)
        return torch.randint(0, 256, (1, 3, side, side), generator=noise, dtype=torch.uint8)
