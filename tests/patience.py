"""How long tests wait: time limits that hold on an idle machine, and allow more on a busy one.

Imports little, since each model server of a test imports it.
"""

from __future__ import annotations

import time

# Guards against a hang; measures nothing.
DEADLINE_S = 40.0
# While processes wait for a processor, this many seconds count as one.
BUSY_S = 5.0
_PRESSURE = "/proc/pressure/cpu"


def _stood_in_line_s() -> float | None:
    """Return how many seconds since the machine's start some process has waited for a processor, if known."""
    try:
        with open(_PRESSURE, encoding="ascii") as file:
            return int(file.readline().rpartition("total=")[2]) / 1e6
    except (OSError, ValueError):
        # Not every kernel counts this, and not every container shows it.
        return None


class Stopwatch:
    """Measures time from its creation.

    What takes a second takes five if there are five processes per processor. A limit of five seconds would not notice
    a slowdown, and a limit of one second would fail because other tests run. So limits are for `calm_s`, in which time
    counts a fifth while some process waits for a processor.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._stood_in_line_s = _stood_in_line_s()

    def s(self) -> float:
        """Return the seconds that have passed."""
        return time.monotonic() - self._began

    def calm_s(self) -> float:
        """Return the seconds that have passed, without most of the time that the machine was busy."""
        passed = self.s()
        stood_in_line_s, before = _stood_in_line_s(), self._stood_in_line_s
        busy_s = passed if stood_in_line_s is None or before is None else min(passed, stood_in_line_s - before)
        return passed - busy_s * (1.0 - 1.0 / BUSY_S)

    def left_s(self, limit_s: float) -> float:
        """Return how long to wait before checking the limit again; 0 once it has passed."""
        return max(0.0, limit_s - self.calm_s())
