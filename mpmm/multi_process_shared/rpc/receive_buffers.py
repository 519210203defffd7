"""Memory into which large buffers are received: private, writable, and kept until the last object that uses it is gone.

Fresh memory costs more than the copy into it, because the kernel zeroes it page by page: 19 MB in 32 arrays take
18 ms in pages of 4 KiB, 0.9 ms in huge pages, and 0.7 ms, the mere copy, in memory that was used before. So buffers
are received into slabs of huge pages, which are reused. Neighbouring buffers of one message share a slab, which lives
as long as any of them; SLAB_BYTES bounds the memory that a single survivor keeps alive for the others.

A slab is lent out through a ctypes array. Once the array is gone, which a weak reference notices, no object can reach
the slab's memory any more, and the kernel may take it when memory is short (MADV_FREE). At most SPARE_BYTES are kept in
slabs, free or lent; slabs lent beyond that are freed when their arrays are gone.
"""

from __future__ import annotations

import ctypes
import mmap
import operator
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from mpmm.interpreter.fork_hooks import in_forked_child

__all__ = ["SLAB_BYTES", "SPARE_BYTES", "drop_spare_slabs", "receive_memory"]

# Two huge pages: one of them is whole even if the kernel does not align the mapping.
SLAB_BYTES = 1 << 22
# Smaller groups of buffers are served as well from the heap.
SMALLEST_SLAB_BYTES = 1 << 20
SPARE_BYTES = 1 << 26
# Enough for every type of number and for vector instructions.
ALIGNMENT = 64


class _Loan(weakref.ref[Any]):
    """Refers to the array through which a slab is lent out; `madvise` is the slab's."""

    __slots__ = ("madvise",)
    madvise: Callable[[int], None]


# The callback at the end of a loan, in C alone: an exception of a signal handler in Python code there would be lost.
_let_kernel_take = operator.methodcaller("madvise", mmap.MADV_FREE) if hasattr(mmap, "MADV_FREE") else None


class _Slab:
    """One private mapping, used by one group of buffers after another."""

    def __init__(self, size: int) -> None:
        self.size = size
        try:
            # Private, so that a forked child has a copy of its own, as of all other memory.
            self._mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            # An OSError would be taken for a broken connection.
            raise MemoryError(f"no memory for a payload of {size / (1 << 20):.0f} MB") from error
        self._array_type = ctypes.c_ubyte * size
        self._loan: _Loan | None = None
        self._at_end = _let_kernel_take
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):
                self._mapping.madvise(mmap.MADV_HUGEPAGE)
        try:
            # Some kernels refuse. Try it now, while there is nothing to free: at the end of a loan no caller is told.
            if self._at_end is not None:
                self._at_end(self._mapping)
        except OSError:
            self._at_end = None

    def lend(self) -> memoryview:
        """Return the memory; once all views of it are gone, the slab is free."""
        array = self._array_type.from_buffer(self._mapping)
        self._loan = _Loan(array, self._at_end)
        self._loan.madvise = self._mapping.madvise
        return memoryview(array).cast("B")

    def is_spare(self) -> bool:
        """Tell whether no object can reach the memory."""
        return self._loan is None or self._loan() is None


# Threads and signal handlers share the list without a lock: only the one that has removed a slab may use it.
_slabs: list[_Slab] = []


def receive_memory(sizes: Sequence[int]) -> list[memoryview]:
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
    """Give back to the kernel the memory that is kept for further payloads."""
    for slab in _slabs.copy():
        if slab.is_spare():
            _take(slab)


def _memory_for(sizes: Sequence[int], total: int) -> list[memoryview]:
    """Return memory for a group of buffers, in one slab if that pays."""
    if total < SMALLEST_SLAB_BYTES:
        return [memoryview(bytearray(size)) for size in sizes]
    slab = _lend(_rounded(total, SLAB_BYTES))
    views, start = [], 0
    for size in sizes:
        views.append(slab[start : start + size])
        start += _rounded(size, ALIGNMENT)
    return views


def _lend(size: int) -> memoryview:
    """Return the memory of a slab, used or new, and keep the slab for later within SPARE_BYTES."""
    used = (slab for slab in _slabs.copy() if slab.size == size and slab.is_spare() and _take(slab))
    slab = next(used, None) or _Slab(size)
    memory = slab.lend()
    for other in _slabs.copy():
        if _kept_bytes() + size <= SPARE_BYTES:
            break
        if other.is_spare():
            _take(other)
    if _kept_bytes() + size <= SPARE_BYTES:
        _slabs.append(slab)
    return memory


def _take(slab: _Slab) -> bool:
    """Remove a slab from the list; return False if another thread was faster."""
    try:
        _slabs.remove(slab)
    except ValueError:
        return False
    return True


def _kept_bytes() -> int:
    return sum(slab.size for slab in _slabs.copy())


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


# The child's copies of free slabs would only make it copy pages.
in_forked_child(_slabs.clear)
