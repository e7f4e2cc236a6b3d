"""Complete Stable Diffusion bases of tiny size, made on the fly from the real classes.

Real `UNet2DConditionModel`, `AutoencoderKL`, `CLIPTextModel`, `CLIPTokenizer` and schedulers with random
weights from a fixed seed, so that the whole training step and every file format run fast on a CPU, offline.
Images are 32x32, latents 4x16x16, prompts 16 tokens. Either U-Net has about 60 k parameters.
"""

import functools
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdxs_lightning.core.batch import Conditioning, TrainingBatch
from sdxs_lightning.core.noise_schedule import PredictionType
from sdxs_lightning.core.seeding import Stream, normal

RESOLUTION_PX = 32
LATENT_SHAPE = (4, 16, 16)
PROMPT_TOKENS = 16
SD_DIM = 32
SDXL_DIM = 48  # two text encoders, 32 + 16, side by side
SDXL_POOLED_DIM = 24
SDXL_TIME_ID_DIM = 8

_WORDS = (
    "a an the small large red green blue yellow purple gray white black circle square triangle star "
    "above below left right of on background photo cat dog"
).split()


def tiny_sd_unet(seed: int = 0, stages: int = 3) -> UNet2DConditionModel:
    """A U-Net of SD kind: three stages, a cross-attention mid block at 4x4; float32, eval mode.

    Args:
        seed: of the random weights.
        stages: 2 leaves one with cross-attention out: two thirds of the time, for tests that look at no single block.
    """
    return _unet(seed, stages, cross_attention_dim=SD_DIM)


def tiny_sdxl_unet(seed: int = 0, stages: int = 3) -> UNet2DConditionModel:
    """A U-Net of SDXL kind: added conditioning "text_time", linear projections; arguments as in `tiny_sd_unet`."""
    return _unet(
        seed,
        stages,
        cross_attention_dim=SDXL_DIM,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=SDXL_TIME_ID_DIM,
        projection_class_embeddings_input_dim=6 * SDXL_TIME_ID_DIM + SDXL_POOLED_DIM,
    )


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    """A VAE with 4 latent channels that halves the resolution; float32, eval mode."""
    with _seeded(seed):
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=RESOLUTION_PX,
            scaling_factor=0.5,
        )
    return vae.eval()


def tiny_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer: each of `_WORDS` is one token, other words fall apart into letters.

    Args:
        pad_token: "<|endoftext|>" in SD-1.5, "!" (id 0) in SD-2.1 and in SDXL's second tokenizer.
    """
    merges = _learn_merges(_WORDS)
    # CLIP's order: bytes, bytes that end a word, merges, start, end.
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters] + [left + right for left, right in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        pad_token=pad_token,
        model_max_length=PROMPT_TOKENS,
    )


def tiny_text_encoder(tokenizer: CLIPTokenizer, dim: int = SD_DIM, seed: int = 0) -> CLIPTextModel:
    """A CLIP text encoder of two layers; float32, eval mode."""
    with _seeded(seed):
        return CLIPTextModel(_text_config(tokenizer, dim)).eval()


def save_tiny_sd(
    path: str | Path, prediction_type: PredictionType = "epsilon", seed: int = 0, stages: int = 3
) -> Path:
    """Writes a whole base of SD kind as a diffusers folder.

    Args:
        path: the folder to make.
        prediction_type: "epsilon" as SD-1.5 or "v_prediction" as SD-2.1.
        seed: of the random weights.
        stages: of the U-Net, 3 or 2.

    Returns:
        path, as a Path.
    """
    return _copy(_sd, Path(path), prediction_type, seed, stages)


def _sd(prediction_type: PredictionType, seed: int, stages: int) -> DiffusionPipeline:
    tokenizer = tiny_tokenizer()
    return StableDiffusionPipeline(
        vae=tiny_vae(seed),
        text_encoder=tiny_text_encoder(tokenizer, SD_DIM, seed),
        tokenizer=tokenizer,
        unet=tiny_sd_unet(seed, stages),
        scheduler=DDIMScheduler(
            **_SCHEDULER, prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_tiny_sdxl(
    path: str | Path, prediction_type: PredictionType = "epsilon", seed: int = 0, stages: int = 3
) -> Path:
    """Writes a whole base of SDXL kind as a diffusers folder; arguments as in `save_tiny_sd`.

    Its scheduler is the Euler one, as in the released SDXL.
    """
    return _copy(_sdxl, Path(path), prediction_type, seed, stages)


def _sdxl(prediction_type: PredictionType, seed: int, stages: int) -> DiffusionPipeline:
    tokenizer, tokenizer_2 = tiny_tokenizer(), tiny_tokenizer(pad_token="!")
    with _seeded(seed + 1):
        config_2 = _text_config(tokenizer_2, SDXL_DIM - SD_DIM)
        config_2.projection_dim = SDXL_POOLED_DIM
        text_encoder_2 = CLIPTextModelWithProjection(config_2).eval()
    return StableDiffusionXLPipeline(
        vae=tiny_vae(seed),
        text_encoder=tiny_text_encoder(tokenizer, SD_DIM, seed),
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=tiny_sdxl_unet(seed, stages),
        scheduler=EulerDiscreteScheduler(**_SCHEDULER, prediction_type=prediction_type),
        add_watermarker=False,
    )


def _copy(make: Callable[..., DiffusionPipeline], path: Path, *settings: Any) -> Path:
    """Writes what `make` makes; within a process once, later as a copy of the files."""
    shutil.copytree(Path(_written(make, *settings).name) / "base", path, dirs_exist_ok=True)
    return path


@functools.cache
def _written(make: Callable[..., DiffusionPipeline], *settings: Any) -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory()  # removed with the process
    make(*settings).save_pretrained(Path(folder.name) / "base", safe_serialization=True)
    return folder


def tiny_conditioning(batch_size: int, *, sdxl: bool = False, seed: int = 0) -> Conditioning:
    """Random embeddings that fit the tiny U-Net of either kind, with their unconditional twin."""
    generator = torch.Generator().manual_seed(seed)
    dim = SDXL_DIM if sdxl else SD_DIM
    prompt_embeds = torch.randn(batch_size, PROMPT_TOKENS, dim, generator=generator)
    if not sdxl:
        negative = torch.randn(1, PROMPT_TOKENS, dim, generator=generator).expand(batch_size, -1, -1)
        return Conditioning(prompt_embeds=prompt_embeds, negative_prompt_embeds=negative)
    pooled = torch.randn(batch_size, SDXL_POOLED_DIM, generator=generator)
    sizes = torch.tensor([RESOLUTION_PX, RESOLUTION_PX, 0, 0, RESOLUTION_PX, RESOLUTION_PX])
    return Conditioning(
        prompt_embeds=prompt_embeds,
        pooled_prompt_embeds=pooled,
        add_time_ids=sizes.float().expand(batch_size, -1),
        negative_prompt_embeds=torch.zeros_like(prompt_embeds),
        negative_pooled_prompt_embeds=torch.zeros_like(pooled),
    )


def tiny_batch(batch_size: int, start: int = 0) -> TrainingBatch:
    """The samples at positions start, start + 1, ...; one position is the same sample in every batch."""
    positions = torch.arange(start, start + batch_size)
    return TrainingBatch(
        captions=[f"a {_COLOURS[i % 4]} {_SHAPES[i % 3]}" for i in positions.tolist()],
        positions=positions,
        sample_ids=[f"tiny-{i:06d}" for i in positions.tolist()],
        latents=normal(0, Stream.EVALUATION, positions, LATENT_SHAPE),
        original_sizes=torch.full((batch_size, 2), RESOLUTION_PX),
        crops=torch.zeros(batch_size, 2, dtype=torch.int64),
    )


_COLOURS = ("red", "green", "blue", "yellow")
_SHAPES = ("circle", "square", "triangle")

_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}


def _unet(seed: int, stages: int, **config: Any) -> UNet2DConditionModel:
    with _seeded(seed):
        unet = UNet2DConditionModel(
            sample_size=LATENT_SHAPE[-1],
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")[:stages],
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")[-stages:],
            block_out_channels=(8, 8, 12)[:stages],
            layers_per_block=1,
            attention_head_dim=2,
            norm_num_groups=4,
            **config,
        )
    return unet.eval()


def _text_config(tokenizer: CLIPTokenizer, dim: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=PROMPT_TOKENS,
        projection_dim=dim,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random weights from a seed, without a trace in the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding until every word is one token: join the commonest pair, ties by spelling."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in pieces for pair in pairwise(word)):
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        pieces = [_join(word, merges[-1]) for word in pieces]
    return merges


def _join(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for piece in pieces:
        # A piece that was just joined never joins again in this pass: it is longer than pair[0].
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined
