"""Scores images: `python -m evaluation.evaluate --model DIR | --images SET --protocol NAME --out FILE.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from data.prepare.common.options import DeviceOptions
from evaluation.protocols.names import (
    METRIC_NAMES,
    PROTOCOL_NAMES,
    REFERENCE_METRICS,
    SCHEDULERS,
    TOY_PROTOCOLS,
    parse_weights,
)
from sdxs_lightning.command_line import Option, run_command
from sdxs_lightning.core.guidance_scale import read_guidance_scale
from sdxs_lightning.core.option_bounds import (
    LARGEST_SCALE,
    LARGEST_SIDE_PX,
    MOST_IMAGES,
    MOST_PROCESSES,
    MOST_STEPS,
)

Count = Annotated[int, Option(at_least=1)]


def guidance_scale(text: str) -> float:
    """Parse a guidance scale; 1 means none, and 0, the convention of some libraries, is read as 1.

    Raises:
        ValueError: for other numbers below 1, or text.
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value and not 1 <= value <= LARGEST_SCALE:
        raise ValueError(f"must be a number from 1 to {LARGEST_SCALE}, where 1 means no guidance")
    return read_guidance_scale("--guidance_scale", value)


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Options of the computation; results do not depend on them beyond rounding."""

    batch_size: Count = 100
    """Images at once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the networks."""
    processes: Annotated[int | None, Option(at_least=1, at_most=MOST_PROCESSES)] = None
    """Processes; by default one per GPU or core, where there is enough to do."""
    weights: Annotated[tuple[str, ...], Option(metavar="KIND=PATH")] = ()
    """Files or folders of metric networks, in place of their usual location: inception, clip_text, ..."""
    work: Annotated[Path | None, Option(metavar="DIR")] = None
    """Folder of intermediate results, from which an interrupted command continues."""

    def __post_init__(self) -> None:
        for text in self.weights:
            parse_weights(text)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ComputeOptions):
    """Measures FID, CLIP score and other metrics of a model or of a set of images, under a named protocol.

    Writes FILE.json, FILE.md and FILE.html. An interrupted command continues when it is given again with the same --out.
    """

    EXAMPLES: ClassVar[str] = r"""
    python -m evaluation.evaluate --model outputs/quickstart/pipeline --protocol toy --out student.json
    python -m evaluation.evaluate --model sd15/ --steps 25 --guidance_scale 7.5 --protocol coco2014-30k-256 \
        --captions captions_val2014.json --reference coco2014.npz --out teacher.json
    python -m evaluation.evaluate --model sdxl/ --protocol coco2014-30k-256 --captions captions_val2014.json \
        --reference coco2014.npz --out shared/teacher.json --ray ray-head:6379
    python -m evaluation.evaluate --model data/toy/student --control toy --condition canny \
        --controlnet outputs/toy-controlnet-joint/controlnet --protocol toy --out control.json
    python -m evaluation.evaluate --images samples.zip --protocol clean --reference real.npz --metrics fid --out samples.json
    """

    model: Annotated[str | None, Option(metavar="DIR")] = None
    """Diffusers pipeline folder of the Stable Diffusion or SDXL kind; this or --images is required."""
    images: Annotated[str | None, Option(metavar="SET")] = None
    """Images: a folder, a .zip file or .tar shards."""
    lora: Annotated[str | None, Option(metavar="FILE|DIR")] = None
    """LoRA of the model: diffusers, PEFT or kohya."""
    lora_scale: Annotated[float, Option(at_least=0, at_most=LARGEST_SCALE)] = 1.0
    """Its scale."""
    protocol: Annotated[str, Option(choices=PROTOCOL_NAMES)] = "toy"
    """Protocol."""
    captions: Annotated[str | None, Option(metavar="FILE")] = None
    """Prompts: COCO's json, txt, json, jsonl, csv, tsv, parquet; PartiPrompts, MJHQ-30K, GenEval, DrawBench, HPSv2 as
    published."""
    reference: Annotated[str | None, Option(metavar="SET|NPZ")] = None
    """Real images, or the .npz of `python -m evaluation.reference`."""
    metrics: Annotated[tuple[str, ...], Option(choices=METRIC_NAMES)] = ()
    """Metrics in place of the protocol's."""
    samples: Annotated[int | None, Option(at_least=1, at_most=MOST_IMAGES)] = None
    """Number of images in place of the protocol's; changes the protocol hash."""
    control: Annotated[str | None, Option(metavar="SET")] = None
    """Measure a ControlNet: shards with images and cond.png as `data.prepare images` writes them, or `toy`."""
    controlnet: Annotated[str | None, Option(metavar="DIR")] = None
    """With --control: folder of the ControlNet."""
    condition: Annotated[str | None, Option(metavar="NAME")] = None
    """With --control: how the condition is read off the output: canny, soft_edge, sketch, depth:FOLDER, reader:FOLDER (not the
    reader that the ControlNet was trained with), or background_bar of the toy world."""
    make_conditions: bool = False
    """With --control: make the conditions of the set's images instead of reading cond.png."""
    conditioning_scales: Annotated[
        tuple[float, ...], Option(at_least=-LARGEST_SCALE, at_most=LARGEST_SCALE)
    ] = (0.5, 1.0, 1.5)
    """With --control: factors of the ControlNet's residuals. `metrics` of FILE.json are those at 1, or at the last one."""
    steps: Annotated[int, Option(at_least=1, at_most=MOST_STEPS)] = 1
    """Sampling steps of the model."""
    scheduler: Annotated[str | None, Option(choices=tuple(SCHEDULERS))] = None
    """Scheduler in place of the model folder's, with the folder's noise schedule and prediction type."""
    timesteps: Annotated[tuple[int, ...], Option(at_least=0)] = ()
    """Timesteps of the sampling steps, descending, in place of --steps: 999 for one step, 999 749 499 249 for four."""
    guidance_scale: Annotated[float, Option(parse=guidance_scale, metavar="FLOAT")] = 1.0
    """Classifier-free guidance of the model; 1 means none."""
    seed: int | None = None
    """Seed of the noise; by default the protocol's."""
    image_px: Annotated[int | None, Option(at_least=1, at_most=LARGEST_SIDE_PX, called=("size",))] = None
    """Side of the generated images; by default the protocol's, or the model's."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the model."""
    report_images: Annotated[int, Option(at_least=0, deprecated=("pictures",))] = 24
    """Sample images in the HTML report."""
    ray: Annotated[str | None, Option(const="auto", metavar="ADDRESS")] = None
    """Make and measure the images of the --model in tasks of a Ray cluster, a batch each; without an address in the one of
    RAY_ADDRESS or of this machine, or else in a new one on this machine. Needs the extra ray, and the same files at the same
    paths on all nodes."""
    gpus_per_task: Annotated[float | None, Option(at_least=0)] = None
    """GPUs that each task asks Ray for, such as 0.5 for two tasks per GPU; by default 1 if the cluster has any."""
    save_images: Annotated[Path | None, Option(metavar="DIR")] = None
    """Keep the images that the model makes as PNG files; a stopped command resumes from them."""
    save_layout: Literal["flat", "geneval", "t2i_compbench"] = "flat"
    """Names of the saved images: what --images and DPG-Bench, GenEval or T2I-CompBench read."""
    out: Annotated[Path | None, Option(metavar="FILE.json")] = None
    """Result; FILE.md and FILE.html are written beside it."""

    @property
    def hardware(self) -> DeviceOptions:
        """Where the images of a model are made."""
        return DeviceOptions(
            device=self.device, processes=self.processes, ray=self.ray, gpus_per_task=self.gpus_per_task
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.hardware.check_ray()
        if self.ray is not None and self.model is None:
            raise ValueError("--ray makes the images of a --model; with --images there is nothing to make.")
        if self.ray is not None and self.out is None and self.work is None:
            raise ValueError("--ray needs --out or --work on a disk that all nodes of the cluster share.")
        if (self.model is None) == (self.images is None):
            raise ValueError("give either --model, a pipeline folder, or --images, a set of images.")
        if self.control is not None and None in (self.model, self.controlnet, self.condition):
            raise ValueError("--control needs --model, --controlnet and --condition.")
        if self.control is not None:
            self._check_control()
        if self.control is None:
            self._refuse_options_of_control()
        self._check_out()
        if (self.scheduler or self.timesteps) and self.model is None:
            raise ValueError("--scheduler and --timesteps are those of a --model; --images are made already.")
        if list(self.timesteps) != sorted(set(self.timesteps), reverse=True):
            given = " ".join(map(str, self.timesteps))
            raise ValueError(f"--timesteps {given} do not descend; give each once, the noisiest first.")
        if self.timesteps and self.steps not in (1, len(self.timesteps)):
            raise ValueError(
                f"--steps {self.steps} and {len(self.timesteps)} --timesteps contradict each other; leave out --steps."
            )
        if self.lora is not None and self.model is None:
            raise ValueError("--lora adapts a --model; with --images there is nothing to adapt.")
        if self.save_images is not None and self.model is None:
            raise ValueError(
                "--save_images keeps what a --model makes; with --images there is nothing to save."
            )

    def _check_out(self) -> None:
        """Refuses, before anything is measured, a file that cannot hold the result or that another one would replace."""
        if self.out is not None and (self.out.is_dir() or self.out.suffix in (".md", ".html", ".png")):
            raise ValueError(
                f"--out is '{self.out}', and the result is a .json file, beside which others of its name are written; give "
                "such a file."
            )

    def _refuse_options_of_control(self) -> None:
        if self.controlnet is not None or self.condition is not None:
            raise ValueError("--controlnet and --condition go with --control, the set of conditions.")
        scales = {one.name: one.default for one in fields(self)}["conditioning_scales"]
        for name, given in (
            ("make_conditions", self.make_conditions),
            ("conditioning_scales", self.conditioning_scales != scales),
        ):
            if given:
                raise ValueError(f"--{name} goes with --control, the set of conditions; leave it out.")

    def _check_control(self) -> None:
        for name in ("captions", "save_images", "work", "processes", "ray"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"--{name} does not go with --control, which measures in one process the images that its set has prompts "
                    "for; leave it out."
                )
        if self.control == "toy" and self.image_px is not None:
            raise ValueError(
                "--image_px does not go with --control toy, whose images have their size; leave it out."
            )
        for name in ("metrics", "reference", "weights"):
            if getattr(self, name) and self.protocol in TOY_PROTOCOLS:
                raise ValueError(
                    f"protocol {self.protocol} is the toy world's own, with its metrics, networks and reference; leave out "
                    f"--{name}, or choose another --protocol."
                )
        if self.reference is not None and not set(REFERENCE_METRICS) & set(self.metrics):
            raise ValueError(
                f"--reference is '{self.reference}', and with --control those of --metrics are measured, of which none "
                "compares with it; name one, such as fid, or leave it out."
            )
        if not self.conditioning_scales:
            raise ValueError("--conditioning_scales is empty; name at least one, such as 1.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    run_command(
        "python -m evaluation.evaluate", EvaluateOptions, "evaluation.runner.commands.evaluate", arguments
    )


if __name__ == "__main__":
    main()
