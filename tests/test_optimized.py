"""`python -O` leaves out no check: a change that the state forbids raises an error, and changes nothing."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import CHECKOUT

from mpmm import SegmentCorruptError
from mpmm.model_manager import ModelManager
from mpmm.shared_state.layout import Instance
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.shared_state.transaction import Transaction

# The remaining assertions state only what type checkers cannot know.
MAY_ASSERT = {"lease.py": 1, "trace.py": 1, "client.py": 1, "channel.py": 1, "fork_parent.py": 1, "timeline.py": 1}


def asserts_in(path: Path) -> int:
    return sum(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(path.read_text())))


def test_asserts_only_narrow_types() -> None:
    found = {path: asserts_in(path) for path in (CHECKOUT / "mpmm").rglob("*.py")}
    too_many = {str(path): count for path, count in found.items() if count > MAY_ASSERT.get(path.name, 0)}
    assert not too_many, "raise an error instead, which `python -O` keeps"


def test_change_from_a_state_that_cannot_be_is_refused(new_manager: Callable[..., ModelManager]) -> None:
    manager = new_manager()
    with manager.model("a", lambda: "handle"):
        pass
    namespace = manager._connected().namespace
    row = next(iter(namespace.tables.used_rows(namespace.segment.layout.instances)))
    before = read_snapshot("test").instances
    changes: list[Callable[[Transaction], object]] = [
        lambda t: namespace.transitions.unloads.end(t, row),
        lambda t: namespace.transitions.leases.end(t, row),
        lambda t: namespace.transitions.holds.discard(t, row),
        lambda t: namespace.transitions.holds.release(t, row),
        lambda t: namespace.transitions.unloads.hand_over(t, row, namespace.slot),
    ]
    for change in changes:
        # More of the transaction is undone with it.
        with (
            pytest.raises(SegmentCorruptError, match="which does not allow this change"),
            namespace.transaction() as t,
        ):
            t.set(namespace.tables.instance(row) + Instance.SINCE, 1)
            change(t)
    assert [copy.state for copy in read_snapshot("test").instances] == [copy.state for copy in before] == ["idle"]
    assert namespace.segment.words[namespace.tables.instance(row) + Instance.SINCE] != 1


def test_arrays_over_a_segment_that_was_unmapped_are_refused(new_manager: Callable[..., ModelManager]) -> None:
    manager = new_manager()
    segment = manager._connected().namespace.segment
    manager.shutdown()
    with pytest.raises(ValueError, match="released memoryview"):
        segment.view(segment.layout.instances)
