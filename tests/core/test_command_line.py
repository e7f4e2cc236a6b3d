"""Command lines from dataclasses: what they accept, what they refuse in which sentence, and what their help says."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import pytest
import torch

from sdxs_lightning.command_line import Command, Option, parse_options, run_command, run_subcommand
from sdxs_lightning.core.errors import CheckpointNotWritten, UserError


def fraction(text: str) -> tuple[int, int]:
    one, slash, parts = text.partition("/")
    if not (slash and one.isdigit() and parts.isdigit()):
        raise ValueError("must be two integers, 1/4")
    return int(one), int(parts)


Count = Annotated[int, Option(at_least=1)]


@dataclass(frozen=True, kw_only=True)
class Machine:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it runs."""
    processes: Count | None = None
    """Number of processes."""


@dataclass(frozen=True, kw_only=True)
class Resize(Machine):
    """Resizes images.

    Aspect ratios are kept.
    """

    EXAMPLES: ClassVar[str] = """
    python -m images resize a.tar --from photos/
        --side_px 64
    """

    shards: Annotated[tuple[str, ...], Option(positional=True)]
    """Folders of shards."""
    source: Annotated[str, Option(name="from", called=("model.init_args.base",))]
    """Folder of the images, 100 % of them
    readable."""
    side_px: Annotated[int, Option(at_least=1, deprecated=("side",))] = 512
    """Side of the output."""
    share: Annotated[float, Option(at_least=0, at_most=1)] = 0.5
    """Share of the images."""
    part: Annotated[tuple[int, int] | None, Option(parse=fraction, metavar="I/N")] = None
    """One part of several."""
    buckets: Annotated[int | None, Option(const=0, metavar="SIDE")] = None
    """Sizes of one area."""
    names: tuple[str, ...] = ()
    """Names of images."""
    contents: Annotated[tuple[str, ...] | None, Option(choices=("images", "latents"), const=())] = None
    """What is read."""
    metric: Annotated[str, Option(choices=("fid", "kid", "clip_score"))] = "fid"
    """What is measured."""
    record: bool = False
    """Also writes checksums."""
    out: Path | None = None
    """File of the result."""

    def __post_init__(self) -> None:
        if self.record and self.out is None:
            raise ValueError("--record needs --out.")


def parse(line: str) -> Resize:
    return parse_options(Resize, line.split(), "python -m images resize")


def test_values_and_defaults() -> None:
    line = "a.tar {0..3}.tar --from 1.50 --side_px=7 --share 1 --part 1/4 --names x 2 null --metric kid --record --out 12"
    assert parse(f"{line} --processes 3 --device cpu") == Resize(
        shards=("a.tar", "{0..3}.tar"),
        source="1.50",
        side_px=7,
        share=1.0,
        part=(1, 4),
        names=("x", "2", "null"),
        metric="kid",
        record=True,
        out=Path("12"),
        processes=3,
        device="cpu",
    )
    assert parse("a --from b") == Resize(shards=("a",), source="b")


def test_an_option_with_and_without_a_value() -> None:
    assert [parse(f"a --from b {one}").buckets for one in ("", "--buckets", "--buckets 64")] == [None, 0, 64]


def test_several_values_and_none() -> None:
    lines = {"": None, "--contents": (), "--contents images latents": ("images", "latents")}
    assert {line: parse(f"a --from b {line}").contents for line in lines} == lines
    with pytest.raises(UserError, match="--contents is 'image', but must be one of images, latents"):
        parse("a --from b --contents latents image")


def test_of_one_value_the_last_counts() -> None:
    assert parse("a --from b --side_px 7 --side_px 9").side_px == 9


def test_a_value_may_begin_with_a_hyphen() -> None:
    assert parse("a --from -b --part=1/4 --out -1e3") == Resize(
        shards=("a",), source="-b", part=(1, 4), out=Path("-1e3")
    )


def test_hyphens_are_underscores_in_options_and_stay_in_values() -> None:
    assert parse("a-b --from c-d --side-px 7") == Resize(shards=("a-b",), source="c-d", side_px=7)


def test_a_former_name_is_accepted_with_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("a --from b --side 7").side_px == 7
    assert capsys.readouterr().err == "--side is now called --side_px.\n"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("", "SHARDS and --from are required; see `python -m images resize --help`."),
        ("a", "--from is required; see `python -m images resize --help`."),
        ("a --from", "--from needs a value, text."),
        ("a --from b --names", "--names needs a value, text."),
        ("a --from b --side_px x", "--side_px is 'x', but must be an integer of at least 1."),
        ("a --from b --side_px 1.5", "--side_px is '1.5', but must be an integer of at least 1."),
        ("a --from b --side-px 0", "--side_px is '0', but must be an integer of at least 1."),
        (
            "a --from b --side_px 99999999999",
            "--side_px is '99999999999', but must be an integer of at least 1, at most 2147483647.",
        ),
        (
            "a --from b --buckets -99999999999",
            "--buckets is '-99999999999', but must be an integer, at least -2147483647.",
        ),
        ("a --from b --share nan", "--share is 'nan', but must be a number from 0 to 1."),
        ("a --from b --share 1.5", "--share is '1.5', but must be a number from 0 to 1."),
        ("a --from b --processes 0", "--processes is '0', but must be an integer of at least 1."),
        ("a --from b --part 1:4", "--part is '1:4', but must be two integers, 1/4."),
        ("a --from b --device gpu1", "--device is 'gpu1', but must be one of auto, cpu, cuda."),
        (
            "a --from b --metric clipscore",
            "--metric is 'clipscore', but must be one of fid, kid, clip_score (did you mean clip_score?).",
        ),
        (
            "a --form b",
            "--form is not an option (did you mean --from?); see `python -m images resize --help`.",
        ),
        ("a --from b --record yes", "unexpected argument 'yes'; see `python -m images resize --help`."),
        ("a --from b --record", "--record needs --out."),
        ("a --from b --record=yes", "--record takes no value, got 'yes'."),
        ("a --from b --help=all", "--help takes no value, got 'all'."),
        ("a --from b --share -1e-3", "--share is '-0.001', but must be a number from 0 to 1."),
        ("a --from b --share -inf", "--share is '-inf', but must be a number from 0 to 1."),
        ("a --from b --names -x", "--names needs a value, text."),
        ("a --from b --record -x", "unexpected argument '-x'; see `python -m images resize --help`."),
        (
            "a --from b --names x --names=y",
            "--names is given twice; give it once, with all values: --names A B.",
        ),
    ],
)
def test_what_is_refused_ends_with_exit_code_2_and_one_sentence(
    capsys: pytest.CaptureFixture[str], line: str, sentence: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command("python -m images resize", Resize, "no.such.module.run", line.split())
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", f"images resize: {sentence}\n")


def test_help_has_description_types_defaults_and_examples(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for part in (
        "usage: python -m images resize [-h] --from TEXT [--side_px INT]",
        "Resizes images.\n\nAspect ratios are kept.\n",
        "--from TEXT           Folder of the images, 100 % of them readable. (required)\n",
        "--side_px INT         Side of the output. (default: 512)\n",
        "--buckets [SIDE]      Sizes of one area.\n",
        "--metric {fid,kid,clip_score}\n                        What is measured. (default: fid)\n",
        "--device {auto,cpu,cuda}\n                        Where it runs. (default: auto)\n",
        "--record              Also writes checksums.\n",
        "\nexamples:\n  python -m images resize a.tar --from photos/\n      --side_px 64\n",
    ):
        assert part in text, part
    assert text.index("--out") < text.index("--device"), "the options that several commands share come last"


def test_a_field_without_help_is_an_error_of_ours() -> None:
    @dataclass(frozen=True)
    class Bare:
        side_px: int = 1

    with pytest.raises(AssertionError, match="Bare: no docstring under side_px"):
        parse_options(Bare, [])


def raised(capsys: pytest.CaptureFixture[str], error: Exception) -> str:
    """What a command prints that ends with an error of exit code 2."""

    def run(options: Resize) -> str:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_command("python -m images resize", Resize, run, ["a", "--from", "b"])
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("`side_px` is 3; give `device` cpu.", "--side_px is 3; give --device cpu."),
        ("set data.names, or data.side_px.", "set --names, or --side_px."),
        ("there is no folder 'x'; see model.init_args.base.", "there is no folder 'x'; see --from."),
        ("see data.names.init_args.model.", "see --names."),
        # What is no option of this command stays: commands, other keys, files and plain words.
        (
            "`uv sync` in side_px, data.other, data.names.first, 'a/data.names' or `other`.",
            "`uv sync` in side_px, data.other, data.names.first, 'a/data.names' or `other`.",
        ),
    ],
)
def test_a_message_of_the_library_names_the_options(
    capsys: pytest.CaptureFixture[str], message: str, shown: str
) -> None:
    assert raised(capsys, UserError(message)) == f"images resize: {shown}\n"


def test_too_little_memory_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for allocate in (lambda: torch.empty(2**52), lambda: np.empty(2**58), lambda: bytearray(2**60)):
        with pytest.raises((RuntimeError, MemoryError)) as refused:
            allocate()
        text = raised(capsys, refused.value)
        assert text.startswith("images resize: this machine has not enough memory for it (")
        assert text.endswith("); give a smaller --processes.\n") and text.count("\n") == 1
    with pytest.raises(RuntimeError, match="a bug"):
        raised(capsys, RuntimeError("a bug"))


def test_the_result_is_printed_and_errors_have_their_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["a", "--from", "b"]
    run_command("python -m images resize", Resize, lambda options: f"{options.source} resized", line)
    assert capsys.readouterr() == ("b resized\n", "")

    def full_disk(options: Resize) -> str:
        raise CheckpointNotWritten("the disk is full.")

    def interrupted(options: Resize) -> str:
        raise KeyboardInterrupt

    for run, code, sentence in ((full_disk, 4, "the disk is full."), (interrupted, 130, "interrupted.")):
        with pytest.raises(SystemExit) as ended:
            run_command("python -m evaluation.resize", Resize, run, line)
        assert ended.value.code == code
        assert capsys.readouterr() == ("", f"resize: {sentence}\n")


COMMANDS = [Command("resize", f"{__name__}.Resize", f"{__name__}.run_resize")]


def run_resize(options: Resize) -> str:
    return f"resized {options.source}"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_subcommands_are_listed(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    run_subcommand("python -m images", "Images.", COMMANDS, arguments)
    listed = capsys.readouterr().out
    assert (
        "usage: python -m images COMMAND ...\n\nImages.\n\ncommands:\n  resize  Resizes images.\n" in listed
    )


def test_a_subcommand_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run_subcommand("python -m images", "Images.", COMMANDS, ["resize", "a", "--from", "b"])
    assert capsys.readouterr().out == "resized b\n"
    with pytest.raises(SystemExit) as ended:
        run_subcommand("python -m images", "Images.", COMMANDS, ["resise"])
    assert ended.value.code == 2
    assert (
        capsys.readouterr().err
        == "images: 'resise' is not a command (did you mean resize?); accepted are resize.\n"
    )


def test_the_implementation_is_imported_after_the_options_are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_command.py").write_text("def run(options):\n    return options.source\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SystemExit):
        run_command("python -m images resize", Resize, "slow_command.run", ["--from"])
    assert "slow_command" not in sys.modules
    run_command("python -m images resize", Resize, "slow_command.run", ["a", "--from", "b"])
    assert "slow_command" in sys.modules


def test_checks_raise_user_errors() -> None:
    with pytest.raises(UserError, match="--record needs --out"):
        parse("a --from b --record")
