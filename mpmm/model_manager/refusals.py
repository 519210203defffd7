"""Why a request fails: the errors that acquires, loads and leases raise, with the figures that their texts name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpmm.errors import AcquireTimeoutError, ClosedError, LockTimeoutError, MpmmError, NamespaceResetError
from mpmm.interpreter.process_end import stand_still_in_daemon
from mpmm.shared_state.layout import device_rows
from mpmm.text.display_names import display_name, shown_tag
from mpmm.text.printable import printable

if TYPE_CHECKING:
    from mpmm.model_manager.request import PlacementRequest
    from mpmm.model_manager.session import Session

__all__ = ["expect_mapped", "expect_own_time_left", "largest_limit", "taken_away", "timed_out"]

# Part of Python's error about a released memoryview.
_UNMAPPED = "released memoryview"


def timed_out(
    tag: str, waited_s: float, reason: str, expected_s: float | None = None, *, shown: str | None = None
) -> AcquireTimeoutError:
    """Return the error for a request that has waited as long as it may.

    reason: what it last waited for. shown: how the tag is shown to people; None for the name that this process knows.
    """
    shown = shown_tag(tag, display_name(tag)) if shown is None else shown
    more = "" if expected_s is None else f"; about {expected_s:.1f} s more are expected"
    return AcquireTimeoutError(
        f"Timeout waiting to acquire model: {printable(shown)} after {waited_s:.1f} seconds (last reason: {reason}"
        f"{more}); wait_timeout_seconds sets the limit",
        tag=tag,
        waited_seconds=waited_s,
        retry_after_seconds=expected_s,
    )


def expect_own_time_left(session: Session, tag: str, error: LockTimeoutError) -> None:
    """Raise AcquireTimeoutError if the wait for the lock ended only because the caller's time was up."""
    if error.timeout_seconds < session.namespace.settings.lock_timeout_seconds:
        shown = session.namespace.tables.shown_for(tag)
        raise timed_out(tag, error.timeout_seconds, "lock", shown=shown) from error


def taken_away(session: Session, what: str, tag: str) -> MpmmError:
    """Return the error for an instance or ticket that a reset, or this process's shutdown, has taken away."""
    if session.closing:
        return ClosedError(f"the model manager was shut down, which {what}")
    return NamespaceResetError(f"a reset of namespace {session.namespace.name!r} {what}", tag=tag)


def largest_limit(session: Session, request: PlacementRequest) -> tuple[float, str]:
    """Return how many MB the roomiest devices that an instance may span can hold together, and their names."""
    namespace, limit_mb = session.namespace, session.scheduler.limit_mb
    with namespace.transaction():
        rows = device_rows(request.loadable_on) or session.samples.rows()
        roomiest = sorted(rows, key=limit_mb)[-request.span :]
        names = [namespace.tables.device_name(row) for row in roomiest]
        return min(map(limit_mb, roomiest)) * request.span, ", ".join(names)


def expect_mapped(session: Session | None, error: ValueError) -> None:
    """Raise ClosedError if this is Python's error about a segment that another thread has unmapped."""
    if _UNMAPPED in str(error) and (session is None or session.closing or not session.namespace.is_usable):
        stand_still_in_daemon()
        raise ClosedError("the model manager was shut down by another thread") from None
