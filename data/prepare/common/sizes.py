"""What the json of a sample says of sizes; SDXL is conditioned on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.prepare.common.geometry import Fit, Size


def size_fields(fields: Mapping[str, Any], size: Size, fit: Fit) -> dict[str, int]:
    """Original size, crop and size of a picture that is resized and cropped now, in pixels.

    Args:
        fields: the json so far. Original sizes in it stay (img2dataset and `data.prepare` write them); a crop in it is added,
            since what an earlier step cut off lies outside what this one sees.
        size: of the picture before this step.
        fit: this step.

    Returns:
        crop_top and crop_left are in pixels of the resized picture, as in SDXL's own training.
    """
    original = _number(fields, "original_height"), _number(fields, "original_width")
    height, width = original if all(original) else size
    return {
        "original_height": height,
        "original_width": width,
        "crop_top": fit.top + round(_number(fields, "crop_top") * fit.resized[0] / size[0]),
        "crop_left": fit.left + round(_number(fields, "crop_left") * fit.resized[1] / size[1]),
        "height": fit.target[0],
        "width": fit.target[1],
    }


def _number(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    return value if isinstance(value, int) and value > 0 else 0
