"""Change the code at random, one place at a time, and see whether a test notices: `python tools/mutate.py [PART ...]`.

PART is one of the parts below, or a file of `mpmm/`; all parts by default. First, the parts' tests run once under
coverage, without any change; `--map FILE` keeps the result for the next run. Then each change is tried with the tests
that cover the changed lines, the quick ones first, until one fails; if hardly any test is known to cover them, then
with all tests of the part. They run in forks of a process that has collected them, which takes a tenth of the time.
Programs that tests start run the unchanged code there, so a change that no fork notices is tried again in a copy of the
tree, in a process of its own. `--way forks` does that only for changes that forks cannot make, and runs no more tests
than fit into `--test-seconds`; `--way copies` uses no forks.

A test has noticed a change if it fails with it, fails with it again, and passes without it. Otherwise, as may happen on
a busy machine, the failure is listed as unconfirmed, and the remaining tests run. A change that no test notices is
printed as a diff: either a test is missing, or the change makes no difference, which the reader must decide. The same
seed makes the same changes to the same code; `--only N` makes the Nth of them again, and `--changes all` makes all.

    python tools/mutate.py policy scheduler --changes 30 --seed 1
    python tools/mutate.py mpmm/policy/eviction.py --seed 1 --only 7
    python tools/mutate.py mpmm/policy/eviction.py --changes all --way forks

Tests of fork and interrupt points are not run. A hundred changes take a quarter of an hour on two processors.
The exit status is 1 if tests noticed less than `--at-least` percent of the changes.
"""

from __future__ import annotations

import argparse
import math
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TypeAlias

from mutating.changes import ROOT, Change, Changes
from mutating.covering import Covering
from mutating.forked import ForkedTests, NewCode, UnfitError
from mutating.tree_copy import Failure, TreeCopy

# Part: its files, and the tests that should notice a change in them, the quickest ones first.
PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "policy": (
        ("mpmm/policy/*.py",),
        (
            *("test_policy", "test_policy_costs", "test_policy_queue", "test_policy_sharing", "test_policy_properties"),
            *("test_backoff", "test_suspension_policy", "test_policy_parts", "test_recorded_plans"),
            *("test_recorded_parts", "test_what_waiters_are_told", "test_reasons", "test_layout"),
            *("test_suspension", "test_ledger", "test_out_of_memory", "test_fairness", "test_steady"),
        ),
    ),
    "scheduler": (
        ("mpmm/scheduling/*.py",),
        (
            *("test_scheduler", "test_suspension_decisions", "test_table_rows", "test_views", "test_shortcut_rules"),
            *("test_recorded_reads", "test_without_a_plan", "test_hand_overs", "test_copies", "test_fairness"),
            *("test_devices", "test_manager", "test_manager_errors", "test_left_asleep", "test_load_ahead"),
            *("test_users", "test_priority"),
            *("test_out_of_memory", "test_tenure", "test_what_waiters_are_told"),
        ),
    ),
    "shared_state": (
        ("mpmm/shared_state/*.py", "mpmm/shared_state/*/*.py"),
        (
            *("test_layout", "test_lock_file", "test_file_errors", "test_liveness", "test_runtime_dir", "test_segment"),
            *("test_orphans", "test_transaction", "test_removal", "test_member_files", "test_membership"),
            *("test_invariants", "test_snapshot", "test_table_rows", "test_views"),
            *("test_changes_of_holds", "test_changes_of_loads", "test_changes_of_unloads"),
            *("test_changes_of_suspensions", "test_changes_of_models", "test_changes_of_devices"),
            *("test_changes_of_hand_overs", "test_changes_of_members", "test_transition_starts"),
            *("test_recorded_changes", "test_recorded_reads", "test_recorded_checks", "test_tables"),
            *("test_new_segment", "test_ledger_entries"),
            "test_what_waiters_are_told",
            *("test_durations", "test_namespace", "test_accounting", "test_full_tables", "test_bounded_work"),
            *("test_copies", "test_leases", "test_model_of_promises", "test_deaths", "test_stopped_processes"),
            *(
                "test_futex",
                "test_prune",
                "test_vanished_files",
                "test_bad_ground",
                "test_odd_hosts",
                "test_who_measures",
            ),
            *("test_transitions", "test_twins", "test_core", "test_core_use", "test_display_names", "test_suspension"),
            "test_reentrance",
            *("test_left_asleep", "test_declared_sizes", "test_unloads", "test_keep_alive", "test_cli"),
            "test_cli_hosts",
            *("test_crash_points", "test_call_crash_points"),
        ),
    ),
    "sources": (
        ("mpmm/sources/*.py", "mpmm/memory/monitor*.py", "mpmm/memory/sample*.py", "mpmm/memory/listed_pids.py"),
        (
            *("test_gpu_monitor", "test_sources", "test_source_choice", "test_host_memory", "test_amd_source"),
            *("test_published_samples", "test_recorded_samples", "test_own_monitors"),
            *("test_accounting", "test_who_measures", "test_source_failures", "test_attribution"),
        ),
    ),
    "multi_process_shared": (
        (
            "mpmm/multi_process_shared/*.py",
            "mpmm/multi_process_shared/rpc/*.py",
            "mpmm/multi_process_shared/forkserver/*.py",
        ),
        (
            *("test_registry", "test_life", "test_hosts", "test_links", "test_messages", "test_server_steps"),
            *("test_zygote_steps", "test_template_steps", "test_forkserver_client", "test_payloads"),
            *("test_shared_buffers", "test_shared_calls", "test_shared_unloads"),
            *("test_zygote", "test_templates", "test_multi_process_shared", "test_servers", "test_server_faults"),
            *("test_references", "test_versions", "test_odd_hosts"),
        ),
    ),
    "estimator": (
        (
            *("mpmm/memory/estimator.py", "mpmm/memory/shared_estimator.py", "mpmm/memory/estimates_file.py"),
            "mpmm/memory/learning.py",
        ),
        ("test_resource_estimator", "test_recorded_samples", "test_estimates_file", "test_accounting"),
    ),
    "observability": (
        ("mpmm/observability/*.py", "mpmm/text/printable.py"),
        ("test_printable", "test_cli", "test_top", "test_trace"),
    ),
    "arguments": (("mpmm/text/arguments.py",), ("test_bad_input",)),
}
WAYS = ("both", "forks", "copies")
# Runs tests, given their seconds in total and those of the longest one, and returns how they fail.
Runner: TypeAlias = Callable[[Sequence[str], float, float], Failure | None]
# Processes that are killed leave no coverage data: if at most this many tests are known to cover a change, others may.
HARDLY_ANY = 2
# After this many failures for other reasons than the change, the machine is at fault, and no more tests run.
MOST_UNCONFIRMED = 8


@dataclass
class Outcome:
    """The outcome of a change: how it was noticed, if it was, and the failures that were not confirmed."""

    noticed: str | None = None
    unconfirmed: list[str] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Try changes; return 0, or 1 if the tests noticed too few."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}, or files (default: all parts)")
    parser.add_argument(
        "--changes", type=_number_or_all, default=20, metavar="N", help="number of changes, or all (default: 20)"
    )
    parser.add_argument("--seed", type=int, default=1, help="for the choice of changes (default: 1)")
    parser.add_argument("--only", type=int, metavar="N", help="make only this one of the changes, counted from 1")
    parser.add_argument(
        "--tests", nargs="+", metavar="TEST", help="run these instead of the part's tests, as in: test_policy"
    )
    parser.add_argument(
        "--map", type=Path, metavar="FILE", help="which tests cover which lines; written if it does not exist"
    )
    parser.add_argument(
        "--test-seconds", type=float, default=30.0, metavar="S", help="seconds of tests per change (default: 30)"
    )
    parser.add_argument(
        "--jobs", type=int, default=2, metavar="N", help="number of changes tried at a time (default: 2)"
    )
    parser.add_argument("--way", choices=WAYS, default="both", help="how to run the tests (default: both, forks first)")
    parser.add_argument(
        "--at-least", type=float, default=0.0, metavar="PERCENT", help="fail if tests notice less than this"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no change after this time")
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
    until = time.monotonic() + options.seconds
    tests = list(dict.fromkeys(test for of_file in tests_of.values() for test in of_file))
    covering = _covering(options.map, tests, options.jobs).of(tests)
    survivors, tried, unconfirmed = _try_all(
        numbered, tests_of, covering, options.test_seconds, options.jobs, until, options.way
    )
    for number, change in survivors:
        print(f"\n{number}: {change.what}\n{change.diff()}")
    share = 100.0 * (tried - len(survivors)) / tried if tried else 100.0
    print(f"\n{tried} changes, {tried - len(survivors)} noticed ({share:.0f} %), {len(survivors)} survive")
    if unconfirmed:
        print(f"failures that were not confirmed: {unconfirmed}")
    return 0 if share >= options.at_least else 1


def _chosen(
    parser: argparse.ArgumentParser, parts: Sequence[str], tests: Sequence[str] | None
) -> dict[str, tuple[str, ...]]:
    """Return the files to change and the test files for each."""
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
                parser.error(f"{part} is in no part: name with --tests the tests that should notice a change")
            found[str(path.relative_to(ROOT))] = of_parts[0] if of_parts else ()
    return {file: tuple(tests) for file in found} if tests is not None else found


def _covering(kept: Path | None, tests: Sequence[str], processes: int) -> Covering:
    if kept is not None and kept.exists():
        return Covering.loaded(kept)
    began = time.monotonic()
    with TreeCopy() as tree:
        covering = Covering.measured(tree, tests, processes)
    print(f"which tests run which lines: {time.monotonic() - began:.0f} s", flush=True)
    if kept is not None:
        covering.save(kept)
    return covering


def _try_all(
    numbered: Sequence[tuple[int, Change]],
    tests_of: dict[str, tuple[str, ...]],
    covering: Covering,
    most_s: float,
    jobs: int,
    until: float,
    way: str,
) -> tuple[list[tuple[int, Change]], int, int]:
    """Try changes, several at a time; return the survivors, and the numbers of tries and of unconfirmed failures."""
    survivors: list[tuple[int, Change]] = []
    tried = unconfirmed = 0
    testers: SimpleQueue[Tester] = SimpleQueue()

    def attempt(number: int, change: Change) -> None:
        nonlocal tried, unconfirmed
        if time.monotonic() > until:
            return
        tester = testers.get()
        try:
            known = covering.witnesses(change, most_s, way != "forks")
            others: list[str] = []
            if len(known) <= (0 if way == "forks" else HARDLY_ANY):
                every = covering.all_of(tests_of[change.file], most_s if way == "forks" else math.inf)
                others = [test for test in every if test not in known]
            outcome = tester.who_notices(change, known, others)
        finally:
            testers.put(tester)
        with saying:
            tried += 1
            unconfirmed += len(outcome.unconfirmed)
            for failure in outcome.unconfirmed:
                print(f"{number}: not confirmed: {failure}")
            print(f"{number}: {change.file}:{change.line}, {change.what}: {outcome.noticed or 'SURVIVES'}", flush=True)
            if outcome.noticed is None:
                survivors.append((number, change))

    saying = threading.Lock()
    collected = covering.all_of(dict.fromkeys(test for tests in tests_of.values() for test in tests))
    with ExitStack() as stack:
        for _ in range(jobs):
            testers.put(Tester(covering, way, collected, stack))
        pool = stack.enter_context(ThreadPoolExecutor(jobs))
        try:
            for done in [pool.submit(attempt, number, change) for number, change in numbered]:
                done.result()
        finally:
            # An interrupt waits for the changes being tried, but not for the others.
            pool.shutdown(wait=False, cancel_futures=True)
    return sorted(survivors, key=lambda survivor: survivor[0]), tried, unconfirmed


class Tester:
    """Tries one change at a time, in forks that have collected the tests, and in a copy of the tree."""

    def __init__(self, covering: Covering, way: str, collected: Sequence[str], stack: ExitStack) -> None:
        self._covering = covering
        self._way = way
        self._tree = stack.enter_context(TreeCopy())
        self._forks = None
        if way != "copies":
            self._forks = stack.enter_context(ForkedTests(stack.enter_context(TreeCopy()), collected))

    def who_notices(self, change: Change, known: Sequence[str], others: Sequence[str] = ()) -> Outcome:
        """Run tests with a change, in the given order.

        others: tests that are not known to cover the change. Programs that they start may, but not in a fork.
        """
        original = (ROOT / change.file).read_bytes()
        changed = change.applied_to(original)
        try:
            compile(changed, change.file, "exec")
        except SyntaxError as error:
            return Outcome(f"no code ({error.msg})")
        outcome, every = Outcome(), [*known, *others]
        if self._forks is not None:
            in_forks = every if self._way == "forks" else known
            with suppress(UnfitError):
                new = NewCode.of(change, original)
                outcome = self._confirmed(in_forks, partial(self._forks.fails, new), partial(self._forks.fails, None))
                if outcome.noticed is not None or self._way == "forks":
                    return outcome

        def fails_with(content: bytes, tests: Sequence[str], seconds: float, longest_s: float) -> Failure | None:
            self._tree.put(change.file, content)
            try:
                return self._tree.fails(tests, seconds, longest_s)
            finally:
                self._tree.put(change.file, original)

        return self._confirmed(every, partial(fails_with, changed), partial(fails_with, original), outcome)

    def _confirmed(
        self, witnesses: Sequence[str], changed: Runner, unchanged: Runner, before: Outcome | None = None
    ) -> Outcome:
        """Run tests until one fails with the change, fails with it again, and passes without it."""
        outcome, left = Outcome(unconfirmed=before.unconfirmed if before else []), list(witnesses)
        passed_over = 0

        def fails(run: Runner, tests: Sequence[str]) -> Failure | None:
            return run(tests, self._covering.seconds(tests), self._covering.longest(tests))

        while left and passed_over < MOST_UNCONFIRMED:
            failure = fails(changed, left)
            if failure is None:
                break
            if fails(changed, failure.tests) and not fails(unchanged, failure.tests):
                outcome.noticed = failure.reason
                break
            outcome.unconfirmed.append(failure.reason)
            passed_over += 1
            # The tests before it have passed.
            left = left[max(map(left.index, failure.tests)) + 1 :]
        return outcome


def _number_or_all(text: str) -> int:
    return sys.maxsize if text == "all" else int(text)


if __name__ == "__main__":
    # On SIGTERM, too, the copies of the tree are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
