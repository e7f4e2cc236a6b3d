"""A one-step student with the two scores that its distillation compares, for benchmarks of their difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from sdxs_lightning.command_line import Option
from sdxs_lightning.core.option_bounds import LARGEST_SCALE

if TYPE_CHECKING:
    from torch import Tensor

    from sdxs_lightning.core.batch import Conditioning
    from sdxs_lightning.families import Family
    from sdxs_lightning.networks.denoiser import Denoiser


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Student, scores and result."""

    base: str = "data/toy/base"
    """Diffusers folder: the real score."""
    student: str
    """Pipeline or U-Net folder of a one-step student."""
    fake_score: str
    """U-Net folder of its fake score (`fake_score: true` of the callback Export)."""
    conditioning_timestep: Annotated[int | None, Option(at_least=0, at_most=999)] = None
    """Timestep of the student; by default its pipeline's."""
    guidance_scale: Annotated[float, Option(at_least=1, at_most=LARGEST_SCALE)] = 1.5
    """Guidance of the real score."""
    out: Path | None = None
    """JSON file to write."""


def settings_of(options: ScoreOptions) -> dict[str, object]:
    """What was measured, for the result file: the networks with the hashes of their weights, and the guidance scale."""
    from sdxs_lightning.core.model_hash import hash_weights
    from sdxs_lightning.families.sources import resolve_unet

    networks = {name: getattr(options, name) for name in ("base", "student", "fake_score")}
    hashes = {
        f"{name}_sha256": hash_weights(resolve_unet(folder, f"--{name}")) for name, folder in networks.items()
    }
    return {**networks, **hashes, "guidance_scale": options.guidance_scale}


class Renoised(NamedTuple):
    """What the scores are compared on."""

    conditioning: Conditioning
    """Of B prompts."""
    latents: Tensor
    """(B, C, h, w), float32: the student's, scaled."""
    noise: Tensor
    """Of their shape, to noise them again."""


class StudentScores(NamedTuple):
    """The three networks, frozen."""

    family: Family
    student: Denoiser
    timestep: int
    """Of the student."""
    real: Denoiser
    fake: Denoiser

    def sample(self, prompts: Sequence[str], first: int = 0) -> Renoised:
        """The student's samples of B prompts; `first` is the number of the first, which the noise depends on."""
        import torch

        from sdxs_lightning.core.seeding import Stream, normal
        from sdxs_lightning.networks.backward_simulation import one_step

        positions, shape = torch.arange(first, first + len(prompts)), self.family.latent_shape()
        conditioning = self.family.encode_prompts(list(prompts))
        noise = normal(0, Stream.STUDENT_NOISE, positions, shape)
        latents = one_step(self.student, noise, conditioning, self.timestep)
        return Renoised(conditioning, latents, normal(0, Stream.SCORE_NOISE, positions, shape))


def load_scores(options: ScoreOptions) -> StudentScores:
    """Loads student and scores.

    Raises:
        FileNotFoundError: if a folder or its weights are missing.
        ValueError: for networks that do not fit the base or take the guidance scale as an input, or a student of several steps
            or of an unknown timestep.
    """
    from sdxs_lightning.families.detect import detect_family
    from sdxs_lightning.networks.denoiser import Denoiser

    family = detect_family(options.base)
    timestep = _timestep(options)

    def denoiser(folder: str | None, option: str, name: str) -> Denoiser:
        unet = family.load_unet(folder, option).eval().requires_grad_(False)
        if unet.config.get("time_cond_proj_dim") is not None:
            raise ValueError(
                f"{option} '{name}' takes the guidance scale as an input (time_cond_proj_dim), which is not given here; give a "
                "network of one scale."
            )
        return Denoiser(unet, family.schedule, family.prediction_type)

    return StudentScores(
        family=family,
        student=denoiser(options.student, "--student", options.student),
        timestep=timestep,
        real=denoiser(None, "--base", options.base),
        fake=denoiser(options.fake_score, "--fake_score", options.fake_score),
    )


def _timestep(options: ScoreOptions) -> int:
    from sdxs_lightning.families.sources import resolve_unet
    from sdxs_lightning.networks.controlled import exported_timesteps

    if options.conditioning_timestep is not None:
        return options.conditioning_timestep
    found = exported_timesteps(resolve_unet(options.student, "--student"))
    if found is None:
        raise ValueError(
            f"--student '{options.student}' has no scheduler beside its U-Net that tells its timestep; give "
            "--conditioning_timestep."
        )
    if len(found) > 1:
        raise ValueError(
            f"--student '{options.student}' is a student of the timesteps {found}, and one of one step is measured; give "
            f"--conditioning_timestep {found[0]} for its first step alone."
        )
    return found[0]
