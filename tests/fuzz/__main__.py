"""Feeds damaged bytes to everything that reads foreign files; any exception but a refusal in words is a failure.

    python -m tests.fuzz --minutes 10
    python -m tests.fuzz --target json --seed 7 --only 1234     # one input again, with its traceback

Inputs are a function of (seed, target, number), so a failure is named by three values. One process; at nice 10.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import tempfile
import time
import traceback
import unicodedata
from itertools import count
from pathlib import Path

from tests.fuzz.mutations import mutate
from tests.fuzz.targets import Target, targets

SEEDS = (1, 2, 3, 4, 5, 6, 7, 8)
SLOW_SECONDS = 5.0  # for one input of at most 1 MB: a bomb, or a loop


def content_of(name: str, target: Target, seed: int, number: int) -> bytes:
    """The input of a number."""
    rng = random.Random(f"{seed} {name} {number}")
    return mutate(rng, rng.choice(target.seeds), target.mutations)


def failure(target: Target, content: bytes, folder: Path) -> str:
    """What an input did that it should not, or ""."""
    started = time.process_time()
    try:
        target.run(content, folder)
    except target.accepted as error:
        unprintable = [
            character for character in str(error) if unicodedata.category(character) in ("Cc", "Cs")
        ]
        if unprintable:
            return f"line breaks or characters that a terminal does not show: {unprintable} in {str(error)!r}"
    except Exception:
        return traceback.format_exc()
    seconds = time.process_time() - started
    return f"it took {seconds:.1f} s" if seconds > SLOW_SECONDS else ""


def fuzz(
    names: list[str] | None = None,
    seed: int = SEEDS[0],
    *,
    inputs: int | None = None,
    seconds: float = math.inf,
) -> dict[str, int]:
    """Fuzz all targets in turn; returns the number of inputs of each.

    Args:
        names: targets; None for all.
        seed: of the inputs.
        inputs: of each target; None for no limit.
        seconds: how long.

    Raises:
        AssertionError: with the first failure and how to run it again.
    """
    chosen = {name: target for name, target in targets().items() if names is None or name in names}
    done = dict.fromkeys(chosen, 0)
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        for number in count() if inputs is None else range(inputs):
            for name, target in chosen.items():
                if time.monotonic() > end:
                    return done
                if found := failure(target, content_of(name, target, seed, number), Path(folder)):
                    raise AssertionError(f"--target '{name}' --seed {seed} --only {number}: {found}")
                done[name] += 1
    return done


def main() -> int:
    """Parse the command line, and fuzz."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="for all seeds together (default: %(default)s)"
    )
    parser.add_argument("--target", action="append", choices=list(targets()), help="by default all of them")
    parser.add_argument("--seed", type=int, action="append", help=f"by default {SEEDS}, one after another")
    parser.add_argument("--only", type=int, help="one input of one target and seed")
    options = parser.parse_args()
    os.nice(10)
    seeds = options.seed or list(SEEDS)
    if options.only is not None:
        (name,), (seed,) = options.target, seeds
        target = targets()[name]
        content = content_of(name, target, seed, options.only)
        with tempfile.TemporaryDirectory() as folder:
            print(failure(target, content, Path(folder)) or f"fine: {content[:200]!r}")
        return 0
    for seed in seeds:
        try:
            done = fuzz(options.target, seed, seconds=options.minutes * 60 / len(seeds))
        except AssertionError as error:
            print(error)
            return 1
        print(
            f"seed {seed}: {', '.join(f'{name} {number:,}' for name, number in done.items())}; no failure",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
