"""Histograms of waits, holds and loads, made from events.

The exporter of metrics counts them from the ring, as long as it follows it. They could be in the segment, the same for
every exporter; but then each release would pay for them (a bucket, a sum and a count are three words of the undo log,
0.8 µs of a release's 10), or the leader of each namespace would read the whole ring four times a second, whether or not
they are exported. So the exporter pays, and a counter says how many events it has missed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field

from mpmm.observability.event_reader import Step

__all__ = ["BOUNDS_S", "Histogram", "Histograms"]

#: Upper bounds in seconds; one more bucket has all that is longer.
BOUNDS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


@dataclass
class Histogram:
    """How many durations are in each bucket, each counted once, and their sum in seconds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    sum_s: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.sum_s += seconds


class Histograms:
    """Histograms by tag.

    waits: of requests that had to queue, until the wait ended, for whatever reason. lost: how many events were missed.
    """

    def __init__(self) -> None:
        self.waits: dict[str, Histogram] = defaultdict(Histogram)
        self.holds: dict[str, Histogram] = defaultdict(Histogram)
        self.loads: dict[str, Histogram] = defaultdict(Histogram)
        self.suspends: dict[str, Histogram] = defaultdict(Histogram)
        self.resumes: dict[str, Histogram] = defaultdict(Histogram)
        self.lost = 0
        self._queued: dict[int, float] = {}

    def add(self, step: Step) -> None:
        """Count the events of a step."""
        self.lost += step.lost
        taken_s = step.snapshot.taken_s
        if step.lost or step.fresh:
            # Otherwise waits whose end was missed would be kept for ever.
            self._queued = {ticket.number: taken_s - ticket.waited_s for ticket in step.snapshot.tickets}
        for event in step.events:
            if event.tag is None:
                # The row of its model is gone, as a lease's is once it has ended.
                continue
            if event.kind == "queued" and event.ticket is not None:
                self._queued[event.ticket] = taken_s - event.age_s
            elif (
                event.kind in ("granted", "left_queue", "load_began", "resume_began", "leased")
                and event.ticket is not None
            ):
                began = self._queued.pop(event.ticket, None)
                if event.kind in ("granted", "left_queue") and event.value is not None:
                    self.waits[event.tag].add(event.value)
                elif began is not None:
                    self.waits[event.tag].add(max(0.0, taken_s - event.age_s - began))
            elif event.kind == "released" and event.value is not None:
                self.holds[event.tag].add(event.value)
            elif event.kind == "load_ended" and event.value is not None:
                self.loads[event.tag].add(event.value)
            elif event.kind == "suspend_ended" and event.value is not None:
                self.suspends[event.tag].add(event.value)
            elif event.kind == "resume_ended" and event.value is not None:
                self.resumes[event.tag].add(event.value)
