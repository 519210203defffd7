"""What others ask of the live rows, who waits, which copy is idle, what runs alone, so that they need touch no word.

`rows` has a field for each word, for callers that are in no hurry. These read what a caller needs in one go, because
the warm path and the hand-overs ask, and a call for each word would cost them more than the reads. They decide nothing:
what follows from an answer is the callers' business, or the policy's.

What belongs together needs the lock. A method that says "without the lock" may be wrong a moment later; only
`QueueReads.unlocked` makes sure that what it returns stood there together, and was committed.
"""

from __future__ import annotations

from mpmm.shared_state.reads.devices import DeviceReads
from mpmm.shared_state.reads.instances import InstanceReads
from mpmm.shared_state.reads.models import ModelReads
from mpmm.shared_state.reads.queue import QueueReads
from mpmm.shared_state.tables import Tables

__all__ = ["Reads"]


class Reads:
    """The reads of one namespace, by what they are about."""

    def __init__(self, tables: Tables) -> None:
        self.queue = QueueReads(tables)
        self.instances = InstanceReads(tables)
        self.models = ModelReads(tables)
        self.devices = DeviceReads(tables)
