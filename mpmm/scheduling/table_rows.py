"""Making room in the tables themselves, where every row of models or instances is taken."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import numpy.typing as npt

from mpmm.errors import TableFullError
from mpmm.policy.view import Reason
from mpmm.scheduling.suspension import SuspensionDecisions
from mpmm.shared_state.events import Cause
from mpmm.shared_state.layout import Instance, Model
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.transaction import Transaction

__all__ = ["TableRows"]

# Begun in one transaction, whose undo log has an end.
UNLOADS_AT_ONCE = 64


class TableRows:
    """Unloads for want of a row. Methods need the lock."""

    def __init__(self, namespace: Namespace, suspension: SuspensionDecisions) -> None:
        self._namespace = namespace
        self._tables = namespace.tables
        self._suspension = suspension

    def has_row_for_instance(self) -> bool:
        """Tell whether there is a row for another copy that none has to be unloaded for."""
        with suppress(TableFullError):
            return self._tables.free_row(self._namespace.segment.layout.instances) >= 0
        return bool(len(self._unused_seats()))

    def free_seat(self, t: Transaction) -> bool:
        """Take a seat that nobody uses from its copy for want of a row; return False if there is none."""
        seats = self._unused_seats()
        if not len(seats):
            return False
        # The one that has been free longest: the next user of the copy takes another.
        since = self._tables.instance_columns().since[seats]
        self._namespace.transitions.seats.free(t, int(seats[np.argmin(since)]))
        return True

    def _unused_seats(self) -> npt.NDArray[np.intp]:
        rows = self._tables.instance_columns()
        return np.flatnonzero((rows.state == Instance.IDLE) & (rows.seat_of != 0))

    def make_room_for_instance(self, t: Transaction, ticket: int) -> bool:
        """Have the copy that has been idle longest unloaded for want of a row; return False if none may be."""
        copies = self._tables.instance_columns()
        # One whose seats are in use has to wait for them.
        if np.any((copies.state == Instance.UNLOADING) & (copies.unload_late == 0) & (copies.seats == 0)):
            return True
        unloader, model = self._namespace.reads.queue.asker(ticket)
        cause = Cause(Reason.NO_ROW, other=model + 1)
        # Before a loaded one, which is worth more to its next user.
        if self._suspension.drop_oldest(t, unloader, cause):
            return True
        pinned = self._tables.model_columns().pins > 0
        idle = np.array(self._tables.idle_copies(), dtype=np.intp)
        # By model, as rows of instances know nothing of pins.
        idle = idle[~pinned[copies.model[idle]]]
        if not len(idle):
            return False
        oldest = int(idle[np.argmin(copies.since[idle])])
        self._namespace.transitions.unloads.begin(t, oldest, unloader, True, cause)
        return True

    def make_room_for_model(self, t: Transaction, unloader: int) -> bool:
        """Have the model whose copies have all been idle for longest unloaded by a member (slot), for want of a row.

        Nothing if the row of another one is about to come free, so that of many newcomers each costs one model.
        Return False if every row is in use, held, pinned or waited for: then nothing has changed.
        """
        models, copies = self._tables.model_columns(), self._tables.instance_columns()
        # Any of them would be left with a row number that means another model.
        kept = models.active + models.loading + models.waiting + models.pins
        unwanted = (models.state == Model.MODEL) & (kept == 0)
        # What a stuck process should unload may hold its row for ever.
        unwanted[copies.model[(copies.state == Instance.UNLOADING) & (copies.unload_late != 0)]] = False
        suspended = unwanted & (models.suspended > 0)
        # Its last copies are being unloaded, or it has none: its row comes free without this.
        if np.any(unwanted & (models.idle == 0) & ~suspended):
            return True
        if np.any(suspended):
            # What is being suspended can go once that has ended. A copy of a model that is wanted would be unloaded for
            # nothing: its row stays.
            among = set(np.flatnonzero(suspended).tolist())
            self._suspension.drop_oldest(t, unloader, Cause(Reason.NO_ROW), among)
            return True
        idle = np.array(self._tables.idle_copies(), dtype=np.intp)
        last_used = np.zeros(len(unwanted), dtype=np.uint64)
        # Not by `last_used[...] = `, which keeps an arbitrary one where a model has several copies.
        np.maximum.at(last_used, copies.model[idle].astype(np.intp), copies.since[idle])
        candidates = np.flatnonzero(unwanted)
        if not len(candidates):
            return False
        # A candidate without an idle copy cannot be here: the look at rows about to come free has found it.
        model = int(candidates[np.argmin(last_used[candidates])])
        for row in idle[copies.model[idle] == model][:UNLOADS_AT_ONCE].tolist():
            self._namespace.transitions.unloads.begin(t, row, unloader, True, Cause(Reason.NO_ROW))
        return True
