"""Serves the demo: `uv run --extra demo python -m sdxs_lightning.demo [--model DIR]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from sdxs_lightning.command_line import Option, run_command
from sdxs_lightning.core.option_bounds import LARGEST_SCALE, MOST_STEPS


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Serves a student in the browser: text, sketch, image to image, style LoRA, side by side with its base.

    Without options it shows the toy student of the repository. It listens on this machine only, makes no connection of its own
    and counts nothing. Anyone who reaches the port may use it: put a proxy with a password before it on a network.
    """

    EXAMPLES: ClassVar[str] = """\
python -m sdxs_lightning.demo
python -m sdxs_lightning.demo --model outputs/student/pipeline --controlnet outputs/canny --dtype fp16 --compiled
python -m sdxs_lightning.demo --model exports/student-openvino --backend openvino"""

    model: Annotated[str | None, Option(metavar="DIR")] = None
    """Diffusers folder of a student, or its export for --backend; by default the toy student."""
    controlnet: Annotated[str | None, Option(metavar="DIR")] = None
    """ControlNet for sketches and images; by default the toy student's, where there is one."""
    condition: Annotated[str, Option(metavar="NAME")] = "canny"
    """What the ControlNet was trained with: canny, sketch, soft_edge, depth:FOLDER, or a class of yours (module.Class)."""
    lora: Annotated[str | None, Option(metavar="FILE")] = None
    """Style LoRA; by default the toy student's, where there is one."""
    base: Annotated[str | None, Option(metavar="DIR")] = None
    """Diffusers folder of the base, to compare with; by default the toy base for the toy student."""
    base_steps: Annotated[int, Option(at_least=1, at_most=MOST_STEPS)] = 50
    """Steps of the base."""
    base_guidance_scale: Annotated[float, Option(at_least=0, at_most=LARGEST_SCALE)] = 1.5
    """Guidance of the base; 7.5 is usual for SD-1.5."""
    backend: Literal["torch", "onnx", "openvino"] = "torch"
    """What runs the student."""
    device: str = "auto"
    """auto, cpu, cuda, or another device of the backend."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the networks (torch)."""
    compiled: bool = False
    """Compile the student: slower start, faster images (torch)."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every network of this machine."""
    port: Annotated[int, Option(at_least=0, at_most=65535)] = 7860
    """Port; 0 takes a free one."""
    max_upload_mb: Annotated[float, Option(at_least=0.1)] = 8.0
    """Largest file that a visitor may upload."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exit codes as in `sdxs_lightning.core.errors`."""
    run_command("python -m sdxs_lightning.demo", DemoOptions, "sdxs_lightning.demo.serve.serve", arguments)


if __name__ == "__main__":
    main()
