"""Write the trace of a namespace: what its ring of events holds, or continuously while a job runs."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from mpmm.observability.event_reader import EventReader, asked_to_end, steps
from mpmm.observability.trace import Tracer
from mpmm.observability.trace_tracks import TraceEvent
from mpmm.shared_state.snapshot import Snapshot

__all__ = ["recent_trace", "record"]


def recent_trace(namespace: str, root: Path | None = None) -> list[TraceEvent]:
    """Return the trace of what the ring holds. Raises what `read_snapshot` raises."""
    tracer = Tracer()
    step = EventReader(namespace, root).step()
    return tracer.add(step) + tracer.finish(step.snapshot)


def record(namespace: str, root: Path | None, output: Path | None, *, follow: bool) -> int:
    """Write the trace of a namespace to a file, or the standard output; say on stderr what was written and missed.

    follow: from what the ring holds now until the namespace is gone, or SIGINT or SIGTERM arrives; if the namespace
    does not exist yet, wait for it. Returns 0.

    Raises what `read_snapshot` raises, without `follow`; OSError when the file cannot be written.
    """
    reader, tracer = EventReader(namespace, root), Tracer()
    last: Snapshot | None = None
    with asked_to_end() as ending, contextlib.ExitStack() as stack:
        # Read before opening the file: without a namespace, an earlier trace in it must not be lost.
        first = None if follow else reader.step()
        stream = sys.stdout if output is None else stack.enter_context(open(output, "w", encoding="utf-8"))
        trace = TraceFile(stream)
        try:
            for step in steps(reader, ending) if first is None else (first,):
                trace.write(tracer.add(step))
                last = step.snapshot
        finally:
            if last is not None:
                trace.write(tracer.finish(last))
            trace.close()
    missed = f"; {tracer.lost} events were overwritten before they could be read" if tracer.lost else ""
    print(f"mpmm: {trace.written} entries written{missed}", file=sys.stderr)
    return 0


class TraceFile:
    """A trace that can be read at any time while it is written: in this format the closing bracket may be missing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.written = 0
        stream.write("[")

    def write(self, events: Iterable[TraceEvent]) -> None:
        """Append events, and flush them, so that readers see them."""
        for event in events:
            self._stream.write((",\n" if self.written else "\n") + json.dumps(event))
            self.written += 1
        self._stream.flush()

    def close(self) -> None:
        """Write the closing bracket; the stream stays open."""
        self._stream.write("\n]\n")
        self._stream.flush()
