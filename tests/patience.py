"""How long tests wait: limits that mean what they say on an idle machine, and more on a busy one.

Imports little, as each model server of a test imports it.
"""

from __future__ import annotations

import time

# Guards against a hang; measures nothing.
DEADLINE_S = 40.0
# While processes stand in line for a processor, so many seconds count as one.
BUSY_S = 5.0
_PRESSURE = "/proc/pressure/cpu"


def _stood_in_line_s() -> float | None:
    """Return for how long, since the machine started, there was a process that waited for a processor, if known."""
    try:
        with open(_PRESSURE, encoding="ascii") as file:
            return int(file.readline().rpartition("total=")[2]) / 1e6
    except (OSError, ValueError):
        # Not every kernel counts it, and not every container shows it.
        return None


class Stopwatch:
    """Measures from its creation on.

    What has to happen within a second happens within five where there are five processes to a processor. A limit of
    five seconds would not see what has become slower, and one of a second fails because other tests run: so limits
    are for `calm_s`, in which time that somebody had to stand in line for a processor counts a fifth.
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
        """Return for how long to wait before looking at the limit again; 0 once it has passed."""
        return max(0.0, limit_s - self.calm_s())
