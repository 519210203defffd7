"""Suspending all idle copies of a model by hand, and waiting for that."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mpmm.errors import ClosedError, SuspendTimeoutError
from mpmm.model_manager.nested import expect_not_kept_quiet
from mpmm.text.printable import printable, printable_logger

if TYPE_CHECKING:
    from mpmm.model_manager.session import Session

__all__ = ["suspend_all"]

# The logger that also reports waiting requests.
_LOG = printable_logger("mpmm.waits")
# How often it checks whether the copies are suspended.
LOOK_S = 0.01


def suspend_all(session: Session, tag: str, timeout_s: float) -> int:
    """Have the idle copies of a model suspended, and return how many are.

    timeout_s: how long to wait until they are; 0 does not wait, and returns how many will be suspended. Raises
    SuspendTimeoutError; DeadlockError, with nothing changed, if the thread would wait for itself; ClosedError,
    LockTimeoutError.
    """
    suspender, began = session.suspender, time.monotonic()

    def expect_not_to_wait_for_itself(rows: Sequence[int]) -> None:
        if timeout_s > 0:
            expect_not_kept_quiet(session, tag, "suspend", rows)

    chosen = suspender.begin_with_idle(tag, expect_not_to_wait_for_itself)
    if timeout_s <= 0:
        return len(chosen)
    _wait(session, tag, chosen, began, timeout_s)
    return len(suspender.suspended_among(chosen))


def _wait(session: Session, tag: str, chosen: Sequence[tuple[int, int]], began: float, timeout_s: float) -> None:
    suspender, tables = session.suspender, session.namespace.tables
    to_say = list(session.warn_after_s)
    while True:
        left = suspender.moving_among(chosen)
        # Checked after that, because a shutdown suspends them at once, and has to end this call.
        if session.closing:
            called = tables.called(tag)
            raise ClosedError(f"the model manager was shut down while a thread waited for {called} to be suspended")
        if not left:
            return
        waited_s = time.monotonic() - began
        if waited_s >= timeout_s:
            model, why = f"model {printable(tables.shown_for(tag))}", suspender.why_moving(left[0])
            raise SuspendTimeoutError(
                f"{model}: after {waited_s:.1f} s, {len(left)} of {len(chosen)} copies are yet to be suspended, which "
                f"{why}; they are suspended as soon as that is possible",
                tag=tag,
                left=len(left),
                waited_seconds=waited_s,
            )
        if to_say and waited_s >= to_say[0]:
            text = "mpmm %s: pid %d has waited %.0f s for %s to be suspended, which %s (%d of %d copies)"
            namespace, why = session.namespace, suspender.why_moving(left[0])
            shown, counts = tables.shown_for(tag), (len(left), len(chosen))
            _LOG.warning(text, namespace.name, namespace.pid, waited_s, shown, why, *counts)
            to_say = [seconds for seconds in to_say if seconds > waited_s]
        time.sleep(LOOK_S)
