"""Follow a namespace: read its events one after another, none twice, and count those that were overwritten unread.

Following slows no process down: the reader copies the ring, like everything else, without the lock. So it
must look again before the ring has been overwritten once; the pauses become shorter when much happens.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mpmm.shared_state.snapshot import EventChoice, EventInfo, Snapshot, read_snapshot

__all__ = ["EventReader", "Step", "asked_to_end", "steps"]

LONGEST_PAUSE_S = 0.25
SHORTEST_PAUSE_S = 0.02
# Between two looks for a namespace that does not exist yet.
WAITING_PAUSE_S = 0.1
# With more events than this at a time, pauses shorten: a quarter of the smallest reasonable ring for a busy host.
WANTED_AT_A_TIME = 2000


@dataclass(frozen=True)
class Step:
    """What is new. lost: events that were overwritten before this look. fresh: this is the first look, or all earlier
    ones were at an earlier namespace of this name."""

    snapshot: Snapshot
    events: tuple[EventInfo, ...]
    lost: int
    fresh: bool


class EventReader:
    """Reads the events of a namespace, from whichever segment has its name at the time. Not thread-safe."""

    def __init__(self, namespace: str, root: Path | None = None) -> None:
        self.namespace = namespace
        self._root = root
        self._created: float | None = None
        self._seen = 0
        self.pause_s = LONGEST_PAUSE_S

    def step(self) -> Step:
        """Look once. Raises what `read_snapshot` raises, FileNotFoundError when the namespace is gone."""
        snapshot = read_snapshot(self.namespace, self._root, choice=EventChoice(after=self._seen))
        fresh = snapshot.created_wall_s != self._created
        if fresh and self._seen:
            snapshot = read_snapshot(self.namespace, self._root)
        if fresh:
            self._created, self._seen = snapshot.created_wall_s, 0
        events = snapshot.events
        lost = max(0, snapshot.events_written - self._seen - len(events))
        self._seen = snapshot.events_written
        if len(events) + lost > WANTED_AT_A_TIME and not fresh:
            self.pause_s = max(SHORTEST_PAUSE_S, self.pause_s / 2)
        elif len(events) < WANTED_AT_A_TIME / 4:
            self.pause_s = min(LONGEST_PAUSE_S, self.pause_s * 2)
        return Step(snapshot, events, lost, fresh)


def steps(reader: EventReader, ending: Callable[[], bool]) -> Iterator[Step]:
    """Yield looks at a namespace until it is gone or `ending()`; if it does not exist yet, wait for it."""
    seen = False
    while True:
        # Ask first, so that the last look has everything that happened before the request.
        asked = ending()
        try:
            yield reader.step()
            seen = True
        except FileNotFoundError:
            if seen or asked:
                return
            time.sleep(WAITING_PAUSE_S)
            continue
        if asked:
            return
        time.sleep(reader.pause_s)


@contextlib.contextmanager
def asked_to_end() -> Iterator[Callable[[], bool]]:
    """Take SIGINT and SIGTERM as a request to end in good order; yield a function that tells whether one has come."""
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        asked.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, ask) for number in numbers]
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
