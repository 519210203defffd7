"""Making room in the tables themselves, where every row of models or instances is taken."""

from __future__ import annotations

import numpy as np

from mpmm.policy.view import Reason
from mpmm.scheduling.suspension import SuspensionDecisions
from mpmm.shared_state.events import Cause
from mpmm.shared_state.layout import Instance, Model, Ticket
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
        self._segment = namespace.segment
        self._layout = namespace.segment.layout
        self._suspension = suspension

    def make_room_for_instance(self, t: Transaction, ticket: int) -> bool:
        """Have the copy that has been idle longest unloaded for want of a row; return False if none may be."""
        rows = self._tables.view(self._layout.instances)
        if np.any((rows[:, Instance.STATE] == Instance.UNLOADING) & (rows[:, Instance.UNLOAD_LATE] == 0)):
            return True
        at = self._tables.ticket(ticket)
        unloader, model = self._segment.words[at + Ticket.MEMBER] - 1, self._segment.words[at + Ticket.MODEL]
        if self._suspension.drop_oldest(t, unloader, Cause(Reason.NO_ROW, other=model + 1)):
            return True
        pinned = self._tables.view(self._layout.models)[:, Model.PINS] > 0
        idle = np.flatnonzero(rows[:, Instance.STATE] == Instance.IDLE)
        idle = idle[~pinned[rows[idle, Instance.MODEL]]]
        if not len(idle):
            return False
        oldest = int(idle[np.argmin(rows[idle, Instance.SINCE])])
        self._namespace.transitions.unloads.begin(t, oldest, unloader, True, Cause(Reason.NO_ROW, other=model + 1))
        return True

    def make_room_for_model(self, t: Transaction, unloader: int) -> bool:
        """Have the model whose copies have all been idle for longest unloaded by a member (slot), for want of a row.

        Nothing if the row of another one is about to come free, so that of many newcomers each costs one model.
        Return False if every row is in use, held, pinned or waited for: then nothing has changed.
        """
        models, copies = self._tables.view(self._layout.models), self._tables.view(self._layout.instances)
        kept = models[:, Model.ACTIVE] + models[:, Model.LOADING] + models[:, Model.WAITING] + models[:, Model.PINS]
        unwanted = (models[:, Model.STATE] == Model.MODEL) & (kept == 0)
        # What a stuck process should unload may hold its row for ever.
        stuck = copies[(copies[:, Instance.STATE] == Instance.UNLOADING) & (copies[:, Instance.UNLOAD_LATE] != 0)]
        unwanted[stuck[:, Instance.MODEL]] = False
        suspended = unwanted & (models[:, Model.SUSPENDED] > 0)
        if np.any(unwanted & (models[:, Model.IDLE] == 0) & ~suspended):
            return True
        if np.any(suspended):
            # What is being suspended can go once that has ended.
            self._suspension.drop_oldest(t, unloader, Cause(Reason.NO_ROW))
            return True
        idle = np.flatnonzero(copies[:, Instance.STATE] == Instance.IDLE)
        last_used = np.zeros(len(models), dtype=np.uint64)
        np.maximum.at(last_used, copies[idle, Instance.MODEL].astype(np.intp), copies[idle, Instance.SINCE])
        candidates = np.flatnonzero(unwanted)
        if not len(candidates):
            return False
        model = int(candidates[np.argmin(last_used[candidates])])
        for row in idle[copies[idle, Instance.MODEL] == model][:UNLOADS_AT_ONCE].tolist():
            self._namespace.transitions.unloads.begin(t, row, unloader, True, Cause(Reason.NO_ROW))
        return True
