"""Prunes a U-Net: `python -m sdxs_lightning.prune --base DIR --preset sdxs-512 --output outputs/pruned`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from sdxs_lightning.command_line import Option, run_command
from sdxs_lightning.core.errors import CheckpointNotWritten, UserError
from sdxs_lightning.surgery.presets import PRESETS
from sdxs_lightning.surgery.topology import Topology, read_topology

_PRESET_NOTES = "\n".join(f"  {name:<13} {preset.note}" for name, preset in PRESETS.items())


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """Makes a smaller U-Net from parts of a larger one, and reports where each of its weights came from.

    The output is a U-Net folder: give it as model.init_args.student.init_args.weights of a training configuration, or to
    UNet2DConditionModel.from_pretrained. A pruned U-Net can be pruned again (bk-base, then bk-small, then bk-tiny).
    """

    EXAMPLES: ClassVar[str] = f"""\
python -m sdxs_lightning.prune --base models/stable-diffusion-v1-5 --preset sdxs-512 --output outputs/sdxs-512-unet
python -m sdxs_lightning.prune --base models/sdxl/unet --preset sdxs-1024 --output outputs/vega-unet --dtype float16
python -m sdxs_lightning.prune --base data/toy/base --topology small.yaml --dry_run

presets:
{_PRESET_NOTES}

sdxs_lightning/surgery/README.md describes topology files."""

    base: Annotated[str, Option(called=("family.init_args.base",))]
    """Pipeline folder, U-Net folder, or hub id of either."""
    preset: Annotated[str | None, Option(choices=tuple(PRESETS))] = None
    """A topology by its name; the list below says where each is from. Give this or --topology."""
    topology: Annotated[Path | None, Option(metavar="FILE.yaml")] = None
    """A topology of your own. Give this or --preset."""
    output: Path | None = None
    """U-Net folder to create; it must not exist, or be empty. Required without --dry_run."""
    dtype: Literal["float16", "float32"] = "float32"
    """Dtype of the written weights."""
    fresh: bool = False
    """Initialise all weights at random instead of copying the teacher's, as a control."""
    seed: int = 0
    """Seed of newly initialised weights."""
    dry_run: bool = False
    """Print the parameter counts only; no weights are read or written."""

    def __post_init__(self) -> None:
        if (self.preset is None) == (self.topology is None):
            raise ValueError(
                f"give either --preset or --topology, got {'neither' if self.preset is None else 'both'}."
            )
        if self.output is None and not self.dry_run:
            raise ValueError("--output is required without --dry_run.")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exit codes as in `sdxs_lightning.core.errors`."""
    run_command("python -m sdxs_lightning.prune", PruneOptions, run, arguments)


def run(options: PruneOptions) -> str:
    """Prunes and writes; returns the report.

    Raises:
        UserError: for an unusable base, an output that exists, or a student that the base does not contain.
        CheckpointNotWritten: if the disk refuses.
    """
    output = options.output
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output '{output}' exists and is not empty; remove it or give another one.")
    try:
        topology = PRESETS[options.preset] if options.preset else read_topology(options.topology or "")
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"--topology: {error}") from error
    return _prune(options, topology)


def _prune(options: PruneOptions, topology: Topology) -> str:
    # Imported here, so that --help and refused options do not wait for torch.
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors import SafetensorError

    from sdxs_lightning.callbacks.checkpoint_folder import write_failure
    from sdxs_lightning.export import write_unet
    from sdxs_lightning.families.folders import unet_config
    from sdxs_lightning.families.sources import resolve_unet
    from sdxs_lightning.families.weights import load_network
    from sdxs_lightning.surgery.pruning import prune, transfer_report

    dtype: torch.dtype = getattr(torch, options.dtype)
    try:
        folder = resolve_unet(options.base, "--base")
        config = unet_config(folder)
        if options.dry_run:
            return str(transfer_report(config, topology, transfer=not options.fresh))
        teacher = load_network(UNet2DConditionModel, folder, dtype, strict=True)
        student, report = prune(teacher, topology, transfer=not options.fresh, seed=options.seed)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    assert options.output is not None
    try:
        write_unet(student, options.output, dtype)
    except (OSError, SafetensorError) as error:
        problem = write_failure(error) or str(error)
        raise CheckpointNotWritten(f"--output '{options.output}' could not be written: {problem}.") from error
    return f"{report}\nwritten to {options.output} in {options.dtype}"


if __name__ == "__main__":
    main()
