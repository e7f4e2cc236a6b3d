"""The recipes of the toy world and their runs of train.py, which start from another row's student or from the base."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from evaluation.protocols.protocols import REPOSITORY
from evaluation.reports.result_file import write_result
from sdxs_lightning.core.errors import RunStopped

MODEL = "--model.init_args."
QUICKSTART, DISTILL, FINISH, METHODS = "quickstart.yaml", "toy/distill.yaml", "toy/finish.yaml", "methods"
WARMUP = ("toy/warmup.yaml", "toy/stored_pairs.yaml")
PAIRS = "outputs/toy-pairs"
"""Output of `python -m data.prepare pairs`; shared by all seeds."""
PAIR_OPTIONS = f"""--model data/toy/base --captions toy:train --count 8192 --steps 8 --guidance_scale 1.5
    --batch_size 64 --out {PAIRS}"""
COST = "cost.json"


@dataclass(frozen=True)
class Recipe:
    """A row: stage, settings and initial student."""

    configs: tuple[str, ...]
    """Files under configs/, each overriding those before it."""
    start: str | None = None
    """Row or U-Net folder of the student's initial weights; None is the base."""
    flags: tuple[str, ...] = ()
    """Further arguments of train.py."""


PRUNED = "outputs/toy-miniaturise/unet"
_NO_GAN = (f"{MODEL}discriminator=null", f"{MODEL}adversarial=null")
_UPDATES = f"{MODEL}update_schedule.max_student_updates"
_HEAD_START = f"{MODEL}update_schedule.fake_score_only_iterations"
_RATIO = f"{MODEL}update_schedule.fake_score_updates_per_student_update"
_RATE = f"{MODEL}student.init_args.optimizer.init_args.lr"
_LARGE_RATE = f"{_RATE}=2.0e-4"
_FAST = (
    f"{_RATIO}=1",
    _LARGE_RATE,
    f"{MODEL}student.init_args.lr_scheduler.init_args.final_factor=0.1",
)
"""As many updates of the student as of the fake score, at four times the learning rate."""
_SCORES = f"{MODEL}distribution_matching.timesteps.high"
_ALL_TIMESTEPS = (f"{_SCORES}=980",)
"""DMD2's, in the place of the quickstart's low noise."""
_BESIDE = (f"{MODEL}regression.phase=always", f"{MODEL}regression.weight=0.1")
_NO_FEATURES = (f"{MODEL}features=null", f"{MODEL}feature_matching=null")


def _cold(updates: int, method: str | None = None, *flags: str) -> Recipe:
    """Score distillation of the base, without GAN, by a file of configs/methods."""
    files = (DISTILL,) if method is None else (DISTILL, f"{METHODS}/{method}.yaml")
    return Recipe(files, flags=(*_NO_GAN, f"{_HEAD_START}=20", f"{_UPDATES}={updates}", *flags))


def _regression(pairs: int, updates: int) -> tuple[str, ...]:
    """Flags of the quickstart without its distillation, at the learning rates of toy/warmup.yaml."""
    return (
        f"{MODEL}fake_score=null",
        f"{MODEL}distribution_matching=null",
        f"{MODEL}pairs.count={pairs}",
        f"{_RATE}=7.0e-4",
        f"{MODEL}student.init_args.lr_scheduler.init_args.first_phase_updates=0",
        f"{MODEL}student.init_args.lr_scheduler.init_args.final_factor=0.05",
        f"{MODEL}update_schedule.warmup_updates={updates}",
        f"{_UPDATES}={updates}",
    )


def _guidance(scale: str) -> Recipe:
    """The quickstart at another guidance scale."""
    terms = ("pairs", "distribution_matching")
    return Recipe((QUICKSTART,), flags=tuple(f"{MODEL}{term}.guidance_scale={scale}" for term in terms))


RECIPES: dict[str, Recipe] = {
    "regression": Recipe(WARMUP, flags=_NO_FEATURES),
    "warmup": Recipe(WARMUP),
    "segmented": Recipe((DISTILL, "toy/distill_segmented.yaml", "toy/stored_pairs.yaml"), "warmup"),
    "dmd2_no_gan": Recipe((DISTILL,), "warmup", _NO_GAN),
    "dmd2": Recipe((DISTILL,), "warmup"),
    "dmd2+finish": Recipe((DISTILL, FINISH), "dmd2"),
    "pruned_warmup": Recipe(WARMUP, PRUNED),
    "pruned_dmd2": Recipe((DISTILL,), "pruned_warmup"),
    # From the base, without a warm-up: what a setting itself reaches, each in about 1,080 passes of the U-Net.
    "cold_dmd2": _cold(40),
    "cold_gan": Recipe((DISTILL,), flags=(f"{_HEAD_START}=20", f"{_UPDATES}=33")),
    "cold_samples_used_5_times": _cold(48, "samples_used_again", f"{_HEAD_START}=4"),
    "cold_lora_fake": _cold(44, "lora_fake_score", f"{MODEL}fake_score.init_args.lora.rank=32"),
    "cold_half_fake_score_batch": _cold(64, "small_fake_score_batch"),
    "cold_decoupled_guidance": _cold(
        38, "decoupled_guidance", f"{MODEL}objectives.guidance.init_args.guidance_scale=1.5"
    ),
    "cold_long_and_short_guidance": _cold(38, "long_and_short_guidance"),
    "cold_score_identity": _cold(35, "score_identity"),
    "cold_large_rate": _cold(40, None, _LARGE_RATE),
    "cold_ratio_1": _cold(111, None, *_FAST),
    "cold_no_momentum": _cold(111, "no_momentum", *_FAST),
    "cold_aligned": _cold(111, "alignment", *_FAST),
    "cold_aligned_half_fake_score_batch": _cold(
        133, "alignment", *_FAST, f"{MODEL}update_schedule.fake_score_every_nth_sample=2"
    ),
    "cold_segmented": Recipe(  # its passes were not counted
        (DISTILL, "toy/distill_segmented.yaml"),
        flags=(f"{_HEAD_START}=20", *_FAST, f"{MODEL}pairs.sampler_steps=5", f"{_UPDATES}=54"),
    ),
    "cold_regression": Recipe((QUICKSTART,), flags=_regression(pairs=1536, updates=200)),
    # In half and twice the passes.
    "cold_dmd2_2x": _cold(83),
    "cold_ratio_1_halfx": _cold(51, None, *_FAST),
    "cold_ratio_1_2x": _cold(231, None, *_FAST),
    "cold_regression_2x": Recipe((QUICKSTART,), flags=_regression(pairs=3072, updates=400)),
    # What the quickstart's distillation is worth: its passes spent on twice the pairs and more regression instead.
    "quickstart": Recipe((QUICKSTART,)),
    "quickstart_regression": Recipe((QUICKSTART,), flags=_regression(pairs=4096, updates=1020)),
    # More of each of its stages, of the full and of the pruned U-Net.
    "longer": Recipe((QUICKSTART, "toy/longer.yaml")),
    "pruned_longer": Recipe((QUICKSTART, "toy/longer.yaml", "toy/pruned.yaml"), PRUNED),
    # The quickstart with one thing changed.
    "quickstart_to_timestep_600": Recipe((QUICKSTART,), flags=(f"{_SCORES}=600",)),
    "quickstart_all_timesteps": Recipe((QUICKSTART,), flags=_ALL_TIMESTEPS),
    # Regression beside the score difference (DMD, arXiv:2311.18828), on samples from pairs alone, or on every fourth.
    "quickstart_regression_beside": Recipe((QUICKSTART,), flags=_BESIDE),
    "quickstart_regression_beside_a_quarter": Recipe(
        (QUICKSTART,), flags=(*_BESIDE, f"{MODEL}pairs.every_nth_sample=4")
    ),
    # And one more, in about its passes.
    "quickstart_all_timesteps_ratio_2": Recipe(
        (QUICKSTART,), flags=(*_ALL_TIMESTEPS, f"{_RATIO}=2", f"{_UPDATES}=500")
    ),
    "quickstart_all_timesteps_unaligned": Recipe(
        (QUICKSTART,),
        flags=(*_ALL_TIMESTEPS, f"{MODEL}fake_score.init_args.alignment=0.0", f"{_HEAD_START}=40"),
    ),
    "quickstart_all_timesteps_no_momentum": Recipe(
        (QUICKSTART, f"{METHODS}/no_momentum.yaml"), flags=_ALL_TIMESTEPS
    ),
    "quickstart_all_timesteps_no_momentum_twice_the_rate": Recipe(
        (QUICKSTART, f"{METHODS}/no_momentum.yaml"),
        flags=(
            *_ALL_TIMESTEPS,
            f"{_RATE}=4.0e-4",
            f"{MODEL}student.init_args.lr_scheduler.init_args.first_phase_factor=1.75",
            f"{MODEL}student.init_args.lr_scheduler.init_args.final_factor=0.05",
        ),
    ),
    # Guidance in the pairs and in the score difference; the quickstart has 1.5.
    **{f"quickstart_guidance_{scale}": _guidance(scale) for scale in ("1", "2", "3", "4.5")},
}
"""Recipes by row name; a row follows the one it starts from."""


def reads_pairs(row: str) -> bool:
    """Whether a row, or one that it starts from, is trained on the stored pairs."""
    recipe = RECIPES[row]
    return "toy/stored_pairs.yaml" in recipe.configs or (
        recipe.start in RECIPES and reads_pairs(recipe.start)
    )


def make_pairs() -> None:
    """Generate the (noise, latents) pairs for all warm-ups, unless they are complete.

    Raises:
        RunStopped: if the generation fails.
    """
    if subprocess.run(
        [sys.executable, "-m", "data.prepare", "pairs", *PAIR_OPTIONS.split()], cwd=REPOSITORY, check=False
    ).returncode:
        raise RunStopped("the pairs could not be made; the message is above.")


def run_folder(root: Path, row: str, seed: int) -> Path:
    """Folder of a row's run."""
    return root / row / f"seed{seed}"


def command(root: Path, row: str, seed: int) -> list[str]:
    """The command line of a run."""
    recipe = RECIPES[row]
    files = [*recipe.configs, "toy/recipe.yaml"]
    line = [sys.executable, "train.py", *(part for file in files for part in ("--config", f"configs/{file}"))]
    start = recipe.start
    if start in RECIPES:
        start = str(run_folder(root, start, seed) / "pipeline")
    weights = f"{MODEL}student.init_args.weights={start or 'null'}"
    folder = f"--trainer.default_root_dir={run_folder(root, row, seed)}"
    return [*line, weights, *recipe.flags, folder, f"--seed_everything={seed}"]


def is_finished(root: Path, row: str, seed: int) -> bool:
    """Whether the run has exported its pipeline."""
    return (run_folder(root, row, seed) / "pipeline" / "model_index.json").is_file()


def train_recipe(root: Path, row: str, seed: int) -> None:
    """Train a row after the rows that it starts from, unless its pipeline exists.

    Raises:
        RunStopped: if train.py fails.
    """
    folder, start = run_folder(root, row, seed), RECIPES[row].start
    if is_finished(root, row, seed):
        return
    if start in RECIPES:
        train_recipe(root, start, seed)
    folder.mkdir(parents=True, exist_ok=True)
    line = command(root, row, seed)
    if (folder / "checkpoints").is_dir():
        line += ["--ckpt_path", "last"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with (folder / "log.txt").open("a") as log:
        code = subprocess.run(
            line, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, check=False
        ).returncode
    # CPU time rather than wall clock: several rows may run at once.
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before + cpu_seconds(folder)
    write_result(folder / COST, {"cpu_seconds": seconds, "command": line[1:]})
    if code:
        raise RunStopped(f"{row} with seed {seed} ended with exit code {code}; see {folder / 'log.txt'}")


def total_cpu_seconds(root: Path, row: str, seed: int) -> float | None:
    """CPU seconds of a run and of those that it starts from; None unless all are recorded."""
    own, start = cpu_seconds(run_folder(root, row, seed)), RECIPES[row].start
    before = total_cpu_seconds(root, start, seed) if start in RECIPES else 0.0
    return own + before if own and before is not None else None


def cpu_seconds(folder: Path) -> float:
    """CPU seconds of a run so far; 0 if none are recorded."""
    file = folder / COST
    return float(json.loads(file.read_text())["cpu_seconds"]) if file.is_file() else 0.0
