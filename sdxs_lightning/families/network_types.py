"""Types of networks for the annotations of configured classes: diffusers' and transformers' to a type checker.

The command line resolves the annotations of every configured class, those under TYPE_CHECKING too; with the real types,
printing a configuration or refusing an option would import diffusers and transformers: longer than importing torch takes.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer
else:

    class _StandIn:
        """Is no network's class: for annotations only, `isinstance` takes the real class, imported in the function."""

    AutoencoderKL = AutoencoderTiny = ControlNetModel = UNet2DConditionModel = CLIPTextModel = (
        CLIPTokenizer
    ) = _StandIn

__all__ = [
    "AutoencoderKL",
    "AutoencoderTiny",
    "CLIPTextModel",
    "CLIPTokenizer",
    "ControlNetModel",
    "UNet2DConditionModel",
]
