"""The answers of functions of the policy to random arguments are those that were recorded: see `random_parts`."""

from __future__ import annotations

import pytest
from random_parts import GROUPS, Group, calls, recorded, shown

_RECORDED = recorded()


@pytest.mark.parametrize("group", GROUPS)
def test_the_answers_of_functions_are_those_that_were_recorded(group: Group) -> None:
    for name, of_name in calls(group).items():
        assert len(_RECORDED[name]) == len(of_name)
        for (function, arguments), before in zip(of_name, _RECORDED[name], strict=True):
            assert shown(function(*arguments)) == before, f"{name}{arguments}"
