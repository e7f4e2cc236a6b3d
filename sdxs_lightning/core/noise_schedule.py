"""The noise schedule, and conversions between the prediction types of diffusion networks.

Notation of the entire project:
    abar_t = alphas_cumprod[t],  alpha_t = sqrt(abar_t),  sigma_t = sqrt(1 - abar_t),
    x_0 = scaled latents,  noise ~ N(0, 1),  x_t = alpha_t x_0 + sigma_t noise.

A network of prediction type
    "epsilon"       outputs noise,
    "v_prediction"  outputs v = alpha_t noise - sigma_t x_0,
    "sample"        outputs x_0.

All arithmetic is float32, whatever the inputs' dtype: at t = 999 an error of epsilon is multiplied by sigma_t / alpha_t = 14.6.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

PredictionType = Literal["epsilon", "v_prediction", "sample"]
PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")

Float64Array = npt.NDArray[np.float64]


class NoiseSchedule(nn.Module):
    """alphas_cumprod and its two square roots, (T,), float32, rounded once from float64.

    The buffers are not persistent and stay float32 when a parent module is cast: bfloat16 would merge neighbouring timesteps.

    Source: DDPM, arXiv:2006.11239, section 2; the beta schedules are those of diffusers' DDPMScheduler.
    """

    alphas_cumprod: Tensor
    alpha: Tensor
    sigma: Tensor

    def __init__(self, betas: npt.ArrayLike, prediction_type: PredictionType | None = None) -> None:
        """Computes the schedule from its betas.

        Args:
            betas: (T,), float, in (0, 1]; a last beta of exactly 1 is zero terminal SNR.
            prediction_type: what the network outputs, if known, for the check below.

        Raises:
            ValueError: for betas of another shape or range, or for zero terminal SNR with "epsilon".
        """
        super().__init__()
        betas64 = np.asarray(betas, dtype=np.float64)
        if betas64.ndim != 1 or betas64.size == 0 or not ((betas64 > 0) & (betas64 <= 1)).all():
            raise ValueError(
                f"betas must be one row of numbers in (0, 1], got shape {betas64.shape}; see the scheduler's "
                "config."
            )
        # float64 on the host, kept next to the buffers so that a cast or move never rounds twice.
        self._alphas_cumprod64: Float64Array = np.cumprod(1.0 - betas64, dtype=np.float64)
        if self._alphas_cumprod64[-1] <= 0 and prediction_type == "epsilon":
            raise ValueError(
                "a schedule of zero terminal SNR (rescale_betas_zero_snr) needs prediction_type "
                "'v_prediction' or 'sample', got 'epsilon', which says nothing about x_0 at the last "
                "timestep; see the scheduler's config."
            )
        self.num_train_timesteps: int = betas64.size
        self._fill_buffers(torch.device("cpu"))

    @classmethod
    def scaled_linear(
        cls, beta_start: float = 0.00085, beta_end: float = 0.012, num_train_timesteps: int = 1000
    ) -> Self:
        """The schedule of all Stable Diffusion models: sqrt(beta_t) is linear in t."""
        return cls(_scaled_linear_betas(beta_start, beta_end, num_train_timesteps))

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> Self:
        """Builds the schedule of a diffusers scheduler config.

        Args:
            config: `scheduler.config` or the parsed `scheduler_config.json`; absent keys take the defaults
                of diffusers.

        Raises:
            ValueError: for an unknown beta_schedule.
        """
        num_train_timesteps = int(config.get("num_train_timesteps", 1000))
        if config.get("trained_betas") is not None:
            betas = np.asarray(config["trained_betas"], dtype=np.float64)
        else:
            name = config.get("beta_schedule", "linear")
            if name not in _BETA_SCHEDULES:
                raise ValueError(
                    f"beta_schedule {name!r} of the scheduler's config is not known; accepted are "
                    f"{', '.join(_BETA_SCHEDULES)}, or trained_betas."
                )
            start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
            betas = _BETA_SCHEDULES[name](start, end, num_train_timesteps)
        if config.get("rescale_betas_zero_snr", False):
            betas = _rescale_zero_terminal_snr(betas)
        return cls(betas, config.get("prediction_type", "epsilon"))

    def betas(self) -> list[float]:
        """The T betas, for schedulers that take them as `trained_betas`."""
        abar = self._alphas_cumprod64
        betas: list[float] = (1.0 - abar / np.concatenate([[1.0], abar[:-1]])).tolist()
        return betas

    def alpha_t(self, timesteps: Tensor) -> Tensor:
        """sqrt(abar_t) per sample: (B,) int64 -> (B, 1, 1, 1) float32."""
        return self._at(self.alpha, timesteps)

    def sigma_t(self, timesteps: Tensor) -> Tensor:
        """sqrt(1 - abar_t) per sample: (B,) int64 -> (B, 1, 1, 1) float32."""
        return self._at(self.sigma, timesteps)

    def _at(self, values: Tensor, timesteps: Tensor) -> Tensor:
        if timesteps.ndim != 1 or timesteps.dtype != torch.int64:
            raise ValueError(f"timesteps must be (B,) int64, got {tuple(timesteps.shape)} {timesteps.dtype}.")
        # On a GPU reading the values would synchronise; index_select checks them there.
        if timesteps.device.type == "cpu" and bool(((timesteps < 0) | (timesteps >= len(values))).any()):
            raise ValueError(f"timesteps must be in [0, {len(values) - 1}], got {timesteps.tolist()}.")
        return values.index_select(0, timesteps).view(-1, 1, 1, 1)

    def _fill_buffers(self, device: torch.device) -> None:
        abar = self._alphas_cumprod64
        buffers = {"alphas_cumprod": abar, "alpha": np.sqrt(abar), "sigma": np.sqrt(1.0 - abar)}
        for name, values in buffers.items():
            rounded = torch.from_numpy(values.astype(np.float32)).to(device)
            self.register_buffer(name, rounded, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Called by .to(), .half(), .to_empty() ...: follow the device, never the dtype.
        self._fill_buffers(fn(self.alpha).device)
        return self


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Forward diffusion: noisy_latents = alpha_t * latents + sigma_t * noise.

    Args:
        latents: (B, 4, h, w), float, scaled latents.
        noise: same shape, N(0, 1).
        timesteps: (B,), int64, in [0, T).
        schedule: source of alpha_t and sigma_t.

    Returns:
        (B, 4, h, w), float32.

    Raises:
        ValueError: unless noise has the shape of latents and there is one timestep per sample.

    Source: DDPM, arXiv:2006.11239, eq. 4; equals DDPMScheduler.add_noise of diffusers.
    """
    _check(latents, noise, timesteps)
    return schedule.alpha_t(timesteps) * latents.float() + schedule.sigma_t(timesteps) * noise.float()


def target_of(
    prediction_type: PredictionType,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    schedule: NoiseSchedule,
) -> Tensor:
    """The training target of a network of this prediction type at x_t = add_noise(latents, noise, ...).

    Args:
        prediction_type: what the network outputs.
        latents: (B, 4, h, w), float, scaled latents.
        noise: same shape, N(0, 1).
        timesteps: (B,), int64, in [0, T).
        schedule: source of alpha_t and sigma_t.

    Returns:
        (B, 4, h, w), float32.

    Raises:
        ValueError: unless the shapes agree, with one timestep per sample, or for an unknown prediction type.

    Source: v = alpha_t noise - sigma_t x_0 is arXiv:2202.00512, section 4; equals DDPMScheduler.get_velocity.
    """
    _check(latents, noise, timesteps)
    match prediction_type:
        case "epsilon":
            return noise.float()
        case "v_prediction":
            return schedule.alpha_t(timesteps) * noise.float() - schedule.sigma_t(timesteps) * latents.float()
        case "sample":
            return latents.float()
    raise _unknown(prediction_type)


def to_pred_x0(
    output: Tensor,
    noisy_latents: Tensor,
    timesteps: Tensor,
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
) -> Tensor:
    """Converts a network's output to its clean-latent estimate; the inverse of `from_pred_x0`.

    Args:
        output: (B, 4, h, w), float, the network's output.
        noisy_latents: same shape, its input x_t.
        timesteps: (B,), int64, in [0, T).
        schedule: source of alpha_t and sigma_t.
        prediction_type: what the network outputs.

    Returns:
        (B, 4, h, w), float32.

    Raises:
        ValueError: unless the shapes agree, with one timestep per sample, or for an unknown prediction type.

    Source: DDIM, arXiv:2010.02502, eq. 9; equals `pred_original_sample` of DDIMScheduler.step, unclipped.
    """
    _check(output, noisy_latents, timesteps)
    output, noisy_latents = output.float(), noisy_latents.float()
    alpha_t, sigma_t = schedule.alpha_t(timesteps), schedule.sigma_t(timesteps)
    match prediction_type:
        case "epsilon":
            return (noisy_latents - sigma_t * output) / alpha_t
        case "v_prediction":
            return alpha_t * noisy_latents - sigma_t * output
        case "sample":
            return output
    raise _unknown(prediction_type)


def to_noise_pred(
    output: Tensor,
    noisy_latents: Tensor,
    timesteps: Tensor,
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
) -> Tensor:
    """Converts a network's output to its noise estimate; arguments, shapes and errors as in `to_pred_x0`.

    Source: equals the `pred_epsilon` inside DDIMScheduler.step.
    """
    _check(output, noisy_latents, timesteps)
    output, noisy_latents = output.float(), noisy_latents.float()
    alpha_t, sigma_t = schedule.alpha_t(timesteps), schedule.sigma_t(timesteps)
    match prediction_type:
        case "epsilon":
            return output
        case "v_prediction":
            return alpha_t * output + sigma_t * noisy_latents
        case "sample":
            return (noisy_latents - alpha_t * output) / sigma_t
    raise _unknown(prediction_type)


def from_pred_x0(
    pred_x0: Tensor,
    noisy_latents: Tensor,
    timesteps: Tensor,
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
) -> Tensor:
    """Converts a clean-latent estimate to the equivalent network output; the inverse of `to_pred_x0`.

    Args:
        pred_x0: (B, 4, h, w), float, clean-latent estimate.
        noisy_latents: same shape, x_t.
        timesteps: (B,), int64, in [0, T).
        schedule: source of alpha_t and sigma_t.
        prediction_type: what the network outputs.

    Returns:
        (B, 4, h, w), float32.

    Raises:
        ValueError: unless the shapes agree, with one timestep per sample, or for an unknown prediction type.
    """
    _check(pred_x0, noisy_latents, timesteps)
    pred_x0, noisy_latents = pred_x0.float(), noisy_latents.float()
    alpha_t, sigma_t = schedule.alpha_t(timesteps), schedule.sigma_t(timesteps)
    match prediction_type:
        case "epsilon":
            return (noisy_latents - alpha_t * pred_x0) / sigma_t
        case "v_prediction":
            # x_0 = alpha_t x_t - sigma_t v, solved for v.
            return (alpha_t * noisy_latents - pred_x0) / sigma_t
        case "sample":
            return pred_x0
    raise _unknown(prediction_type)


def _check(first: Tensor, second: Tensor, timesteps: Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(
            f"the two tensors must have one shape, got {tuple(first.shape)} and {tuple(second.shape)}; "
            "broadcasting here would mix samples."
        )
    if first.ndim != 4 or timesteps.shape != (first.shape[0],):
        raise ValueError(
            f"needs (B, C, h, w) and one timestep per sample, got {tuple(first.shape)} and timesteps of "
            f"shape {tuple(timesteps.shape)}."
        )


def _unknown(prediction_type: str) -> ValueError:
    return ValueError(
        f"prediction_type {prediction_type!r} is not known; accepted are {', '.join(PREDICTION_TYPES)}, as "
        "in the base's scheduler_config.json."
    )


def _linear_betas(beta_start: float, beta_end: float, num_train_timesteps: int) -> Float64Array:
    return np.linspace(beta_start, beta_end, num_train_timesteps)


def _scaled_linear_betas(beta_start: float, beta_end: float, num_train_timesteps: int) -> Float64Array:
    betas: Float64Array = np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2
    return betas


def _squared_cosine_betas(_beta_start: float, _beta_end: float, num_train_timesteps: int) -> Float64Array:
    """Nichol and Dhariwal, arXiv:2102.09672, eq. 17, with betas clipped at 0.999 as there."""
    edges = np.arange(num_train_timesteps + 1) / num_train_timesteps
    abar = np.cos((edges + 0.008) / 1.008 * np.pi / 2) ** 2
    betas: Float64Array = np.minimum(1.0 - abar[1:] / abar[:-1], 0.999)
    return betas


_BETA_SCHEDULES: dict[str, Callable[[float, float, int], Float64Array]] = {
    "linear": _linear_betas,
    "scaled_linear": _scaled_linear_betas,
    "squaredcos_cap_v2": _squared_cosine_betas,
}


def _rescale_zero_terminal_snr(betas: Float64Array) -> Float64Array:
    """Shifts and scales sqrt(abar) so that the last is 0 and the first unchanged (arXiv:2305.08891, alg. 1)."""
    alpha = np.sqrt(np.cumprod(1.0 - betas))
    abar = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
    rescaled: Float64Array = 1.0 - np.concatenate([abar[:1], abar[1:] / abar[:-1]])
    return rescaled
