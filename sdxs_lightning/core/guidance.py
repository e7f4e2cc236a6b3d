"""Classifier-free guidance."""

from torch import Tensor


def guide(cond: Tensor, uncond: Tensor, guidance_scale: float) -> Tensor:
    """Guided prediction: uncond + guidance_scale * (cond - uncond); 1 means none, 0 is unconditional.

    Linear, so guiding noise, v or x_0 predictions of one x_t is equivalent.

    Args:
        cond: (B, 4, h, w), float, prediction with the prompt.
        uncond: same shape, prediction without it.
        guidance_scale: w.

    Returns:
        (B, 4, h, w), float32.

    Raises:
        ValueError: unless the shapes agree.

    Source: arXiv:2207.12598, in the parametrisation of diffusers (the paper's w is ours - 1).
    """
    if cond.shape != uncond.shape:
        raise ValueError(
            f"cond and uncond must have one shape, got {tuple(cond.shape)} and {tuple(uncond.shape)}."
        )
    cond, uncond = cond.float(), uncond.float()
    # The same formula relative to cond, so that w = 1 returns cond bit for bit.
    return cond + (guidance_scale - 1.0) * (cond - uncond)
