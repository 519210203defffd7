"""The answers about many random rows are those that were recorded: see `random_reads`."""

from __future__ import annotations

import pytest
from random_reads import RECORDED, SEEDS, answers_of, lines_of


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_read_of_random_rows_is_what_was_recorded(seed: int) -> None:
    recorded = [line for line in RECORDED.read_text().splitlines() if line.startswith(f"{seed} ")]
    new = set(lines_of(seed)) - set(recorded)
    answers = answers_of(seed) if new else {}
    assert {name: answers[name] for _, _, name in (line.split(" ", 2) for line in sorted(new))} == {}
    assert len(lines_of(seed)) == len(recorded)
