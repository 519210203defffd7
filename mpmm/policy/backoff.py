"""Back-off: for how long after a failed load nothing is evicted so that its model can be loaded again.

A loader that always fails would have the device flushed at each try, and models that are in demand would be loaded
again in between. So a model's failures in a row are counted, and for 1, 2, 4, … up to `LONGEST_S` seconds after the
last one, a request for it may use free memory, but evicts nothing, and holds up no other request. It is not refused,
and its loader may still use free memory: only the caller knows whether another try makes sense. One successful load, or
`force_reset`, resets the count.

A failure is an exception of the loader, or a load that `load_timeout_seconds` has ended. A load that ran out of memory
and gets a second turn does not count (the memory that was not enough is recorded instead), nor does the death,
interruption or reset of the process that loads, which says nothing about the model.
"""

from __future__ import annotations

from mpmm.policy.view import ModelView

__all__ = ["LONGEST_S", "back_off_s", "left_s"]

FIRST_S = 1.0
LONGEST_S = 60.0


def back_off_s(failures: int) -> float:
    """Return how long the back-off is after `failures` failures in a row, in seconds."""
    # The exponent is bounded, because a float would overflow.
    return min(LONGEST_S, FIRST_S * 2.0 ** min(failures - 1, 16)) if failures > 0 else 0.0


def left_s(model: ModelView) -> float:
    """Return how much of a model's back-off is left, in seconds; 0 if it has none."""
    return max(0.0, back_off_s(model.failures) - model.failed_ago_s)
