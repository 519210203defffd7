"""Converts seconds, which people use, to nanoseconds, which the segment stores."""

from __future__ import annotations

__all__ = ["LONGEST_NS", "to_ns"]

# 146 years. Added to any time of a monotonic clock it still fits into a word, and into a signed number of 64 bits.
LONGEST_NS = 2**62


def to_ns(seconds: float) -> int:
    """Return a duration, or a time, in whole nanoseconds: at most `LONGEST_NS`, which also stands for `inf`.

    A negative one becomes 0, because a word cannot hold it.
    """
    # Compare before converting: infinity has no integer.
    return int(seconds * 1e9) if 0 < seconds < LONGEST_NS / 1e9 else LONGEST_NS if seconds > 0 else 0
