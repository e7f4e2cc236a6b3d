"""Prune a U-Net: `python -m sdxs_lightning.prune --base DIR --preset sdxs-512 --output outputs/pruned`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError

from sdxs_lightning.callbacks.checkpoint_folder import write_failure
from sdxs_lightning.core.errors import CheckpointNotWritten, RunStopped, UserError
from sdxs_lightning.families.folders import read_json
from sdxs_lightning.surgery import PRESETS, Topology, TransferReport, plan, prune, topology_of
from sdxs_lightning.surgery.topology_file import read_topology

DTYPES = {"float16": torch.float16, "float32": torch.float32}

_EXAMPLES = """examples:
  python -m sdxs_lightning.prune --base models/stable-diffusion-v1-5 --preset sdxs-512 --output outputs/sdxs-512-unet
  python -m sdxs_lightning.prune --base models/sdxl/unet --preset sdxs-1024 --output outputs/vega-unet --dtype float16
  python -m sdxs_lightning.prune --base data/toy/base --topology small.yaml --dry-run

The output is a U-Net folder: give it as model.init_args.student.init_args.weights of a training configuration, or
to UNet2DConditionModel.from_pretrained. Pruning again what was pruned works (bk-base, then bk-small, then bk-tiny).

presets:
"""


def prune_folder(
    base: Path, topology: Topology, output: Path, dtype: torch.dtype, fresh: bool, seed: int
) -> TransferReport:
    """Reads a U-Net, prunes it and writes the student; its folder appears whole or not at all.

    Args:
        base: pipeline folder or U-Net folder.
        topology: what to keep.
        output: the folder to make.
        dtype: of the weights, as they are read and written.
        fresh: no weights of the teacher; the same network with random ones.
        seed: of new weights.

    Raises:
        UserError: for an unusable base, an output that exists, or a student that the base does not contain.
        CheckpointNotWritten: if the disk does not take it.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output '{output}' exists and is not empty; remove it or give another one.")
    teacher = load_unet(unet_folder(base), dtype)
    try:
        student, report = prune(teacher, topology, transfer=not fresh, seed=seed)
    except ValueError as error:
        raise UserError(str(error)) from error
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
            written = Path(temporary) / "unet"
            student.save_pretrained(written, safe_serialization=True)
            os.replace(written, output)
    except (OSError, SafetensorError) as error:
        told = write_failure(error) if isinstance(error, OSError) else str(error)
        raise CheckpointNotWritten(f"--output '{output}' could not be written: {told}.") from error
    return report


def unet_folder(base: Path) -> Path:
    """The folder with the U-Net's config.json: the given one, or its `unet`.

    Raises:
        UserError: if there is none.
    """
    if not base.is_dir():
        raise UserError(
            f"--base '{base}' is no folder; give a diffusers pipeline folder, or one with a U-Net's config.json."
        )
    # A pipeline folder first: some hub repositories have a config.json beside model_index.json.
    for folder in (base / "unet", base):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(
        f"--base '{base}' is neither a U-Net folder (config.json) nor a pipeline folder (unet/config.json)."
    )


def unet_config(folder: Path) -> dict[str, object]:
    """The config in a U-Net folder.

    Raises:
        UserError: if it is not that of a UNet2DConditionModel.
    """
    try:
        config = read_json(folder / "config.json")
    except ValueError as error:
        raise UserError(str(error)) from error
    found = config.get("_class_name")
    if found != "UNet2DConditionModel":
        raise UserError(f"'{folder}' holds a {found}, and only a UNet2DConditionModel can be pruned.")
    return config


def load_unet(folder: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    """The U-Net in a folder.

    Raises:
        UserError: if its weights are missing, pickled, cut off, or not those of its config.
    """
    unet_config(folder)
    stem = "diffusion_pytorch_model"
    if any(folder.glob(f"{stem}.safetensors*")) or any(folder.glob(f"{stem}-*.safetensors")):
        variant = None
    elif any(folder.glob(f"{stem}.fp16*.safetensors")):
        variant = "fp16"
    else:
        pickled = any(folder.glob("*.bin"))
        raise UserError(
            f"'{folder}' has no {stem}.safetensors{', only a pickle (.bin), which is not read' if pickled else ''}."
        )
    try:
        unet, info = UNet2DConditionModel.from_pretrained(
            folder, torch_dtype=dtype, variant=variant, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        told = " ".join(str(error).split())
        raise UserError(
            f"the weights in '{folder}' cannot be read ({told}); was their download cut off?"
        ) from error
    for what in ("missing_keys", "unexpected_keys"):
        if info[what]:
            raise UserError(
                f"the weights in '{folder}' are not those of its config.json: {what.replace('_', ' ')} "
                f"{', '.join(sorted(info[what])[:3])} ({len(info[what])} in all)."
            )
    return unet


def main(arguments: list[str] | None = None) -> None:
    """The command; exit codes as in `sdxs_lightning.core.errors`."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.output is None and not options.dry_run:
        parser.error("--output is needed, but for a --dry-run")
    try:
        sys.stdout.write(f"{_run(options)}\n")
    except RunStopped as stop:
        sys.stderr.write(f"prune: {stop}\n")
        sys.exit(stop.exit_code)


def _run(options: argparse.Namespace) -> str:
    try:
        topology = topology_of(options.preset) if options.preset else read_topology(options.topology)
        if options.dry_run:
            return str(plan(unet_config(unet_folder(options.base)), topology, transfer=not options.fresh))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
    dtype = DTYPES[options.dtype]
    report = prune_folder(options.base, topology, options.output, dtype, options.fresh, options.seed)
    return f"{report}\nwritten to {options.output} in {options.dtype}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sdxs_lightning.prune",
        description="Make a smaller U-Net from parts of a larger one, and tell where each of its weights came from.",
        epilog=_EXAMPLES + "\n".join(f"  {name:<13} {preset.note}" for name, preset in PRESETS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--base", type=Path, required=True, help="pipeline folder, or U-Net folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--preset", help="a topology by its name, see below")
    what.add_argument("--topology", type=Path, metavar="FILE.yaml", help="a topology of your own")
    parser.add_argument("--output", type=Path, help="U-Net folder to make; it must not exist")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default="float32",
        help="of the written weights (default: %(default)s)",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="random weights instead of the teacher's, as a control"
    )
    parser.add_argument("--seed", type=int, default=0, help="of new weights (default: %(default)s)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the counts alone; no weights are read or written"
    )
    return parser


if __name__ == "__main__":
    main()
