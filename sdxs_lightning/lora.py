"""LoRA files on the command line: `python -m sdxs_lightning.lora merge|extract|convert`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from sdxs_lightning.command_line import Command, Option, run_subcommand
from sdxs_lightning.core.errors import CheckpointNotWritten, UserError
from sdxs_lightning.core.option_bounds import LARGEST_RANK, LARGEST_SCALE

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from sdxs_lightning.networks.lora_files import LoraFile

PROGRAM = "python -m sdxs_lightning.lora"
Dtype = Literal["float16", "float32"]
Form = Literal["diffusers", "peft", "kohya"]


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Adds one or several LoRAs to the weights of a U-Net or of a pipeline's U-Net.

    W + scale * alpha / rank * B A, computed in float64. Layers of text encoders in a file are left out.
    """

    EXAMPLES: ClassVar[str] = f"""\
{PROGRAM} merge --model outputs/sd15-distill/pipeline --lora outputs/sd15-lora/lora --out outputs/styled
{PROGRAM} merge --model models/sdxl --lora ink.safetensors grain.safetensors --scale 1 0.5 --out models/sdxl-ink"""

    model: str
    """Pipeline folder, U-Net folder, or hub id of a pipeline, all of which is fetched."""
    lora: tuple[str, ...]
    """LoRA files or folders: diffusers, PEFT or kohya."""
    scale: Annotated[tuple[float, ...], Option(at_least=-LARGEST_SCALE, at_most=LARGEST_SCALE)] = (1.0,)
    """Factor of each LoRA, or one for all."""
    out: Path
    """Folder to create, of the same kind as the model; it must not exist, or be empty."""
    dtype: Dtype = "float16"
    """Dtype of the written weights."""

    def __post_init__(self) -> None:
        if not self.lora:
            raise ValueError("--lora needs at least one file.")
        if len(self.scale) not in (1, len(self.lora)):
            raise ValueError(
                f"--scale has {len(self.scale)} values for {len(self.lora)} LoRAs; give one, or one each."
            )


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """Writes the difference of two networks of one shape as a LoRA."""

    EXAMPLES: ClassVar[str] = (
        f"{PROGRAM} extract --base models/sd15 --tuned models/dreamshaper --rank 64 --out outputs/dreamshaper-lora"
    )

    base: str
    """Pipeline folder, U-Net folder or hub id, for which the LoRA is."""
    tuned: str
    """The fine-tune of it."""
    rank: Annotated[int, Option(at_least=1, at_most=LARGEST_RANK)] = 64
    """Rank of each layer."""
    out: Path
    """Folder to create; it must not exist, or be empty."""
    format: Form = "diffusers"
    """Whose names: diffusers and PEFT load the folder, kohya's trainers and user interfaces the file in it."""
    dtype: Dtype = "float16"
    """Dtype of the written weights."""


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Writes a LoRA in another format."""

    EXAMPLES: ClassVar[str] = (
        f"{PROGRAM} convert --lora outputs/sd15-lora/lora --model outputs/sd15-distill/pipeline --format kohya --out kohya/"
    )

    lora: str
    """LoRA file or folder: diffusers, PEFT or kohya."""
    model: str
    """Pipeline folder, U-Net folder or hub id for which the LoRA is; its layers are compared."""
    format: Form = "diffusers"
    """Whose names: diffusers and PEFT load the folder, kohya's trainers and user interfaces the file in it."""
    out: Path
    """Folder to create; it must not exist, or be empty."""
    dtype: Dtype = "float16"
    """Dtype of the written weights."""


def merge(options: MergeOptions) -> str:
    """Merges and writes; returns a report."""
    import shutil

    import torch

    from sdxs_lightning.export import new_folder, write_unet
    from sdxs_lightning.families.sources import pipeline_folder
    from sdxs_lightning.networks.lora_files import add_to_weights, parameter_count, read_lora

    _check_new(options.out)
    _check_outside(options.out, options.model)
    unet = _load(options.model, "--model")
    scales = options.scale * len(options.lora) if len(options.scale) == 1 else options.scale
    lines = []
    for source, scale in zip(options.lora, scales, strict=True):
        with _refused():
            found = read_lora(source, unet, "--lora")
        add_to_weights(unet, found.adapters, scale)
        lines.append(
            f"{source}: {len(found.adapters)} layers, {parameter_count(found.adapters):,} weights, scale {scale}"
            f"{_left_out(found)}"
        )
    dtype = getattr(torch, options.dtype)
    with _refused():
        pipeline = pipeline_folder(options.model, "--model")
    with _written(options.out):
        if pipeline is not None:
            with new_folder(options.out) as written:
                shutil.copytree(pipeline, written, ignore=shutil.ignore_patterns("unet"))
                write_unet(unet, written / "unet", dtype)
        else:
            write_unet(unet, options.out, dtype)
    return "\n".join([*lines, f"written to {options.out} in {options.dtype}"])


def extract(options: ExtractOptions) -> str:
    """Extracts and writes; returns a report."""
    from sdxs_lightning.networks.lora import TARGETS
    from sdxs_lightning.networks.lora_extraction import extract_lora
    from sdxs_lightning.networks.lora_files import parameter_count

    _check_new(options.out)
    base, tuned = _load(options.base, "--base"), _load(options.tuned, "--tuned")
    with _refused():
        found = extract_lora(base, tuned, options.rank, TARGETS)
    path = _write(options, found.adapters)
    rest = f"; {found.left_out} other tensors changed and are not in it" if found.left_out else ""
    return (
        f"{len(found.adapters)} layers, {parameter_count(found.adapters):,} weights, {found.share:.1%} of the squared "
        f"difference of these layers{rest}\nwritten to {path}"
    )


def convert(options: ConvertOptions) -> str:
    """Reads and writes; returns a report."""
    from sdxs_lightning.networks.lora_files import parameter_count, read_lora

    _check_new(options.out)
    unet = _load(options.model, "--model")
    with _refused():
        found = read_lora(options.lora, unet, "--lora")
    path = _write(options, found.adapters)
    return f"{len(found.adapters)} layers, {parameter_count(found.adapters):,} weights{_left_out(found)}\nwritten to {path}"


def _left_out(found: LoraFile) -> str:
    layers = found.text_encoder_layers
    return f"; {layers} layers of text encoders left out" if layers else ""


def _write(options: ExtractOptions | ConvertOptions, adapters: object) -> Path:
    import torch

    from sdxs_lightning.export import new_folder
    from sdxs_lightning.networks.lora_files import write_lora

    with _refused(), _written(options.out), new_folder(options.out) as written:
        written.mkdir()
        path = write_lora(written, adapters, options.format, getattr(torch, options.dtype))  # type: ignore[arg-type]
    return options.out / path.name


def _check_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out '{out}' exists and is not empty; remove it or give another one.")


def _check_outside(out: Path, model: str) -> None:
    if Path(model).exists() and out.resolve().is_relative_to(Path(model).resolve()):
        raise UserError(
            f"--out '{out}' is inside of --model '{model}', which is copied; give a folder beside it."
        )


def _load(model: str, option: str) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    from sdxs_lightning.families.sources import resolve_unet
    from sdxs_lightning.families.weights import load_network

    with _refused():
        return load_network(UNet2DConditionModel, resolve_unet(model, option))


@contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error


@contextmanager
def _written(out: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    from sdxs_lightning.callbacks.checkpoint_folder import write_failure

    try:
        yield
    except (OSError, SafetensorError) as error:
        problem = write_failure(error) or str(error)
        raise CheckpointNotWritten(f"--out '{out}' could not be written: {problem}.") from error


COMMANDS = tuple(
    Command(name, f"sdxs_lightning.lora.{name.title()}Options", f"sdxs_lightning.lora.{name}")
    for name in ("merge", "extract", "convert")
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exit codes as in `sdxs_lightning.core.errors`."""
    run_subcommand(PROGRAM, "Merges, extracts and converts LoRA files.", COMMANDS, arguments)


if __name__ == "__main__":
    main()
