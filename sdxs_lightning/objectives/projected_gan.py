"""The hinge GAN over several heads, each on a feature map of a frozen network, and R1 on the heads' inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import relu

from sdxs_lightning.networks.projected_discriminator import ProjectedDiscriminator


def hinge_generator_loss(fake_logits: Sequence[Tensor]) -> Tensor:
    """The generator's side: minus the mean logit, averaged over the heads.

    Args:
        fake_logits: per head (B, n), float, n places of a feature map, of the generator's images; large means real.

    Returns:
        (), float32.

    Source: ADD, arXiv:2311.17042, eq. 3, averaged instead of summed over heads.
    """
    return -torch.stack([logits.float().mean() for logits in fake_logits]).mean()


def hinge_discriminator_loss(real_logits: Sequence[Tensor], fake_logits: Sequence[Tensor]) -> Tensor:
    """The discriminator's side: mean relu(1 - real) + mean relu(1 + fake), averaged over the heads.

    Args:
        real_logits: per head (B, n), float: real images; large means real.
        fake_logits: per head (B', n), float: images of the generator.

    Returns:
        (), float32; 2 where the discriminator knows nothing.

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
        real_features: per head (B, C, h, w), float; they require gradients.

    Returns:
        (), float32, with a graph for a second derivative.

    Source: R1, arXiv:1801.04406, eq. 9, on the heads' inputs instead of pixels as in ADD, arXiv:2311.17042, section 3.2.
    """
    total = torch.stack([logits.float().sum() for logits in real_logits]).sum()
    # Each head sees its own features only, so one gradient of the sum is that of every head.
    gradients = torch.autograd.grad(total, list(real_features), create_graph=True)
    return torch.stack([g.float().square().flatten(1).sum(dim=1).mean() for g in gradients]).mean()


def projected_discriminator_loss(
    discriminator: ProjectedDiscriminator,
    real_features: Sequence[Tensor],
    fake_features: Sequence[Tensor],
    r1_weight: float | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The heads' hinge loss, with R1 on their inputs from real images; both halves go through the heads as one batch.

    Args:
        discriminator: built.
        real_features: per head (B, C, h, w), float; detached here.
        fake_features: the same of as many images of the generator.
        r1_weight: factor of R1; None leaves it out.

    Returns:
        The loss, (), float32, and scalars: `loss` without R1, `accuracy` over all logits, and `r1` where there is one.
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
