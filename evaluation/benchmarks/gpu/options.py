"""Options of the command, and its sections; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

from sdxs_lightning.command_line import Option


class Section(NamedTuple):
    """A part of the benchmark, run in a process of its own."""

    implementation: str
    """Dotted path of a function that takes a `SectionRun`."""
    seconds: float
    """Expected on an H100 of 80 GB (`expected.py`); a section is ended at twice this, the last at the command's end."""
    gigabytes: float
    """Expected peak of GPU memory, GiB."""


_HERE = "evaluation.benchmarks.gpu."
SECTIONS = {
    "machine": Section(_HERE + "machine.run", 10, 2),
    "tests": Section(_HERE + "gpu_tests.run", 80, 6),
    "distill": Section(_HERE + "distillation.run_sd15", 100, 54),
    "inference": Section(_HERE + "inference.run", 70, 27),
    "distill_sdxl": Section(_HERE + "distillation.run_sdxl", 50, 94),
    "toy": Section(_HERE + "toy.run", 90, 8),
    "attention": Section(_HERE + "attention.run", 15, 12),
    "evaluation": Section(_HERE + "measuring.run", 15, 6),
    "stages": Section(_HERE + "stages.run", 40, 34),
}
"""In order of value."""


@dataclass(frozen=True, kw_only=True)
class GpuOptions:
    """Measures training, inference and evaluation on one GPU, section by section; results are written as they come."""

    EXAMPLES: ClassVar[str] = (
        "python -m evaluation.benchmarks.gpu --minutes 8 --out evaluation/results/gpu.json\n"
        "python -m evaluation.benchmarks.gpu --minutes 4 --out evaluation/results/gpu.json --resume\n"
        "python -m evaluation.benchmarks.gpu --only distill --out evaluation/results/gpu.json   # measured again\n"
        "python -m evaluation.benchmarks.gpu --device cpu --tiny --out /tmp/gpu.json   # every section, tiny, without GPU\n"
        "python -m evaluation.benchmarks.gpu --dry_run --out gpu.json                  # expected seconds and bytes"
    )

    out: Path
    """JSON file, rewritten after each section; an earlier file of the same machine is extended, and only rows that are measured
    again change. Files of a section, such as the toy student, go to a folder of this name without .json."""
    minutes: Annotated[float, Option(at_least=0.1)] = 8.0
    """Time for all sections; those that did not fit are named in the file."""
    only: Annotated[tuple[str, ...], Option(choices=tuple(SECTIONS))] = ()
    """Sections to run; by default all, in their order."""
    resume: bool = False
    """Measure only what the file lacks: rows that failed or were not reached."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where to run."""
    tiny: bool = False
    """Tiny networks and few repetitions: checks the command itself."""
    dry_run: bool = False
    """Print what each section is expected to need, and run nothing."""

    @property
    def files(self) -> Path:
        """Folder for the files that sections leave."""
        return self.out.with_suffix("")
