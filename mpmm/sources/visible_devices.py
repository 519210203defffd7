"""Which GPUs a process may use: `CUDA_VISIBLE_DEVICES`, read the way the CUDA runtime reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpmm.sources.base import DeviceInfo

__all__ = ["VISIBLE_VARIABLE", "Gpu", "Unit", "devices_of", "visible_units"]

VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Unit:
    """Memory of its own: a whole GPU or one MIG slice. `total_mb` None = could not be read."""

    uuid: str
    name: str
    total_mb: float | None


@dataclass(frozen=True)
class Gpu:
    """A board, with one unit, or one for each of its MIG slices (none, if MIG is on and nothing was cut)."""

    uuid: str
    units: tuple[Unit, ...]


def visible_units(gpus: Sequence[Gpu], setting: str | None) -> list[Unit]:
    """Return the units that `setting` lets through, in its order.

    gpus: all boards in the driver's (PCI bus) order. Numbers in `setting` count in that order; CUDA does
        the same with `CUDA_DEVICE_ORDER=PCI_BUS_ID`, and always where all boards are of one kind.
    setting: None lets everything through, an empty text nothing. Otherwise numbers and beginnings of
        uuids (`GPU-…`, `MIG-…`) between commas. As in CUDA, the first entry that matches nothing, or
        more than one thing, ends the list. A board in MIG mode stands for all of its slices.
    """
    if setting is None:
        return [unit for gpu in gpus for unit in gpu.units]
    chosen: dict[str, Unit] = {}
    for entry in setting.split(","):
        units = _matches(gpus, entry.strip())
        if units is None:
            break
        chosen.update((unit.uuid, unit) for unit in units if unit.uuid not in chosen)
    return list(chosen.values())


def _matches(gpus: Sequence[Gpu], entry: str) -> tuple[Unit, ...] | None:
    if entry.isdecimal():
        return gpus[int(entry)].units if int(entry) < len(gpus) else None
    if not entry:
        return None
    found = [gpu.units for gpu in gpus if gpu.uuid.startswith(entry)]
    if not found:
        found = [(unit,) for gpu in gpus for unit in gpu.units if unit.uuid.startswith(entry)]
    return found[0] if len(found) == 1 else None


def devices_of(units: Sequence[Unit]) -> tuple[DeviceInfo, ...]:
    """Number `units` as CUDA does and leave out those whose total is unknown: nothing can be placed there."""
    return tuple(
        DeviceInfo(index, unit.uuid, unit.name, unit.total_mb)
        for index, unit in enumerate(units)
        if unit.total_mb is not None
    )
