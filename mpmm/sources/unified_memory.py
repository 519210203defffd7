"""GPUs that have no memory of their own but use the host's: GB10 (DGX Spark), Jetson.

Their driver reports no memory ("Not Supported", `[N/A]`), or the host's, with the page cache counted as used, so that
on a host that has read some files nothing seems to fit. Here the total is the host's MemTotal, and free memory its
MemAvailable, both within what the control group of this process allows. The driver still says what single processes
take.

Such a GPU is the only one of its host. If there are more, one that does not report its memory is left out, because
several would share the same memory, and a board beside others is more likely to be broken.
"""

from __future__ import annotations

import psutil

from mpmm.sources.base import MIB
from mpmm.sources.host_memory import host_memory_left_mb, host_memory_mb

__all__ = ["counts_page_cache", "is_host_total", "is_not_told", "unified_total_mb", "unified_used_mb"]

# The driver's total and the kernel's are the same number; the two figures of free memory are read one after the other.
_SAME_TOTAL = 0.005
_SAME_FREE = 0.02


def is_not_told(answer: str) -> bool:
    """Return whether a driver's answer means that there is no such figure, rather than that it cannot be read now."""
    return answer.strip("[]").lower() in ("n/a", "not supported")


def is_host_total(total_mb: float) -> bool:
    """Return whether the total of a host's only GPU is that of the host's memory."""
    total = psutil.virtual_memory().total
    return bool(abs(total_mb * MIB - total) <= _SAME_TOTAL * total)


def counts_page_cache(total_mb: float, free_mb: float) -> bool:
    """Return whether the figures of a host's only GPU are those of the host's memory, with the page cache as used."""
    memory = psutil.virtual_memory()
    return is_host_total(total_mb) and bool(abs(free_mb * MIB - memory.free) <= _SAME_FREE * memory.total)


def unified_total_mb() -> float:
    """Return the memory that host and GPU have together."""
    return host_memory_mb()


def unified_used_mb() -> float:
    """Return how much of it is not available, whether host or GPU uses it."""
    return max(0.0, host_memory_mb() - host_memory_left_mb())
