"""Classifier-free guidance."""

from torch import Tensor


def guide(cond: Tensor, uncond: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """Guided prediction: uncond + guidance_scale * (cond - uncond); 1 means none, 0 is unconditional.

    Linear, so guiding noise, v or x_0 predictions of one x_t is equivalent.

    Args:
        cond: (B, 4, h, w), float, prediction with the prompt.
        uncond: same shape, prediction without it.
        guidance_scale: w, for all samples or (B, 1, 1, 1).

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


def rescaled(guided: Tensor, cond: Tensor, share: float) -> Tensor:
    """Guided clean latents with the standard deviation of the unguided ones, mixed with themselves by `share`.

    Args:
        guided: (B, 4, h, w), float32, with guidance.
        cond: same shape, without.
        share: 1 rescales, 0 returns `guided`.

    Returns:
        (B, 4, h, w), float32.

    Source: arXiv:2305.08891, eq. 15 and 16, there on the prediction of the network.
    """
    spread = (cond.std(dim=(1, 2, 3), keepdim=True), guided.std(dim=(1, 2, 3), keepdim=True))
    return guided * (share * spread[0] / spread[1].clamp_min(1e-12) + (1 - share))
