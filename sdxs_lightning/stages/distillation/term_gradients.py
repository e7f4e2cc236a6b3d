"""The student's terms side by side: the gradient of each at the student's latents, its norm, and how far two agree.

Following each term back to the latents by itself costs no more than following their sum, since the terms share nothing
before the latents; the student, which they do share, is passed once with the sum of the gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import torch
import torch.distributed as dist
from torch import Tensor

from sdxs_lightning.stages.distillation.sample import DistillationContext, Sample
from sdxs_lightning.stages.distillation.student_terms import StudentTerm

Gradients = dict[str, Tensor]
"""(B, C, h, w), float32, by name of the term."""


def term_gradients(
    terms: Mapping[str, StudentTerm], sample: Sample, context: DistillationContext
) -> tuple[Gradients, dict[str, Tensor]]:
    """The gradient of each weighted term at the sample's latents, and the terms' scalars.

    Args:
        terms: by name.
        sample: its latents have a graph, which stays whole.
        context: the networks that the terms ask; they collect no gradients if they rest.
    """
    gradients: Gradients = {}
    scalars: dict[str, Tensor] = {}
    for name, term in terms.items():
        loss, named = term(sample, context)
        (gradients[name],) = torch.autograd.grad(loss, sample.latents)
        scalars.update(named)
    return gradients, scalars


def balanced(gradients: Gradients, name: str, reference: str, ratio: float) -> Gradients:
    """One gradient scaled so that its norm is `ratio` times another's, over the whole batch of all ranks.

    Args:
        gradients: of the terms.
        name: which one is scaled.
        reference: whose norm counts.
        ratio: wanted norm over the reference's norm.

    Returns:
        A new dict; nothing waits for the device.
    """
    squares = torch.stack([gradients[key].float().square().sum() for key in (reference, name)])
    if dist.is_initialized():  # else the scale would depend on how the batch lies on ranks
        dist.all_reduce(squares)
    wanted, found = squares.sqrt()
    return gradients | {name: gradients[name] * (ratio * wanted / found.clamp_min(1e-12))}


def comparison(gradients: Gradients) -> dict[str, Tensor]:
    """Norms, and cosines of every two: `gradient_norm_A`, `cosine_A_B`. Of this rank's samples."""
    flat = {name: gradient.float().flatten() for name, gradient in gradients.items()}
    norms = {name: gradient.norm() for name, gradient in flat.items()}
    compared = {f"gradient_norm_{name}": norm for name, norm in norms.items()}
    for one, other in combinations(flat, 2):
        both = (norms[one] * norms[other]).clamp_min(1e-20)
        compared[f"cosine_{one}_{other}"] = torch.dot(flat[one], flat[other]) / both
    return compared
