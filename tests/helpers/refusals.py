"""What commands say when they refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest


def refusal(
    main: Callable[[list[str]], None], arguments: Sequence[object], capsys: pytest.CaptureFixture[str]
) -> str:
    """The one sentence on stderr with which a command ends, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, arguments)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2, said
    return said.strip().splitlines()[-1]
