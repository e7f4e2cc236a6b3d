"""`python -m tests.fuzz` for the first inputs of its first seed; a failure says how to run its input again."""

from tests.fuzz.__main__ import fuzz
from tests.fuzz.targets import targets


def test_no_damage_ends_in_a_traceback() -> None:
    # A number, not a time: a fast machine must not meet inputs that no other has seen.
    assert fuzz(inputs=400) == dict.fromkeys(targets(), 400)
