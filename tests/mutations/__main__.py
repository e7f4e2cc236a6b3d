"""Applies each mutation to a copy of the repository, and requires that its test fails: `python -m tests.mutations`.

    python -m tests.mutations                       # all; minutes
    python -m tests.mutations --only "ratio off by one"
    python -m tests.mutations --out mutations.json

Exit code 1 if a mutation survives, or if a test fails without any. Each run is a fork of one process that has imported the
libraries, so that it takes seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest

from tests.mutations.catalogue import MUTATIONS
from tests.mutations.mutation import Mutation

ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED = 0, 1
"""Exit codes of pytest: all passed, some failed. Others are errors of usage or collection."""


def copy_repository(folder: Path) -> None:
    """The tracked and new files; large ones as links."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source, target = ROOT / name, folder / name
        if not source.is_file():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".py":
            shutil.copyfile(source, target)
        else:
            target.symlink_to(source)


LIBRARIES = (
    "torch",
    "lightning.pytorch",
    "diffusers",
    "transformers",
    "peft",
    "torchmetrics",
    "jsonargparse",
    "pytest",
)
OUTPUT = "pytest_output.txt"
"""What the last tests said, in the copy."""
OWN = ("tests", "sdxs_lightning", "data", "evaluation")


def run_tests(folder: Path, tests: Sequence[str]) -> int:
    """Exit code of pytest in the copy, run in a fork of this process."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 70  # an internal error: neither passed nor failed
    try:
        quiet = os.open(folder / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os.chdir(folder)
        # The copy's packages, not those that this process was started from.
        for name in [name for name in sys.modules if name.split(".")[0] in OWN]:
            del sys.modules[name]
        sys.path[:] = [str(folder), *(entry for entry in sys.path if entry not in ("", str(ROOT)))]
        os.environ["PYTHONPATH"] = str(folder)
        code = int(pytest.main(["-q", "-x", "-n0", "-p", "no:cacheprovider", *tests]))
    finally:
        os._exit(code)


def caught(mutation: Mutation, folder: Path) -> bool:
    """Whether the test fails under a mutation; the file is restored.

    Raises:
        ValueError: unless the right text occurs once.
    """
    file = folder / mutation.file
    source = file.read_text()
    if source.count(mutation.right) != 1:
        raise ValueError(
            f"{mutation.name}: {mutation.file} has its line {source.count(mutation.right)} times, not once; update "
            "tests/mutations/method.py and use.py."
        )
    file.write_text(source.replace(mutation.right, mutation.wrong))
    try:
        return run_tests(folder, [mutation.test]) == FAILED
    finally:
        file.write_text(source)


def main() -> int:
    """Runs the mutations; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", metavar="NAME", action="append", help="a mutation of the catalogue; may be repeated"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    chosen = [one for one in MUTATIONS if options.only is None or one.name in options.only]
    if not chosen:
        parser.error(
            f"no mutation is named {', '.join(options.only)}; see tests/mutations/method.py and use.py"
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_repository(folder)
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # which tests/conftest.py would answer
        sys.dont_write_bytecode = True
        for library in LIBRARIES:
            import_module(library)
        tests = sorted({one.test for one in chosen})
        if run_tests(folder, tests) != PASSED:
            sys.stderr.write((folder / OUTPUT).read_text() + "\nthe tests fail without any mutation\n")
            return 1
        rows = []
        for one in chosen:
            started = time.monotonic()
            found = caught(one, folder)
            rows.append({"name": one.name, "file": one.file, "test": one.test, "caught": found})
            print(
                f"{'caught  ' if found else 'SURVIVED'}  {time.monotonic() - started:3.0f} s  {one.name}",
                flush=True,
            )
    survived = [row["name"] for row in rows if not row["caught"]]
    print(f"{len(rows) - len(survived)} of {len(rows)} mutations are caught")
    if options.out is not None:
        options.out.write_text(
            json.dumps({"caught": len(rows) - len(survived), "mutations": rows}, indent=2) + "\n"
        )
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
