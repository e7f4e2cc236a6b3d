"""Measures how fast a student is: `python -m evaluation.latency --model DIR [--baseline DIR --steps N] --out FILE.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from sdxs_lightning.command_line import Option, run_command
from sdxs_lightning.core.option_bounds import LARGEST_SCALE, LARGEST_SIDE_PX, MOST_PROCESSES, MOST_STEPS

BACKENDS = (
    "torch",
    "torch-compiled",
    "onnx",
    "onnx-fp16",
    "openvino",
    "openvino-fp16",
    "openvino-int8",
)
MODELS = ("sdxs-512", "sdxs-1024", "sd15", "sdxl", "tiny")
PAPER_PRESETS = ("paper-512", "paper-1024")


@dataclass(frozen=True, kw_only=True)
class LatencyOptions:
    """Measures the time from prompt to pixels: a student on several backends, in stock diffusers, and a base at its steps.

    Each runs in a process of its own; they take turns, so that all see the same machine. Medians and quartiles, per component
    (text, unet, controlnet, decoder, copy) and end to end. Writes FILE.json and beside it a table (.md) and a bar chart (.png).
    """

    EXAMPLES: ClassVar[str] = """\
python -m evaluation.latency --model outputs/quickstart/pipeline --backend torch onnx openvino --out latency.json
python -m evaluation.latency --preset paper-512 --device cuda --dtype fp16 --batch_sizes 1 4 16 --out h100.json
python -m evaluation.latency --random_weights sdxs-512 --backend torch openvino-fp16 --threads 2 --out cpu.json

presets (random weights, which cost the same time): paper-512 is SDXS-512 against SD-1.5 at 16 steps with guidance, paper-1024
SDXS-1024 against SDXL at 32 steps with guidance, as in the table of arXiv:2403.16627."""

    model: Annotated[str | None, Option(metavar="DIR")] = None
    """Diffusers folder of a student; this, --random_weights or --preset is required."""
    random_weights: Annotated[str | None, Option(choices=MODELS)] = None
    """A model of this architecture with random weights instead."""
    preset: Annotated[str | None, Option(choices=PAPER_PRESETS)] = None
    """The paper's comparison."""
    baseline: Annotated[str | None, Option(metavar="DIR|NAME")] = None
    """Diffusers folder of the base, or the name of an architecture as for --random_weights."""
    steps: Annotated[int | None, Option(at_least=1, at_most=MOST_STEPS)] = None
    """Steps of the base; by default 16. A student knows its own."""
    guidance_scale: Annotated[float, Option(at_least=0, at_most=LARGEST_SCALE)] = 7.5
    """Guidance of the base; 1 is none."""
    backend: Annotated[tuple[str, ...], Option(choices=BACKENDS)] = ("torch",)
    """What runs the student; stock diffusers is always measured too."""
    batch_sizes: Annotated[tuple[int, ...], Option(at_least=1)] = (1,)
    """Images at once."""
    controlnet: Annotated[str | None, Option(metavar="DIR")] = None
    """ControlNet of the student, with which it runs everywhere; speed does not depend on the condition, which is noise."""
    baseline_controlnet: Annotated[str | None, Option(metavar="DIR")] = None
    """ControlNet of the base; required where --controlnet is compared with one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Of all networks."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Of PyTorch's networks."""
    size_px: Annotated[int | None, Option(at_least=8, at_most=LARGEST_SIDE_PX, called=("size",))] = None
    """Side of the images; by default the trained one."""
    threads: Annotated[int | None, Option(at_least=1, at_most=MOST_PROCESSES)] = None
    """Processor threads of each; by default one for each core."""
    repetitions: Annotated[int, Option(at_least=1)] = 5
    """Measured calls of each."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu counts the process's processor time, which other programs disturb less; with --threads 1 it is the time on an idle
    machine."""
    composed_baseline: bool = False
    """Measure one step of the base and multiply, instead of all its steps: hours become minutes on a CPU."""
    ratios_only: bool = False
    """Leave absolute times out of the files: on a shared or unnamed machine they mean nothing."""
    work: Annotated[Path | None, Option(metavar="DIR")] = None
    """Folder that keeps random models and exports for the next time."""
    out: Annotated[Path | None, Option(metavar="FILE.json")] = None
    """Result; FILE.md and FILE.png are written beside it."""

    def __post_init__(self) -> None:
        given = [one for one in (self.model, self.random_weights, self.preset) if one is not None]
        if len(given) != 1:
            raise ValueError(f"give one of --model, --random_weights and --preset, got {len(given)}.")
        if self.preset is not None and (self.steps is not None or self.baseline is not None):
            raise ValueError(
                "--preset names the base and its steps; leave out --baseline and --steps, or give --random_weights instead."
            )
        based = self.preset is not None or self.baseline is not None
        if not based and (
            self.steps is not None or self.baseline_controlnet is not None or self.composed_baseline
        ):
            raise ValueError(
                "--steps, --baseline_controlnet and --composed_baseline are of the base; give --baseline or --preset."
            )
        if based and (self.controlnet is None) != (self.baseline_controlnet is None):
            missing = "--baseline_controlnet" if self.controlnet else "--controlnet"
            raise ValueError(
                f"student and base are compared with a ControlNet each or without any; {missing} is missing."
            )
        if self.clock == "cpu" and self.device == "cuda":
            raise ValueError("--clock cpu counts processor time, and a GPU's work is none; use wall.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    run_command(
        "python -m evaluation.latency",
        LatencyOptions,
        "evaluation.benchmarks.latency.command.latency",
        arguments,
    )


if __name__ == "__main__":
    main()
