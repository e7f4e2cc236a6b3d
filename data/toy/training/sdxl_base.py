"""The SDXL-kind toy base's folder, without weights."""

from __future__ import annotations

import json
from pathlib import Path

TIME_ID_DIMENSIONS = 16
"""Width of the embedding of each of the six numbers of original size, crop and target size; SDXL has 256."""

_COMPONENTS = {
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_skeleton(folder: Path, cross_attention_dim: int, pooled_dim: int) -> None:
    """Writes model_index.json and the configs of scheduler and U-Net: SDXL's, at a smaller size.

    As in SDXL: no attention in the outermost stage, more transformer layers in the innermost one, pooled embedding, original
    size, crop and target size added to the timestep embedding, zeros as unconditional embeddings. Unlike SDXL, and like the
    shipped base and SDXL's own descendants of v-prediction, it predicts v: errors of epsilon at high noise, where layout and
    binding are decided, are enlarged fifteen times in the image.

    Args:
        folder: of the base.
        cross_attention_dim: sum of both text encoders' widths.
        pooled_dim: width of the second encoder's pooled embedding.
    """
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True} | _COMPONENTS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="leading",
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")
    UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 6),
        norm_num_groups=16,
        cross_attention_dim=cross_attention_dim,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_DIMENSIONS,
        projection_class_embeddings_input_dim=6 * TIME_ID_DIMENSIONS + pooled_dim,
    ).save_config(folder / "unet")
