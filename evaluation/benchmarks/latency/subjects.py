"""What is measured: a student on a backend, the same folder in stock diffusers, a base at its many steps. One process each."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

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
    kl_decoder: bool = False
    """Stock: decode with the VAE in vae_large."""
    steps: int = 1
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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


class Stopwatch:
    """Sums seconds by component."""

    def __init__(self, device: str, clock: str) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._clock: Callable[[], float] = time.perf_counter if clock == "wall" else time.process_time

    def now(self) -> float:
        """Seconds, after what the device was given before."""
        if self._device == "cuda":
            import torch

            torch.cuda.synchronize()
        return self._clock()

    @contextmanager
    def part(self, name: str) -> Any:
        """Adds the time of a block to a component."""
        started = self.now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - started

    def watch(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function with its time added to a component."""

        def watched(*given: Any, **named: Any) -> Any:
            with self.part(name):
                return function(*given, **named)

        return watched


def _prepared(subject: Subject) -> Callable[[int], dict[str, float]]:
    if subject.kind == "generator":
        return _generator(subject)
    return _stock(subject) if subject.kind == "stock" else _base(subject)


def _generator(subject: Subject) -> Callable[[int], dict[str, float]]:
    from sdxs_lightning.core.latents import to_uint8
    from sdxs_lightning.inference.generator import OneStepGenerator

    options: dict[str, Any] = {}
    if subject.backend != "torch":
        options["threads"] = subject.threads
    if subject.backend == "openvino":
        options["static_shapes"] = True
    generator = OneStepGenerator.load(
        subject.folder,
        subject.backend,
        subject.controlnet if subject.backend == "torch" else None,
        device=subject.device,
        dtype=subject.dtype,
        compiled=subject.compiled,
        **options,
    )
    watch = Stopwatch(subject.device, subject.clock)
    if not (subject.compiled or subject.device == "cuda"):
        watch_components(generator.networks, watch)
    call = _Calls()

    def measure(batch_size: int) -> dict[str, float]:
        prompts = call.prompts(batch_size)
        given: dict[str, Any] = {"size": subject.size_px}
        if generator.networks.has_control:
            given["control_images"] = call.images(subject.size_px or generator.model.size[0])
        watch.seconds.clear()
        started = watch.now()
        images = generator.sample(prompts, 0, **given)
        with watch.part("copy"):
            to_uint8(images).cpu()
        total = watch.now() - started
        return {**watch.seconds, "end_to_end": total}

    return measure


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
    pipeline = _pipeline(subject)
    watch = Stopwatch(subject.device, subject.clock)
    _watch_pipeline(pipeline, watch)
    call = _Calls()

    def measure(batch_size: int) -> dict[str, float]:
        import torch

        watch.seconds.clear()
        started = watch.now()
        generators = [torch.Generator().manual_seed(i) for i in range(batch_size)]
        pipeline(
            call.prompts(batch_size),
            num_inference_steps=subject.steps,
            guidance_scale=subject.guidance_scale,
            generator=generators,
            height=subject.size_px,
            width=subject.size_px,
            output_type="pil",
        )
        return {**watch.seconds, "end_to_end": watch.now() - started}

    return measure


def _base(subject: Subject) -> Callable[[int], dict[str, float]]:
    if not subject.composed:
        return _stock(subject)
    pipeline = _pipeline(subject)
    watch = Stopwatch(subject.device, subject.clock)
    call = _Calls()

    def measure(batch_size: int) -> dict[str, float]:
        """As the pipeline, but with one of its steps: its scheduler takes the first of N."""
        import torch

        found: dict[str, float] = {}
        pipeline.set_progress_bar_config(disable=True)
        _watch_pipeline(pipeline, watch)
        watch.seconds.clear()
        pipeline(
            call.prompts(batch_size),
            num_inference_steps=1,
            guidance_scale=subject.guidance_scale,
            generator=[torch.Generator().manual_seed(i) for i in range(batch_size)],
            height=subject.size_px,
            width=subject.size_px,
            output_type="pt",
        )
        found = {**watch.seconds}
        found["unet"] *= subject.steps
        return {**found, "end_to_end": sum(found.values())}

    return measure


def _pipeline(subject: Subject) -> Any:
    import torch
    from diffusers import AutoencoderKL, DiffusionPipeline

    from evaluation.images.samples import DTYPES

    dtype: torch.dtype = DTYPES[subject.dtype]
    given: dict[str, Any] = {}
    if subject.kl_decoder:
        given["vae"] = AutoencoderKL.from_pretrained(Path(subject.folder) / "vae_large", torch_dtype=dtype)
    pipeline = DiffusionPipeline.from_pretrained(
        subject.folder, torch_dtype=dtype, local_files_only=True, **given
    )
    pipeline.to(subject.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _watch_pipeline(pipeline: Any, watch: Stopwatch) -> None:
    """Times the networks of a pipeline, once."""
    if getattr(pipeline, "_watched", None) is watch:
        return
    pipeline._watched = watch
    for name, component in pipeline.components.items():
        if name.startswith("text_encoder"):
            component.forward = watch.watch(component.forward, "text")
    pipeline.unet.forward = watch.watch(pipeline.unet.forward, "unet")
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
