"""Types of options that several commands have, and the options of the machine."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """A whole number from `least` on."""

    def number(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"'{text}' is no whole number from {least} on")
        return int(text)

    return number


def part(text: str) -> tuple[int, int]:
    """The pair (1, 4) of "1/4", the second of four parts."""
    one, slash, parts = text.partition("/")
    if not (slash and one.isdigit() and parts.isdigit() and int(one) < int(parts)):
        raise argparse.ArgumentTypeError(f"'{text}' is no part; 0/4 is the first of four, 3/4 the last")
    return int(one), int(parts)


def add_part(add: Callable[..., object]) -> None:
    """Adds `--part`."""
    add(
        "--part",
        type=part,
        default=(0, 1),
        metavar="I/N",
        help="make the I-th of N parts, counted from 0: one command a machine, all with the same --out",
    )


def add_device(add: Callable[..., object]) -> None:
    """Adds `--device` and `--processes`."""
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: GPUs, if there are any")
    add("--processes", type=at_least(1), help="default: one a GPU, or one a core (at most 8)")
