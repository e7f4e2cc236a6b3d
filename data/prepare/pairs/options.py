"""The options of `python -m data.prepare pairs`. Imported before torch: keep it light."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from data.prepare.common.options import Count, DeviceOptions, OutputOptions
from sdxs_lightning.command_line import Option
from sdxs_lightning.core.guidance_scale import read_guidance_scale
from sdxs_lightning.core.option_bounds import LARGEST_SCALE, MOST_STEPS
from sdxs_lightning.pairs.ode_schedulers import ODE_SCHEDULERS

DDIM = "ddim"
"""This project's own."""
_LARGEST_SEED = (1 << 31) - 1  # of pair_noise.SEEDS; a test compares them


@dataclass(frozen=True, kw_only=True)
class PairOptions(OutputOptions, DeviceOptions):
    """Samples (noise, latents) pairs of a base or few-step model, for the warm-up stage or feature matching.

    A training reads them with data.shards pointing at --out, data.contents [latents, noise_seeds] and pairs.source batch. The
    noise is not stored: it is generated from each pair's seed. An interrupted run resumes when the same command is given
    again, with any number of processes, and the shards come out the same.
    """

    EXAMPLES: ClassVar[str] = """
    python -m data.prepare pairs --model data/toy/base --captions toy:train --count 2048 --steps 15 \\
        --guidance_scale 1.5 --out outputs/pairs
    python -m data.prepare pairs --model stabilityai/sd-turbo --captions prompts.txt --steps 1 --guidance_scale 1 \\
        --out pairs/turbo
    python -m data.prepare pairs --model models/sdxl --captions 'laion/{00000..00099}.tar' --count 10000 --steps 25 \\
        --guidance_scale 6 --scheduler DPMSolverMultistepScheduler --out pairs/sdxl --verify 4
    srun --nodes 8 python -m data.prepare pairs --model models/sd15 --captions prompts.txt --steps 25 --guidance_scale 7.5 \\
        --out pairs/sd15
    """

    model: Annotated[str, Option(called=("family.init_args.base",))]
    """Target sampler: diffusers folder, hub id or .safetensors file."""
    captions: str
    """A .txt file with one prompt per line, shards (folder, glob or brace pattern), or toy:train."""
    steps: Annotated[int, Option(at_least=1, at_most=MOST_STEPS)]
    """Number of sampling steps."""
    guidance_scale: Annotated[float, Option(at_least=0, at_most=LARGEST_SCALE, deprecated=("guidance",))]
    """Scale of classifier-free guidance; 1 means none."""
    config: Annotated[str | None, Option(called=("family.init_args.config",))] = None
    """For a .safetensors file: folder or hub id of its configs and tokenizers."""
    unet: str | None = None
    """U-Net instead of the model's own: U-Net or pipeline folder, or hub id of either."""
    count: Count | None = None
    """Number of pairs; by default one per prompt. Prompts are repeated if there are fewer."""
    scheduler: Annotated[str, Option(choices=(DDIM, *ODE_SCHEDULERS))] = DDIM
    """Sampler that draws no noise on the way; ddim is this project's own, the others are diffusers'."""
    spacing: Literal["trailing", "leading"] = "trailing"
    """Spacing of the timesteps; trailing begins at pure noise, where a one-step student begins."""
    seed: Annotated[int, Option(at_least=0, at_most=_LARGEST_SEED)] = 0
    """Seed of the noise."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Dtype of the networks; by default bfloat16 on GPUs, else float32."""
    batch_size: Count = 16
    """Pairs per batch."""
    samples_per_shard: Count = 1024
    """Pairs per shard; also what an interruption can cost a process."""
    verify: Annotated[int | None, Option(at_least=1, const=1, metavar="PAIRS")] = None
    """Sample random pairs of the set again and compare."""

    def __post_init__(self) -> None:
        self.check_ray()
        object.__setattr__(
            self, "guidance_scale", read_guidance_scale("--guidance_scale", self.guidance_scale)
        )
