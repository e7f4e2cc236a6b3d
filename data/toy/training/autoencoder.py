"""Training of the toy base's autoencoder: a stock diffusers AutoencoderKL, 32x32 pixels to 4x16x16 latents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import functional as F

from data.toy.rendered import CaptionedImages
from data.toy.training.fitting import ToyTraining

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def image_gradients(images: Tensor) -> Tensor:
    """Differences of neighbouring pixels in both directions, flattened: (B, n)."""
    across, down = images.diff(dim=-1), images.diff(dim=-2)
    return torch.cat([across.flatten(1), down.flatten(1)], dim=1)


class AutoencoderTraining(ToyTraining):
    """L1 + MSE + gradient loss with a small KL term; exports a diffusers folder at the end.

    After training, the latents are centred and whitened per channel by folding the affine map into the 1x1 `quant_conv` and
    `post_quant_conv`, which changes no reconstruction. `scaling_factor` 0.5 then makes latents of standard deviation 0.5:
    the SD betas leave sqrt(abar_999) = 0.068 of the signal at the last timestep, and with unit variance the U-Net takes the
    background from that leak instead of the prompt.

    Args:
        optimizer: from parameters to optimizer.
        lr_scheduler: from optimizer to a per-step schedule.
        output: diffusers folder to write.
        block_out_channels: widths of the two resolutions.
        latent_scale: the `scaling_factor` to write.
        kl_weight: weight of the KL term.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable,
        output: str,
        block_out_channels: tuple[int, int] = (16, 32),
        latent_scale: float = 0.5,
        kl_weight: float = 1e-4,
    ) -> None:
        from diffusers import AutoencoderKL

        super().__init__(optimizer, lr_scheduler)
        self.output, self.kl_weight = output, kl_weight
        self.autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=block_out_channels,
            layers_per_block=1,
            norm_num_groups=8,
            latent_channels=4,
            sample_size=32,
            mid_block_add_attention=False,
            scaling_factor=latent_scale,
        ).to(memory_format=torch.channels_last)

    def training_step(self, batch: CaptionedImages, batch_idx: int) -> Tensor:
        """Reconstruction of a sampled latent."""
        images = self.to_network_range(batch.images_uint8)
        posterior = self.autoencoder.encode(images).latent_dist
        reconstruction = self.autoencoder.decode(posterior.sample()).sample
        pixel = F.l1_loss(reconstruction, images) + F.mse_loss(reconstruction, images)
        edges = F.l1_loss(image_gradients(reconstruction), image_gradients(images))
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        self.log_dict({"pixel": pixel, "edges": edges, "kl": divergence}, prog_bar=True)
        loss: Tensor = pixel + edges + self.kl_weight * divergence
        return loss

    def validation_step(self, batch: CaptionedImages, batch_idx: int) -> None:
        """PSNR in dB of the decoded posterior mean."""
        images = self.to_network_range(batch.images_uint8)
        decoded = self.autoencoder.decode(self.autoencoder.encode(images).latent_dist.mode()).sample
        error = (decoded.clamp(-1, 1) - images).square().mean(dim=(1, 2, 3))
        self.log("psnr_db", (10 * torch.log10(4 / error)).mean(), prog_bar=True, batch_size=len(images))

    def on_fit_end(self) -> None:
        """Whitens the latents and writes the folder."""
        if not self.trainer.is_global_zero:
            return
        images = self.trainer.datamodule.train_split.images_uint8[:4096].float() / 127.5 - 1  # type: ignore[attr-defined]
        whiten_latents(self.autoencoder.float().cpu().eval(), images)
        self.autoencoder.half().save_pretrained(Path(self.output))


@torch.no_grad()
def whiten_latents(autoencoder: AutoencoderKL, images: Tensor) -> None:
    """Normalises the latent means of `images` (N,3,H,W) to zero mean and unit variance per channel, without changing
    reconstructions.
    """
    latents = torch.cat([autoencoder.encode(chunk).latent_dist.mode() for chunk in images.split(256)])
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    encode, decode = autoencoder.quant_conv, autoencoder.post_quant_conv
    channels = len(mean)
    # The first half of the moments is the mean, the second the log-variance: dividing by s lowers it by 2 log s.
    encode.weight[:channels] /= deviation.view(-1, 1, 1, 1)
    encode.bias[:channels] = (encode.bias[:channels] - mean) / deviation
    encode.bias[channels:] -= 2 * deviation.log()
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= deviation.view(1, -1, 1, 1)
