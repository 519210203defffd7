"""Processes for rows that need several; each gets its orders and answers through a pipe."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

__all__ = ["Crew", "sleep_until"]

# Guards against a hang; measures nothing.
HEAR_TIMEOUT_S = 60.0
LEAVE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class _Trouble:
    text: str


class Crew:
    """`count` processes that run `work(number, connection)`. Leaving the `with` block ends them.

    Fork a crew before this process has threads or a manager, so that each process makes its own, as workers do.
    start_method: with "spawn", each starts an interpreter of its own, and `work` is pickled.
    A process ends by returning from `work`. At the end of the block each one receives None, so that a
    `connection.recv()` returns at the latest then.
    """

    def __init__(self, count: int, work: Callable[[int, Connection], None], start_method: str = "fork") -> None:
        context: Any = multiprocessing.get_context(start_method)
        self._connections: list[Connection] = []
        self._processes = []
        for number in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_run, args=(work, number, theirs))
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._connections:
            try:
                connection.send(None)
            except OSError:
                # This one has ended already.
                continue
        deadline = time.monotonic() + LEAVE_TIMEOUT_S
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()

    @property
    def pids(self) -> list[int]:
        """The process ids."""
        return [process.pid for process in self._processes if process.pid is not None]

    def tell(self, message: object, number: int | None = None) -> None:
        """Send a message to one process, or to all."""
        for connection in self._connections if number is None else [self._connections[number]]:
            connection.send(message)

    def has_spoken(self, number: int) -> bool:
        """Return whether `hear` would return at once."""
        return self._connections[number].poll()

    def hear(self, number: int) -> Any:
        """Return the next message of a process.

        Raises RuntimeError when it has failed, TimeoutError when it is silent.
        """
        connection = self._connections[number]
        if not connection.poll(HEAR_TIMEOUT_S):
            raise TimeoutError(f"nothing from process {number} in {HEAR_TIMEOUT_S:.0f} s")
        message = connection.recv()
        if isinstance(message, _Trouble):
            raise RuntimeError(f"process {number} failed:\n{message.text}")
        return message

    def hear_all(self) -> list[Any]:
        """Return the next message of every process."""
        return [self.hear(number) for number in range(len(self._connections))]


def sleep_until(monotonic_s: float) -> None:
    """Sleep until a time of `time.monotonic()`, a clock that all processes of a host share: a common start."""
    time.sleep(max(0.0, monotonic_s - time.monotonic()))


def _run(work: Callable[[int, Connection], None], number: int, connection: Connection) -> None:
    try:
        work(number, connection)
    except BaseException:
        connection.send(_Trouble(traceback.format_exc()))
        raise
