"""What other threads and finalizers change without a lock is copied in one step before it is iterated."""

from __future__ import annotations

import ast
import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from harness import CHECKOUT, NewManager
from loaders import LoadsObject

from mpmm.model_manager.operations import LoadedInstance

# More than Python keeps freed tuples of each size, which it uses without a garbage collection.
MANY = 3000
CONTAINERS = re.compile(r"\b(dict|set|defaultdict|OrderedDict|Weak\w+)\b")


def slow_copies(text: str) -> Iterator[str]:
    """Yield the copies of attributes and global variables in a module's text that are not made in one step."""
    tree = ast.parse(text)
    annotated = {
        ast.unparse(node.target): ast.unparse(node.annotation).removeprefix("weakref.")
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign)
    }
    lasting = {ast.unparse(node.target) for node in tree.body if isinstance(node, ast.AnnAssign)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func) in ("list", "tuple") and len(node.args) == 1):
            continue
        copied = ast.unparse(node.args[0])
        whole = copied.removesuffix(".items()")
        # A variable of a function is not shared, unlike an attribute, or what `vars` returns.
        is_shared = "." in whole or "(" in whole or whole in lasting
        is_container = CONTAINERS.match(annotated.get(whole, "")) is not None
        if is_shared and (whole != copied or (is_container and ast.unparse(node.func) == "tuple")):
            yield ast.unparse(node)


def test_copies_are_made_in_one_step() -> None:
    found = {
        str(path.relative_to(CHECKOUT)): copies
        for path in sorted((CHECKOUT / "mpmm").rglob("*.py"))
        if (copies := list(slow_copies(path.read_text())))
    }
    assert found == {}


@pytest.mark.parametrize(
    "text",
    [
        "list(self._a.items())",
        "tuple(one.a.items())",
        "list(vars(module).items())",
        "list(_a.items())",
        "tuple(self._a)",
    ],
)
def test_a_copy_in_many_steps_is_found(text: str) -> None:
    kept = "_a: dict[int, int] = {}\nself._a: set[int] = set()\n"
    assert list(slow_copies(kept + text)) == [text]
    fast = "list(self._a); list(_a.values()); self._a.copy(); tuple(a); list(a.items()); tuple(self.b)"
    assert list(slow_copies(kept + fast)) == []


@contextmanager
def at_each_collection(call: Callable[[int], object]) -> Iterator[list[int]]:
    """Collect garbage as often as possible, and call `call`, as a finalizer, with the number of the collection."""
    collections: list[int] = []

    def run(phase: str, info: object) -> None:
        if phase == "start":
            collections.append(len(collections))
            call(len(collections))

    before = gc.get_threshold()
    gc.callbacks.append(run)
    gc.set_threshold(1)
    try:
        yield collections
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(run)


def test_finalizers_may_change_what_is_copied(new_manager: NewManager) -> None:
    session = new_manager()._connected()
    objects, grants = session.owned.in_rows, session.held._taken_grants
    # A collection comes at every other allocation, so each step of a copy is tried at odd and at even ones.
    kept: list[set[int]] = []
    for turn in range(4):
        copies = {row: LoadedInstance(row, 1, "a", object()) for row in range(10_000, 10_000 + MANY)}
        objects.update(copies)
        late = LoadedInstance(0, 1, "a", object())
        try:
            with at_each_collection(lambda number: objects.update({number: late})) as collections:  # noqa: B023  # at once
                kept += [set() for _ in range(turn)]
                found = session.owned.all()
        finally:
            objects.clear()
        assert collections
        assert [copy for copy in found if copy is not late] == list(copies.values())
        grants.update((0, 2**40 + number) for number in range(MANY))
        try:
            with (
                session.namespace.transaction() as t,
                at_each_collection(lambda number: grants.add((0, number))) as collections,
            ):
                kept += [set() for _ in range(turn)]
                session.held.free_taken_tickets(t)
        finally:
            grants.clear()
        assert collections


def test_an_object_that_another_thread_is_about_to_unload_is_passed_over(new_manager: NewManager) -> None:
    manager = new_manager()
    with manager.model("a", LoadsObject()):
        pass
    session = manager._connected()
    model = session.namespace.tables.model_row("a")
    assert model is not None
    with session.namespace.transaction():
        row = session.owned.find_idle(model)
        assert row is not None
        # As between the two steps in which that thread strikes it off.
        session.owned.rows_of_model[model].insert(0, row + 1)
        session.owned.rows_of_model[model].append(row + 1)
        assert session.owned.find_idle(model) == row
        session.owned.rows_of_model[model][:] = [row]
