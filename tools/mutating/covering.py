"""Which tests cover which lines, and how long each takes, so that the quick ones that may notice a change run first."""

from __future__ import annotations

import ast
import itertools
import json
import math
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import coverage

from mutating.changes import ROOT, Change
from mutating.tree_copy import TreeCopy

# Started and forked processes count for the test that started them.
CONFIGURATION = "[run]\nparallel = true\npatch = _exit, subprocess\n"
# Run by programs as they start, so that what they run counts with the test that has started them.
IN_PROGRAMS = """
import os
import coverage

measures, test = coverage.Coverage.current(), os.environ.get("PYTEST_CURRENT_TEST")
if measures is not None and test:
    measures.switch_context(test.rpartition(" (")[0] + "|run")
"""
MEASURED_WITHIN_S = 3600.0
# The least time that a test is taken to need.
LEAST_S = 0.001


class Covering:
    """Tests by the lines that they cover: `lines` has the names of tests by file and line; `tests` their seconds."""

    def __init__(self, tests: dict[str, float], lines: dict[str, dict[int, list[str]]]) -> None:
        self._seconds = tests
        self._lines = lines

    @classmethod
    def measured(cls, tree: TreeCopy, tests: Iterable[str], processes: int) -> Covering:
        """Run test files under coverage, without any change; tests that fail are not used as witnesses."""
        (tree.path / ".coveragerc").write_text(CONFIGURATION)
        (tree.path / "sitecustomize.py").write_text(IN_PROGRAMS)
        report, data = tree.path / "report.xml", tree.path / ".coverage"
        arguments = ["--cov=mpmm", "--cov-config=.coveragerc", "--cov-context=test", "--cov-report=", "-q", "-n"]
        files = [f"tests/{test}.py" for test in tests]
        code, output = tree.run([*arguments, str(processes), f"--junitxml={report}", *files], MEASURED_WITHIN_S)
        if not report.exists():
            raise SystemExit(f"the tests did not run (status {code}): {output[-2000:]}")
        return cls.read(tree.path, data, report)

    @classmethod
    def read(cls, root: Path, data: Path, report: Path) -> Covering:
        """Read the files that coverage and pytest have written about tests in a tree."""
        seconds = {}
        for case in ET.parse(report).iter("testcase"):
            if case.find("failure") is None and case.find("error") is None and case.find("skipped") is None:
                seconds[_node_id(root, case.attrib["classname"], case.attrib["name"])] = float(case.attrib["time"])
        recorded = coverage.CoverageData(str(data))
        recorded.read()
        lines = {}
        for file in recorded.measured_files():
            name = str(Path(file).resolve().relative_to(root.resolve()))
            lines[name] = {
                line: sorted({context.rpartition("|")[0] for context in contexts} & seconds.keys())
                for line, contexts in recorded.contexts_by_lineno(file).items()
            }
        return cls(seconds, lines)

    @classmethod
    def loaded(cls, path: Path) -> Covering:
        """Read what `save` has written. Raises SystemExit if the code has changed since then."""
        content = json.loads(path.read_text())
        stale = [file for file, size in content["code"].items() if _stamp(file) != size]
        if stale:
            raise SystemExit(f"{path} was measured with another version of {stale[0]}: remove it to measure again")
        tests = list(content["tests"])
        lines = {
            file: {int(line): [tests[number] for number in numbers] for line, numbers in of_file.items()}
            for file, of_file in content["lines"].items()
        }
        return cls(content["tests"], lines)

    def of(self, files: Iterable[str]) -> Covering:
        """Return what the tests of these test files cover, because no others are collected."""
        among = set(self.all_of(files))
        seconds = {test: took for test, took in self._seconds.items() if test in among}
        lines = {
            file: {line: [test for test in tests if test in among] for line, tests in of_file.items()}
            for file, of_file in self._lines.items()
        }
        return Covering(seconds, lines)

    def save(self, path: Path) -> None:
        """Write the tests and lines to a file."""
        number = {test: place for place, test in enumerate(self._seconds)}
        lines = {
            file: {line: [number[test] for test in tests] for line, tests in of_file.items()}
            for file, of_file in self._lines.items()
        }
        code = {file: _stamp(file) for file in self._lines}
        path.write_text(json.dumps({"code": code, "tests": self._seconds, "lines": lines}))

    def witnesses(self, change: Change, most_s: float, one_of_each: bool = True) -> list[str]:
        """Return the tests that cover a change, the quick ones first, as many as fit into `most_s`.

        one_of_each: include the quickest one of each test file in any case. Code that runs at the import of the file
        counts as covered by every test that runs any of the file: only tests that start programs are seen to run it.
        """
        of_file = self._lines.get(change.file, {})
        found = {test for line in range(change.line, change.last_line + 1) for test in of_file.get(line, [])}
        if not _is_in_function(change):
            found = {test for tests in of_file.values() for test in tests}
        by_time = sorted(found, key=lambda test: self._seconds[test])
        chosen, spent, seen = [], 0.0, set()
        for test in by_time:
            file = test.partition("::")[0]
            took = max(LEAST_S, self._seconds[test])
            if spent + took <= most_s or (one_of_each and file not in seen):
                chosen.append(test)
                spent += took
            seen.add(file)
        return chosen

    def all_of(self, files: Iterable[str], most_s: float = math.inf) -> list[str]:
        """Return the tests of test files, the quick ones first, as many as fit into `most_s`."""
        prefixes = tuple(f"tests/{file}.py::" for file in files)
        by_time = sorted((test for test in self._seconds if test.startswith(prefixes)), key=self._seconds.__getitem__)
        spent = itertools.accumulate(max(LEAST_S, self._seconds[test]) for test in by_time)
        return [test for test, seconds in zip(by_time, spent, strict=True) if seconds <= most_s]

    def seconds(self, tests: Sequence[str]) -> float:
        """Return how long tests took without a change."""
        return sum(self._seconds[test] for test in tests)

    def longest(self, tests: Sequence[str]) -> float:
        """Return how long the longest one of tests took without a change."""
        return max((self._seconds[test] for test in tests), default=0.0)


def _node_id(root: Path, class_name: str, name: str) -> str:
    """Turn the names in a JUnit report into pytest's name of the test."""
    parts = class_name.split(".")
    for end in range(len(parts), 0, -1):
        file = Path(*parts[:end]).with_suffix(".py")
        if (root / file).is_file():
            return "::".join([file.as_posix(), *parts[end:], name])
    return f"{class_name}::{name}"


def _stamp(file: str) -> int:
    path = ROOT / file
    return zlib.crc32(path.read_bytes()) if path.exists() else 0


def _is_in_function(change: Change) -> bool:
    tree = ast.parse((ROOT / change.file).read_bytes())
    return any(
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body[0].lineno <= change.line <= (node.end_lineno or 0)
        for node in ast.walk(tree)
    )
