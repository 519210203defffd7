"""Memory in which large buffers arrive: private, writable, freed with the last object that uses it.

Fresh memory in pages of 4 KiB costs far more than the copy into it (19 MB in 32 arrays: 18 ms, of which the copy is
0.7), so it comes in slabs of huge pages (0.9 ms). Buffers of one message that arrive beside each other share a slab,
which lives as long as any of them; SLAB_BYTES bounds what a single survivor can keep alive for the others.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress

__all__ = ["SLAB_BYTES", "landing_memory"]

# Two huge pages: one of them is whole even where the kernel does not align the mapping.
SLAB_BYTES = 1 << 22
# Less is served as well by what the heap has at hand.
SMALLEST_SLAB_BYTES = 1 << 20
# Good for every type of number and for vector instructions.
ALIGNMENT = 64


def landing_memory(sizes: Sequence[int]) -> list[memoryview]:
    """Return memory for buffers of these sizes in bytes. Raises OSError or MemoryError when there is not enough."""
    memory: list[memoryview] = []
    group: list[int] = []
    group_bytes = 0
    for size in sizes:
        if group and group_bytes + size > SLAB_BYTES:
            memory += _slab(group, group_bytes)
            group, group_bytes = [], 0
        group.append(size)
        group_bytes += _aligned(size)
    return memory + _slab(group, group_bytes)


def _slab(sizes: Sequence[int], total: int) -> list[memoryview]:
    """Return memory for a group of buffers, together if that pays."""
    if total < SMALLEST_SLAB_BYTES:
        return [memoryview(bytearray(size)) for size in sizes]
    # Private, so that a forked child has a copy of its own, as of all other memory.
    mapping = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Refused by kernels that were built without huge pages.
        with suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
    slab = memoryview(mapping)
    views, start = [], 0
    for size in sizes:
        views.append(slab[start : start + size])
        start += _aligned(size)
    return views


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
