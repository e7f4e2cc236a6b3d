"""The catalogue of mutations fits the code; `python -m tests.mutations` runs it."""

from __future__ import annotations

import pytest

from tests.helpers.tiny_run import ROOT
from tests.mutations.catalogue import MUTATIONS
from tests.mutations.mutation import Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_names_one_line_and_an_existing_test(mutation: Mutation) -> None:
    assert (ROOT / mutation.file).read_text().count(mutation.right) == 1
    file, _, name = mutation.test.partition("::")
    assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text()


def test_there_are_twenty_of_different_names() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 20
