"""What processes do with samples, and learn from them, in random states is what was recorded.

See `random_samples` and `random_learning`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import random_learning
import random_samples
from random_samples import answers_of, lines_of


def new_answers(recorded: Path, seed: int, answers: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the answers that are not those that were recorded for a seed."""
    lines, known = lines_of(answers, seed), recorded.read_text().splitlines()
    new = sorted(set(lines) - set(known))
    assert len(lines) == sum(line.startswith(f"{seed} ") for line in known)
    return {name: answers[name] for _, _, name in (line.split(" ", 2) for line in new)}


@pytest.mark.parametrize("seed", random_samples.SEEDS)
def test_what_is_done_with_samples_in_random_states_is_what_was_recorded(seed: int) -> None:
    answers = answers_of(seed, random_samples.RandomSamples, random_samples.LOOKS)
    assert new_answers(random_samples.RECORDED, seed, answers) == {}


@pytest.mark.parametrize("seed", random_learning.SEEDS)
def test_what_is_learnt_in_random_states_is_what_was_recorded(seed: int) -> None:
    answers = answers_of(seed, random_learning.RandomLearning, random_learning.LOOKS)
    assert new_answers(random_learning.RECORDED, seed, answers) == {}
