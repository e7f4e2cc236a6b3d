"""Options of the commands that measure the toy world's tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from evaluation.benchmarks.tables.recipe_runs import RECIPES
from evaluation.protocols.names import TOY_PROTOCOLS
from sdxs_lightning.command_line import Option
from sdxs_lightning.core.option_bounds import LARGEST_SCALE, MOST_IMAGES

PROGRAM = "python -m evaluation.benchmarks.tables"
Count = Annotated[int, Option(at_least=1)]
Counts = Annotated[tuple[int, ...], Option(at_least=1)]
Guidance = Annotated[float, Option(at_least=1, at_most=LARGEST_SCALE)]
ToyProtocol = Annotated[str, Option(choices=TOY_PROTOCOLS)]


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """Options of every table that is measured."""

    samples: Annotated[int | None, Option(at_least=2, at_most=MOST_IMAGES)] = None
    """Fewer images than the protocol's, for a quick check; FID depends on their number."""
    batch_size: Count = 100
    """Images at once."""
    device: str = "cpu"
    """Torch device that generates and measures."""


@dataclass(frozen=True, kw_only=True)
class RecipesOptions(Measuring):
    """Runs the training recipes of the toy world and scores their students in one step."""

    EXAMPLES: ClassVar[str] = f"""
    {PROGRAM} recipes --rows warmup dmd2 --seeds 0 1 2 --out toy_recipes.json --sheet toy_recipes.png
    {PROGRAM} recipes --finished_only
    """

    rows: Annotated[tuple[str, ...], Option(choices=tuple(RECIPES))] = ()
    """Recipes, each trained after the one that it starts from; with --finished_only all by default."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; each trains every recipe once."""
    finished_only: bool = False
    """Starts no training: scores the runs that have finished."""
    root: Path = Path("outputs/recipes")
    """Folder of the runs."""
    protocol: ToyProtocol = "toy"
    """Protocol."""
    out: Path | None = None
    """Score file to write."""
    sheet: Annotated[Path | None, Option(deprecated=("picture",))] = None
    """PNG file of samples of the first seed."""
    curves: Path | None = None
    """PNG file of quality against processor time; rows whose names differ by _halfx, _2x and so on form a line."""

    def __post_init__(self) -> None:
        if not self.rows and not self.finished_only:
            raise ValueError(
                f"--rows is missing, and all {len(RECIPES)} recipes are not trained unasked: name some, such as --rows warmup "
                "dmd2, or give --finished_only to score those that have finished."
            )


@dataclass(frozen=True, kw_only=True)
class UNetsOptions(Measuring):
    """Scores a base with its own U-Net and with others in its place, sampled in many steps with guidance."""

    EXAMPLES: ClassVar[str] = (
        f"{PROGRAM} unets --unet kd=outputs/toy-miniaturise/unet --out toy_miniature.json"
    )

    base: str = "data/toy/base"
    """Diffusers folder."""
    unet: Annotated[tuple[str, ...], Option(metavar="NAME=FOLDER")] = ()
    """U-Net or pipeline folders."""
    steps: Counts = (25,)
    """Numbers of sampler steps."""
    guidance_scale: Guidance = 1.5
    """Guidance of the sampler; 1 means none."""
    protocol: ToyProtocol = "toy"
    """Protocol."""
    out: Path
    """Score file to write or to extend."""


@dataclass(frozen=True, kw_only=True)
class TeacherOptions(Measuring):
    """Scores a base in many and few steps, its autoencoder, and real images."""

    EXAMPLES: ClassVar[str] = f"{PROGRAM} teacher --base data/toy/base --steps 50 25 8 4 1"

    base: str = "data/toy/base"
    """Diffusers folder."""
    steps: Counts = (50, 25, 8, 4, 1)
    """Numbers of sampler steps."""
    protocol: Annotated[tuple[str, ...], Option(choices=TOY_PROTOCOLS)] = TOY_PROTOCOLS
    """Protocols."""
    guidance_scale: Guidance = 1.5
    """Guidance of the sampler; 1 means none."""
    spacing: Literal["trailing", "leading"] = "trailing"
    """Spacing of the timesteps."""
    out: Path = Path("evaluation/results/toy_teacher.json")
    """Score file to write or to extend."""


@dataclass(frozen=True, kw_only=True)
class QualityOptions(Measuring):
    """Scores real images, a base in many and few steps, and one-step students, all with 95 % intervals.

    Shape score, caption accuracy, and KID, precision and recall in the attribute classifier's features.
    """

    EXAMPLES: ClassVar[str] = f"""
    {PROGRAM} quality --student late=outputs/quickstart/pipeline --out toy_quality.json
    """

    base: str = "data/toy/base"
    """Diffusers folder."""
    steps: Counts = (50, 8, 4, 2, 1)
    """Numbers of sampler steps."""
    student: Annotated[tuple[str, ...], Option(metavar="NAME=FOLDER")] = ()
    """Pipeline folders, sampled in one step."""
    samples: Annotated[int | None, Option(at_least=4, at_most=MOST_IMAGES)] = 2000
    """Number of images, and of real ones to compare with."""
    guidance_scale: Guidance = 1.5
    """Guidance of the base's sampler; 1 means none."""
    out: Path
    """Score file to write or to extend."""


@dataclass(frozen=True, kw_only=True)
class DecoderOptions:
    """Compares a tiny decoder with its base's own on latents of real images.

    PSNR, distance of frozen features, decoding time (a ratio, measured alternately), and a sheet of images beside the file.
    """

    EXAMPLES: ClassVar[str] = f"""
    {PROGRAM} decoder --base data/toy/base --decoder outputs/toy-decoder/decoder --out toy_decoder.json
    {PROGRAM} decoder --base models/sd21 --decoder outputs/sd21-decoder/decoder --source IMAGES --features dinov2:FOLDER:2,5,8
    """

    base: str
    """Diffusers folder of the base."""
    decoder: str
    """AutoencoderTiny folder, or a pipeline folder that contains one."""
    out: Path | None = None
    """Score file to write; the sheet goes beside it as .png."""
    images: Count = 500
    """Number of images."""
    source: str | None = None
    """Folder of images, .zip file or shards; by default the toy world's test images are rendered."""
    features: str = "open_clip:data/toy/clip:0,1,2"
    """Network of the feature distance: open_clip:FOLDER:LAYERS, dinov2:FOLDER:LAYERS or timm:NAME:FILE:LAYERS."""
    columns: Count = 8
    """Images on the sheet."""
    batch_size: Count = 50
    """Images at once."""
    device: str = "cpu"
    """Torch device."""


@dataclass(frozen=True, kw_only=True)
class SizeConditioningOptions(Measuring):
    """Measures whether a toy base follows its size conditioning (original size and crop)."""

    EXAMPLES: ClassVar[str] = f"{PROGRAM} size_conditioning --base outputs/toy-sdxl-base --out sizes.json"

    base: str = "outputs/toy-sdxl-base"
    """Diffusers folder."""
    steps: Count = 25
    """Sampler steps."""
    samples: Annotated[int | None, Option(at_least=2, at_most=MOST_IMAGES)] = 200
    """Number of images."""
    out: Path | None = None
    """Score file to write."""


@dataclass(frozen=True, kw_only=True)
class LoraOptions(Measuring):
    """Scores style LoRAs of a student of the toy world, or of its base: style, caption accuracy, diversity."""

    EXAMPLES: ClassVar[str] = f"""
    {PROGRAM} lora --student outputs/toy-distill/pipeline --lora score=outputs/toy-lora/seed{{seed}}/lora \\
        denoising=outputs/toy-lora-denoising/seed{{seed}}/lora --seeds 0 1 2 --scales 0 0.5 1 1.5 --out toy_lora.json
    """

    student: str
    """Pipeline folder of the student, or of the base."""
    lora: Annotated[tuple[str, ...], Option(metavar="NAME=FOLDER")]
    """LoRAs; {seed} in a folder stands for each seed, and one without it is measured once."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the trainings."""
    scales: tuple[float, ...] = (1.0,)
    """Scales of the first LoRA; the others are measured at 1."""
    steps: Count = 1
    """Sampling steps; 1 is a one-step student's."""
    guidance_scale: Guidance = 1.0
    """Guidance of the sampler; 1 means none."""
    diversity_prompts: Count = 50
    """Prompts of the diversity, each with eight images."""
    style: str = "textured"
    """The style that is looked for."""
    classifier: Path = Path("data/toy/style")
    """Folder of the style classifier."""
    protocol: ToyProtocol = "toy"
    """Protocol: prompts, noise, judges."""
    out: Path
    """Score file to write or to extend."""
    sheet: Path | None = None
    """PNG file of samples of the first seed."""


@dataclass(frozen=True, kw_only=True)
class GuidanceOptions(Measuring):
    """Scores a student with the guidance scale as an input: quality and diversity by scale, and what negative prompts remove.

    Captions of two objects do not state the background; the negative prompt of each of their images is a caption that states
    the background which the image has without it. A student that learnt no negative prompts gets none.
    """

    EXAMPLES: ClassVar[str] = f"""
    {PROGRAM} guidance --student outputs/toy-guidance-input/pipeline --base data/toy/base --out guidance.json
    """

    student: str
    """Pipeline folder of the student."""
    base: str | None = None
    """Pipeline folder of the base, to compare with, in --base_steps."""
    base_steps: Count = 8
    """Sampler steps of the base."""
    scales: Annotated[tuple[float, ...], Option(at_least=1, at_most=LARGEST_SCALE)] = (1.0, 1.5, 2.0, 3.0)
    """Guidance scales; 1 means none."""
    diversity_prompts: Count = 50
    """Prompts of the diversity, each with eight images."""
    protocol: ToyProtocol = "toy"
    """Protocol."""
    out: Path
    """Score file to write or to extend."""
    sheet: Path | None = None
    """PNG file of samples."""


@dataclass(frozen=True, kw_only=True)
class ImageToImageOptions:
    """Scores image to image with a student of several steps: agreement with the input and with the prompt, by strength."""

    EXAMPLES: ClassVar[str] = f"""
    {PROGRAM} image_to_image --student outputs/toy-image-to-image/pipeline --single data/toy/student --out image_to_image.json
    """

    student: str
    """Pipeline folder of the student, with several timesteps."""
    single: str | None = None
    """Pipeline folder of a one-step student, to compare its images of the prompts with."""
    strengths: Annotated[tuple[float, ...], Option(at_least=0, at_most=1)] = (0.25, 0.5, 0.75, 1.0)
    """Strengths: the share of the steps that run."""
    samples: Annotated[int | None, Option(at_least=2, at_most=MOST_IMAGES)] = None
    """Fewer images than the protocol's."""
    batch_size: Count = 100
    """Images at once."""
    protocol: ToyProtocol = "toy"
    """Protocol: captions, seed, classifier."""
    out: Path
    """Score file to write or to extend."""
    sheet: Path | None = None
    """PNG file of samples."""


@dataclass(frozen=True, kw_only=True)
class SeedsOptions:
    """Summarises the report.json files of runs that differ in their seed: mean and range."""

    EXAMPLES: ClassVar[str] = (
        f"{PROGRAM} seeds outputs/seed0/report.json outputs/seed1/report.json --out seeds.json"
    )

    reports: Annotated[tuple[Path, ...], Option(positional=True)]
    """report.json files of one setting."""
    out: Path | None = None
    """Score file to write."""

    def __post_init__(self) -> None:
        files = [path.resolve() for path in self.reports]
        again = next(
            (one for one, file in zip(self.reports, files, strict=True) if files.count(file) > 1), None
        )
        if again is not None:
            raise ValueError(f"the report {again} is given twice; give one for each seed.")
        _refuse_input_as_output(self.out, self.reports)


@dataclass(frozen=True, kw_only=True)
class PairedOptions:
    """Mean differences between rows of the recipes' score file over equal seeds, with standard errors."""

    EXAMPLES: ClassVar[str] = f"""
    {PROGRAM} paired evaluation/results/toy_recipes.json --pairs segmented:dmd2_no_gan dmd2:warmup
    """

    table: Annotated[Path, Option(positional=True)]
    """Score file of `recipes`."""
    pairs: Annotated[tuple[str, ...], Option(metavar="ROW:ROW")]
    """Pairs of rows; the second is subtracted from the first."""
    out: Path | None = None
    """Score file to write."""

    def __post_init__(self) -> None:
        _refuse_input_as_output(self.out, (self.table,))


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Prints the tables of score files and of run reports as Markdown."""

    EXAMPLES: ClassVar[str] = (
        f"{PROGRAM} show evaluation/results/toy_recipes.json outputs/quickstart/report.json"
    )

    files: Annotated[tuple[Path, ...], Option(positional=True)]
    """Score files or report.json files."""


def _refuse_input_as_output(out: Path | None, read: Sequence[Path]) -> None:
    """Raises ValueError if the result would replace a file that it is computed from."""
    if out is not None and out.resolve() in [path.resolve() for path in read]:
        raise ValueError(
            f"--out '{out}' is a file that is read, which the result would replace; give another."
        )
