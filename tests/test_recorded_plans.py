"""The plans of many random states are those that were recorded: see `random_states`."""

from __future__ import annotations

import re

import pytest
from random_states import RECORDED, STATES, plan_of

_PLANS = dict(re.findall(r"^(\d+)\n((?:  .+\n)*)", RECORDED.read_text(), re.MULTILINE))
AT_A_TIME = 100


@pytest.mark.parametrize("first", range(0, STATES, AT_A_TIME))
def test_the_plan_of_a_state_is_the_one_that_was_recorded(first: int) -> None:
    assert len(_PLANS) == STATES
    for seed in range(first, first + AT_A_TIME):
        assert plan_of(seed).splitlines() == _PLANS[str(seed)].splitlines(), f"random state {seed}"
