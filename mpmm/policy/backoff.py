"""Back-off: for how long after a failed load nothing is evicted so that its model can be loaded again.

A loader that always fails would have the device flushed at each try, and models that are in demand loaded again in
between. So the failures of a model in a row are counted, and for 1, 2, 4, … up to `LONGEST_S` seconds after the last
one, a request for it may use what is free, but evicts nothing, and holds up no other. It is not refused, and its loader
is not kept from free memory: only the caller knows whether another try makes sense. One load that comes to an end, or
`force_reset`, and all is forgotten.

A failure is an exception of the loader, or a load that `load_timeout_seconds` has ended. A load that ran out of memory
and gets a second turn is none (what it needs more than is remembered instead), nor is the death, interruption or reset
of the process that loads, which says nothing about the model.
"""

from __future__ import annotations

from mpmm.policy.view import ModelView

__all__ = ["LONGEST_S", "back_off_s", "left_s"]

FIRST_S = 1.0
LONGEST_S = 60.0


def back_off_s(failures: int) -> float:
    """Return how long the back-off is after `failures` failures in a row, in seconds."""
    # The exponent is bounded, because a float is not.
    return min(LONGEST_S, FIRST_S * 2.0 ** min(failures - 1, 16)) if failures > 0 else 0.0


def left_s(model: ModelView) -> float:
    """Return how much of a model's back-off is left, in seconds; 0 when it has none."""
    return max(0.0, back_off_s(model.failures) - model.failed_ago_s)
