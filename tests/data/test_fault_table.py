"""data/FAULTS.md is what the reader and the commands do, and none of it is a traceback."""

from tests.helpers.fault_table import TABLE, table


def test_the_table_of_faults_is_current() -> None:
    made = table()
    assert TABLE.read_text() == made, "write it anew: python -m tests.helpers.fault_table"
    assert (
        "naming nothing" not in made
        and "reports nothing" not in made
        and "exit code 1" not in made.split("|---|")[1]
    )
