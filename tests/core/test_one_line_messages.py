"""Messages of errors are one line that a terminal shows, whatever they quote."""

from pathlib import Path

import pytest

from data.prepare.verify.shard_check import ShardFault
from data.shards.decoders import BadSampleError
from data.shards.tar_headers import BrokenShardError
from evaluation.images.prompt_files import read_prompts
from sdxs_lightning.core.errors import RunStopped, UserError, first_line, one_line


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("plain: 'ä', 1 x 2.", "plain: 'ä', 1 x 2."),
        ("two\nlines\r\n  and a third\n", "two lines and a third"),
        ("a\u2028b\x85c\x0bd", "a b c d"),
        ("\x1b[31mred\x1b[0m\x07", r"\x1b[31mred\x1b[0m\x07"),
        ("a\tb\x00c\x9b", r"a\x09b\x00c\x9b"),
        ("half \ud800 a pair", r"half \ud800 a pair"),
    ],
)
def test_one_line(message: str, shown: str) -> None:
    assert one_line(message) == shown
    for kind in (RunStopped, UserError, BadSampleError, BrokenShardError):
        assert str(kind(message)) == shown
    assert str(ShardFault("a.tar", "", message)) == f"a.tar: {shown}"


@pytest.mark.parametrize(
    ("error", "line"),
    [(OSError(), "OSError"), (ValueError(" \n\n"), "ValueError"), (ValueError("\n a \nb"), "a")],
)
def test_first_line(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_a_column_named_over_two_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text('a,"b\n\x1b[2Jc",d\n1,2,3\n')
    with pytest.raises(UserError) as refused:
        read_prompts(path)
    assert r"but a, b \x1b[2Jc, d)" in str(refused.value)
