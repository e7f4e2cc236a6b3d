"""The recipes of the toy world side by side: `python -m evaluation.recipes --seeds 0 1 2 --out FILE.json`.

Each row is a run of train.py from another row's student (or from the base), with every seed. What is finished is not run
again, so the command can be stopped and given again.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from rich.console import Console
from rich.table import Table

from evaluation.diversity import diversity
from evaluation.evaluate import PipelineImages
from evaluation.generate import RealImages
from evaluation.machine import where
from evaluation.pictures import sheet
from evaluation.protocols import REPOSITORY, Protocol, get_protocol, hash_weights
from evaluation.scores import Judges, measure
from evaluation.teacher import Teacher
from sdxs_lightning.families.sd import StableDiffusion

MODEL = "--model.init_args."
DISTILL, FINISH = "toy/distill.yaml", "toy/finish.yaml"
WARMUP = ("toy/warmup.yaml", "toy/stored_pairs.yaml")
SEGMENTED = (DISTILL, "toy/distill_segmented.yaml", "toy/stored_pairs.yaml")
PAIRS = "outputs/toy-pairs"
"""What `python -m data.prepare pairs` wrote; all seeds share it."""
DIVERSITY_PROMPTS, PICTURES = 50, 10
COST = "cost.json"


@dataclass(frozen=True)
class Recipe:
    """One row: a stage with its settings, and the student that it starts from."""

    configs: tuple[str, ...]
    """Files under configs/, laid over each other."""
    start: str | None = None
    """Row or U-Net folder that gives the student's first weights; None is the base."""
    flags: tuple[str, ...] = ()
    """Further arguments of train.py."""


def _finish_of(row: str) -> Recipe:
    return Recipe((DISTILL, FINISH), row)


PRUNED = "outputs/toy-miniaturise/unet"
_NO_FEATURES = (f"{MODEL}features=null", f"{MODEL}feature_matching=null")
RECIPES: dict[str, Recipe] = {
    "regression": Recipe(WARMUP, flags=_NO_FEATURES),
    "feature_matching": Recipe(WARMUP, flags=(f"{MODEL}regression=null",)),
    "warmup": Recipe(WARMUP),
    "segmented": Recipe(SEGMENTED, "warmup"),
    "dmd2_no_gan": Recipe((DISTILL,), "warmup", (f"{MODEL}discriminator=null", f"{MODEL}adversarial=null")),
    "dmd2": Recipe((DISTILL,), "warmup"),
    "dmd2_jensen_shannon": Recipe(
        (DISTILL,), "warmup", (f"{MODEL}distribution_matching.f_divergence.divergence=jensen_shannon",)
    ),
    "dmd2_lora_fake": Recipe((DISTILL,), "warmup", (f"{MODEL}fake_score.init_args.lora.rank=32",)),
    "segmented+finish": _finish_of("segmented"),
    "dmd2_no_gan+finish": _finish_of("dmd2_no_gan"),
    "dmd2+finish": _finish_of("dmd2"),
    "dmd2_jensen_shannon+finish": _finish_of("dmd2_jensen_shannon"),
    "dmd2_lora_fake+finish": _finish_of("dmd2_lora_fake"),
    "pruned_warmup": Recipe(WARMUP, PRUNED),
    "pruned_segmented": Recipe(SEGMENTED, "pruned_warmup"),
    "pruned_dmd2": Recipe((DISTILL,), "pruned_warmup"),
    "pruned_segmented+finish": _finish_of("pruned_segmented"),
    "pruned_dmd2+finish": _finish_of("pruned_dmd2"),
}
"""By name of the row. Those without a start, or with a folder, come before those that start from them."""


def make_pairs() -> None:
    """The pairs of every warm-up, by the project's own command; does nothing where they are complete."""
    options = ["--captions", "toy:train", "--count", "8192", "--steps", "8", "--guidance", "1.5"]
    line = [
        sys.executable,
        "-m",
        "data.prepare",
        "pairs",
        "--model",
        "data/toy/base",
        *options,
        "--batch-size",
        "64",
    ]
    subprocess.run([*line, "--out", PAIRS], cwd=REPOSITORY, check=True)


def run_folder(root: Path, row: str, seed: int) -> Path:
    """Where a row's run with a seed lies."""
    return root / row / f"seed{seed}"


def command(root: Path, row: str, seed: int) -> list[str]:
    """The command line of a run."""
    recipe = RECIPES[row]
    files = [*recipe.configs, "toy/recipe.yaml"]
    line = [sys.executable, "train.py", *(part for file in files for part in ("--config", f"configs/{file}"))]
    start = recipe.start
    if start in RECIPES:
        start = str(run_folder(root, start, seed) / "pipeline")
    weights = [f"{MODEL}student.init_args.weights={start or 'null'}"]
    folder = [f"--trainer.default_root_dir={run_folder(root, row, seed)}", f"--seed_everything={seed}"]
    return [*line, *weights, *recipe.flags, *folder]


def is_finished(root: Path, row: str, seed: int) -> bool:
    """Whether the run has exported its pipeline."""
    return (run_folder(root, row, seed) / "pipeline" / "model_index.json").is_file()


def train(root: Path, row: str, seed: int) -> None:
    """Runs a row, and first what it starts from; does nothing if its pipeline is there.

    Raises:
        RuntimeError: if train.py fails; its last words are in the run's log.
    """
    folder, start = run_folder(root, row, seed), RECIPES[row].start
    if is_finished(root, row, seed):
        return
    if start in RECIPES:
        train(root, start, seed)
    folder.mkdir(parents=True, exist_ok=True)
    line = command(root, row, seed)
    if (folder / "checkpoints").is_dir():
        line += ["--ckpt_path", "last"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with (folder / "log.txt").open("a") as log:
        code = subprocess.run(
            line, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, check=False
        ).returncode
    # Of the processor, not of the clock: several rows may run beside each other.
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before + cpu_seconds(folder)
    (folder / COST).write_text(json.dumps({"cpu_seconds": seconds, "command": line[1:]}) + "\n")
    if code:
        raise RuntimeError(f"{row} with seed {seed} ended with exit code {code}; see {folder / 'log.txt'}")


def cpu_seconds(folder: Path) -> float:
    """What a run has cost so far, of one core; 0 where nothing was written down."""
    file = folder / COST
    return float(json.loads(file.read_text())["cpu_seconds"]) if file.is_file() else 0.0


def score(root: Path, row: str, seed: int, protocol: Protocol, judges: Judges) -> dict[str, Any]:
    """What the exported student scores in one step; kept beside the run."""
    folder = run_folder(root, row, seed)
    kept, digest = folder / f"scores_{protocol.name}.json", hash_weights(folder / "pipeline")
    if kept.is_file():
        stored: dict[str, Any] = json.loads(kept.read_text())
        if (stored["model_sha256"], stored["fingerprint"]) == (digest, protocol.fingerprint()):
            return stored
    maker = student_of(folder / "pipeline", protocol)
    prompts = protocol.captions()
    scores = measure(maker, prompts, judges, torch.device("cpu")).as_dict()
    scores["diversity"] = diversity(maker, prompts[:DIVERSITY_PROMPTS], judges.clip)
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
    """Per row mean, smallest and largest over its seeds of each score, and of the cost of its own stage."""
    keys = ("fid", "clip_score", "caption_accuracy", "attribute_accuracy", "diversity", "cpu_seconds")
    summary = {}
    for row, by_seed in rows.items():
        spreads = {key: [scores[key] for scores in by_seed.values()] for key in keys}
        summary[row] = {
            "seeds": list(by_seed),
            "parameters": next(iter(by_seed.values()))["parameters"],
            **{
                key: None
                if None in values
                else {"mean": statistics.fmean(values), "smallest": min(values), "largest": max(values)}
                for key, values in spreads.items()
            },
        }
    return summary


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
        prog="python -m evaluation.recipes",
        description="Run and measure the recipes of the toy world; what is there already is not run again.",
        epilog="example: python -m evaluation.recipes --rows warmup dmd2 --seeds 0 1 2 --out recipes.json",
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
    judges = Judges.load(protocol)
    rows: dict[str, dict[int, dict[str, Any]]] = {row: {} for row in options.rows}
    try:
        if not options.finished_only:
            make_pairs()
        for seed in options.seeds:
            for row in options.rows:
                if options.finished_only and not is_finished(options.root, row, seed):
                    continue
                train(options.root, row, seed)
                scores = score(options.root, row, seed, protocol, judges)
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
