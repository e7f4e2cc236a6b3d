"""Statistics for the log of a distillation, computed from existing tensors without further network passes."""

from __future__ import annotations

import torch
from torch import Tensor

from sdxs_lightning.objectives.checks import check_same_shape

REACH = 4.0
"""Standard deviations of the data beyond which latents count as saturated: 6e-5 of a normal distribution, and 1e-3 of the toy
base's latents, whose tails are heavier."""


@torch.no_grad()
def latent_stats(latents: Tensor, data: Tensor | None) -> dict[str, Tensor]:
    """Mean, standard deviation and saturation of the student's latents.

    Saturation is the share of elements farther from 0 than `REACH` standard deviations of the data. Too strong guidance
    increases it, and such latents decode to burnt colours.

    Args:
        latents: (B, C, h, w), float, scaled.
        data: scaled latents of the batch, any (B', C, h', w'); None assumes a standard deviation of 1, which a base's
            scaling factor is chosen for.

    Returns:
        `mean`, `std`, `saturation`, each (), float32, on the device of latents.
    """
    latents = latents.float()
    reach = REACH if data is None else REACH * data.float().std()
    return {
        "mean": latents.mean(),
        "std": latents.std(),
        "saturation": (latents.abs() > reach).float().mean(),
    }


@torch.no_grad()
def score_stats(pred_x0: Tensor, real_x0: Tensor, fake_x0: Tensor) -> dict[str, Tensor]:
    """Distance of the two scores on the student's re-noised samples, and whether the fake score keeps up.

    - `score_gap`: mean |fake_x0 - real_x0|;
    - `relative_score_gap`: `score_gap` / mean |pred_x0 - real_x0|, the normaliser of distribution matching;
    - `fake_score_lag`: mean (pred_x0 - fake_x0)^2 / mean (pred_x0 - real_x0)^2. An optimal fake score is the best denoiser
      of the student's samples in mean square at every timestep. So for a fake score that keeps up the ratio is at most 1,
      whatever the real score and its guidance, and approaches 1 as the student's distribution approaches the data's.

    Args:
        pred_x0: (B, C, h, w), float, the student's clean latents.
        real_x0: same shape, the guided real score's estimate of them from their re-noised version.
        fake_x0: same shape, the fake score's estimate from the same re-noised version.

    Returns:
        Each (), float32; 0 / 0 is 0 for the gap and 1 for the lag.

    Raises:
        ValueError: unless the shapes agree.
    """
    check_same_shape(pred_x0=pred_x0, real_x0=real_x0, fake_x0=fake_x0)
    pred_x0, real_x0, fake_x0 = pred_x0.float(), real_x0.float(), fake_x0.float()
    tiny = torch.finfo(torch.float32).tiny
    gap, distance = (fake_x0 - real_x0).abs().mean(), (pred_x0 - real_x0).abs().mean()
    fake_error, real_error = (pred_x0 - fake_x0).square().mean(), (pred_x0 - real_x0).square().mean()
    return {
        "score_gap": gap,
        "relative_score_gap": gap / (distance + tiny),
        "fake_score_lag": (fake_error + tiny) / (real_error + tiny),
    }


@torch.no_grad()
def guidance_stats(real_x0: Tensor, cond_x0: Tensor, fake_x0: Tensor) -> dict[str, Tensor]:
    """The two parts of the score difference: guidance (real_x0 - cond_x0) and matching (cond_x0 - fake_x0).

    Args:
        real_x0: (B, 4, h, w), float, the guided real score's estimate of the clean latents.
        cond_x0: same shape, without guidance.
        fake_x0: same shape, the fake score's.

    Returns:
        `guidance_share`, the norm of the first over the sum of both norms, and `guidance_cosine` between them, each
        (), float32. Empty without guidance.

    Source: Decoupled DMD, arXiv:2511.22677, which finds that the first drives few-step distillation.
    """
    if real_x0 is cond_x0:
        return {}
    guidance, matching = (real_x0 - cond_x0).float().flatten(), (cond_x0 - fake_x0).float().flatten()
    one, other = guidance.norm(), matching.norm()
    return {
        "guidance_share": one / (one + other).clamp_min(1e-20),
        "guidance_cosine": torch.dot(guidance, matching) / (one * other).clamp_min(1e-20),
    }
