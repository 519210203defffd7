"""Making room in the tables themselves, when every row of models or instances is taken."""

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

# How many unloads are begun in one transaction, because the undo log is limited.
UNLOADS_AT_ONCE = 64


class TableRows:
    """Unloads to free a row. Methods need the lock."""

    def __init__(self, namespace: Namespace, suspension: SuspensionDecisions) -> None:
        self._namespace = namespace
        self._tables = namespace.tables
        self._suspension = suspension

    def has_row_for_instance(self) -> bool:
        """Tell whether there is a row for another copy without unloading any."""
        with suppress(TableFullError):
            return self._tables.free_row(self._namespace.segment.layout.instances) >= 0
        return bool(len(self._unused_seats()))

    def free_seat(self, t: Transaction) -> bool:
        """Free the row of a seat that is not in use; return False if there is none."""
        seats = self._unused_seats()
        if not len(seats):
            return False
        # The seat that has been unused longest: the next user of the copy takes another one.
        since = self._tables.instance_columns().since[seats]
        self._namespace.transitions.seats.free(t, int(seats[np.argmin(since)]))
        return True

    def _unused_seats(self) -> npt.NDArray[np.intp]:
        rows = self._tables.instance_columns()
        return np.flatnonzero((rows.state == Instance.IDLE) & (rows.seat_of != 0))

    def make_room_for_instance(self, t: Transaction, ticket: int) -> bool:
        """Have the copy that has been idle longest unloaded to free its row; return False if none may be."""
        copies = self._tables.instance_columns()
        # A row is about to come free, unless it has to wait for seats in use.
        if np.any((copies.state == Instance.UNLOADING) & (copies.unload_late == 0) & (copies.seats == 0)):
            return True
        unloader, model = self._namespace.reads.queue.asker(ticket)
        cause = Cause(Reason.NO_ROW, other=model + 1)
        # A suspended copy comes first: a loaded one is worth more to its next user.
        if self._suspension.drop_oldest(t, unloader, cause):
            return True
        pinned = self._tables.model_columns().pins > 0
        idle = np.array(self._tables.idle_copies(), dtype=np.intp)
        # Looked up by model, because pins are not in the rows of instances.
        idle = idle[~pinned[copies.model[idle]]]
        if not len(idle):
            return False
        oldest = int(idle[np.argmin(copies.since[idle])])
        self._namespace.transitions.unloads.begin(t, oldest, unloader, True, cause)
        return True

    def make_room_for_model(self, t: Transaction, unloader: int) -> bool:
        """Have the model whose copies have all been idle longest unloaded by a member (slot), to free its row.

        Does nothing if the row of another model is about to come free, so that each of many newcomers costs one model.
        Return False if every row is in use, held, pinned or waited for: then nothing has changed.
        """
        models, copies = self._tables.model_columns(), self._tables.instance_columns()
        # Each of these refers to the row, which would then stand for another model.
        kept = models.active + models.loading + models.waiting + models.pins
        unwanted = (models.state == Model.MODEL) & (kept == 0)
        # A copy that a stuck process should unload may keep its model's row for ever.
        unwanted[copies.model[(copies.state == Instance.UNLOADING) & (copies.unload_late != 0)]] = False
        suspended = unwanted & (models.suspended > 0)
        # Its last copies are being unloaded, or it has none: its row comes free anyway.
        if np.any(unwanted & (models.idle == 0) & ~suspended):
            return True
        if np.any(suspended):
            # A copy that is being suspended can be dropped after that. To drop one of a model that is still wanted
            # would be in vain: the model's row stays.
            among = set(np.flatnonzero(suspended).tolist())
            self._suspension.drop_oldest(t, unloader, Cause(Reason.NO_ROW), among)
            return True
        idle = np.array(self._tables.idle_copies(), dtype=np.intp)
        last_used = np.zeros(len(unwanted), dtype=np.uint64)
        # Not `last_used[...] = `, which keeps an arbitrary time if a model has several copies.
        np.maximum.at(last_used, copies.model[idle].astype(np.intp), copies.since[idle])
        candidates = np.flatnonzero(unwanted)
        if not len(candidates):
            return False
        # Every candidate here has an idle copy: the check for rows about to come free has found the others.
        model = int(candidates[np.argmin(last_used[candidates])])
        for row in idle[copies.model[idle] == model][:UNLOADS_AT_ONCE].tolist():
            self._namespace.transitions.unloads.begin(t, row, unloader, True, Cause(Reason.NO_ROW))
        return True
