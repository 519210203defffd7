"""Claims to poll in the leader's place, or to look at a device, so that one process does it and the others see that.

Raw words, which are written without the lock: whoever looks is about to find out whether the leader is stuck, and the
leader may have the lock. Two that claim at the same time poll twice, which costs only time.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from mpmm.shared_state.layout import Device, Header
from mpmm.shared_state.tables import Tables

__all__ = ["claim_late_looks", "claim_late_polls", "times_of_polls"]


def times_of_polls(tables: Tables, devices: Iterable[int]) -> tuple[int, ...]:
    """Return the words in which it stands when the last poll was, and the last look at each of these devices (rows)."""
    return tuple(tried for tried, _ in _poll_places(tables, devices))


def claim_late_polls(tables: Tables, devices: Iterable[int], late_ns: int, claim_lasts_ns: int) -> bool:
    """Claim the poll if the last one, or the last look at one of these devices (rows), is too long ago; else return
    False.

    late_ns: what is too long. claim_lasts_ns: for so long another one's claim counts; then it may have died.
    """
    return _claim(tables, _poll_places(tables, devices), late_ns, claim_lasts_ns)


def claim_late_looks(tables: Tables, devices: Iterable[int], late_ns: int, claim_lasts_ns: int) -> bool:
    """Claim the look at these devices (rows) if the last one at any is too long ago; else return False.

    late_ns, claim_lasts_ns: as above.
    """
    return _claim(tables, _places(tables, devices), late_ns, claim_lasts_ns)


def _poll_places(tables: Tables, devices: Iterable[int]) -> list[tuple[int, int]]:
    return [(Header.POLLED, Header.POLL_CLAIMED), *_places(tables, devices)]


def _places(tables: Tables, devices: Iterable[int]) -> list[tuple[int, int]]:
    """Return for each device where it stands when somebody last looked, and when somebody last claimed to."""
    starts = (tables.device(row) for row in devices)
    return [(at + Device.TRIED, at + Device.CLAIMED) for at in starts]


def _claim(tables: Tables, places: list[tuple[int, int]], late_ns: int, claim_lasts_ns: int) -> bool:
    words, now = tables.segment.words, time.monotonic_ns()
    # 0 is no claim, on a machine that has just started either.
    late, lapsed = now - late_ns, max(0, now - claim_lasts_ns)
    # A claim from the future was not written by a claimant, and keeps nobody from it.
    if not any(words[tried] < late and not lapsed < words[claimed] <= now for tried, claimed in places):
        return False
    for _, claimed in places:
        words[claimed] = now
    return True
