"""Images of a student, by PyTorch, ONNX Runtime or OpenVINO: the one way to sample outside training.

    generator = OneStepGenerator.load("outputs/quickstart/pipeline")
    images = generator.generate(["a red circle above a blue square"], seeds=[0])   # (1, 3, H, W), uint8

Equal to the stock diffusers pipeline of the same folder with num_inference_steps as the student has, guidance_scale=0 and
generator=[torch.Generator().manual_seed(seed), ...], without its scheduler object, its second text encoding and its copies.
A student has guidance 0 and no negative prompts, unless it was trained with them as inputs (`student.guidance`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxs_lightning.core.errors import UserError
from sdxs_lightning.core.latents import from_uint8, to_uint8
from sdxs_lightning.inference.guidance import with_guidance
from sdxs_lightning.inference.inputs import (
    Images,
    draw,
    finite,
    image_size,
    image_tensor,
    noise_generators,
    prompt_list,
    seed_list,
    to_device,
    torch_dtype,
)
from sdxs_lightning.inference.model_folder import Backend, ModelFolder
from sdxs_lightning.inference.networks import Control, Networks, Prompts
from sdxs_lightning.inference.plan import SamplingPlan, Step
from sdxs_lightning.inference.prompts import PromptEncoder

OPTIONS: Mapping[str, tuple[str, ...]] = {
    "torch": (),
    "onnx": ("providers", "threads"),
    "openvino": ("threads", "static_shapes"),
}
"""Further arguments of `OneStepGenerator.load` by backend."""
GRAPHS = 64
"""Compiled graphs, one for each combination of batch size, image size and kind of inputs; torch's own limit is 8, beyond which
it goes on uncompiled, without a word."""


class NotFiniteWarning(UserWarning):
    """Images that a network's NaN or infinity made black or white."""


@dataclass(frozen=True)
class Sample:
    """Inputs of the tensor part of sampling."""

    latents: Tensor
    """(B, C, h, w): noise, or noisy latents of an image."""
    noises: tuple[Tensor, ...]
    """(B, C, h, w) for each step but the first."""
    prompts: Prompts
    time_ids: Tensor | None
    """(B, 6) for SDXL: height, width, 0, 0, height, width."""
    control: Control | None


def sample_images(networks: Networks, plan: SamplingPlan, sample: Sample) -> Tensor:
    """Noise to images (B, 3, H, W), about [-1, 1]: tensors only, which can be compiled as a whole."""
    latents = sample.latents
    for i, step in enumerate(plan.steps):
        if i:
            latents = plan.renoise(step, latents, sample.noises[i - 1])
        output = networks.predict(latents, step.timestep, sample.prompts, sample.time_ids, sample.control)
        latents = plan.pred_x0(step, latents, output)
    return networks.decode(latents)


class OneStepGenerator:
    """A student of one or a few steps that makes images; see `load`.

    Args:
        model: its folder.
        networks: its networks on a backend.
        compiled: whether to compile the tensor part for each shape (backend torch).
    """

    def __init__(self, model: ModelFolder, networks: Networks, compiled: bool = False) -> None:
        self.model = model
        self.networks = networks
        self.plan = model.plan
        self._encode = PromptEncoder(model, networks)
        self._sample: Callable[[Networks, SamplingPlan, Sample], Tensor] = sample_images
        if compiled:
            self._sample = _compiled(networks.device)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        backend: Backend = "torch",
        controlnet: str | Path | None = None,
        lora: str | Path | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "fp32",
        lora_scale: float = 1.0,
        steps: int | None = None,
        compiled: bool = False,
        **options: Any,
    ) -> OneStepGenerator:
        """Loads a student.

        Args:
            folder: a diffusers folder for the backend torch, or its export by `sdxs_lightning.export_runtime`.
            backend: "torch", "onnx" or "openvino".
            controlnet: folder of a ControlNet (torch; the other backends have it in their export).
            lora: file or folder of a LoRA (torch; the other backends have it merged at export).
            device: "auto", "cpu", "cuda", or any device of torch; for the other backends "auto" or "cpu" and "cuda"
                ("GPU" or "NPU" for OpenVINO).
            dtype: "fp32", "fp16" or "bf16", of all networks (torch; an export has its own).
            lora_scale: weight of the LoRA; `set_lora_scale` changes it later.
            steps: of a student of several steps whose scheduler could take more; None is right for exports of this project.
            compiled: torch.compile the step from noise to pixels, with CUDA graphs on a GPU: the first image of each shape
                takes a minute.
            options: of the backend: `providers` (onnx), `threads` (onnx, openvino), `static_shapes` (openvino).

        Raises:
            UserError: for a folder of another kind, a missing extra, or adapters that do not fit.
        """
        if backend not in OPTIONS:
            raise UserError(f"`backend` is '{backend}', but must be one of {', '.join(OPTIONS)}.")
        unknown = sorted(options.keys() - set(OPTIONS[backend]))
        if unknown:
            accepted = ", ".join(OPTIONS[backend]) or "none"
            raise UserError(
                f"{unknown[0]} is no argument of load; further ones of the backend {backend}: {accepted}."
            )
        model = ModelFolder.read(folder, backend, steps, guided=backend == "torch")
        chosen = torch_dtype(dtype)
        if backend == "torch":
            from sdxs_lightning.inference.torch_networks import TorchNetworks

            place = torch_device(device)
            networks: Networks = TorchNetworks.load(model, place, chosen, controlnet, lora, lora_scale)
            return cls(model, networks, compiled)
        for name, value in (("controlnet", controlnet), ("lora", lora)):
            if value is not None:
                raise UserError(
                    f"`{name}` is '{value}', but an export has its adapters inside; give them to "
                    f"sdxs_lightning.export_runtime (--{name}), or take `backend` torch."
                )
        if chosen != torch.float32:
            raise UserError(
                f"`dtype` is '{dtype}', but an export has the precision that it was made in; leave it out, or export again "
                "with sdxs_lightning.export_runtime (--dtype)."
            )
        if compiled:
            raise UserError(f"`compiled` is for `backend` torch; {backend} compiles its own graph.")
        if backend == "onnx":
            from sdxs_lightning.inference.onnx_networks import OnnxNetworks

            return cls(model, OnnxNetworks(model, str(device), **options))
        from sdxs_lightning.inference.openvino_networks import OpenVinoNetworks

        return cls(model, OpenVinoNetworks(model, str(device), **options))

    def generate(
        self,
        prompts: str | Sequence[str],
        seeds: int | Sequence[int] | None = None,
        control_images: Images | None = None,
        image: Images | None = None,
        strength: float | None = None,
        size: int | Sequence[int] | None = None,
        control_scale: float = 1.0,
        latents: Tensor | None = None,
        guidance_scale: float | None = None,
        negative_prompts: str | Sequence[str] | None = None,
    ) -> Tensor:
        """Makes an image for each prompt.

        Args:
            prompts: one prompt or B.
            seeds: one for each prompt; a single number counts on from there, None from 0.
            control_images: for the ControlNet: one for each prompt, or one for all; PIL images, uint8 arrays (H, W, 3) or a
                uint8 tensor (B, 3, H, W), of the output's size.
            image: image to change instead of noise, likewise.
            strength: how much of it is replaced, above 0 and at most 1; see `SamplingPlan.from_strength`. Needs `image`.
            size: side, or (height, width), multiples of 8; None is the size of the training.
            control_scale: weight of the ControlNet.
            latents: (B, C, h, w), N(0, 1), instead of the first noise of the seeds, which then give that of later steps only.
            guidance_scale: for a student that takes it as an input, which needs it; 1 means none.
            negative_prompts: for one that was trained with some: one for all or for each prompt, "" for none.

        Returns:
            (B, 3, H, W), uint8, on the CPU. NaN, from an overflow in half precision, is black, and `NotFiniteWarning` says so.

        Raises:
            UserError: for inputs that do not fit the model or each other.
        """
        images = self.sample(
            prompts,
            seeds,
            control_images,
            image,
            strength,
            size,
            control_scale,
            latents,
            guidance_scale,
            negative_prompts,
        )
        whole = images.isfinite().flatten(1).all(dim=1, keepdim=True)
        pixels = to_uint8(images.nan_to_num(-1.0))
        # One copy to the host for both: each waits for the device.
        copied = torch.cat((pixels.flatten(1), whole.to(torch.uint8)), dim=1).cpu()
        pixels = copied[:, :-1].reshape(pixels.shape)
        broken = int((copied[:, -1] == 0).sum())
        if broken:
            half = self.networks.dtype in (torch.float16, torch.bfloat16)
            cause = "half precision overflows in this model, try fp32; or" if half else "perhaps"
            warnings.warn(
                f"{broken} of {len(pixels)} images have NaN or infinity, drawn black or white: {cause} its weights have NaN, "
                "or the LoRA's scale is too large.",
                NotFiniteWarning,
                stacklevel=2,
            )
        return pixels

    @torch.inference_mode()
    def sample(
        self,
        prompts: str | Sequence[str],
        seeds: int | Sequence[int] | None = None,
        control_images: Images | None = None,
        image: Images | None = None,
        strength: float | None = None,
        size: int | Sequence[int] | None = None,
        control_scale: float = 1.0,
        latents: Tensor | None = None,
        guidance_scale: float | None = None,
        negative_prompts: str | Sequence[str] | None = None,
    ) -> Tensor:
        """Like `generate`, before rounding: (B, 3, H, W), about [-1, 1], on the backend's device."""
        listed = prompt_list(prompts)
        if (image is None) != (strength is None):
            missing = "strength" if strength is None else "image"
            raise UserError(f"`image` and `strength` belong together, and `{missing}` is missing.")
        pixels = image_size(size, self.model.size, self.multiple)
        plan = self.plan if strength is None else self.plan.from_strength(finite(strength, "strength"))
        generators = noise_generators(seed_list(seeds, len(listed)))
        start = None if image is None else self._encoded(image, pixels, generators)
        noises = self._noises(plan, generators, pixels, latents)
        if start is not None:
            noises[0] = plan.renoise(plan.steps[0], start, noises[0])
        embedded = with_guidance(
            self.model, self._encode, self._encode(listed), guidance_scale, negative_prompts
        )
        sample = Sample(
            noises[0],
            tuple(noises[1:]),
            embedded,
            self._time_ids(len(listed), pixels),
            self._control(control_images, control_scale, len(listed), pixels),
        )
        return self._sample(self.networks, plan, sample)

    @property
    def multiple(self) -> int:
        """Of which heights and widths must be multiples."""
        return max(8, self.model.factor)

    def set_lora_scale(self, scale: float) -> None:
        """Changes the weight of the LoRA.

        Raises:
            UserError: without a LoRA.
        """
        set_scale = getattr(self.networks, "set_lora_scale", None)
        if set_scale is None:
            raise UserError("this export has no LoRA whose scale could change; take `backend` torch.")
        set_scale(scale)

    def _control(
        self, images: Images | None, scale: float, count: int, pixels: tuple[int, int]
    ) -> Control | None:
        if images is None:
            return None
        if not self.networks.has_control:
            way = (
                "give one as `controlnet`"
                if self.model.manifest is None
                else "export it with one (sdxs_lightning.export_runtime --controlnet DIR)"
            )
            raise UserError(
                f"`control_images` were given and the model was loaded without ControlNet; {way}."
            )
        stacked = image_tensor(images, count, pixels, "control_images")
        values = to_device(stacked, self.networks.device).float() / 255
        return Control(values.to(self.networks.dtype), finite(scale, "control_scale"))

    def _encoded(
        self, images: Images, pixels: tuple[int, int], generators: Sequence[torch.Generator]
    ) -> Tensor:
        stacked = from_uint8(image_tensor(images, len(generators), pixels, "image"))
        on_device = to_device(stacked.to(self.networks.dtype), self.networks.device)
        parts = [
            self.networks.encode_image(one[None], generator)
            for one, generator in zip(on_device, generators, strict=True)
        ]
        return torch.cat(parts)

    def _noises(
        self,
        plan: SamplingPlan,
        generators: Sequence[torch.Generator],
        pixels: tuple[int, int],
        latents: Tensor | None,
    ) -> list[Tensor]:
        """The noise of each step, in the order in which a pipeline draws it."""
        dtype, device = self.networks.dtype, self.networks.device
        shape = (self.model.latent_channels, *(side // self.model.factor for side in pixels))
        given = []
        if latents is not None:
            if tuple(latents.shape) != (len(generators), *shape):
                wanted = (len(generators), *shape)
                raise UserError(
                    f"latents have shape {tuple(latents.shape)}, and images of {pixels} need {wanted}."
                )
            given = [latents.to(device, dtype)]
        return given + [draw(generators, shape, dtype, device) for _ in plan.steps[len(given) :]]

    def _time_ids(self, count: int, pixels: tuple[int, int]) -> Tensor | None:
        """SDXL's size conditioning, (B, 6)."""
        if not self.model.has_pooled_prompts:
            return None
        ids = torch.tensor([[*pixels, 0, 0, *pixels]], dtype=self.networks.dtype)
        return to_device(ids.expand(count, -1).contiguous(), self.networks.device)


def torch_device(device: str | torch.device) -> torch.device:
    """The device that an option `device` names; "auto" is a GPU if there is one.

    Raises:
        UserError: for a name that torch does not know, or a GPU where there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UserError(
            f"`device` is '{device}', but must be auto, cpu, cuda or another device of torch."
        ) from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UserError("`device` is cuda and this machine has no GPU that torch can use; give cpu.")
    return found


def _compiled(device: torch.device) -> Callable[[Networks, SamplingPlan, Sample], Tensor]:
    """One graph for each shape; on a GPU replayed as a CUDA graph."""
    from torch._dynamo.exc import FailOnRecompileLimitHit

    mode = "reduce-overhead" if device.type == "cuda" else None
    graph = torch.compile(sample_images, dynamic=False, mode=mode)

    def run(networks: Networks, plan: SamplingPlan, sample: Sample) -> Tensor:
        limits: dict[str, Any] = {"recompile_limit": GRAPHS, "fail_on_recompile_limit_hit": True}
        plan, sample = _numbers_as_tensors(plan, sample, device)
        try:
            with torch._dynamo.config.patch(**limits):
                images: Tensor = graph(networks, plan, sample)
        except FailOnRecompileLimitHit as error:
            raise UserError(
                f"more than {GRAPHS} combinations of batch size, image size and inputs were asked for, and each is compiled; "
                "use fewer, or load without `compiled`."
            ) from error
        return images.clone()  # the next replay of a CUDA graph writes to the same memory

    return run


def _numbers_as_tensors(
    plan: SamplingPlan, sample: Sample, device: torch.device
) -> tuple[SamplingPlan, Sample]:
    """Timesteps, alphas, sigmas and the ControlNet's scale as tensors: a graph holds a Python number as a constant.

    Alpha and sigma are float32 of shape (1, 1, 1, 1), so that half precision is not rounded in between.
    """

    def placed(value: float, dtype: torch.dtype, *shape: int) -> Any:
        return to_device(torch.full(shape, value, dtype=dtype), device)

    one = (1, 1, 1, 1)
    steps = tuple(
        Step(
            placed(step.timestep, torch.int64),
            placed(step.alpha, torch.float32, *one),
            placed(step.sigma, torch.float32, *one),
        )
        for step in plan.steps
    )
    control = sample.control
    if control is not None:
        control = replace(control, scale=placed(control.scale, torch.float32))
    return replace(plan, steps=steps), replace(sample, control=control)
