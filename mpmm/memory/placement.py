"""On which devices a loader should load: `current_placement()`.

A model server that a loader starts finds `CUDA_VISIBLE_DEVICES` set to its placement before its constructor runs, so
`cuda:0` is its first device there; on AMD GPUs it is `HIP_VISIBLE_DEVICES` (`mpmm.sources.visible_devices`). A loader
that loads in its own process, where CUDA has read that variable already, asks `current_placement` and uses
`cuda:<index>`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

__all__ = ["Placement", "current_placement", "place_for_good", "placed"]


@dataclass(frozen=True)
class Placement:
    """The devices of a copy. indices: as `cuda:<index>` counts them in this process. uuids: in the same order."""

    indices: tuple[int, ...]
    uuids: tuple[str, ...]


_current: ContextVar[Placement | None] = ContextVar("mpmm_placement", default=None)


def current_placement() -> Placement | None:
    """Return on which devices the present loader should load its copy; None outside of a loader.

    It works in the thread of a loader that `ModelManager.acquire_model` and the like have called, and in the
    constructor of a `MultiProcessShared` in the model server that such a loader has started.
    """
    return _current.get()


@contextmanager
def placed(placement: Placement) -> Iterator[None]:
    """Let `current_placement` return `placement` inside the block."""
    reset = _current.set(placement)
    try:
        yield
    finally:
        _current.reset(reset)


def place_for_good(placement: Placement) -> None:
    """Let `current_placement` return `placement` in this thread from now on; for a model server, which loads once."""
    _current.set(placement)
