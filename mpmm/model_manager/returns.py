"""Watching for memory that is coming back: a sample soon after an unload may be taken before the driver has freed it.

On an H100 (driver 580.159.04) the memory of a process is back while the process still exits, 0.11 s after it was
killed. A sample that is a moment too early shows nothing, and the leader takes the next one up to `poll_interval`
later, while requests wait for a device that is already free.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from mpmm.interpreter.latch import Latch
from mpmm.interpreter.thread_starts import start_thread
from mpmm.model_manager.fresh_figures import FreshFigures
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.poll_claims import claim_late_looks
from mpmm.text.printable import printable_logger

__all__ = ["ReturnWatch"]

_LOG = printable_logger("mpmm")
# Pauses between two samples: nvidia-smi takes 25 ms of processor time, and 0.3 s on a slow host.
FIRST_PAUSE_S = 0.03
LONGEST_PAUSE_S = 0.25
# After that, the leader's polls find the memory that comes back.
WATCHED_FOR_S = 1.0
# Of many processes that watch, one samples at a time; otherwise a crowd that unloads would do nothing but sample.
LATE_NS = int(FIRST_PAUSE_S * 1e9)
CLAIM_LASTS_NS = 500_000_000


class ReturnWatch:
    """Takes samples until they show the unloaded memory, or a second has passed; at most one thread per process."""

    def __init__(
        self, namespace: Namespace, figures: FreshFigures, waiting: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """waiting: counts the calling thread among those that wait, for the length of a `with` block."""
        self._namespace = namespace
        self._figures = figures
        self._waiting = waiting
        self._until = 0.0
        self._thread: threading.Thread | None = None
        # Set when the process leaves the namespace.
        self.ended = Latch()

    def begin(self) -> None:
        """Watch from now on, if there is anything to watch for. Takes no lock, and does not wait.

        A thread that is just ending may miss it; then it is left to the leader's next poll.
        """
        if not self._awaiting() or self._namespace.tables.header.source_accounting_only:
            return
        self._until = time.monotonic() + WATCHED_FOR_S
        if self._thread is None or not self._thread.is_alive():
            thread = threading.Thread(target=self._run, name="mpmm-returns", daemon=True)
            try:
                start_thread(thread)
            except RuntimeError:
                # No thread can be started: it is left to the leader's next poll.
                return
            self._thread = thread

    def _run(self) -> None:
        try:
            with self._waiting():
                pause = FIRST_PAUSE_S
                while not self.ended.wait(pause) and time.monotonic() < self._until:
                    awaiting = self._awaiting()
                    if not awaiting:
                        return
                    if claim_late_looks(self._namespace.tables, awaiting, LATE_NS, CLAIM_LASTS_NS):
                        self._figures.sample()
                    pause = min(2 * pause, LONGEST_PAUSE_S)
        except Exception:
            # Otherwise the process has left meanwhile, and none of its threads waits for memory any more.
            if self._namespace.is_usable:
                _LOG.exception("mpmm %s: pid %d stops watching for memory", self._namespace.name, self._namespace.pid)

    def _awaiting(self) -> list[int]:
        """Return the devices (rows) that wait for memory to come back. Takes no lock."""
        tables = self._namespace.tables
        rows = tables.used_rows(self._namespace.segment.layout.devices)
        return [row for row in rows if tables.devices[row].return_count]
