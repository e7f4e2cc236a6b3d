"""Measure U-Nets that stand in for a base's own: `python -m evaluation.benchmarks.unet_table --unet kd=DIR ... --out FILE.json`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from evaluation.protocols.protocols import PROTOCOLS, Protocol, get_protocol, hash_weights
from evaluation.runner.machine import milliseconds_per_image, where
from evaluation.runner.scores import ProtocolNetworks, score_images
from evaluation.runner.teacher_scores import GUIDANCE_SCALE, Teacher
from sdxs_lightning.families.detect import detect_family
from sdxs_lightning.networks.denoiser import Denoiser

Rows = dict[str, dict[str, Any]]


def measure_rows(
    networks: Mapping[str, str | None],
    teacher: Teacher,
    protocol: Protocol,
    steps: Sequence[int],
    known: Rows,
) -> Rows:
    """Scores of each network at each number of steps; what is known of the same weights is not measured again.

    Args:
        networks: U-Net folders by name; None is the base's own.
        teacher: of the base.
        protocol: what to measure with.
        steps: of the sampler.
        known: rows measured earlier.
    """
    metric_networks, prompts = ProtocolNetworks.load(protocol), protocol.captions()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    rows: Rows = {}
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for name, folder in networks.items():
            digest = hash_weights(folder or teacher.family.folder / "unet")
            row = known.get(name, {})
            row = row if row.get("unet_sha256") == digest else {}
            unet = teacher.family.load_unet(folder).eval().requires_grad_(False)
            denoiser = Denoiser(unet, teacher.family.schedule, teacher.family.prediction_type).to(
                teacher.device
            )
            scores = dict(row.get("steps", {}))
            for count in steps:
                maker = teacher.images(count, denoiser=denoiser)
                if str(count) not in scores:
                    task = progress.add_task(f"{name}: {count} steps", total=len(prompts))
                    scores[str(count)] = score_images(
                        maker,
                        prompts,
                        metric_networks,
                        teacher.device,
                        batch_size=100,
                        advance=lambda images, task=task: progress.advance(task, images),  # type: ignore[misc]
                    ).as_dict()
                scores[str(count)]["ms_per_image"] = milliseconds_per_image(maker, prompts[0])
            parameters = sum(parameter.numel() for parameter in unet.parameters())
            rows[name] = {"unet": folder, "unet_sha256": digest, "parameters": parameters, "steps": scores}
    return rows


def show(rows: Rows) -> None:
    """A table on the terminal."""
    table = Table("U-Net", "parameters", "steps", "FID", "CLIP score", "all right", "time, first row = 1")
    first: dict[str, float] = {}
    for name, row in rows.items():
        for steps, scores in row["steps"].items():
            unit = first.setdefault(steps, scores["ms_per_image"])
            figures = (
                f"{scores['fid']:.2f}",
                f"{scores['clip_score']:.1f}",
                f"{100 * scores['caption_accuracy']:.1f} %",
            )
            table.add_row(
                name, f"{row['parameters']:,}", steps, *figures, f"{scores['ms_per_image'] / unit:.2f}"
            )
    Console().print(table)


def named_folders(arguments: Sequence[str]) -> dict[str, str | None]:
    """`name=folder` of each.

    Raises:
        ValueError: for anything else.
    """
    for argument in arguments:
        if not all(argument.partition("=")[::2]):
            raise ValueError(
                f"--unet takes name=folder, such as kd=outputs/toy-miniaturise/unet, and got '{argument}'."
            )
    return {name: folder for name, _, folder in (argument.partition("=") for argument in arguments)}


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.benchmarks.unet_table",
        description="Measure the base's U-Net and others in its place, sampled in many steps with guidance. What the file "
        "already holds for the same weights is not measured again.",
        epilog="example: python -m evaluation.benchmarks.unet_table --unet kd=outputs/toy-miniaturise/unet --out table.json",
    )
    parser.add_argument("--base", default="data/toy/base", help="diffusers folder (default: %(default)s)")
    parser.add_argument(
        "--unet", nargs="+", default=[], metavar="NAME=FOLDER", help="U-Net or pipeline folders"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[25], help="default: 25")
    parser.add_argument("--protocol", default="toy", choices=list(PROTOCOLS), help="default: %(default)s")
    parser.add_argument("--guidance_scale", type=float, default=GUIDANCE_SCALE, help="default: %(default)s")
    parser.add_argument(
        "--samples", type=int, help="fewer than the protocol's, for a quick look; it changes FID"
    )
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write or to add to")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    try:
        networks = {"base": None} | named_folders(options.unet)
        protocol = get_protocol(options.protocol, samples=options.samples)
        teacher = Teacher(
            detect_family(options.base).to(device), device, options.guidance_scale, seed=protocol.seed
        )
        setting = {
            "base": options.base,
            "guidance_scale": options.guidance_scale,
            "protocol": protocol.describe(),
        }
        stored = json.loads(options.out.read_text()) if options.out.is_file() else {}
        known = (
            stored.get("rows", {}) if all(stored.get(key) == value for key, value in setting.items()) else {}
        )
        rows = measure_rows(networks, teacher, protocol, options.steps, known)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**setting, "rows": rows, **where(device)}, indent=2) + "\n")
    except (FileNotFoundError, PermissionError, ValueError) as error:
        sys.exit(f"unet_table: {error}")
    show(rows)


if __name__ == "__main__":
    main()
