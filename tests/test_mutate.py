"""`tools/mutate.py`: its changes change the code, and it reports those that no test notices."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import mutate
import pytest
from harness import wait_until
from mutating import changes, covering, tree_copy
from mutating.covering import Covering
from mutating.forked import ForkedTests, NewCode, UnfitError
from mutating.tree_copy import Failure, TreeCopy
from shared_workers import is_running

FIRST, SECOND = "tests/test_a.py::test_first", "tests/test_a.py::test_second[x]"
THIRD = "tests/test_a.py::test_third"
ALL = [FIRST, SECOND, THIRD]
ONE = "mpmm/policy/one.py"
TWO_TESTS = """
import os
import subprocess
import sys
import pytest
from mpmm.shared_state import durations

def test_nothing():
    pass

class TestIn:
    @pytest.mark.parametrize("seconds", [1])
    def test_child(self, seconds):
        child = os.fork()
        if not child:
            durations.to_ns(seconds)
            os._exit(0)
        assert os.waitpid(child, 0) == (child, 0)

    @pytest.mark.parametrize("seconds", [1])
    def test_program(self, seconds):
        code = f"from mpmm.shared_state import durations; durations.to_ns({seconds})"
        subprocess.run([sys.executable, "-c", code], check=True)
"""

WAYS_TO_END = ("passes", "fails[a - b]", "exits", "waits", "waits_deaf")
WAYS = """
import os
import signal
import threading
import pytest

def test_passes():
    pass

@pytest.mark.parametrize("way", ["a - b"])
def test_fails(way):
    assert False

def test_exits():
    os._exit(3)

def test_waits():
    threading.Event().wait()

def test_waits_deaf():
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    threading.Event().wait()
"""

FORKED = """
import contextlib
import functools
import os
import signal
import threading

LIMIT = 0

def plain(
    number=0,
):
    return 1

class Kinds:
    def method(self):
        return 2

    @staticmethod
    def static():
        return 3

    @classmethod
    def of_class(cls):
        return 4

    @property
    def read(self):
        return 5

    @functools.cached_property
    def cached(self):
        return 6

@functools.lru_cache
def wrapped():
    return 7

@contextlib.contextmanager
def context():
    def last():
        return 8

    yield last()
"""
FORKED_TESTS = """
import pytest
from mpmm.forked import Kinds, context, plain, wrapped

KINDS = Kinds()
WAYS = {
    "plain": plain,
    "method": KINDS.method,
    "static": Kinds.static,
    "of_class": KINDS.of_class,
    "read": lambda: KINDS.read,
    "cached": lambda: KINDS.cached,
    "wrapped": wrapped,
    "context": lambda: context().__enter__(),
}

@pytest.mark.parametrize("way", WAYS)
def test_it(way):
    assert WAYS[way]() > 0
"""

STARTS = """
import subprocess

def test_starts():
    subprocess.run("setsid sleep 600 > /dev/null 2>&1 & echo $! > pid", shell=True, check=True)
"""


class FakeTree:
    """A copy of the tree whose tests notice what makes a function return nothing."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def put(self, file: str, content: bytes) -> None:
        self.files[file] = content

    def fails(self, tests: list[str], seconds: float, longest_s: float) -> Failure | None:
        changed = any(content.count(b"return None") > 1 for content in self.files.values())
        return Failure("test_it", (SECOND,)) if changed and SECOND in tests else None

    def __enter__(self) -> FakeTree:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def run_with(monkeypatch: pytest.MonkeyPatch, root: Path, tree: type[FakeTree], forks: Callable[..., FakeTree]) -> None:
    """Have changes of the tree below `root` tried with stand-ins, one for copies of the tree and one for forks."""
    for module in (mutate, changes, covering):
        monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(mutate, "TreeCopy", tree)
    monkeypatch.setattr(mutate, "ForkedTests", forks)
    monkeypatch.setitem(mutate.PARTS, "policy", (("mpmm/policy/*.py",), ("test_a",)))


class BusyTree(FakeTree):
    """A copy of the tree on a busy machine: each run of a test takes the next of `fates`, None if it passes."""

    fates: ClassVar[dict[str, list[str | None]]] = {}
    asked: ClassVar[list[tuple[bool, list[str]]]] = []

    def fails(self, tests: list[str], seconds: float, longest_s: float) -> Failure | None:
        (content,) = self.files.values()
        self.asked.append((content != (changes.ROOT / ONE).read_bytes(), list(tests)))
        for test in tests:
            if (reason := self.fates[test].pop(0)) is not None:
                return Failure(reason, (test,))
        return None


def test_each_change_is_code_that_does_something_else() -> None:
    for part, (patterns, tests) in mutate.PARTS.items():
        assert all((changes.ROOT / "tests" / f"{test}.py").is_file() for test in tests), part
        assert all(list(changes.ROOT.glob(pattern)) for pattern in patterns), part
    for file in ("mpmm/policy/fairness.py", "mpmm/shared_state/durations.py", "mpmm/text/arguments.py"):
        source = (changes.ROOT / file).read_bytes()
        original = ast.dump(ast.parse(source))
        found = changes.Changes(file).all()
        assert len(found) == len(set(found)) > 5
        for change in found:
            assert ast.dump(ast.parse(change.applied_to(source))) != original, change
            assert change.diff().count("\n@@") == 1


def test_words_for_people_are_not_changed() -> None:
    changed = {change.line for change in changes.Changes("mpmm/errors.py").all()}
    lines = (changes.ROOT / "mpmm/errors.py").read_text().splitlines()
    assert all(
        "return" in lines[line - 1] or "self." in lines[line - 1] or "super" in lines[line - 1] for line in changed
    )


def test_the_first_word_of_a_row_is_where_the_row_begins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So to look as far before that is no change."""
    (tmp_path / "one.py").write_text("a = at + Ticket.STATE\nb = at - Ticket.STATE\nc = at + Ticket.MODEL\n")
    monkeypatch.setattr(changes, "ROOT", tmp_path)
    assert [change.line for change in changes.Changes("one.py").all()] == [2, 3]


def test_what_must_be_true_anyway_is_not_changed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("assert a == 1\nb = zip(a, a, strict=True)\nc = f(a, lenient=True)\nd = 2e9\n")
    monkeypatch.setattr(changes, "ROOT", tmp_path)
    assert [(one.line, one.new) for one in changes.Changes("one.py").all()] == [(3, "False"), (4, "4000000000.0")]


def test_the_same_seed_draws_the_same_changes(capsys: pytest.CaptureFixture[str]) -> None:
    listed = []
    for arguments in (["policy"], ["policy"], ["policy", "--seed", "2"], ["mpmm/policy/plan.py"]):
        assert mutate.main([*arguments, "--list", "--changes", "5"]) == 0
        listed.append(capsys.readouterr().out)
    assert listed[0] == listed[1] != listed[2]
    assert listed[0].count("\n--- mpmm/policy/") == 5
    assert mutate.main(["policy", "--list", "--changes", "5", "--only", "3"]) == 0
    assert capsys.readouterr().out.partition("\n\n3: ")[2] in listed[0]
    with pytest.raises(SystemExit):
        mutate.main(["no such part"])


def test_survivors_are_told_with_their_diffs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = "mpmm/policy/one.py"
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text("def first(x):\n    if x > 1:\n        return None\n    return x\n")
    for module in (mutate, changes, covering):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(mutate, "TreeCopy", FakeTree)
    kept = tmp_path / "map.json"
    Covering({FIRST: 0.1, SECOND: 0.2}, {file: {2: [FIRST], 4: [SECOND]}}).save(kept)
    arguments = ["policy", "--map", str(kept), "--way", "copies", "--tests", "test_a"]
    assert mutate.main(arguments) == 0
    said = capsys.readouterr().out
    assert f"{file}:4, nothing returned: test_it" in said
    assert f"{file}:2, another comparison: SURVIVES" in said
    assert "-    if x > 1:\n+    if (x >= 1):" in said
    assert "3 changes, 1 noticed (33 %), 2 survive" in said
    assert mutate.main([*arguments, "--at-least", "95"]) == 1
    (tmp_path / file).write_text("def first(x):\n    return x\n")
    with pytest.raises(SystemExit, match=r"was measured with another version of mpmm/policy/one\.py"):
        mutate.main(arguments)


def test_a_failure_names_the_test_that_failed_hung_or_ended_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    passes, fails, exits, waits, deaf = (f"tests/test_ways.py::test_{way}" for way in WAYS_TO_END)
    broken = "tests/test_broken.py::test_it"
    with TreeCopy() as tree:
        (tree.path / "tests" / "test_ways.py").write_text(WAYS)
        (tree.path / "tests" / "test_broken.py").write_text("import nothing_of_this_name\n")
        assert tree.fails([passes], 0.0, 0.0) is None
        assert tree.fails([passes, fails, exits], 0.0, 0.0) == Failure(f"{fails[6:]} - assert False", (fails,))
        assert tree.fails([passes, exits, fails], 0.0, 0.0) == Failure("status 3", (exits,))
        failure = tree.fails([passes, broken], 0.0, 0.0)
        assert failure is not None
        assert failure.tests == (broken,)
        monkeypatch.setattr(tree_copy, "LEAST_PATIENCE_S", 1.0)
        failure = tree.fails([passes, waits, fails], 0.0, 0.0)
        assert failure is not None
        assert "Timeout" in failure.reason
        assert failure.tests == (waits,)
        monkeypatch.setattr(tree_copy, "ENDING_S", 2.0)
        assert tree.fails([passes, deaf, fails], 0.0, 0.0) == Failure("too long", (deaf,))


def test_forks_run_a_changed_function_wherever_it_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ("plain", "method", "static", "of_class", "read", "cached", "wrapped", "context")
    tests = {kind: f"tests/test_forked.py::test_it[{kind}]" for kind in kinds}
    asked = list(tests.values())

    def changed(old: str, new: str) -> NewCode:
        return NewCode.of(_change_of("mpmm/forked.py", FORKED, old, new), FORKED.encode())

    with TreeCopy() as tree:
        (tree.path / "tests" / "test_forked.py").write_text(FORKED_TESTS)
        (tree.path / "mpmm" / "forked.py").write_text(FORKED)
        with ForkedTests(tree, asked) as forks:
            for number, test in enumerate(asked, 1):
                failure = forks.fails(changed(f"return {number}", "return 0"), asked, 0.0, 0.0)
                assert failure == Failure(f"{test} - assert 0 > 0", (test,))
                assert forks.fails(None, asked, 0.0, 0.0) is None
            failure = forks.fails(changed("return 3", "os._exit(4)"), asked, 0.0, 0.0)
            assert failure == Failure("status 4", (tests["static"],))
            moved = replace(changed("return 1", "return 0"), source="\n\n" + FORKED)
            with pytest.raises(UnfitError, match="is made by something else"):
                forks.fails(moved, asked, 0.0, 0.0)
            monkeypatch.setattr(tree_copy, "LEAST_PATIENCE_S", 1.0)
            failure = forks.fails(changed("return 2", "return threading.Event().wait()"), asked, 0.0, 0.0)
            assert failure is not None
            assert "Timeout" in failure.reason
            assert failure.tests == (tests["method"],)
            monkeypatch.setattr(tree_copy, "ENDING_S", 1.0)
            deaf = changed("return 2", "signal.signal(signal.SIGALRM, signal.SIG_IGN); threading.Event().wait()")
            assert forks.fails(deaf, asked, 0.0, 0.0) == Failure("too long", (tests["method"],))
    for outside in ("LIMIT = 0", "number=0"):
        with pytest.raises(UnfitError):
            changed(outside, outside.replace("0", "1"))


@pytest.mark.parametrize(
    ("way", "noticed", "in_copies"),
    [("forks", {3: "fork"}, {1}), ("both", {3: "fork", 4: "copy"}, {1, 4}), ("copies", {4: "copy"}, {1, 3, 4})],
)
def test_what_forks_do_not_notice_is_tried_in_a_copy(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    way: str,
    noticed: dict[int, str],
    in_copies: set[int],
) -> None:
    """As what runs only in programs that tests start, or is in no function."""
    code = "LIMIT = 1\ndef first(x):\n    x += x\n    return x\n"
    (tmp_path / ONE).parent.mkdir(parents=True)
    (tmp_path / ONE).write_text(code)
    copied: set[int] = set()

    class Tree(FakeTree):
        def fails(self, tests: list[str], seconds: float, longest_s: float) -> Failure | None:
            now = self.files[ONE].decode().splitlines()
            changed = {line for line, was in enumerate(code.splitlines(), 1) if now[line - 1] != was}
            copied.update(changed)
            return Failure("copy", (SECOND,)) if 4 in changed else None

    class Forks(FakeTree):
        def __init__(self, tree: FakeTree, tests: Sequence[str]) -> None:
            assert isinstance(tree, FakeTree)
            assert set(tests) == {FIRST, SECOND}

        def fails(  # type: ignore[override]  # it takes new code, where that of a tree takes a change
            self, new: NewCode | None, tests: list[str], *limits: float
        ) -> Failure | None:
            return Failure("fork", (FIRST,)) if new is not None and "x += x" not in new.source else None

    run_with(monkeypatch, tmp_path, Tree, Forks)
    kept = tmp_path / "map.json"
    Covering({FIRST: 0.1, SECOND: 0.2}, {ONE: {line: [FIRST, SECOND] for line in (1, 3, 4)}}).save(kept)
    mutate.main(["policy", "--map", str(kept), "--changes", "all", "--way", way])
    said = capsys.readouterr().out
    told = re.findall(rf"^\d+: {ONE}:(\d+), [^:]+: (.+)$", said, re.MULTILINE)
    assert sorted(told) == [(str(line), noticed.get(line, "SURVIVES")) for line in (1, 3, 4)]
    assert copied == in_copies


@pytest.mark.parametrize(
    ("way", "asked"),
    [
        # Of each line: what is asked in a fork and what in a copy.
        ("both", {2: ([], ALL), 3: ([SECOND], [SECOND, FIRST, THIRD]), 4: (ALL, ALL)}),
        ("forks", {2: (ALL, []), 3: ([SECOND], []), 4: (ALL, [])}),
        ("copies", {2: ([], ALL), 3: ([], [SECOND, FIRST, THIRD]), 4: ([], ALL)}),
    ],
)
def test_where_hardly_a_test_is_known_to_run_what_was_changed_the_others_are_asked_in_a_copy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str, asked: dict[int, tuple[list[str], list[str]]]
) -> None:
    """Of what a process has run that is killed in the end nothing is known."""
    code = "def first(x):\n    x += x\n    x *= x\n    x -= x\n"
    (tmp_path / ONE).parent.mkdir(parents=True)
    (tmp_path / ONE).write_text(code)
    found: dict[int, tuple[list[str], list[str]]] = {line: ([], []) for line in asked}

    def note(now: str, tests: Sequence[str], place: int) -> None:
        [line] = [line for line, was in enumerate(code.splitlines(), 1) if now.splitlines()[line - 1] != was]
        found[line][place].extend(tests)

    class Tree(FakeTree):
        def fails(self, tests: list[str], seconds: float, longest_s: float) -> Failure | None:
            note(self.files[ONE].decode(), tests, 1)
            return None

    class Forks(FakeTree):
        def __init__(self, tree: FakeTree, tests: Sequence[str]) -> None:
            """As that of forks."""

        def fails(  # type: ignore[override]  # it takes new code, where that of a tree takes a change
            self, new: NewCode, tests: list[str], *limits: float
        ) -> Failure | None:
            note(new.source, tests, 0)
            return None

    run_with(monkeypatch, tmp_path, Tree, Forks)
    kept = tmp_path / "map.json"
    Covering({FIRST: 0.1, SECOND: 0.2, THIRD: 0.3}, {ONE: {3: [SECOND], 4: ALL}}).save(kept)
    assert mutate.main(["policy", "--map", str(kept), "--changes", "all", "--way", way]) == 0
    assert found == asked


def test_those_are_asked_that_run_what_was_changed_the_quick_ones_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = "mpmm/policy/one.py"
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text("LIMIT = 1\ndef first(x):\n    if x > LIMIT:\n        return None\n    return x\n")
    for module in (changes, covering):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    slow, other = "tests/test_a.py::test_slow", "tests/test_b.py::test_slow"
    seconds = {slow: 9.0, FIRST: 0.5, SECOND: 0.1, other: 8.0}
    # Programs that a test starts import the file; this process did so before any test.
    lines = {file: {1: [other], 3: [slow, FIRST, other], 4: [SECOND], 5: [FIRST]}}
    found = {(change.line, change.what): change for change in changes.Changes(file).all()}
    asked = Covering(seconds, lines)
    # One of each file, however long it takes.
    assert asked.witnesses(found[3, "another comparison"], 1.0) == [FIRST, other]
    assert asked.witnesses(found[3, "another comparison"], 1.0, one_of_each=False) == [FIRST]
    assert asked.witnesses(found[3, "another comparison"], 20.0) == [FIRST, other, slow]
    # Every test that runs any of the file may notice a change in code that runs at its import.
    assert asked.witnesses(found[1, "another number"], 20.0) == [SECOND, FIRST, other, slow]
    assert Covering(seconds, {file: {3: [slow]}}).witnesses(found[5, "nothing returned"], 20.0) == []
    assert asked.all_of(["test_a"]) == [SECOND, FIRST, slow]
    assert asked.all_of(["test_a"], 1.0) == [SECOND, FIRST]
    # The map may be of more parts than this run is about.
    of_one = asked.of(["test_b"])
    assert of_one.witnesses(found[3, "another comparison"], 20.0) == of_one.all_of(["test_a", "test_b"]) == [other]


def test_coverage_knows_which_tests_run_which_lines(tmp_path: Path) -> None:
    with TreeCopy() as tree:
        (tree.path / "tests" / "test_two.py").write_text(TWO_TESTS)
        found = Covering.measured(tree, ["test_two"], 2)
        file = "mpmm/shared_state/durations.py"
        to_ns = [change for change in changes.Changes(file).all() if "to_ns" in _function_of(file, change.line)]
        # In which order depends on which of them was quicker.
        witnesses = {frozenset(found.witnesses(change, 60.0)) for change in to_ns}
        assert witnesses == {frozenset(f"tests/test_two.py::TestIn::test_{how}[1]" for how in ("child", "program"))}
    assert not tree.path.exists()


def test_what_tests_have_started_does_not_outlive_their_run() -> None:
    with TreeCopy() as tree:
        (tree.path / "tests" / "test_starts.py").write_text(STARTS)
        code, _ = tree.run(["tests/test_starts.py"], 60.0)
        assert code == 0
        pid = int((tree.path / "pid").read_text())
        wait_until(lambda: not is_running(pid), "what the test has started is ended")


def _change_of(file: str, source: str, old: str, new: str) -> changes.Change:
    start, line = source.index(old), source[: source.index(old)].count("\n") + 1
    return changes.Change(file, start, start + len(old), new, line, line, "another text")


def _function_of(file: str, line: int) -> str:
    tree = ast.parse((changes.ROOT / file).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return next((node.name for node in functions if node.lineno <= line <= (node.end_lineno or 0)), "")
