"""20 seconds of `python -m tests.fuzz`, from its first seed; a failure says how to run its input again."""

from tests.fuzz.__main__ import fuzz


def test_no_damage_ends_in_a_traceback() -> None:
    done = fuzz(20.0)
    assert min(done.values()) > 20, done
