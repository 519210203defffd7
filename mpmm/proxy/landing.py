"""Memory in which large buffers arrive: private and writable, an object's own until the last one that uses it is gone.

Fresh memory costs more than the copy into it, because the kernel zeroes it page by page: 19 MB in 32 arrays take
18 ms in pages of 4 KiB, 0.9 ms in huge pages, and 0.7 ms, the mere copy, in memory that was used before. So buffers
arrive in slabs of huge pages, and slabs are used again. Those of one message that lie beside each other share a
slab, which lives as long as any of them; SLAB_BYTES bounds what a single survivor keeps alive for the others.

A slab is lent out through a ctypes array, whose end, seen by a weak reference, says that nobody can reach its
memory any more. A spare slab is free for the kernel to take (MADV_FREE) as soon as memory is short, and no more
than SPARE_BYTES are kept at all.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from mpmm.proxy.process_life import in_forked_child

__all__ = ["SLAB_BYTES", "SPARE_BYTES", "drop_spare_slabs", "landing_memory"]

# Two huge pages: one of them is whole even where the kernel does not align the mapping.
SLAB_BYTES = 1 << 22
# Less is served as well by what the heap has at hand.
SMALLEST_SLAB_BYTES = 1 << 20
SPARE_BYTES = 1 << 26
# Good for every type of number and for vector instructions.
ALIGNMENT = 64


class _Slab:
    """One private mapping, used by one group of buffers after another."""

    def __init__(self, size: int) -> None:
        self.size = size
        try:
            # Private, so that a forked child has a copy of its own, as of all other memory.
            self._mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            # Not to be taken for a broken connection.
            raise MemoryError(f"no memory for a payload of {size / (1 << 20):.0f} MB") from error
        self._array_type = ctypes.c_ubyte * size
        self.advise("MADV_HUGEPAGE")

    def lend(self) -> memoryview:
        """Return the memory; once all views of it are gone, the slab is spare."""
        array = self._array_type.from_buffer(self._mapping)
        _lent[id(self)] = self, weakref.KeyedRef(array, _take_back, id(self))
        return memoryview(array).cast("B")

    def advise(self, advice: str) -> None:
        """Tell the kernel, by the name of a constant of `mmap`, how the memory is used."""
        # Unknown to some platforms, refused by some kernels.
        with suppress(AttributeError, OSError):
            self._mapping.madvise(getattr(mmap, advice))


_spare: list[_Slab] = []
# By id: a slab and the weak reference to its borrower, which nothing else holds.
_lent: dict[int, tuple[_Slab, weakref.KeyedRef[int, Any]]] = {}


def _take_back(end_of_loan: weakref.KeyedRef[int, Any]) -> None:
    # Runs at any place in any thread, also in the middle of landing_memory: no locks, and single steps only.
    slab, _ = _lent.pop(end_of_loan.key)
    if sum(spare.size for spare in _spare.copy()) + slab.size <= SPARE_BYTES:
        slab.advise("MADV_FREE")
        _spare.append(slab)


def landing_memory(sizes: Sequence[int]) -> list[memoryview]:
    """Return memory for buffers of these sizes in bytes. Raises MemoryError when there is not enough."""
    memory: list[memoryview] = []
    group: list[int] = []
    group_bytes = 0
    for size in sizes:
        if group and group_bytes + size > SLAB_BYTES:
            memory += _memory_for(group, group_bytes)
            group, group_bytes = [], 0
        group.append(size)
        group_bytes += _rounded(size, ALIGNMENT)
    return memory + _memory_for(group, group_bytes)


def drop_spare_slabs() -> None:
    """Give the kernel back what is kept for further payloads."""
    _spare.clear()


def _memory_for(sizes: Sequence[int], total: int) -> list[memoryview]:
    """Return memory for a group of buffers, together if that pays."""
    if total < SMALLEST_SLAB_BYTES:
        return [memoryview(bytearray(size)) for size in sizes]
    slab = _slab_of(_rounded(total, SLAB_BYTES)).lend()
    views, start = [], 0
    for size in sizes:
        views.append(slab[start : start + size])
        start += _rounded(size, ALIGNMENT)
    return views


def _slab_of(size: int) -> _Slab:
    """Return a slab that is not lent out."""
    for slab in _spare.copy():
        if slab.size == size:
            # Another thread may be faster.
            with suppress(ValueError):
                _spare.remove(slab)
                return slab
    return _Slab(size)


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


# The child's copies of spare slabs would only make it copy pages.
in_forked_child(drop_spare_slabs)
