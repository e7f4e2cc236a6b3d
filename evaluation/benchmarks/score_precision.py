"""Error of the score difference in bfloat16, by timestep: `python -m evaluation.benchmarks.score_precision`.

The gradient of distribution matching is a difference of two estimates that approach each other as the student improves, so
rounding of either may swamp it. DMD2 runs the real score in bfloat16, and fake score and text encoders in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from evaluation.benchmarks.student_scores import ScoreOptions, load_scores, settings_of
from evaluation.reports.result_file import check_writable, write_result
from evaluation.user_errors import as_user_errors
from sdxs_lightning.command_line import Option, run_command
from sdxs_lightning.core.option_bounds import MOST_IMAGES

if TYPE_CHECKING:
    from torch import Tensor

PROGRAM = "python -m evaluation.benchmarks.score_precision"
TIMESTEPS = (20, 100, 250, 400, 550, 700, 850, 980)


@dataclass(frozen=True, kw_only=True)
class ScorePrecisionOptions(ScoreOptions):
    """Compares the score difference in bfloat16 with that in float32, on the samples of a student.

    Errors are relative to the norm of the float32 difference over the batch.
    """

    EXAMPLES: ClassVar[str] = (
        f"{PROGRAM} --student outputs/toy-distill/pipeline --fake_score outputs/toy-distill/fake_score --out precision.json"
    )

    samples: Annotated[int, Option(at_least=2, at_most=MOST_IMAGES)] = 128
    """Prompts, of the toy world's val split."""


VARIANTS: Mapping[str, tuple[bool, bool, bool]] = {
    "real score in bf16 (DMD2)": (True, False, False),
    "real and fake score in bf16": (True, True, False),
    "real score, fake score and prompts in bf16": (True, True, True),
}
"""By name: whether real score, fake score and text encoders are bfloat16."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    run_command(PROGRAM, ScorePrecisionOptions, run, arguments)


@as_user_errors()
def run(options: ScorePrecisionOptions) -> str:
    """Measures, and returns the table."""
    if options.out is not None:
        check_writable(options.out)
    rows = measure(options)
    if options.out is not None:
        settings = {**settings_of(options), "samples": options.samples}
        write_result(options.out, {"relative_error": rows, **settings})
    return table(rows)


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown of relative errors, one row per variant and one column per timestep."""
    from evaluation.reports.markdown import markdown_table

    cells = [[name, *(f"{row[str(t)]:.2%}" for t in TIMESTEPS)] for name, row in rows.items()]
    return markdown_table(["timestep", *map(str, TIMESTEPS)], cells)


def measure(options: ScorePrecisionOptions) -> dict[str, dict[str, float]]:
    """Relative error of the score difference by variant and timestep."""
    import torch
    from rich.console import Console
    from rich.progress import track

    from data.toy.world import captions
    from sdxs_lightning.core.noise_schedule import add_noise

    scores = load_scores(options)
    found: dict[str, dict[str, float]] = {name: {} for name in VARIANTS}
    with torch.no_grad():
        exact, latents, noise = scores.sample(captions("val", options.samples))
        conditionings = {False: exact, True: exact.to(dtype=torch.bfloat16).to(dtype=torch.float32)}
        for timestep in track(TIMESTEPS, description="timesteps", console=Console(stderr=True)):
            timesteps = torch.full((options.samples,), timestep)
            noisy = add_noise(latents, noise, timesteps, scores.family.schedule)
            # Each pass once: in bfloat16 they are very slow on a CPU without instructions for it.
            estimates: dict[tuple[str, bool, bool], Tensor] = {}
            for bf16, prompts_bf16 in ((False, False), (True, False), (True, True)):
                conditioning = conditionings[prompts_bf16]
                with _precision(bf16):
                    guided = scores.real.guided(noisy, timesteps, conditioning, options.guidance_scale)
                    plain = scores.fake(noisy, timesteps, conditioning)
                estimates["real", bf16, prompts_bf16] = guided.pred_x0
                estimates["fake", bf16, prompts_bf16] = plain.pred_x0
            reference = estimates["fake", False, False] - estimates["real", False, False]
            for name, (real_bf16, fake_bf16, prompts_bf16) in VARIANTS.items():
                difference = (
                    estimates["fake", fake_bf16, prompts_bf16] - estimates["real", real_bf16, prompts_bf16]
                )
                found[name][str(timestep)] = float((difference - reference).norm() / reference.norm())
    return found


def _precision(bf16: bool) -> Any:
    import torch

    return torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()


if __name__ == "__main__":
    main()
