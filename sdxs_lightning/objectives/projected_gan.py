"""Hinge GAN losses over several heads on frozen feature maps, and R1 on the heads' inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import relu

from sdxs_lightning.networks.projected_discriminator import ProjectedDiscriminator


def hinge_generator_loss(fake_logits: Sequence[Tensor]) -> Tensor:
    """The generator's hinge loss: minus the mean logit, averaged over the heads.

    Args:
        fake_logits: per head (B, n), float, at the n positions of the feature map of generated images; positive means real.

    Returns:
        (), float32.

    Source: ADD, arXiv:2311.17042, eq. 3, averaged instead of summed over heads.
    """
    return -torch.stack([logits.float().mean() for logits in fake_logits]).mean()


def hinge_discriminator_loss(real_logits: Sequence[Tensor], fake_logits: Sequence[Tensor]) -> Tensor:
    """The discriminator's hinge loss: mean relu(1 - real) + mean relu(1 + fake), averaged over the heads.

    Args:
        real_logits: per head (B, n), float, of real images; positive means real.
        fake_logits: per head (B', n), float, of generated images.

    Returns:
        (), float32; 2 for logits of 0.

    Source: ADD, arXiv:2311.17042, eq. 4, averaged instead of summed over heads.
    """
    losses = [
        relu(1 - real.float()).mean() + relu(1 + fake.float()).mean()
        for real, fake in zip(real_logits, fake_logits, strict=True)
    ]
    return torch.stack(losses).mean()


def r1_penalty(real_logits: Sequence[Tensor], real_features: Sequence[Tensor]) -> Tensor:
    """Squared gradient of each head's summed logits with respect to its input, averaged over samples, then over heads.

    Args:
        real_logits: per head (B, n), float, with graph to real_features.
        real_features: per head (B, C, h, w), float, requiring gradients.

    Returns:
        (), float32, with the graph for the second derivative.

    Source: R1, arXiv:1801.04406, eq. 9, on the heads' inputs instead of pixels as in ADD, arXiv:2311.17042, section 3.2.
    """
    total = torch.stack([logits.float().sum() for logits in real_logits]).sum()
    # Each head depends on its own features only, so the gradient of the sum contains that of every head.
    gradients = torch.autograd.grad(total, list(real_features), create_graph=True)
    return torch.stack([g.float().square().flatten(1).sum(dim=1).mean() for g in gradients]).mean()


def projected_discriminator_loss(
    discriminator: ProjectedDiscriminator,
    real_features: Sequence[Tensor],
    fake_features: Sequence[Tensor],
    r1_weight: float | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The heads' hinge loss plus R1 on their real inputs; real and fake go through the heads as one batch.

    Args:
        discriminator: a built discriminator.
        real_features: per head (B, C, h, w), float; detached here.
        fake_features: the same for as many generated images.
        r1_weight: weight of R1; None disables it.

    Returns:
        The loss, (), float32, and scalars: `loss` without R1, `accuracy` over all logits, and `r1` if enabled.
    """
    real = [part.detach().float().requires_grad_(r1_weight is not None) for part in real_features]
    both = [torch.cat([r, f.detach().float()]) for r, f in zip(real, fake_features, strict=True)]
    logits = [part.chunk(2) for part in discriminator(both)]
    real_logits, fake_logits = [pair[0] for pair in logits], [pair[1] for pair in logits]
    loss = hinge_discriminator_loss(real_logits, fake_logits)
    right = torch.cat([(part > 0).flatten() for part in [*real_logits, *(-f for f in fake_logits)]])
    scalars = {"loss": loss, "accuracy": right.float().mean()}
    if r1_weight is not None:
        penalty = r1_penalty(real_logits, real)
        scalars["r1"] = penalty
        loss = loss + r1_weight * penalty
    return loss, scalars
