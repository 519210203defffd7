"""Tells a loader on which devices to load, and how much memory it has there: `current_placement()`.

A model server that a loader starts finds `CUDA_VISIBLE_DEVICES` set to its placement before its constructor runs, so
`cuda:0` is its first device there; on AMD GPUs it is `HIP_VISIBLE_DEVICES` (`mpmm.sources.visible_devices`). A loader
that loads in its own process, where CUDA has read that variable already, asks `current_placement` and uses
`cuda:<index>`.

Engines that size themselves need their share of the memory:

    placement = mpmm.current_placement()
    engine = LLM(MODEL, gpu_memory_utilization=placement.memory_fraction)

If the load is `steady=True`, a model server that its loader starts also finds the share in its environment, in the
variables that `mpmm run` sets for programs (`Placement.environment`). The environment of the process in which a loader
runs does not change, because its other threads share it; for a program that a loader starts itself there is
`env={**os.environ, **placement.environment()}`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from mpmm.interpreter.block_variable import BlockVariable
from mpmm.sources.visible_devices import visible_devices

__all__ = ["SHARE_VARIABLES", "Placement", "current_placement", "fraction_of", "place_for_good", "placed", "with_share"]

_LEASE_MB, _DEVICES, _FRACTION = SHARE_VARIABLES = ("MPMM_LEASE_MB", "MPMM_DEVICES", "MPMM_MEMORY_FRACTION")


@dataclass(frozen=True)
class Placement:
    """The devices of a copy or a lease, and its share of them. Two placements are equal if their devices are.

    indices: as `cuda:<index>` counts them in this process. uuids: in the same order. mb: the memory that is reserved
    for it, on all devices together. memory_fraction: its share of the memory of each device, rounded down; None if the
    total of a device is not known.
    """

    indices: tuple[int, ...]
    uuids: tuple[str, ...]
    mb: float | None = field(default=None, compare=False)
    memory_fraction: float | None = field(default=None, compare=False)

    def environment(self) -> dict[str, str]:
        """Return environment variables for a program that uses the memory.

        MPMM_LEASE_MB: how much it is, in MB. MPMM_DEVICES: its devices, as `CUDA_VISIBLE_DEVICES` takes them.
        MPMM_MEMORY_FRACTION: its share of the memory of each, rounded down, for engines that size themselves
        (`gpu_memory_utilization` of vLLM). A variable without a known value is missing, or empty if the environment of
        this process has it for another share, as within `mpmm run`: the program must not take that for its own.
        """
        known = {name: "" for name in SHARE_VARIABLES if name in os.environ}
        known |= {_DEVICES: visible_devices(self.uuids) or ",".join(self.uuids)}
        if self.mb is not None:
            known[_LEASE_MB] = str(int(self.mb))
        if self.memory_fraction is not None:
            known[_FRACTION] = f"{self.memory_fraction:.3f}"
        return known


def with_share(environment: Mapping[str, str], share: Mapping[str, str]) -> dict[str, str]:
    """Return an environment with the variables of a share (`Placement.environment`), and none of another share."""
    others = {name: value for name, value in environment.items() if name not in SHARE_VARIABLES}
    return {**others, **{name: value for name, value in share.items() if value}}


def fraction_of(mb: float, totals_mb: Sequence[float]) -> float | None:
    """Return the share of each device that `mb` takes, spread over devices of these totals, see `Placement`.

    None if a total is not known, or there is no device.
    """
    total_mb = min(totals_mb, default=0.0)
    if not total_mb > 0:
        return None
    # At most the whole device: an engine may refuse to take more.
    return math.floor(min(mb / len(totals_mb) / total_mb, 1.0) * 1000) / 1000


_placement: BlockVariable[Placement] = BlockVariable("mpmm_placement")


def current_placement() -> Placement | None:
    """Return the devices on which the current loader should load its copy, and its share of them; else None.

    It works in the thread of a loader that `ModelManager.acquire_model` and the like have called, and in the
    constructor of a `MultiProcessShared` in the model server that such a loader has started.
    """
    return _placement.innermost()


def placed(placement: Placement) -> AbstractContextManager[None]:
    """Let `current_placement` return `placement` inside the block."""
    return _placement.set_inside(placement)


def place_for_good(placement: Placement) -> None:
    """Let `current_placement` return `placement` in this thread from now on; for a model server, which loads once."""
    _placement.set_for_good(placement)
