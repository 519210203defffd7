"""Change the code at random, one place at a time, and see whether a test notices: `python tools/mutate.py [PART ...]`.

PART is one of the parts below, or a file of `mpmm/`; all parts by default. Each change is made in a copy of the tree,
against which the tests of the part run, the quick ones first, until one fails. What none notices is printed as a diff:
either a test is missing, or the change makes no difference, which is for the reader to say. The same seed makes the
same changes of the same code; `--only N` makes the Nth of them again.

    python tools/mutate.py policy scheduler --changes 30 --seed 1
    python tools/mutate.py mpmm/policy/eviction.py --seed 1 --only 7

The tests of servers and of shared state start many processes: a hundred changes take an hour or more on two processors.
Ends with status 1 if fewer than `--at-least` percent were noticed, with 2 if the tests fail without any change.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import difflib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("mpmm", "tests", "tools", "setup.cfg")
# Part: its files, and the tests that should notice a change in them, the quickest ones first.
PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "policy": (
        ("mpmm/policy/*.py",),
        (
            *("test_policy", "test_policy_costs", "test_policy_queue", "test_policy_sharing", "test_policy_properties"),
            *("test_backoff", "test_suspension_policy", "test_policy_parts"),
            *("test_suspension", "test_ledger", "test_out_of_memory", "test_fairness"),
        ),
    ),
    "scheduler": (
        ("mpmm/scheduling/*.py",),
        (
            *("test_scheduler", "test_table_rows", "test_views", "test_shortcut_rules"),
            *("test_without_a_plan", "test_hand_overs", "test_copies", "test_fairness", "test_devices", "test_manager"),
            *("test_manager_errors", "test_left_asleep", "test_load_ahead", "test_users", "test_priority"),
        ),
    ),
    "shared_state": (
        ("mpmm/shared_state/*.py", "mpmm/shared_state/*/*.py"),
        (
            *("test_invariants", "test_table_rows", "test_views"),
            *("test_durations", "test_namespace", "test_accounting", "test_full_tables", "test_bounded_work"),
            *("test_copies", "test_leases", "test_model_of_promises", "test_deaths", "test_stopped_processes"),
            *("test_left_asleep", "test_crash_points", "test_call_crash_points"),
        ),
    ),
    "sources": (
        ("mpmm/sources/*.py", "mpmm/memory/monitor*.py", "mpmm/memory/sample*.py", "mpmm/memory/listed_pids.py"),
        (
            *("test_gpu_monitor", "test_sources", "test_source_choice", "test_host_memory", "test_amd_source"),
            *("test_source_failures", "test_attribution"),
        ),
    ),
    "multi_process_shared": (
        (
            "mpmm/multi_process_shared/*.py",
            "mpmm/multi_process_shared/rpc/*.py",
            "mpmm/multi_process_shared/forkserver/*.py",
        ),
        (
            *("test_payloads", "test_shared_calls", "test_shared_unloads", "test_multi_process_shared", "test_zygote"),
            *("test_servers", "test_server_faults"),
        ),
    ),
    "estimator": (
        ("mpmm/memory/estimator.py", "mpmm/memory/shared_estimator.py", "mpmm/memory/estimates_file.py"),
        ("test_resource_estimator", "test_estimates_file", "test_accounting"),
    ),
    "observability": (
        ("mpmm/observability/*.py", "mpmm/text/printable.py"),
        ("test_printable", "test_cli", "test_top", "test_trace"),
    ),
    "arguments": (("mpmm/text/arguments.py",), ("test_bad_input",)),
}
# Tests that a change makes hang are ended after so many times what they take without one.
PATIENCE = 4
LEAST_PATIENCE_S = 60.0
LONGEST_REASON = 160

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
FUNCTIONS = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Change:
    """One change: `new` in place of the bytes from `start` to `end` of a file. line, what: for people."""

    file: str
    start: int
    end: int
    new: str
    line: int
    what: str

    def applied_to(self, source: bytes) -> bytes:
        """Return the changed file."""
        return source[: self.start] + self.new.encode() + source[self.end :]

    def diff(self) -> str:
        """Return the change as a diff of the file."""
        before = (ROOT / self.file).read_bytes()
        after = self.applied_to(before).decode().splitlines()
        return "\n".join(difflib.unified_diff(before.decode().splitlines(), after, self.file, self.file, "", "", 2, ""))


class Changes:
    """All changes that are made of a file's code: not of its docstrings, types, messages or log lines."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._source = (ROOT / file).read_bytes()
        self._line_starts = [0]
        for line in self._source.splitlines(keepends=True):
            self._line_starts.append(self._line_starts[-1] + len(line))

    def all(self) -> list[Change]:
        """Return the changes in the order of their places."""
        found = list(self._in(ast.parse(self._source)))
        return sorted(found, key=lambda change: (change.start, change.end, change.new))

    def _in(self, node: ast.AST) -> Iterator[Change]:
        yield from self._of(node)
        for child in _code_in(node):
            yield from self._in(child)

    def _of(self, node: ast.AST) -> Iterator[Change]:
        """Yield the changes of a node itself."""
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            changed = copy.copy(node)
            changed.ops = [COMPARISONS[type(node.ops[0])]()]
            yield self._expression(node, changed, "another comparison")
        elif isinstance(node, ast.BoolOp):
            changed_bool = copy.copy(node)
            changed_bool.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            yield self._expression(node, changed_bool, "and for or")
            for left_out in range(len(node.values)):
                rest = [value for place, value in enumerate(node.values) if place != left_out]
                fewer = rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
                yield self._expression(node, fewer, "a condition left out")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            yield self._expression(node, node.operand, "no longer negated")
        elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            changed_sum = copy.copy(node)
            changed_sum.op = ARITHMETIC[type(node.op)]()
            yield self._expression(node, changed_sum, "another operator")
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield self._expression(node, ast.Constant(not node.value), "the opposite")
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            yield self._expression(node, ast.Constant(node.value + 1), "another number")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
            yield self._expression(node.func, ast.Name(FUNCTIONS[node.func.id]), "another function")
        elif isinstance(node, ast.IfExp):
            yield self._expression(node, node.body, "always the first")
            yield self._expression(node, node.orelse, "always the second")
        elif isinstance(node, ast.If | ast.While) and isinstance(node.test, ast.Name | ast.Attribute | ast.Call):
            yield self._expression(node.test, ast.UnaryOp(ast.Not(), node.test), "the opposite condition")
        elif isinstance(node, ast.Expr | ast.AugAssign | ast.Break | ast.Continue | ast.Delete):
            yield self._statement(node, "a statement left out")
        elif isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
            yield self._expression(node.value, ast.Constant(None), "nothing returned")

    def _expression(self, node: ast.expr, new: ast.expr, what: str) -> Change:
        text = ast.unparse(ast.fix_missing_locations(new))
        return self._change(node, text if isinstance(new, ast.Name | ast.Constant) else f"({text})", what)

    def _statement(self, node: ast.stmt, what: str) -> Change:
        return self._change(node, "pass", what)

    def _change(self, node: ast.expr | ast.stmt, new: str, what: str) -> Change:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self._line_starts[node.lineno - 1] + node.col_offset
        end = self._line_starts[node.end_lineno - 1] + node.end_col_offset
        return Change(self._file, start, end, new, node.lineno, what)


def _code_in(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the children of a node whose changes would be changes of what the code does."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases", "keywords") and not isinstance(node, ast.Call):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_words(child):
                yield child


def _is_words(node: ast.AST) -> bool:
    """Tell whether a node is there for people, or for type checkers, or says what must be true anyway."""
    if isinstance(node, ast.JoinedStr | ast.Raise | ast.Assert | ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.Expr):
        call = node.value
        if isinstance(call, ast.Constant):
            return True
        return isinstance(call, ast.Call) and ast.unparse(call.func).startswith(("_LOG.", "logger.", "self.logging"))
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return True
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("__all__", "__slots__")


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


class TreeCopy:
    """A copy of the tree in which tests run. `with` removes it, and what the tests have left in shared memory."""

    def __init__(self) -> None:
        # A short name: there are sockets below it, whose names may not be long.
        self.path = Path(tempfile.mkdtemp(prefix="mut-", dir="/tmp"))
        self._temporary = self.path / "t"
        self._temporary.mkdir()
        for name in COPIED:
            target = self.path / name
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(ROOT / name, target)

    def put(self, file: str, content: bytes) -> None:
        """Write a file."""
        (self.path / file).write_bytes(content)

    def fails(self, test: str, timeout_s: float) -> str | None:
        """Run the tests of a file; return how they fail, or None."""
        environment = {**os.environ, "PYTHONPATH": str(self.path), "TMPDIR": str(self._temporary)}
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no"]
        process = subprocess.Popen(
            [*command, f"tests/{test}.py"],
            cwd=self.path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return "too long"
        finally:
            # Whatever the tests have started in their session; servers have their own, and end with their clients.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._sweep()
        if process.returncode == 0:
            return None
        failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
        # With the reason: a failure that has nothing to do with the change is one of the machine, or of the test.
        return failed[0].partition("::")[2][:LONGEST_REASON] if failed else f"status {process.returncode}"

    def _sweep(self) -> None:
        """Remove what tests have left: runtime directories of those that were killed, and what runs tell each other."""
        # Hypothesis keeps the examples that have failed, of which the next change is to know nothing.
        shutil.rmtree(self.path / ".hypothesis", ignore_errors=True)
        # A root's name in shared memory is made of its inode, which a folder of the next run may have.
        prefixes = tuple(map(_prefix_of, (folder for folder, _, _ in os.walk(self._temporary))))
        for name in os.listdir("/dev/shm"):
            if name.startswith(prefixes):
                os.unlink(f"/dev/shm/{name}")
        for left in self._temporary.iterdir():
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()

    def __enter__(self) -> TreeCopy:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _prefix_of(root: str) -> str:
    """Return how the names of all segments begin whose runtime root this folder is, if it is one."""
    place = os.stat(root)
    identity = f"{os.path.realpath(root)}:{place.st_dev}:{place.st_ino}"
    return f"mpmm-{os.getuid()}-{hashlib.sha256(os.fsencode(identity)).hexdigest()[:12]}-"


def main(arguments: Sequence[str] | None = None) -> int:
    """Make changes; return 0, 1 if too few were noticed, 2 if the tests fail without any."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}, or files (default: all parts)")
    parser.add_argument("--changes", type=int, default=20, metavar="N", help="how many (default: 20)")
    parser.add_argument("--seed", type=int, default=1, help="of the choice (default: 1)")
    parser.add_argument("--only", type=int, metavar="N", help="make this one of the changes alone, from 1")
    parser.add_argument("--tests", nargs="+", metavar="TEST", help="instead of the part's, as in: test_policy")
    parser.add_argument("--at-least", type=float, default=0.0, metavar="PERCENT", help="that are to be noticed")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no change later than that")
    parser.add_argument("--list", action="store_true", help="print the changes, and run nothing")
    options = parser.parse_args(arguments)
    tests_of = _chosen(parser, options.parts or list(PARTS), options.tests)
    possible = [change for file in sorted(tests_of) for change in Changes(file).all()]
    drawn = random.Random(options.seed).sample(possible, min(options.changes, len(possible)))
    numbered = list(enumerate(drawn, 1))
    if options.only is not None:
        numbered = numbered[options.only - 1 : options.only]
    print(f"{len(numbered)} of {len(possible)} changes of {len(tests_of)} files, seed {options.seed}", flush=True)
    if options.list:
        for number, change in numbered:
            print(f"\n{number}: {change.what}\n{change.diff()}")
        return 0
    with TreeCopy() as tree:
        return _try_all(tree, numbered, tests_of, options.at_least, time.monotonic() + options.seconds)


def _chosen(
    parser: argparse.ArgumentParser, parts: Sequence[str], tests: Sequence[str] | None
) -> dict[str, tuple[str, ...]]:
    """Return the files to change and the tests for each."""
    found: dict[str, tuple[str, ...]] = {}
    for part in parts:
        if part in PARTS:
            for pattern in PARTS[part][0]:
                for path in ROOT.glob(pattern):
                    found[str(path.relative_to(ROOT))] = PARTS[part][1]
        else:
            path = Path(part).resolve()
            of_parts = [the_tests for patterns, the_tests in PARTS.values() if any(map(path.match, patterns))]
            if not path.is_file() or not path.is_relative_to(ROOT / "mpmm"):
                parser.error(f"{part}: expected one of {', '.join(PARTS)}, or a file of mpmm/")
            if not of_parts and tests is None:
                parser.error(f"{part} is in no part: say with --tests what should notice a change")
            found[str(path.relative_to(ROOT))] = of_parts[0] if of_parts else ()
    return {file: tuple(tests) for file in found} if tests is not None else found


def _try_all(
    tree: TreeCopy,
    numbered: Sequence[tuple[int, Change]],
    tests_of: dict[str, tuple[str, ...]],
    at_least: float,
    until: float,
) -> int:
    timeout_s: dict[str, float] = {}
    for test in dict.fromkeys(test for _, change in numbered for test in tests_of[change.file]):
        began = time.monotonic()
        failure = tree.fails(test, 3600.0)
        if failure is not None:
            print(f"{test} fails without any change: {failure}")
            return 2
        took_s = time.monotonic() - began
        timeout_s[test] = max(LEAST_PATIENCE_S, PATIENCE * took_s)
        print(f"{test}: {took_s:.0f} s", flush=True)
    survivors = []
    tried = 0
    for number, change in numbered:
        if time.monotonic() > until:
            break
        tried += 1
        noticed = _who_notices(tree, change, tests_of[change.file], timeout_s)
        print(f"{number}: {change.file}:{change.line}, {change.what}: {noticed or 'SURVIVES'}", flush=True)
        if noticed is None:
            survivors.append((number, change))
    for number, change in survivors:
        print(f"\n{number}: {change.what}\n{change.diff()}")
    share = 100.0 * (tried - len(survivors)) / tried if tried else 100.0
    print(f"\n{tried} changes, {tried - len(survivors)} noticed ({share:.0f} %), {len(survivors)} survive")
    return 0 if share >= at_least else 1


def _who_notices(tree: TreeCopy, change: Change, tests: Sequence[str], timeout_s: dict[str, float]) -> str | None:
    original = (ROOT / change.file).read_bytes()
    changed = change.applied_to(original)
    try:
        compile(changed, change.file, "exec")
    except SyntaxError as error:
        return f"no code ({error.msg})"
    tree.put(change.file, changed)
    try:
        for test in tests:
            failure = tree.fails(test, timeout_s[test])
            if failure is not None:
                return f"{test}: {failure}"
        return None
    finally:
        tree.put(change.file, original)


if __name__ == "__main__":
    # So that the copy goes with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
