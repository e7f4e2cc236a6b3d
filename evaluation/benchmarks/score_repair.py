"""What real and fake score make of a student's images, by noise level: `python -m evaluation.benchmarks.score_repair`.

Distribution matching moves a student's image by the difference of two scores. Where the fake score, which should know the
student's images as they are, mends a wrong one just as the real score does, the difference does not say what is wrong with it.
The images are noised up to a timestep, sampled down again by either (SDEdit, arXiv:2108.01073), and judged by their captions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from evaluation.benchmarks.student_scores import ScoreOptions, load_scores, settings_of
from evaluation.reports.result_file import check_writable, write_result
from evaluation.user_errors import as_user_errors
from sdxs_lightning.command_line import Option, run_command
from sdxs_lightning.core.option_bounds import MOST_IMAGES

if TYPE_CHECKING:
    from torch import Tensor

    from sdxs_lightning.core.batch import Conditioning
    from sdxs_lightning.networks.denoiser import Denoiser

PROGRAM = "python -m evaluation.benchmarks.score_repair"
TIMESTEPS = (100, 200, 300, 400, 500, 600, 700, 850)
BATCH = 100
REAL, FAKE = "real score", "fake score"


@dataclass(frozen=True, kw_only=True)
class ScoreRepairOptions(ScoreOptions):
    """Noises a student's images up to a timestep, samples them down again by real and by fake score, and reads the captions.

    Where both mend a wrong image alike, their difference does not tell the student what is wrong with it.
    """

    EXAMPLES: ClassVar[str] = (
        f"{PROGRAM} --student outputs/toy-distill/pipeline --fake_score outputs/toy-distill/fake_score --out repair.json"
    )

    steps: Annotated[int, Option(at_least=1, at_most=TIMESTEPS[0])] = 5
    """Steps from each timestep down."""
    samples: Annotated[int, Option(at_least=1, at_most=MOST_IMAGES)] = 500
    """Prompts, of the toy world's val split."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    run_command(PROGRAM, ScoreRepairOptions, run, arguments)


@as_user_errors()
def run(options: ScoreRepairOptions) -> str:
    """Measures, and returns the table."""
    if options.out is not None:
        check_writable(options.out)
    found = measure(options)
    if options.out is not None:
        settings = {**settings_of(options), "steps": options.steps, "samples": options.samples}
        write_result(options.out, {**found, **settings})
    return table(found)


def table(found: Mapping[str, Any]) -> str:
    """Markdown of the captions that are right in the end, one row per timestep."""
    from evaluation.reports.markdown import markdown_table

    columns = [(share, name) for share in ("all", "wrong", "right") for name in (REAL, FAKE)]
    rows = [
        [timestep, *(_percent(by[name][share]) for share, name in columns)]
        for timestep, by in found["captions_right"].items()
    ]
    return markdown_table(["timestep", *(f"{share}, {name}" for share, name in columns)], rows)


def measure(options: ScoreRepairOptions) -> dict[str, Any]:
    """Share of captions that are right, of all images and of those that the student had wrong and right.

    Returns:
        `captions_right_before`: the student's own share; `captions_right`: by timestep, score and kind of image.
    """
    import torch
    from rich.console import Console
    from rich.progress import track

    from data.toy.training.classifier import AttributeClassifier
    from data.toy.world import IMAGE_PX, captions
    from sdxs_lightning.core.latents import to_uint8

    loaded = load_scores(options)
    if loaded.family.resolution != IMAGE_PX:
        raise ValueError(
            f"--base '{options.base}' has images of {loaded.family.resolution} px, and captions are read from those of the toy "
            f"world, of {IMAGE_PX} px; give one of its bases."
        )
    classifier = AttributeClassifier.from_pretrained("data/toy/classifier").eval()
    scores = {REAL: (loaded.real, options.guidance_scale), FAKE: (loaded.fake, 1.0)}
    prompts = captions("val", options.samples)
    seen: dict[tuple[int, str], list[Tensor]] = {(t, name): [] for t in TIMESTEPS for name in scores}
    before: list[Tensor] = []

    def right(latents: Tensor, batch: Sequence[str]) -> Tensor:
        return classifier.right(to_uint8(loaded.family.decode(latents)), batch).all(1)

    starts = range(0, options.samples, BATCH)
    with torch.no_grad():
        for start in track(starts, description="prompts", console=Console(stderr=True)):
            batch = prompts[start : start + BATCH]
            conditioning, made, noise = loaded.sample(batch, start)
            before.append(right(made, batch))
            for (timestep, name), parts in seen.items():
                score, scale = scores[name]
                latents = sampled_again(score, made, noise, timestep, conditioning, scale, options.steps)
                parts.append(right(latents, batch))
    was_right = torch.cat(before)
    by_timestep: dict[str, dict[str, Any]] = {str(timestep): {} for timestep in TIMESTEPS}
    for (timestep, name), parts in seen.items():
        by_timestep[str(timestep)][name] = _shares(torch.cat(parts), was_right)
    return {"captions_right_before": was_right.float().mean().item(), "captions_right": by_timestep}


def sampled_again(
    denoiser: Denoiser,
    latents: Tensor,
    noise: Tensor,
    timestep: int,
    conditioning: Conditioning,
    guidance_scale: float,
    steps: int,
) -> Tensor:
    """Noises latents up to a timestep and samples them down to 0 by DDIM.

    Args:
        denoiser: the score that samples.
        latents: (B, C, h, w), scaled.
        noise: of their shape.
        timestep: where sampling begins.
        conditioning: of B prompts.
        guidance_scale: 1 means none.
        steps: number of calls, evenly spaced.

    Returns:
        (B, C, h, w), float32.

    Source: SDEdit, arXiv:2108.01073, algorithm 1, with DDIM's deterministic step.
    """
    import torch

    from sdxs_lightning.core.noise_schedule import add_noise

    schedule = denoiser.schedule
    visited = [round(timestep * (steps - step) / steps) for step in range(steps + 1)]
    at = [torch.full((len(latents),), one, dtype=torch.int64) for one in visited]
    noisy = add_noise(latents, noise, at[0], schedule)
    for now, then in pairwise(at):
        _, pred_x0, noise_pred = denoiser.guided(noisy, now, conditioning, guidance_scale)
        noisy = schedule.alpha_t(then) * pred_x0 + schedule.sigma_t(then) * noise_pred
    return pred_x0


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _shares(right: Tensor, was_right: Tensor) -> dict[str, float | None]:
    kinds = {"all": right, "wrong": right[~was_right], "right": right[was_right]}
    return {kind: part.float().mean().item() if len(part) else None for kind, part in kinds.items()}


if __name__ == "__main__":
    main()
