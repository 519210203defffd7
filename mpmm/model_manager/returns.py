"""Watching for memory that is on its way back: a sample soon after an unload may come before the driver has freed it.

On an H100 (driver 580.159.04) the memory of a process is back while the process still ends, 0.11 s after it was killed.
A sample that comes a moment too early shows nothing, and the next one would be the leader's, up to `poll_interval`
later, while waiters stand before a device that is free.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from mpmm.interpreter.thread_starts import start_thread
from mpmm.model_manager.fresh_figures import FreshFigures
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.poll_claims import claim_late_looks
from mpmm.text.printable import printable_logger

__all__ = ["ReturnWatch"]

_LOG = printable_logger("mpmm")
# Between two samples: nvidia-smi takes 25 ms of a processor, and 0.3 s on a slow host.
FIRST_PAUSE_S = 0.03
LONGEST_PAUSE_S = 0.25
# What has not come back by then, the leader's polls will find.
WATCHED_FOR_S = 1.0
# Of many processes that watch one looks at a time: a crowd that unloads would be busy with nothing but looks.
LATE_NS = int(FIRST_PAUSE_S * 1e9)
CLAIM_LASTS_NS = 500_000_000


class ReturnWatch:
    """Has samples taken until they show what was unloaded, or a second has passed; one thread a process at most."""

    def __init__(
        self, namespace: Namespace, figures: FreshFigures, waiting: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """waiting: counts the calling thread among those that wait, for the length of a `with` block."""
        self._namespace = namespace
        self._figures = figures
        self._waiting = waiting
        self._until = 0.0
        self._thread: threading.Thread | None = None
        # The process leaves the namespace.
        self.ended = threading.Event()

    def begin(self) -> None:
        """Watch from now on, if there is anything to watch for. Takes no lock, and does not wait.

        A thread that is just ending may miss it; then the leader's next poll has to do.
        """
        if not self._awaiting() or self._namespace.tables.header.source_accounting_only:
            return
        self._until = time.monotonic() + WATCHED_FOR_S
        if self._thread is None or not self._thread.is_alive():
            thread = threading.Thread(target=self._run, name="mpmm-returns", daemon=True)
            try:
                start_thread(thread)
            except RuntimeError:
                # There is no thread to be had: the leader's next poll has to do.
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
            # Otherwise the process has left meanwhile, and nobody in it waits for memory any more.
            if self._namespace.is_usable:
                _LOG.exception("mpmm %s: pid %d watches for no memory", self._namespace.name, self._namespace.pid)

    def _awaiting(self) -> list[int]:
        """Return the devices (rows) that wait for memory to come back. Without the lock."""
        tables = self._namespace.tables
        rows = tables.used_rows(self._namespace.segment.layout.devices)
        return [row for row in rows if tables.devices[row].return_count]
