"""What a student does between noise and image: its timesteps and the arithmetic of its scheduler, as numbers.

A pipeline's scheduler keeps state and is called in a loop; here the same steps are a tuple of constants, so that a compiler or
an ONNX session sees no Python. The arithmetic follows diffusers' DDIMScheduler (one step) and LCMScheduler (several), with its
order of operations and in the dtype of the network, so that half precision rounds as it does there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sdxs_lightning.core.errors import UserError

SCHEDULERS = ("DDIMScheduler", "LCMScheduler")
_KEPT = ("clip_sample", "thresholding")


@dataclass(frozen=True)
class Step:
    """One call of the U-Net; the generator gives compiled graphs the same numbers as tensors."""

    timestep: int
    alpha: float
    """sqrt(alphas_cumprod) at the timestep."""
    sigma: float
    """sqrt(1 - alphas_cumprod) at the timestep."""


@dataclass(frozen=True)
class SamplingPlan:
    """The steps of a student, from noise to clean."""

    steps: tuple[Step, ...]
    prediction_type: str
    """"epsilon", "v_prediction" or "sample"."""
    schedule: tuple[float, ...]
    """alphas_cumprod of every timestep up to the first step's."""

    def pred_x0(self, step: Step, latents: Tensor, output: Tensor) -> Tensor:
        """The clean latents that the U-Net's output implies; as DDIMScheduler.step with a last step to alpha 1."""
        if self.prediction_type == "epsilon":
            return ((latents - step.sigma * output) / step.alpha).to(latents.dtype)
        if self.prediction_type == "v_prediction":
            return (step.alpha * latents - step.sigma * output).to(latents.dtype)
        return output

    def renoise(self, step: Step, latents: Tensor, noise: Tensor) -> Tensor:
        """Noisy latents at a step: alpha * latents + sigma * noise."""
        return (step.alpha * latents + step.sigma * noise).to(latents.dtype)

    def from_strength(self, strength: float) -> SamplingPlan:
        """The steps that change an image by a strength in (0, 1].

        A student of n steps takes its last int(n * strength), as in diffusers' image-to-image pipelines. A student of one step
        takes it at the timestep round(T * strength) - 1, T the number of its timesteps: what those pipelines do with
        num_inference_steps N and strength 1 / N.

        Raises:
            UserError: for a strength out of range, or so small that no step is left.
        """
        if not 0 < strength <= 1:
            raise UserError(f"`strength` is {strength:g}, but must be above 0 and at most 1.")
        count = len(self.steps)
        if count == 1:
            total = self.steps[0].timestep + 1
            timestep = round(total * strength) - 1
            if timestep < 0:
                raise UserError(f"`strength` {strength:g} leaves no noise; the least is {1 / total:.4f}.")
            return replace(self, steps=(self._step(timestep),))
        taken = int(count * strength)
        if taken == 0:
            raise UserError(
                f"`strength` {strength:g} leaves none of the model's {count} steps; give at least {1 / count:g}."
            )
        return replace(self, steps=self.steps[count - taken :])

    def _step(self, timestep: int) -> Step:
        abar = torch.tensor(self.schedule[timestep])  # float32, as in the scheduler
        return Step(timestep, float(abar**0.5), float((1 - abar) ** 0.5))

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any], named: str, steps: int | None = None) -> SamplingPlan:
        """Reads the scheduler of an exported student.

        Args:
            config: scheduler_config.json: "trailing" DDIM for one step, LCM for several.
            named: the model folder, for messages.
            steps: of a student of several; None takes `original_inference_steps` of its scheduler.

        Raises:
            UserError: for another scheduler, or one that does more than to estimate clean latents.
        """
        kind = config.get("_class_name")
        if kind not in SCHEDULERS:
            raise _is_a_base(
                named,
                f"has a {kind}, and students have a {' or '.join(SCHEDULERS)}, which say how many steps",
            )
        if kind == "DDIMScheduler" and not config.get("set_alpha_to_one", True):
            raise _is_a_base(
                named,
                "has a DDIMScheduler whose last step leaves noise (set_alpha_to_one false), and a student's leaves none",
            )
        wrong = [name for name in _KEPT if config.get(name)]
        if wrong:
            raise UserError(
                f"the scheduler of '{named}' sets {' and '.join(wrong)}, which no student was trained with."
            )
        several = kind == "LCMScheduler"
        if several and not isinstance(config.get("original_inference_steps"), int):
            raise _is_a_base(
                named,
                "has an LCMScheduler without original_inference_steps, which says how many a student takes",
            )
        count = (steps or int(config["original_inference_steps"])) if several else 1
        if steps not in (None, count):
            raise UserError(f"'{named}' is a student of one step, got `steps` {steps}.")
        if not several and config.get("timestep_spacing") != "trailing":
            raise _is_a_base(
                named,
                f"has a DDIMScheduler with timestep_spacing {config.get('timestep_spacing')}, and a one-step student's is "
                "trailing, which begins at its last timestep",
            )
        import diffusers

        # diffusers' own object, once: its float32 product differs from a float64 one in the last digits.
        try:
            scheduler = getattr(diffusers, kind).from_config(dict(config))
            scheduler.set_timesteps(count)
        except (ValueError, TypeError) as error:
            raise UserError(f"'{named}' cannot take {count} steps: {error}") from error
        plan = cls(
            (), str(config.get("prediction_type", "epsilon")), tuple(scheduler.alphas_cumprod.tolist())
        )
        return replace(plan, steps=tuple(plan._step(timestep) for timestep in scheduler.timesteps.tolist()))


def _is_a_base(named: str, why: str) -> UserError:
    """One step of a base makes no image, so it is not taken for a student."""
    return UserError(
        f"'{named}' is a base of many steps by its scheduler: it {why}. Give the `pipeline` folder that a training exported "
        "(students of other projects: export_pipeline of sdxs_lightning.export, in Python), or run the base in its own steps: "
        f"python -m evaluation.evaluate --model {named} --steps 25 --guidance_scale 7.5 --save_images DIR."
    )
