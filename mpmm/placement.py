"""On which devices a loader should load: `current_placement()`.

A model server that a loader starts finds `CUDA_VISIBLE_DEVICES` set to its placement before its constructor runs, so
`cuda:0` is its first device there; on AMD GPUs it is `HIP_VISIBLE_DEVICES`, see `server_setting`. A loader that loads
in its own process, where CUDA has read that variable already, asks `current_placement` and uses `cuda:<index>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from mpmm.sources.visible_devices import VISIBLE_VARIABLE

__all__ = ["Placement", "current_placement", "place_for_good", "placed", "server_setting", "visible_devices"]

# What NVIDIA's driver calls GPUs and slices of them; and what a source calls the n-th board whose uuid it cannot read.
_UUID = re.compile(r"(GPU|MIG)-.+")
_NUMBERED = re.compile(r"gpu(\d+)")


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


def visible_devices(uuids: Sequence[str]) -> str | None:
    """Return what to set `CUDA_VISIBLE_DEVICES` to so that CUDA sees these devices; None where they are no GPUs.

    Names are good in every process, however its own `CUDA_VISIBLE_DEVICES` restricts and numbers what it sees.
    """
    numbers = [_NUMBERED.fullmatch(uuid) for uuid in uuids]
    names = [number[1] if number else uuid for number, uuid in zip(numbers, uuids, strict=True)]
    known = all(number or _UUID.fullmatch(uuid) for number, uuid in zip(numbers, uuids, strict=True))
    return ",".join(names) if names and known else None


def server_setting(source: object, uuids: Sequence[str]) -> tuple[str, str] | None:
    """Return the variable, and its value, that show a model server these devices alone; None where they are no GPUs.

    source: the memory source that knows the devices. One whose devices are not CUDA's has a method `server_setting` of
    its own, which gets `uuids` and answers in its place.
    """
    own = getattr(source, "server_setting", None)
    if own is not None:
        setting: tuple[str, str] | None = own(uuids)
        return setting
    visible = visible_devices(uuids)
    return (VISIBLE_VARIABLE, visible) if visible else None
