"""A snapshot as JSON text, for `mpmm inspect --json` and support bundles; `mpmm.cli` documents the schema."""

from __future__ import annotations

import json
import math

from mpmm.observability.findings import findings
from mpmm.observability.formatting import expected_waits, times_left, why, whys, with_names
from mpmm.shared_state.snapshot import Snapshot, as_json

__all__ = ["SCHEMA_VERSION", "snapshot_json"]

SCHEMA_VERSION = 2


def snapshot_json(snapshot: Snapshot) -> str:
    """Return every field of a snapshot, with the sentences that people are shown, as one line of JSON."""
    found = as_json(snapshot)
    # Fields have tags; sentences are for people, and have names.
    named = with_names(snapshot)
    why_of, left_s_of, expected_s_of = whys(named), times_left(named), expected_waits(named)
    for ticket, shown in zip(named.tickets, found["tickets"], strict=True):
        shown["why"] = why_of(ticket)
        shown["seconds_left"] = _finite(left_s_of(ticket))
        shown["expected_s"] = _finite(expected_s_of(ticket))
    for event, shown in zip(named.events, found["events"], strict=True):
        shown["why"] = why(event)
    found["findings"] = [{"urgent": finding.urgent, "text": finding.text} for finding in findings(named)]
    return json.dumps({"schema": SCHEMA_VERSION, **found})


def _finite(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None
