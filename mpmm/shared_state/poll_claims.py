"""Claims to poll in the leader's place, or to sample a device, so that one process does it and the others know.

Raw words, written without the lock: a process claims when the leader may be stuck, and the leader may hold the lock. If
two processes claim at the same time, both poll, which only costs time.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from mpmm.shared_state.layout import Device, Header
from mpmm.shared_state.tables import Tables

__all__ = ["claim_late_looks", "claim_late_polls", "times_of_polls"]


def times_of_polls(tables: Tables, devices: Iterable[int]) -> tuple[int, ...]:
    """Return the words with the times of the last poll, and of the last try to sample each of these devices (rows)."""
    return tuple(tried for tried, _ in _poll_places(tables, devices))


def claim_late_polls(tables: Tables, devices: Iterable[int], late_ns: int, claim_lasts_ns: int) -> bool:
    """Claim the poll if the last one, or the last try to sample one of these devices (rows), is too old.

    Return False otherwise, or if another process has claimed it. late_ns: how old is too old. claim_lasts_ns: how long
    another process's claim counts; after that it may have died.
    """
    return _claim(tables, _poll_places(tables, devices), late_ns, claim_lasts_ns)


def claim_late_looks(tables: Tables, devices: Iterable[int], late_ns: int, claim_lasts_ns: int) -> bool:
    """Claim to sample these devices (rows) if the last try to sample any of them is too old; else return False.

    late_ns, claim_lasts_ns: see `claim_late_polls`.
    """
    return _claim(tables, _places(tables, devices), late_ns, claim_lasts_ns)


def _poll_places(tables: Tables, devices: Iterable[int]) -> list[tuple[int, int]]:
    return [(Header.POLLED, Header.POLL_CLAIMED), *_places(tables, devices)]


def _places(tables: Tables, devices: Iterable[int]) -> list[tuple[int, int]]:
    """Return for each device the words with the times of the last try to sample it, and of the last claim to."""
    starts = (tables.device(row) for row in devices)
    return [(at + Device.TRIED, at + Device.CLAIMED) for at in starts]


def _claim(tables: Tables, places: list[tuple[int, int]], late_ns: int, claim_lasts_ns: int) -> bool:
    words, now = tables.segment.words, time.monotonic_ns()
    # 0 is no claim, even on a machine that has just started.
    late, lapsed = now - late_ns, max(0, now - claim_lasts_ns)
    # No claimant wrote a claim from the future, so it does not count.
    if not any(words[tried] < late and not lapsed < words[claimed] <= now for tried, claimed in places):
        return False
    for _, claimed in places:
        words[claimed] = now
    return True
