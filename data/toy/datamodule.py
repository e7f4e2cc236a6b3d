"""The toy world's latents as WebDataset shards: rendered and encoded once, then read as any other data set."""

from __future__ import annotations

import hashlib
import io
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from rich.progress import track
from torch import Tensor

from data.shards.datamodule import ShardDataModule
from data.shards.dataset import Content
from data.shards.writer import Member, ShardWriter, encode_latents
from data.toy.original_sizes import vary_original_sizes
from data.toy.rendered import render_batch
from data.toy.world import Style, captions
from sdxs_lightning.core.image_condition import ImageCondition
from sdxs_lightning.families.network_types import AutoencoderKL

_ENCODE_BATCH = 128


class ToyDataModule(ShardDataModule):
    """Latents and captions of the first `train_images` images of the train split.

    The shards are in a subfolder of `cache` that is named after the number of images and a hash of the autoencoder's weights,
    so that latents of another autoencoder are never read.

    Args:
        base: diffusers folder with the autoencoder, `vae/`.
        train_images: number of images.
        cache: parent folder of the shard folders.
        batch_size: samples of a micro-batch on each device.
        num_workers: reading processes per device.
        seed: of the order.
        original_sizes: some of the images have half the size or are cropped, and batches hold their sizes (SDXL).
        images: batches hold the images in addition to their latents.
        condition: makes condition images of the images, which batches then hold too.
        style: how the images are drawn; null is the plain drawing.
    """

    def __init__(
        self,
        base: str = "data/toy/base",
        train_images: int = 8192,
        cache: str = "outputs/toy_shards",
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        original_sizes: bool = False,
        images: bool = False,
        condition: ImageCondition | None = None,
        style: Style | None = None,
    ) -> None:
        stored = images or condition is not None
        name = f"{train_images}-{_weights_digest(Path(base) / 'vae')}"
        name += "-sizes" * original_sizes + "-images" * stored
        name += f"-{style}" if style else ""
        folder = Path(cache) / name
        contents: list[Content] = ["latents"]
        contents += ["sizes"] if original_sizes else []
        contents += ["images"] if images else []
        contents += ["control_images"] if condition is not None else []
        super().__init__(
            shards=str(folder),
            batch_size=batch_size,
            contents=contents,
            num_workers=num_workers,
            seed=seed,
            condition=condition,
        )
        self.base, self.train_images, self.folder = base, train_images, folder
        self.original_sizes, self.images = original_sizes, stored
        self.style = style

    def prepare_data(self) -> None:
        """Renders and encodes the images unless the shards are complete; an incomplete folder is written again."""
        finished = self.folder / "complete"
        if not finished.exists():
            # Of runs that start together one writes, and the others wait.
            with self._alone():
                if not finished.exists():
                    extras = self.original_sizes, self.images, self.style
                    write_latent_shards(self.base, self.train_images, self.folder, *extras)
                    finished.touch()
        super().prepare_data()

    def _alone(self) -> AbstractContextManager[object]:
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{self.folder}.lock")
            try:
                return lock.acquire(blocking=False)
            except Timeout:
                rank_zero_info(f"Waiting for another run to write '{self.folder}'.")
                return lock.acquire()
        except OSError as error:
            raise ValueError(
                f"the toy world's shards cannot be written to '{self.folder.parent}' ({error.strerror}); change "
                "data.init_args.cache."
            ) from error


def write_latent_shards(
    base: str,
    count: int,
    folder: Path,
    original_sizes: bool = False,
    with_images: bool = False,
    style: Style | None = None,
) -> None:
    """Renders `count` train images and writes VAE means, unscaled, with captions and, on request, sizes and images."""
    from diffusers import AutoencoderKL

    autoencoder = AutoencoderKL.from_pretrained(Path(base) / "vae", torch_dtype=torch.float32).eval()
    with ShardWriter(folder, samples_per_shard=4096, overwrite=True) as writer:
        for start in track(
            range(0, count, _ENCODE_BATCH), description="rendering and encoding the toy world"
        ):
            size = min(_ENCODE_BATCH, count - start)
            images, sizes = render_batch("train", size, start, [style]), [dict[str, int]()] * size
            if original_sizes:
                images, heights, crops = vary_original_sizes(images, torch.arange(start, start + size))
                sizes = [_size_fields(*row) for row in torch.cat([heights, crops], dim=1).tolist()]
            for caption, sample, fields, image in zip(
                captions("train", size, start),
                encode(autoencoder, images),
                sizes,
                images,
                strict=True,
            ):
                members: dict[str, Member] = {"latent.safetensors": encode_latents(sample), "txt": caption}
                members |= {"json": fields} if fields else {}
                members |= {"png": png(image)} if with_images else {}
                writer.write(members)


def _size_fields(height: int, width: int, top: int, left: int) -> dict[str, int]:
    return {"original_height": height, "original_width": width, "crop_top": top, "crop_left": left}


def png(image_uint8: Tensor) -> bytes:
    """An image (3, H, W) uint8 as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image_uint8.permute(1, 2, 0).numpy()).save(file, format="PNG")
    return file.getvalue()


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, images_uint8: Tensor) -> Tensor:
    """VAE means (B,4,16,16), unscaled, of (B,3,32,32) uint8 images."""
    latents: Tensor = autoencoder.encode(images_uint8.float() / 127.5 - 1).latent_dist.mode()
    return latents


def _weights_digest(folder: Path) -> str:
    path = folder / "diffusion_pytorch_model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"the toy base has no autoencoder at {path}; give a diffusers folder as data.init_args.base, or train one with "
            "`python train.py --config configs/toy/autoencoder.yaml`"
        )
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
