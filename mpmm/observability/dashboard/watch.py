"""All namespaces of this user, as they begin and end: a thread looks at each of them once a second."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from mpmm.errors import MpmmError
from mpmm.interpreter.latch import Latch
from mpmm.interpreter.thread_locks import new_lock
from mpmm.observability.dashboard.history import Recorder
from mpmm.shared_state.runtime_dir import default_root
from mpmm.shared_state.snapshot import find_lost_namespaces, find_namespaces
from mpmm.text.printable import printable_logger

__all__ = ["Watcher"]

_logger = printable_logger("mpmm.observability.dashboard")

PAUSE_S = 1.0
# If so much happens that the ring of events could be overwritten between two looks.
BUSY_PAUSE_S = 0.25
# How long the last picture of a namespace that has ended stays.
ENDED_KEPT_S = 600.0


class Watcher:
    """Keeps a `Recorder` for each namespace. Thread-safe; changes nothing that others can see.

    namespace: the only one to show, whether or not it exists yet; None for all. root: folder of the runtime
    directories.
    """

    def __init__(self, root: Path | None = None, namespace: str | None = None) -> None:
        self._root = root
        self._only = namespace
        self._mutex = new_lock()
        self._recorders: dict[str, Recorder] = {}
        self._ended: dict[str, float] = {}
        # Why the thread's last look failed, if it did.
        self._trouble: str | None = None
        self._closing = Latch()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Look once, and from then on in a thread."""
        self.look()
        self._thread = threading.Thread(target=self._run, name="mpmm-dashboard", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def look(self) -> float:
        """Look at all namespaces once; return the seconds until the next look."""
        with self._mutex:
            self._look_at_all()
            busy = any(recorder.busy for recorder in self._recorders.values())
        return BUSY_PAUSE_S if busy else PAUSE_S

    def state(self, name: str | None, epoch: str, look: int, window_s: float) -> dict[str, Any]:
        """Return what to show on a page that has seen a certain look at a namespace; see `Recorder.state`.

        name: None for the busiest. A namespace that is not known has the state None.
        """
        with self._mutex:
            if name is None:
                name = self._busiest()
            recorder = self._recorders.get(name) if name is not None else None
            known = recorder is not None and recorder.seen
            return {
                "root": str(self._root or default_root()),
                "only": self._only,
                "namespaces": [self._recorders[other].summary() for other in sorted(self._recorders)],
                "namespace": name,
                "problem": self._trouble or (None if recorder is None else recorder.problem),
                "state": recorder.state(epoch, look, window_s) if recorder is not None and known else None,
            }

    def _found(self) -> list[str]:
        return [*find_namespaces(self._root), *find_lost_namespaces(self._root)]

    def _look_at_all(self) -> None:
        there = [self._only] if self._only is not None else self._found()
        for name in there:
            if name not in self._recorders:
                self._recorders[name] = Recorder(name, self._root)
        for name, recorder in self._recorders.copy().items():
            self._look_at(recorder, name in there)

    def _look_at(self, recorder: Recorder, there: bool) -> None:
        """Look at a namespace; forget it if it has ended and was shown for long enough, or could never be read."""
        name, now_s = recorder.namespace, time.monotonic()
        try:
            recorder.look()
            self._ended.pop(name, None)
        except Exception as error:
            if not isinstance(error, (OSError, MpmmError)):
                # A bug of ours: the page shows its text, and the thread looks at all other namespaces nevertheless.
                _logger.exception("mpmm dashboard: cannot show namespace %s", name)
            since_s = self._ended.setdefault(name, now_s)
            if not there and (not recorder.seen or now_s - since_s > ENDED_KEPT_S):
                del self._recorders[name], self._ended[name]

    def _busiest(self) -> str | None:
        """Return the namespace to show first: the one with the most copies, among those that can be read."""
        known = self._recorders
        return max(sorted(known), key=lambda name: known[name].weight(), default=None)

    def _run(self) -> None:
        pause_s = PAUSE_S
        while not self._closing.wait(pause_s):
            try:
                pause_s = self.look()
            except Exception as error:
                # The page says so until a look succeeds, or its figures would seem to be current.
                if self._trouble is None:
                    _logger.exception("mpmm dashboard: cannot look at the namespaces")
                self._trouble, pause_s = f"cannot look at the namespaces: {error}", PAUSE_S
            else:
                self._trouble = None
