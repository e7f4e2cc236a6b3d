"""The options of `python -m data.prepare latents`. Imported before torch: keep it light."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from data.prepare.common.options import Count, DeviceOptions, OutputOptions, RemoteOptions
from sdxs_lightning.command_line import Option
from sdxs_lightning.core.option_bounds import LARGEST_SIDE_PX

Store = Literal["mean", "mean+logvar"]
StoredDtype = Literal["float16", "float32"]
VaeDtype = Literal["float32", "float16", "bfloat16"]


def parse_size(text: str) -> tuple[int, int]:
    """Height and width of "1152x896".

    Raises:
        ValueError: for other text.
    """
    height, cross, width = text.partition("x")
    if not (cross and height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise ValueError("must be HEIGHTxWIDTH in pixels; 1152x896 is a portrait")
    if max(int(height), int(width)) > LARGEST_SIDE_PX:
        raise ValueError(f"a side is at most {LARGEST_SIDE_PX} px")
    return int(height), int(width)


@dataclass(frozen=True, kw_only=True)
class LatentSettings:
    """The options that the shards depend on; latents.json keeps them."""

    model: Annotated[str, Option(called=("family.init_args.base",))]
    """Base: diffusers folder, hub id or .safetensors file."""
    source: Annotated[str, Option(name="from")]
    """Shards of images: folder, glob or brace pattern."""
    config: Annotated[str | None, Option(called=("family.init_args.config",))] = None
    """For a .safetensors file: folder or hub id of its configs and tokenizers."""
    vae: str | None = None
    """VAE instead of the base's, with the same latents: VAE or pipeline folder, or hub id of either."""
    dtype: StoredDtype = "float16"
    """Dtype of the stored latents."""
    store: Store = "mean"
    """mean+logvar doubles the size and also keeps the posterior's variance, for data.draw_latents."""
    vae_dtype: VaeDtype = "float32"
    """Dtype of the VAE's weights and computations; float16 only if the VAE does not overflow."""
    batch_size: Count = 8
    """Images per batch; another number may round differently in the last bits."""


@dataclass(frozen=True, kw_only=True)
class LatentOptions(LatentSettings, OutputOptions, RemoteOptions, DeviceOptions):
    """Encodes shards of images to shards of latents with the VAE of a base.

    Each shard of --from becomes one of --out, with captions, condition images and json; original size and crop are in the json
    for SDXL. A training reads them with data.contents [latents] or [latents, sizes]. Crops are fixed with the latents. An
    interrupted run resumes when the same command is given again, with any number of processes, and the shards come out the
    same. `(cd OUT && sha256sum --check SHA256SUMS)` or `python -m data.prepare verify OUT` detects any byte that changed.
    """

    EXAMPLES: ClassVar[str] = """
    python -m data.prepare latents --model models/sd15 --from datasets/photos --out datasets/photos-sd15
    python -m data.prepare latents --model models/sdxl --from datasets/photos --buckets --out datasets/photos-sdxl
    python -m data.prepare latents --model models/sdxl --vae madebyollin/sdxl-vae-fp16-fix --vae_dtype float16 \\
        --from 'laion/{00000..00999}.tar' --sizes 1024x1024 896x1152 1152x896 --batch_size 16 --out datasets/laion-sdxl
    srun --nodes 8 python -m data.prepare latents --model models/sdxl --from datasets/photos --out datasets/photos-sdxl
    python -m data.prepare latents --model models/sdxl --from datasets/photos --ray auto --gpus_per_task 0.5 \\
        --out s3://bucket/photos-sdxl
    """

    resolution: Annotated[int | None, Option(at_least=1, at_most=LARGEST_SIDE_PX)] = None
    """Side of the squares; by default the base's own."""
    sizes: Annotated[tuple[tuple[int, int], ...], Option(parse=parse_size, metavar="HxW")] = ()
    """Several sizes; an image goes to the one with the nearest aspect ratio."""
    buckets: Annotated[int | None, Option(at_least=1, at_most=LARGEST_SIDE_PX, const=0, metavar="SIDE")] = (
        None
    )
    """Sizes with the area of SIDE squared (by default the base's own side) and aspect ratios from about 1:2 to 2:1, in steps
    of SIDE / 16."""
    bad_samples: Annotated[float, Option(at_least=0, at_most=1)] = 0.01
    """Fraction of a shard's samples that may be broken and are left out; with more the command stops."""

    def __post_init__(self) -> None:
        given = {"--resolution": self.resolution is not None, "--sizes": bool(self.sizes)}
        given["--buckets"] = self.buckets is not None
        chosen = [option for option, present in given.items() if present]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude one another; give one of them.")
        self.check_ray()
