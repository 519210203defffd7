"""Run a change's tests in forks of a process that has collected them: about ten times as fast as a new process each.

The changed function gets its new code in the fork, so every module that has imported it runs that. Programs that tests
start run the old code: a change that no test notices here is tried in a copy of the tree.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import IO, Any

import pytest

from mutating.changes import Change
from mutating.tree_copy import Failure, TreeCopy, limits_s

COLLECTED_WITHIN_S = 300.0
# How much is read from a pipe at a time.
READ_BYTES = 1 << 16


class UnfitError(Exception):
    """A change is in no function, or in one whose code cannot be replaced."""


@dataclass(frozen=True)
class NewCode:
    """New code for a function: its file, its qualified name, and the file's changed source."""

    file: str
    function: str
    source: str

    @classmethod
    def of(cls, change: Change, original: bytes) -> NewCode:
        """Return the new code of the function that a change is in. Raises UnfitError if it is in no function's body."""
        name, at = [], ast.parse(original)
        body: list[ast.stmt] = at.body
        while True:
            inside = [one for one in body if one.lineno <= change.line and change.last_line <= (one.end_lineno or 0)]
            if len(inside) != 1 or not isinstance(inside[0], ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                raise UnfitError(f"{change.file}:{change.line} is in no function")
            name.append(inside[0].name)
            body = inside[0].body
            if not isinstance(inside[0], ast.ClassDef):
                if change.line < body[0].lineno:
                    raise UnfitError(f"{change.file}:{change.line} is in no function's body")
                return cls(change.file, ".".join(name), change.applied_to(original).decode())

    def put_in_place(self) -> None:
        """Give the function its new code in this process. Raises UnfitError if the name leads to something else."""
        module = importlib.import_module(self.file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        found: Any = module
        for name in self.function.split("."):
            found = vars(found).get(name)
        found = getattr(found, "fget", None) or getattr(found, "func", None) or found
        while (wrapped := getattr(found, "__wrapped__", None) or getattr(found, "__func__", None)) is not None:
            found = wrapped
        if not isinstance(found, FunctionType):
            raise UnfitError(f"{self.function} is no function of {self.file}")
        code = next(
            _code_of(compile(self.source, module.__file__ or "", "exec", dont_inherit=True), self.function), None
        )
        at = (found.__code__.co_name, found.__code__.co_firstlineno, found.__code__.co_freevars)
        if code is None or at != (code.co_name, code.co_firstlineno, code.co_freevars):
            raise UnfitError(f"{self.function} of {self.file} is made by something else")
        found.__code__ = code


class ForkedTests:
    """A process that has collected tests in a copy of the tree, and runs them in forks. `with` ends it."""

    def __init__(self, tree: TreeCopy, tests: Sequence[str]) -> None:
        self._tree = tree
        files = sorted({test.partition("::")[0] for test in tests})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mutating.forked", *files],
            cwd=tree.path,
            env={**tree.environment(), "PYTHONPATH": f"{tree.path}{os.pathsep}{tree.path / 'tools'}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._answer(COLLECTED_WITHIN_S)

    def fails(self, new: NewCode | None, tests: Sequence[str], seconds: float, longest_s: float) -> Failure | None:
        """Run tests until one fails, like `TreeCopy.fails`. Raises UnfitError if the function cannot be changed."""
        limit_s, timeout_s = limits_s(seconds, longest_s)
        order = {"new": None if new is None else vars(new), "tests": tests, "limit_s": limit_s, "timeout_s": timeout_s}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._answer(timeout_s + limit_s)
        self._tree.tidy(spared=self._process.pid)
        if "unfit" in answer:
            raise UnfitError(answer["unfit"])
        return Failure(answer["reason"], tuple(answer["tests"])) if answer else None

    def _answer(self, within_s: float) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], within_s)[0] or not (line := stdout.readline()):
            raise RuntimeError(f"the process that collects the tests does not answer (status {self._process.poll()})")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> ForkedTests:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        self._tree.tidy()


class Forks:
    """Runs collected tests in forks, in place of pytest's own loop, and answers each line with an order by a line."""

    def __init__(self, orders: IO[bytes], answers: int) -> None:
        self._orders = orders
        self._answers = answers
        self._failed: pytest.TestReport | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Report that the tests are collected, and run those that are ordered."""
        items = {item.nodeid: item for item in session.items}
        self._say({})
        for line in self._orders:
            order = json.loads(line)
            self._say(self._in_fork([items[test] for test in order["tests"]], order))
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Remember the first report of a failure."""
        report = yield
        if report.failed and self._failed is None:
            self._failed = report
        return report

    def _in_fork(self, items: Sequence[pytest.Item], order: dict[str, Any]) -> dict[str, Any]:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.setpgid(0, 0)
            os.close(reader)
            self._run(items, order, writer)
        os.close(writer)
        with contextlib.suppress(OSError):
            os.setpgid(child, child)
        said = b"".join(_read_until(reader, time.monotonic() + order["timeout_s"]))
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        lines = [json.loads(line) for line in said.splitlines()]
        if lines and isinstance(lines[-1], dict):
            last: dict[str, Any] = lines[-1]
            return last
        reason = "too long" if status == signal.SIGKILL else f"status {os.waitstatus_to_exitcode(status)}"
        return {"reason": reason, "tests": lines[-1:] or order["tests"]}

    def _run(self, items: Sequence[pytest.Item], order: dict[str, Any], writer: int) -> None:
        """Run tests in the fork: report each that begins, and finally the result."""
        answer: dict[str, Any] = {}
        try:
            if order["new"] is not None:
                NewCode(**order["new"]).put_in_place()
            for item, following in zip(items, [*items[1:], None], strict=True):
                os.write(writer, json.dumps(item.nodeid).encode() + b"\n")
                item.add_marker(pytest.mark.timeout(order["limit_s"]))
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if self._failed is not None:
                    crash = getattr(self._failed.longrepr, "reprcrash", None)
                    what = str(crash.message if crash else self._failed.longrepr).splitlines()[:1]
                    answer = {"reason": " - ".join([item.nodeid, *what]), "tests": [item.nodeid]}
                    break
        except UnfitError as error:
            answer = {"unfit": str(error)}
        except BaseException as error:
            answer = {"reason": f"{item.nodeid} - {error!r}", "tests": [item.nodeid]}
        os.write(writer, json.dumps(answer).encode() + b"\n")
        os._exit(0)

    def _say(self, answer: dict[str, Any]) -> None:
        os.write(self._answers, json.dumps(answer).encode() + b"\n")


def _read_until(reader: int, deadline: float) -> Iterator[bytes]:
    """Yield what a child writes until it reports its result, ends, or its time is up."""
    while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        said = os.read(reader, READ_BYTES)
        if not said:
            return
        yield said
        if said.rpartition(b"\n")[0].rpartition(b"\n")[2].startswith(b"{"):
            return


def _code_of(code: CodeType, function: str) -> Iterator[CodeType]:
    """Yield the code of a function of this name inside that of its file, class or function."""
    name, _, rest = function.partition(".")
    for inner in code.co_consts:
        if isinstance(inner, CodeType) and inner.co_name == name:
            yield from _code_of(inner, rest) if rest else [inner]


def main(files: Sequence[str]) -> int:
    """Collect test files, and run the tests that standard input orders."""
    # Keep what tests print out of the answers.
    answers = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    orders = os.fdopen(os.dup(0), "rb")
    for stream in (0, 1):
        os.dup2(nowhere, stream)
    os.close(nowhere)
    return pytest.main(["-q", "-p", "no:cacheprovider", "--tb=line", *files], plugins=[Forks(orders, answers)])


if __name__ == "__main__":
    # Import it under its own name, so that its error classes are those of the module.
    from mutating import forked

    sys.exit(forked.main(sys.argv[1:]))
