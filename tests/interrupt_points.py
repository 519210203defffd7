"""Exceptions at chosen bytecodes of the package, and what must hold after each: see `test_interrupt_points`."""

from __future__ import annotations

import bisect
import dis
import itertools
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from harness import Process, Seat
from patience import Stopwatch

import mpmm
from mpmm import RemoteCallError
from mpmm.errors import ClosedError
from mpmm.interpreter import thread_locks
from mpmm.memory.placement import current_placement
from mpmm.model_manager import ModelManager
from mpmm.model_manager.leader import DEPUTIES
from mpmm.multi_process_shared.context import served_namespaces
from mpmm.shared_state.invariants import check_invariants
from mpmm.shared_state.layout import Capacities, Instance
from mpmm.shared_state.snapshot import Snapshot, read_snapshot

PACKAGE = str(Path(mpmm.__file__).parent)


STEP = int(os.environ.get("MPMM_INTERRUPT_STEP", "0"))


OFFSET = int(os.environ.get("MPMM_INTERRUPT_OFFSET", str(int(time.time() // 86400))))


RETURNS = {code for name, code in dis.opmap.items() if name.startswith("RETURN_")}


KW_NAMES = dis.opmap.get("KW_NAMES", -1)


HEALS_WITHIN_S = 1.0


# At 2 000 points, on two busy processors, no other process waited longer than 0.21 s for the lock.
KEEPS_OUT_FOR_S = 1.0


SMALL_TABLES = Capacities(members=8, models=16, instances=16, tickets=8, events=16)


# A failing test need not report a thousand failures, which take a second each.
ENOUGH_FAILURES = 20


class Interrupted(Exception):
    """Raised as by the handler of a soft time limit."""


@cache
def ways_out(code: CodeType) -> frozenset[int]:
    """Return the offsets of the instructions that call `__exit__` at the normal end of `with` blocks.

    The offsets of NOPs, as for `try`, are included: they, too, may be outside the block in which they stand. So are
    those at the beginnings and ends of `except` clauses, where the interpreter would get the exceptions mixed up that
    it handles, or go on for ever to handle one. And so are
    those of an `__enter__` of `thread_locks` after the step of its `for` loop, which takes the lock.
    """
    instructions = list(dis.get_instructions(code))
    never = ("NOP", "PUSH_EXC_INFO", "POP_EXCEPT")
    offsets = {instruction.offset for instruction in instructions if instruction.opname in never}
    ends = itertools.pairwise(instructions)
    offsets |= {copy.offset for copy, end in ends if (copy.opname, end.opname) == ("COPY", "POP_EXCEPT")}
    if code.co_name == "__enter__" and code.co_filename == thread_locks.__file__:
        takes = next(instruction.offset for instruction in instructions if instruction.opname == "FOR_ITER")
        offsets.update(instruction.offset for instruction in instructions if instruction.offset > takes)
    for place, first in enumerate(instructions[:-4]):
        if first.opname == "LOAD_CONST" and first.argval is None:
            # Python 3.10 loads the second and third None in another way.
            nones = [i.opname == "DUP_TOP" or i.argval is None for i in instructions[place + 1 : place + 3]]
            calls = [i.opname in ("PRECALL", "CALL", "CALL_FUNCTION") for i in instructions[place + 3 : place + 5]]
            if all(nones) and calls[0]:
                begin = place - (place > 0 and instructions[place - 1].opname in ("SWAP", "ROT_TWO"))
                offsets.update(i.offset for i in instructions[begin : place + 3 + sum(calls)])
    return frozenset(offsets)


class Tracer:
    """Follows the bytecodes that the calling thread runs inside the package."""

    def __init__(self) -> None:
        # Kept here as well: if Python 3.11 collects garbage while it makes a traced frame, and a finalizer is
        # interrupted, which ends the tracing, the interpreter still calls the function that traced the frame.
        self._traces = self._enter

    def __enter__(self) -> None:
        sys.settrace(self._traces)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Say how a function is followed that begins, or continues if it is a generator's."""
        raise NotImplementedError

    def _at(self, frame: FrameType) -> None:
        """Be told of a bytecode that a handler's exception may precede."""
        raise NotImplementedError

    def _follow(self, frame: FrameType) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._step

    def _step(self, frame: FrameType, event: str, argument: Any) -> Any:
        if (
            event == "opcode"
            and not self._is_last(frame)
            and not self._has_names(frame)
            and frame.f_lasti not in ways_out(frame.f_code)
        ):
            self._at(frame)
        return self._step

    @staticmethod
    def _has_names(frame: FrameType) -> bool:
        # Between KW_NAMES and CALL, Python 3.11 has PRECALL with its cache; later versions have nothing.
        code, at = frame.f_code.co_code, frame.f_lasti
        return KW_NAMES >= 0 and any(at >= back and code[at - back] == KW_NAMES for back in (2, 6))

    @staticmethod
    def _is_last(frame: FrameType) -> bool:
        caller = frame.f_back
        outermost = caller is None or not is_ours(caller)
        return outermost and frame.f_code.co_code[frame.f_lasti] in RETURNS


def is_ours(frame: FrameType) -> bool:
    """Return whether a function of the package runs in the frame, or one of `threading` that the package calls."""
    caller: FrameType | None = frame
    while caller is not None and caller.f_code.co_filename == threading.__file__:
        caller = caller.f_back
    return caller is not None and caller.f_code.co_filename.startswith(PACKAGE)


class Recording(Tracer):
    """Counts the bytecodes of one run of an operation, and those before each call of a function."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._before: list[int] = []

    def point(self, at: int) -> tuple[int, int]:
        """Return where the at-th bytecode is, from 1 on: after how many calls, how many bytecodes after the last."""
        if sys.version_info >= (3, 12):
            # There, a function that is followed from its middle on tells nothing of its next bytecodes.
            return 1, at
        calls = bisect.bisect_left(self._before, at)
        return calls, at - self._before[calls - 1]

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not is_ours(frame):
            return None
        self._before.append(self.count)
        return self._follow(frame)

    def _at(self, frame: FrameType) -> None:
        self.count += 1


class Interruption(Tracer):
    """Raises an exception before a bytecode: the steps-th after the calls-th call of a function of the package.

    Only the bytecodes after that call are followed, since to follow one takes longer than to run a hundred.
    """

    def __init__(self, calls: int, steps: int, error: BaseException) -> None:
        super().__init__()
        self.error = error
        self.where = ""
        self._calls = calls
        self._steps = steps

    def forget(self) -> None:
        """Let the exception go, since the frames of its traceback keep their objects alive."""
        self.error.__traceback__ = None
        # Raised in an `except` clause, it has that of the clause's exception, too.
        self.error.__context__ = None
        self.error = KeyboardInterrupt()

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not is_ours(frame):
            return None
        self._calls -= 1
        if self._calls > 0:
            return None
        if self._calls == 0:
            caller = frame.f_back
            while caller is not None:
                if is_ours(caller):
                    caller.f_trace = self._follow(caller)
                caller = caller.f_back
        return self._follow(frame)

    def _at(self, frame: FrameType) -> None:
        self._steps -= 1
        if self._steps == 0:
            file = Path(frame.f_code.co_filename).stem
            self.where = f"{file}.{frame.f_code.co_name}:{frame.f_lineno}+{frame.f_lasti}"
            raise self.error


class Handler(Interruption):
    """Has a function called before a bytecode, as Python calls a signal handler or a finalizer.

    failure: what the function has raised. A SystemExit is raised at the bytecode instead, as Python would.
    """

    def __init__(self, calls: int, steps: int, act: Callable[[], object]) -> None:
        super().__init__(calls, steps, KeyboardInterrupt())
        self._act = act
        self.failure: BaseException | None = None

    def _at(self, frame: FrameType) -> None:
        try:
            super()._at(frame)
        except KeyboardInterrupt:
            sys.settrace(None)
            try:
                self._act()
            except SystemExit:
                raise
            except BaseException as error:
                self.failure = error


def points_of(
    operation: Callable[[], Any], prepare: Callable[[], Any], step: int, failures: list[str]
) -> Iterator[tuple[int, Interruption]]:
    """Yield every step-th bytecode of an operation, and what raises an exception there, until there were many failures.

    Each run is a little different, and thereby so are the points. The operation has to be prepared before each.
    """
    recording = Recording()
    prepare()
    with recording:
        operation()
    for at in itertools.count(1 + OFFSET % step, step):
        if len(failures) >= ENOUGH_FAILURES:
            return
        prepare()
        interruption = Interruption(*recording.point(at), KeyboardInterrupt() if at % 2 else Interrupted())
        yield at, interruption
        # Later runs may be longer than the recorded one: a load may have to wait for an eviction, say.
        if at > recording.count and not interruption.where:
            return


def use_copy(seat: Seat, tag: str) -> None:
    """In another process: acquire and release."""
    with seat.manager.model(tag, lambda: tag):
        pass


_longest_wait_s = 0.0


def stand_by(seat: Seat) -> None:
    """In another process: take the lock again and again, and note the longest wait."""
    namespace = seat.manager._connected().namespace

    def run() -> None:
        global _longest_wait_s
        # Raised by the last transaction, when the process leaves.
        with suppress(ClosedError, ValueError):
            while True:
                watch = Stopwatch()
                with namespace.transaction():
                    pass
                _longest_wait_s = max(_longest_wait_s, watch.calm_s())
                time.sleep(0.01)

    threading.Thread(target=run, daemon=True).start()


def longest_wait_s(seat: Seat) -> float:
    """In that process: return its longest wait for the lock."""
    return _longest_wait_s


class Points:
    """Runs an operation with an exception at one point after another, and checks the state after each."""

    def __init__(self, step: int) -> None:
        self.step = STEP or step
        self.points = 0
        self.failures: list[str] = []

    def go_on(self) -> None:
        """Do what the same thread must still be able to do after each point."""
        raise NotImplementedError

    def left(self) -> list[str]:
        """Return what is wrong after a point, which must be repaired within a second."""
        raise NotImplementedError

    def __call__(self, operation: Callable[[], None], prepare: Callable[[], None] = lambda: None) -> None:
        """Try the points of an operation. prepare: called before each, so that it takes the tested branch."""
        for at, interruption in points_of(operation, prepare, self.step, self.failures):
            escaped = ""
            try:
                with interruption:
                    operation()
            except (KeyboardInterrupt, Interrupted):
                pass
            except RemoteCallError as other:
                # An exception that interrupts unpickling becomes the cause of this error.
                escaped = "" if isinstance(other.__cause__, Interrupted) else f"RemoteCallError: {other}"
                other.__cause__ = None
            except Exception as other:
                escaped = f"{type(other).__name__}: {other}"
            interruption.forget()
            assert interruption.where or not escaped, escaped
            if interruption.where:
                self.points += 1
                self._check(f"{at} ({interruption.where})", escaped)

    def _check(self, where: str, escaped: str) -> None:
        wrong = [f"raised {escaped}"] if escaped else []
        if sys.exc_info()[1] is not None:
            wrong.append("the interpreter still handles an exception")
        # Without a call, which would find and end what was left. What the call leaves is found after the next point.
        wrong += self._left_after_a_second()
        try:
            self.go_on()
        except (Exception, AssertionError) as error:
            wrong.append(f"the same thread cannot go on: {type(error).__name__}: {error}")
        if wrong:
            self.failures.append(f"{where}: {wrong}")
            print(self.failures[-1], flush=True)

    def _left_after_a_second(self) -> list[str]:
        watch = Stopwatch()
        while (left := self.left()) and watch.calm_s() < HEALS_WITHIN_S:
            time.sleep(0.001)
        if left:
            print_stacks()
        return left

    def conclude(self) -> None:
        """Print the number of points, and fail if there was a failure."""
        if left := self._left_after_a_second():
            self.failures.append(f"after the last point: {left}")
        print(f"{self.points} points, {len(self.failures)} failures")
        found = "\n".join(self.failures[:40])
        assert not self.failures, f"{len(self.failures)} of {self.points} points failed:\n{found}"


def print_stacks() -> None:
    """Print where each thread is, for whoever asks why something was not repaired."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        print(f"{names.get(ident, ident)}:", *traceback.format_stack(frame), sep="\n", flush=True)


# States that a copy has only while a call, or a thread for it, runs.
NOT_AT_REST = ("active", "loading", "leased", "unloading", "suspending", "resuming")


class Sweep(Points):
    """The points of operations of a manager."""

    def __init__(self, manager: ModelManager, step: int) -> None:
        super().__init__(step)
        self.manager = manager
        self._segment = manager._connected().namespace.segment

    def go_on(self) -> None:
        """Use another model."""
        with self.manager.model("other", lambda: "other"):
            pass

    def left(self) -> list[str]:
        """Return copies in use, waiters and locks that should be gone, and broken invariants."""
        snapshot = self.snapshot()
        rows = [f"{i.tag} is {i.state}" for i in snapshot.instances if i.state in NOT_AT_REST]
        rows += [f"{model.tag} is not suspended any more" for model in snapshot.models if model.unsuspendable]
        tickets = [f"a ticket for {ticket.tag} is {ticket.state}" for ticket in snapshot.tickets]
        lock = self._segment.lock_file()
        is_free = lock.try_exclusive()
        lock.close()
        wrong = [] if is_free else ["the lock is taken"]
        wrong += self._wrong_objects()
        if served_namespaces() or current_placement() is not None:
            wrong.append("this thread seems to run a loader")
        return [*rows, *tickets, *check_invariants(snapshot), *wrong]

    def _wrong_objects(self) -> list[str]:
        """Return objects that are kept without a row, and idle ones that were told to unload."""
        session, wrong = self.manager._connected(), []
        for copy in session.owned.all():
            instance = session.namespace.tables.instances[copy.row]
            if instance.state == Instance.FREE or instance.generation != copy.generation:
                wrong.append(f"an object of {copy.tag} is kept without a row")
            elif instance.state == Instance.IDLE and getattr(copy.value, "unloaded", False):
                wrong.append(f"the idle object of {copy.tag} was told to unload")
        return wrong

    def snapshot(self) -> Snapshot:
        """Return the state of the manager's namespace."""
        return read_snapshot(self.manager.namespace, events=False)


@pytest.fixture
def sweep(
    new_manager: Callable[..., ModelManager], new_process: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Sweep]]:
    """Makes a sweep over a manager; at the end, no point may have failed, and other processes must still work."""
    monkeypatch.setattr("mpmm.model_manager.background.RECONCILE_S", 0.002)
    made: list[Sweep] = []
    bystanders: list[Process] = []

    def make(step: int, kind: type[Sweep] = Sweep, **arguments: Any) -> Sweep:
        # Small tables, because each look decodes all of them.
        # A leader and two deputies, so that this process seldom checks the namespace, and does not by chance repair
        # what an exception has left.
        for _ in range(1 + DEPUTIES):
            bystander = new_process(capacities=SMALL_TABLES, **arguments)
        bystander.call(stand_by)
        bystanders.append(bystander)
        made.append(kind(new_manager(capacities=SMALL_TABLES, **arguments), step))
        return made[-1]

    yield make
    for one, bystander in zip(made, bystanders, strict=True):
        new_process().call(use_copy, "from elsewhere")
        one.conclude()
        kept_out_s = bystander.call(longest_wait_s)
        print(f"another process has waited for the lock for {kept_out_s:.2f} s at most")
        assert kept_out_s < KEEPS_OUT_FOR_S
