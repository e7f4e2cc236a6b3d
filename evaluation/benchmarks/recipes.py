"""The recipes of the toy world side by side: `python -m evaluation.benchmarks.recipes --seeds 0 1 2 --out FILE.json`.

What is finished is not run again, so the command can be stopped and given again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from rich.console import Console
from rich.table import Table

from evaluation.benchmarks.recipe_runs import RECIPES, cpu_seconds, is_finished, make_pairs, run_folder, train
from evaluation.evaluate import PipelineImages
from evaluation.images.generate import RealImages
from evaluation.metrics.diversity import diversity
from evaluation.protocols.protocols import Protocol, get_protocol, hash_weights
from evaluation.reports.grids import sheet
from evaluation.reports.seeds import spread
from evaluation.runner.machine import where
from evaluation.runner.scores import ProtocolNetworks, score_images
from evaluation.runner.teacher_scores import Teacher
from sdxs_lightning.families.sd import StableDiffusion

DIVERSITY_PROMPTS, PICTURES = 50, 10


def score(root: Path, row: str, seed: int, protocol: Protocol, networks: ProtocolNetworks) -> dict[str, Any]:
    """What the exported student scores in one step; kept beside the run."""
    folder = run_folder(root, row, seed)
    kept, digest = folder / f"scores_{protocol.name}.json", hash_weights(folder / "pipeline")
    if kept.is_file():
        stored: dict[str, Any] = json.loads(kept.read_text())
        if (stored["model_sha256"], stored["fingerprint"]) == (digest, protocol.fingerprint()):
            return stored
    maker = student_of(folder / "pipeline", protocol)
    prompts = protocol.captions()
    scores = score_images(maker, prompts, networks, torch.device("cpu")).as_dict()
    scores["diversity"] = diversity(maker, prompts[:DIVERSITY_PROMPTS], networks.clip)
    parameters = sum(parameter.numel() for parameter in maker.pipeline.unet.parameters())
    result = {
        **scores,
        "parameters": parameters,
        "model_sha256": digest,
        "fingerprint": protocol.fingerprint(),
    }
    kept.write_text(json.dumps(result, indent=2) + "\n")
    return result


def draw(root: Path, rows: Sequence[str], seed: int, protocol: Protocol) -> Image:
    """The first prompts of the protocol: real, the base in many steps and in one, and each row."""
    prompts, numbers = protocol.captions()[:PICTURES], torch.arange(PICTURES)
    teacher = Teacher(StableDiffusion("data/toy/base"), torch.device("cpu"), seed=protocol.seed)
    drawn = {"real": RealImages(protocol.split)(prompts, numbers)}
    drawn |= {
        f"base\n{steps} step{'s' * (steps > 1)}": teacher.images(steps)(prompts, numbers) for steps in (25, 1)
    }
    for row in rows:
        maker = student_of(run_folder(root, row, seed) / "pipeline", protocol)
        drawn[row.replace("_", "\n").replace("+", "\n+")] = maker(prompts, numbers)
    return sheet(drawn, prompts)


def student_of(folder: Path, protocol: Protocol) -> PipelineImages:
    """A maker of images in one step, from an exported pipeline."""
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return PipelineImages(pipeline, steps=1, guidance_scale=0.0, seed=protocol.seed)


def summarise(rows: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Per row the spread over its seeds of each score, and of the cost of its own stage."""
    keys = ("fid", "clip_score", "caption_accuracy", "attribute_accuracy", "diversity", "cpu_seconds")
    return {
        row: {
            "seeds": list(by_seed),
            "parameters": next(iter(by_seed.values()))["parameters"],
            **{key: _spread([scores[key] for scores in by_seed.values()]) for key in keys},
        }
        for row, by_seed in rows.items()
    }


def _spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Of the values that are known; None without one. All of them stand there, in the order of the seeds."""
    known = [value for value in values if value is not None]
    return spread(known) | {"values": list(values)} if known else None


def show(summary: Mapping[str, Mapping[str, Any]]) -> None:
    """A table on the terminal."""
    table = Table(
        "recipe", "seeds", "FID", "CLIP score", "all right", "diversity", "parameters", "cost, first row = 1"
    )
    first = next(iter(summary.values()))["cpu_seconds"]
    for row, scores in summary.items():
        cells = [
            f"{scores['fid']['mean']:.3f}",
            f"{scores['clip_score']['mean']:.1f}",
            f"{100 * scores['caption_accuracy']['mean']:.1f} %",
            f"{scores['diversity']['mean']:.3f}",
            f"{scores['parameters']:,}",
            f"{scores['cpu_seconds']['mean'] / first['mean']:.2f}" if first and scores["cpu_seconds"] else "",
        ]
        table.add_row(row, str(len(scores["seeds"])), *cells)
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.benchmarks.recipes",
        description="Run and measure the recipes of the toy world; what is there already is not run again.",
        epilog="example: python -m evaluation.benchmarks.recipes --rows warmup dmd2 --seeds 0 1 2 --out recipes.json",
    )
    parser.add_argument("--rows", nargs="+", choices=list(RECIPES), default=list(RECIPES), metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="default: 0")
    parser.add_argument(
        "--finished_only", action="store_true", help="start no run: measure what was finished, of these seeds"
    )
    parser.add_argument("--root", type=Path, default=Path("outputs/recipes"), help="default: %(default)s")
    parser.add_argument("--protocol", default="toy", help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--picture", type=Path, help="PNG file to draw, of the first seed")
    options = parser.parse_args(arguments)
    protocol = get_protocol(options.protocol)
    networks = ProtocolNetworks.load(protocol)
    rows: dict[str, dict[int, dict[str, Any]]] = {row: {} for row in options.rows}
    try:
        if not options.finished_only:
            make_pairs()
        for seed in options.seeds:
            for row in options.rows:
                if options.finished_only and not is_finished(options.root, row, seed):
                    continue
                train(options.root, row, seed)
                scores = score(options.root, row, seed, protocol, networks)
                cost = cpu_seconds(run_folder(options.root, row, seed)) or None  # none was written down
                rows[row][seed] = scores | {"cpu_seconds": cost}
                Console(stderr=True).print(f"{row} seed {seed}: {rows[row][seed]}")
    except (RuntimeError, subprocess.CalledProcessError) as error:
        sys.exit(f"recipes: {error}")
    summary = summarise({row: by_seed for row, by_seed in rows.items() if by_seed})
    if not summary:
        sys.exit(f"recipes: none of these rows was finished with these seeds under {options.root}")
    if options.picture is not None:
        draw(options.root, list(summary), options.seeds[0], protocol).save(options.picture)
    if options.out is not None:
        result = {"rows": summary, "protocol": protocol.describe(), **where(torch.device("cpu"))}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    show(summary)


if __name__ == "__main__":
    main()
