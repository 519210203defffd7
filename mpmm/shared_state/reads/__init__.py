"""Reads of live rows for other modules: which tickets wait, which copy is idle, what runs alone.

`rows` has a field for each word, for callers in no hurry. These methods read all that a caller needs in one call,
because the warm path and the hand-overs use them, and a call for each word would cost more than the reads. They decide
nothing: that is up to the callers, or the policy.

Values that belong together need the lock. The answer of a method that says "without the lock" may be wrong a moment
later; only `QueueReads.unlocked` ensures that its values are of one moment, and committed.
"""

from __future__ import annotations

from mpmm.shared_state.reads.devices import DeviceReads
from mpmm.shared_state.reads.instances import InstanceReads
from mpmm.shared_state.reads.models import ModelReads
from mpmm.shared_state.reads.queue import QueueReads
from mpmm.shared_state.tables import Tables

__all__ = ["Reads"]


class Reads:
    """The reads of one namespace, by subject."""

    def __init__(self, tables: Tables) -> None:
        self.queue = QueueReads(tables)
        self.instances = InstanceReads(tables)
        self.models = ModelReads(tables)
        self.devices = DeviceReads(tables)
