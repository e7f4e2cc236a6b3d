"""The U-Nets of the released bases, as arguments of `UNet2DConditionModel`: meant for `torch.device("meta")`.

Only what differs from the class's defaults, and what the surgery and the memory plan read. Counted on the meta device:
859,520,964 parameters for SD-1.5, 865,910,724 for SD-2.1, 2,567,463,684 for SDXL.
"""

from typing import Any


def sd15_unet_config() -> dict[str, Any]:
    """Stable Diffusion 1.5: four stages, 8 heads everywhere, 1x1 convolutions around the Transformers."""
    return {
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    }


def sd21_unet_config() -> dict[str, Any]:
    """Stable Diffusion 2.1-base: OpenCLIP-H prompts, heads of 64 channels, linear projections."""
    return sd15_unet_config() | {
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    }


def sdxl_unet_config() -> dict[str, Any]:
    """Stable Diffusion XL 1.0: three stages, Transformers of depth 2 and 10, pooled and size conditioning."""
    return {
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
