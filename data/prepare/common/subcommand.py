"""What a command of `python -m data.prepare` consists of."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple


class Subcommand(NamedTuple):
    """One command; `__main__.py` lists them."""

    name: str
    summary: str
    """One line of the general help."""
    examples: str
    """Stand below the command's own help."""
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], str]
    """Does the work and returns what to tell at the end; raises a RunStopped for whatever the user can mend."""
