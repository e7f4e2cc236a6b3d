"""Measure the many-step teacher: `python -m evaluation.benchmarks.teacher_table --base data/toy/base --out FILE.json`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from evaluation.images.generate import ImageMaker
from evaluation.protocols.protocols import PROTOCOLS, Protocol, get_protocol
from evaluation.runner.scores import ProtocolNetworks, score_images
from evaluation.runner.teacher_scores import (
    GUIDANCE_SCALE,
    RESULTS,
    STEPS,
    Entry,
    Teacher,
    add_timings,
    complete,
    look_up,
    store,
)
from sdxs_lightning.families.sd import StableDiffusion


def measure_with_bar(
    protocol: Protocol, teacher: Teacher, steps: Sequence[int], batch_size: int, known: Entry
) -> Entry:
    """Complete an entry on one process, behind a progress bar."""
    networks = ProtocolNetworks.load(protocol)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def measure_images(what: str, maker: ImageMaker, prompts: Sequence[str]) -> dict[str, float]:
            task = progress.add_task(f"{protocol.name}: {what}", total=len(prompts))
            scores = score_images(
                maker,
                prompts,
                networks,
                teacher.device,
                batch_size,
                advance=lambda images: progress.advance(task, images),
            )
            return scores.as_dict()

        return complete(known, protocol, teacher, steps, measure_images)


def show(name: str, entry: Entry, students: Mapping[str, Mapping[str, float]] | None = None) -> None:
    """A table on the terminal; `students` are further rows by label."""
    table = Table("", "FID", "CLIP score", "all right", "attributes", "ms/image", title=f"protocol {name}")
    rows = {"real": entry["real_vs_real"], "autoencoder": entry["vae_floor"]}
    rows |= {f"{steps} steps": row for steps, row in entry["teacher"].items()}
    for label, row in (rows | dict(students or {})).items():
        accuracies = (f"{100 * row[key]:.1f} %" for key in ("caption_accuracy", "attribute_accuracy"))
        milliseconds = f"{row['ms_per_image']:.1f}" if "ms_per_image" in row else ""
        table.add_row(label, f"{row['fid']:.2f}", f"{row['clip_score']:.2f}", *accuracies, milliseconds)
    Console().print(table)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.benchmarks.teacher_table",
        description="Measure the base with many and few steps, its autoencoder and real images. What the file already "
        "holds for the same protocol, judges and weights is not measured again.",
        epilog="example: python -m evaluation.benchmarks.teacher_table --base data/toy/base --steps 50 25 8 4 1",
    )
    parser.add_argument("--base", default="data/toy/base", help="diffusers folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help="default: %(default)s")
    parser.add_argument(
        "--protocol", nargs="+", default=list(PROTOCOLS), choices=list(PROTOCOLS), metavar="NAME"
    )
    parser.add_argument("--guidance_scale", type=float, default=GUIDANCE_SCALE, help="default: %(default)s")
    parser.add_argument(
        "--spacing", default="trailing", choices=["trailing", "leading"], help="default: %(default)s"
    )
    parser.add_argument(
        "--samples", type=int, help="fewer than the protocol's, for a quick look; it changes FID"
    )
    parser.add_argument("--batch_size", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file (default: %(default)s)")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    try:
        family = StableDiffusion(options.base).to(device)
        for name in options.protocol:
            protocol = get_protocol(name, samples=options.samples)
            teacher = Teacher(family, device, options.guidance_scale, options.spacing, protocol.seed)
            known = look_up([options.out], protocol, teacher)
            entry = measure_with_bar(protocol, teacher, options.steps, options.batch_size, known)
            entry = add_timings(entry, teacher, protocol.captions()[0])
            store(options.out, name, entry)
            show(name, entry)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"teacher_table: {error}")


if __name__ == "__main__":
    main()
