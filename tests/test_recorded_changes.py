"""Random operations change, and random reads find, what was recorded: see `random_changes`."""

from __future__ import annotations

import pytest
from random_changes import RECORDED, SEEDS, shown_checksum, steps_of


@pytest.mark.parametrize("seed", SEEDS)
def test_random_operations_change_what_they_were_recorded_to_change(seed: int) -> None:
    recorded = RECORDED.read_text().splitlines()[seed].split()
    for number, (name, text, checksum) in enumerate(steps_of(seed)):
        assert shown_checksum(checksum) == recorded[number], f"step {number}, {name}, now: {text}"
    assert len(recorded) == number + 1
