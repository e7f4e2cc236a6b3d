"""Where an iteration's time goes, beside DMD2's arrangement of the same work: `python -m evaluation.benchmarks.step_profile`.

Both run on one thread in float32 on equal U-Nets with random weights, so that only the arrangement differs: passes, and all
that is not a pass. Processor times are compared within one run, in turn; the smallest of the repeats counts.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

from evaluation.reports.result_file import write_result
from sdxs_lightning.command_line import Option, run_command

if TYPE_CHECKING:
    from evaluation.benchmarks.gpu.distillation import MeasuredDistillation
    from evaluation.benchmarks.gpu.random_base import RandomBase
    from evaluation.benchmarks.gpu.reference_arrangement import ReferenceArrangement

PROGRAM = "python -m evaluation.benchmarks.step_profile"
RATIO = 10
"""Fake score updates per student update."""
UNET = {"block_out_channels": [64, 128, 256, 256], "sample_size": 32}
"""Of SD-1.5's shape, with 34 M parameters."""


@dataclass(frozen=True, kw_only=True)
class StepProfileOptions:
    """Compares iterations of the stage with DMD2's arrangement, and says where the stage's time goes.

    Each share is one of a student update and its ten fake score updates.
    """

    EXAMPLES: ClassVar[str] = f"{PROGRAM} --out evaluation/results/step_profile.json"

    batch_size: Annotated[int, Option(at_least=2)] = 4
    """Samples per iteration."""
    repeats: Annotated[int, Option(at_least=1)] = 3
    """Of every iteration; the fastest counts."""
    tiny: bool = False
    """Networks of a few thousand parameters, as a check of the command."""
    out: Path | None = None
    """JSON file to write."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    run_command(PROGRAM, StepProfileOptions, run, arguments)


def run(options: StepProfileOptions) -> str:
    """Measures, writes the file, and returns a table."""
    import torch

    from evaluation.reports.markdown import markdown_table
    from evaluation.runner.machine import where

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = {name: measure(options, gan) for name, gan in (("with GAN", True), ("without GAN", False))}
    finally:
        torch.set_num_threads(threads)
    if options.out is not None:
        machine = where(torch.device("cpu"))
        write_result(options.out, {"rows": found, "batch_size": options.batch_size, **machine})
    names = ["images per second, DMD2's = 1", *next(iter(found.values()))["shares"]]
    cells = [
        [name, f"{row['speed']:.2f}", *(f"{share:.1%}" for share in row["shares"].values())]
        for name, row in found.items()
    ]
    return markdown_table(["", *names], cells)


def measure(options: StepProfileOptions, gan: bool) -> dict[str, Any]:
    """Speed against DMD2's arrangement, and the shares of an update's time."""
    import torch

    from evaluation.benchmarks.gpu.random_base import RandomBase
    from sdxs_lightning.families.detect import detect_family

    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        family = RandomBase(detect_family(str(small_base(Path(folder), options.tiny))), device)
        stage, reference = stage_of(family, gan), reference_of(family, gan)
        batch = family.batch(options.batch_size)
        assert batch.latents is not None
        timed: dict[tuple[str, bool], float] = {}
        for _ in range(options.repeats + 1):  # the first is a warm-up, and never the fastest
            for student in (True, False):
                ours = partial(stage.iterate, batch, student)
                theirs = partial(reference.iterate, batch.latents, student)
                for name, iterate in (("ours", ours), ("reference", theirs)):
                    timed[name, student] = min(timed.get((name, student), float("inf")), _seconds(iterate))
        parts = {
            student: parts_of(stage, partial(stage.iterate, batch, student)) for student in (True, False)
        }
    total = {name: _of_update(timed[name, True], timed[name, False]) for name in ("ours", "reference")}
    shares = {part: _of_update(parts[True][part], parts[False][part]) for part in parts[True]}
    whole = sum(shares.values())
    return {
        "speed": total["reference"] / total["ours"],
        "shares": {part: seconds / whole for part, seconds in shares.items()},
    }


def small_base(folder: Path, tiny: bool) -> Path:
    """JSON files of a base of SD-1.5's kind with a small U-Net and two layers of its text encoder."""
    from evaluation.benchmarks.gpu.random_base import config_folder
    from sdxs_lightning.families.folders import read_json

    base = config_folder("sd15", folder, tiny)
    if not tiny:
        for name, changes in (("unet", UNET), ("text_encoder", {"num_hidden_layers": 2})):
            file = base / name / "config.json"
            file.write_text(json.dumps(read_json(file) | changes))
    return base


def stage_of(family: RandomBase, gan: bool) -> MeasuredDistillation:
    """The stage at DMD2's settings, in float32."""
    import torch

    from evaluation.benchmarks.gpu.distillation import MeasuredDistillation
    from sdxs_lightning.families import Family
    from sdxs_lightning.networks.discriminator import Discriminator
    from sdxs_lightning.networks.fake_score import FakeScore
    from sdxs_lightning.networks.student_generator import StudentGenerator
    from sdxs_lightning.objectives.adversarial import DiffusionAdversarial
    from sdxs_lightning.objectives.distribution_matching import DistributionMatching
    from sdxs_lightning.stages.distillation.update_schedule import UpdateSchedule

    adamw = partial(torch.optim.AdamW, lr=1e-6, fused=True)
    stage = MeasuredDistillation(
        family=cast(Family, family),
        student=StudentGenerator(adamw),
        fake_score=FakeScore(adamw),
        update_schedule=UpdateSchedule(
            max_student_updates=10**6, fake_score_updates_per_student_update=RATIO
        ),
        distribution_matching=DistributionMatching(guidance_scale=1.75),
        discriminator=Discriminator(adamw) if gan else None,
        adversarial=DiffusionAdversarial() if gan else None,
    )
    stage.prepare(torch.device("cpu"), channels_last=False)
    return stage


def reference_of(family: RandomBase, gan: bool) -> ReferenceArrangement:
    """DMD2's arrangement, in float32."""
    import torch

    from evaluation.benchmarks.gpu.reference_arrangement import ReferenceArrangement

    reference = ReferenceArrangement(family, 1.75, torch.device("cpu"))
    if not gan:
        vars(reference)["_logits"] = lambda latents, prompts: latents.new_zeros(len(latents))
    return reference


def parts_of(stage: MeasuredDistillation, iterate: Callable[[], None]) -> dict[str, float]:
    """Seconds of each part of an iteration; the rest is noise, terms, hooks and scalars.

    Of calls inside each other the outermost counts.
    """
    import torch

    from evaluation.benchmarks.gpu import distillation

    assert stage.fake_score is not None and stage.real_score is not None and stage.ema is not None
    spent: dict[str, float] = defaultdict(float)
    with _timing(
        spent,
        (stage.family, "encode_prompts", "text encoder"),
        (stage.student, "simulate", "student, forward"),
        (stage, "manual_backward", "backward"),
        (torch.autograd, "grad", "backward"),
        (stage.fake_score, "predict", "fake and real score, forward"),
        (stage.fake_score, "predict_with_features", "fake and real score, forward"),
        (stage.fake_score, "features", "fake and real score, forward"),
        (stage.fake_score.denoiser, "guided", "fake and real score, forward"),
        (stage.real_score.module, "unguided_pair", "fake and real score, forward"),
        (distillation, "clip_gradients", "clipping and optimizers"),
        *((optimizer, "step", "clipping and optimizers") for optimizer in stage.steppers.values()),
        (stage.ema, "update", "average"),
    ):
        whole = _seconds(iterate)
    names = (
        "student, forward",
        "fake and real score, forward",
        "backward",
        "text encoder",
        "clipping and optimizers",
        "average",
    )
    return {name: spent[name] for name in names} | {"rest": max(whole - sum(spent.values()), 0.0)}


@contextmanager
def _timing(spent: dict[str, float], *methods: tuple[Any, str, str]) -> Iterator[None]:
    """Adds the seconds of each method to its part; of methods inside each other the outermost counts."""
    inside: list[str] = []

    def timed(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if inside:
                return function(*args, **kwargs)
            inside.append(part)
            begun = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += time.process_time() - begun
                inside.clear()

        return call

    kept = [(owner, name, name in vars(owner), getattr(owner, name)) for owner, name, _ in methods]
    for (owner, name, part), (_, _, _, function) in zip(methods, kept, strict=True):
        setattr(owner, name, timed(function, part))
    try:
        yield
    finally:
        for owner, name, own, function in kept:
            if own:
                setattr(owner, name, function)
            else:
                delattr(owner, name)


def _seconds(function: Callable[[], object]) -> float:
    begun = time.process_time()
    function()
    return time.process_time() - begun


def _of_update(student: float, other: float) -> float:
    """Of one student update, from an iteration with and one without."""
    return student + (RATIO - 1) * other


if __name__ == "__main__":
    main()
