"""Publishes a finished run: `python -m sdxs_lightning.publish RUN --out FOLDER [--repo_id NAME]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from sdxs_lightning.command_line import Option, run_command
from sdxs_lightning.core.option_bounds import LARGEST_SCALE, MOST_STEPS

PROGRAM = "python -m sdxs_lightning.publish"


@dataclass(frozen=True, kw_only=True)
class PublishOptions:
    """Makes a hub folder from a finished run (student, decoder, ControlNet or LoRA), and uploads it.

    Weights, samples, configuration, score files and a model card. Numbers come from the run's score files, which
    `python -m evaluation.evaluate ... --out RUN/NAME.json` writes; a number that does not agree with its file is refused. The
    card may be edited: a second call checks its numbers again, and uploads.
    """

    EXAMPLES: ClassVar[str] = f"""\
{PROGRAM} outputs/sd15-distill --out hub/student --base_model stable-diffusion-v1-5/stable-diffusion-v1-5
{PROGRAM} outputs/sd15-lora --out hub/ink --student me/sdxs-student --licence creativeml-openrail-m --repo_id me/ink-lora
{PROGRAM} outputs/sd15-style-lora --out hub/ink --partner models/sd15 --steps 25 --guidance_scale 7.5
{PROGRAM} outputs/sd15-distill --out hub/student --repo_id me/sdxs-student --private"""

    run: Annotated[Path, Option(positional=True)]
    """Folder of the run."""
    out: Path
    """Folder to create, or one that this command made before, which is checked."""
    repo_id: str | None = None
    """Hub repository to upload to (org/name), made if it is missing; without it nothing is uploaded."""
    private: bool = False
    """Make the repository private if it is made."""
    base_model: str | None = None
    """Hub id of the base, for the card; by default the run's base if that is a hub id."""
    student: str | None = None
    """Hub id of the student that a LoRA or ControlNet was made for, for the card's code; by default its folder."""
    partner: Annotated[Path | None, Option(metavar="DIR")] = None
    """Pipeline here that a LoRA, ControlNet or decoder is used with; by default the run's student, or its base."""
    steps: Annotated[int | None, Option(at_least=1, at_most=MOST_STEPS)] = None
    """Steps of a base that is used with a LoRA, ControlNet or decoder (25); students have their own."""
    guidance_scale: Annotated[float | None, Option(at_least=0, at_most=LARGEST_SCALE)] = None
    """Its guidance (7.5)."""
    licence: str | None = None
    """Licence of the base in the hub's spelling; by default that of the base's own card, or of a known base."""
    prompts: tuple[str, ...] = ()
    """Prompts of the samples; the first is that of the card's code."""
    scale: Annotated[float | None, Option(at_least=0, at_most=LARGEST_SCALE)] = None
    """Scale of a LoRA (1) or ControlNet (that of its training) in the card's code."""
    condition: Path | None = None
    """Condition image of a ControlNet's samples; its middle where the shape differs."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exit codes as in `sdxs_lightning.core.errors`."""
    run_command(PROGRAM, PublishOptions, "sdxs_lightning.publishing.command.publish", arguments)


if __name__ == "__main__":
    main()
