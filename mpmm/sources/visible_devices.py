"""Which GPUs a process may use: `CUDA_VISIBLE_DEVICES`, read the way the CUDA runtime reads it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mpmm.sources.base import DeviceInfo

__all__ = ["VISIBLE_VARIABLE", "Gpu", "Unit", "devices_of", "visible_units"]

VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
# CUDA takes the number at the beginning of an entry and ignores what follows.
_NUMBER = re.compile(r"[+-]?\d+")
# How slices were named before they had uuids of their own: GPU, GPU instance, compute instance.
_SLICE_OF_GPU = re.compile(r"MIG-(GPU-[^/]*)/(\d+)/(\d+)")


@dataclass(frozen=True)
class Unit:
    """Memory of its own: a whole GPU or one MIG slice.

    total_mb: None = could not be read.
    instances: of a slice, the numbers of its GPU instance and compute instance, if known.
    """

    uuid: str
    name: str
    total_mb: float | None
    instances: tuple[int, int] | None = None


@dataclass(frozen=True)
class Gpu:
    """A board, with one unit, or one for each of its MIG slices (none, if MIG is on and nothing was cut)."""

    uuid: str
    units: tuple[Unit, ...]


def visible_units(gpus: Sequence[Gpu], setting: str | None) -> list[Unit]:
    """Return the units that `setting` lets through, in its order.

    gpus: all boards in the driver's (PCI bus) order. Numbers in `setting` count in that order; CUDA does
        the same with `CUDA_DEVICE_ORDER=PCI_BUS_ID`, and always where all boards are of one kind.
    setting: None lets everything through, an empty text nothing. Otherwise numbers, or beginnings of
        uuids (`GPU-…`, `MIG-…`), between commas. As in CUDA, the list ends before the first entry that
        matches nothing (`-1`, say) or more than one thing, or is a uuid after numbers or the reverse; and
        a device that is named twice hides all of them.

    One process can use no more than one slice, and CUDA shows it the first. Here all are let through, and
    a board in MIG mode stands for all of its slices: each is for other processes to use.
    """
    if setting is None:
        return [unit for gpu in gpus for unit in gpu.units]
    chosen: list[Unit] = []
    entries = [entry.strip() for entry in setting.split(",")]
    numbers = _NUMBER.match(entries[0]) is not None
    for entry in entries:
        number = _NUMBER.match(entry)
        units = (
            None if (number is not None) != numbers else _by_number(gpus, number) if number else _by_uuid(gpus, entry)
        )
        if units is None:
            break
        if any(unit in chosen for unit in units):
            return []
        chosen += units
    return chosen


def _by_number(gpus: Sequence[Gpu], number: re.Match[str]) -> tuple[Unit, ...] | None:
    index = int(number[0])
    return gpus[index].units if 0 <= index < len(gpus) else None


def _by_uuid(gpus: Sequence[Gpu], entry: str) -> tuple[Unit, ...] | None:
    if not entry:
        return None
    found: list[tuple[Unit, ...]]
    if named := _SLICE_OF_GPU.fullmatch(entry):
        wanted = (int(named[2]), int(named[3]))
        boards = [gpu for gpu in gpus if gpu.uuid.startswith(named[1])]
        found = [(unit,) for gpu in boards for unit in gpu.units if unit.instances == wanted]
    else:
        found = [gpu.units for gpu in gpus if gpu.uuid.startswith(entry)]
        # A whole board's uuid is its unit's, too: looked for among slices only where no board fits.
        found = found or [(unit,) for gpu in gpus for unit in gpu.units if unit.uuid.startswith(entry)]
    return found[0] if len(found) == 1 else None


def devices_of(units: Sequence[Unit]) -> tuple[DeviceInfo, ...]:
    """Number `units` as CUDA does and leave out those whose total is unknown: nothing can be placed there."""
    return tuple(
        DeviceInfo(index, unit.uuid, unit.name, unit.total_mb)
        for index, unit in enumerate(units)
        if unit.total_mb is not None
    )
