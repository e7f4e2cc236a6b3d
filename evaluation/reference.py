"""Measures reference sets: `python -m evaluation.reference --protocol clean --images val2014 --out val.npz`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from evaluation.evaluate import ComputeOptions
from evaluation.protocols.names import PROTOCOL_NAMES, REFERENCE_METRICS, TOY_PROTOCOLS
from sdxs_lightning.command_line import Option, run_command


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions(ComputeOptions):
    """Measures the real images that FID and other metrics compare with, and writes their statistics (.npz: mu, sigma).

    Without options, those of the toy world's protocols, which is needed after its CLIP was trained again.
    """

    EXAMPLES: ClassVar[str] = """
    python -m evaluation.reference
    python -m evaluation.reference --protocol coco2014-30k-256 --images val2014 --out coco2014.npz
    python -m evaluation.reference --protocol clean --images val2017.zip --metrics fid kid --out val2017.npz
    """

    protocol: Annotated[tuple[str, ...], Option(choices=PROTOCOL_NAMES)] = TOY_PROTOCOLS
    """Protocols."""
    images: Annotated[str | None, Option(metavar="SET")] = None
    """Real images: a folder, a .zip file or .tar shards."""
    out: Annotated[Path | None, Option(metavar="FILE.npz")] = None
    """Statistics for FID; files of other metrics are written beside it."""
    metrics: Annotated[tuple[str, ...], Option(choices=REFERENCE_METRICS)] = ()
    """Metrics in place of the protocol's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        published = [name for name in self.protocol if name not in TOY_PROTOCOLS]
        if published and (self.images is None or self.out is None):
            raise ValueError(f"protocol {published[0]} needs --images, the real ones, and --out FILE.npz.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    run_command(
        "python -m evaluation.reference", ReferenceOptions, "evaluation.runner.commands.reference", arguments
    )


if __name__ == "__main__":
    main()
