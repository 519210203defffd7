"""`CUDA_VISIBLE_DEVICES`: which GPUs a process may use, read as the CUDA runtime reads it, and written for others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mpmm.sources.base import DeviceInfo

__all__ = ["VISIBLE_VARIABLE", "Gpu", "Unit", "devices_of", "server_setting", "visible_devices", "visible_units"]

VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
# CUDA takes the number at the beginning of an entry and ignores what follows.
_NUMBER = re.compile(r"[+-]?\d+")
# How slices were named before they had uuids of their own: GPU, GPU instance, compute instance.
_SLICE_OF_GPU = re.compile(r"MIG-(GPU-[^/]*)/(\d+)/(\d+)")

# Names that NVIDIA's driver gives to GPUs and slices; and a source's name for the n-th board if its uuid is unknown.
_UUID = re.compile(r"(GPU|MIG)-.+")
_NUMBERED = re.compile(r"gpu(\d+)")


@dataclass(frozen=True)
class Unit:
    """A device with memory of its own: a whole GPU or one MIG slice.

    total_mb: None = could not be read.
    instances: of a slice, the numbers of its GPU instance and compute instance, None for one that is not known.
    """

    uuid: str
    name: str
    total_mb: float | None
    instances: tuple[int | None, int | None] | None = None


@dataclass(frozen=True)
class Gpu:
    """A board, with one unit, or one for each of its MIG slices (none, if MIG is on and nothing was cut)."""

    uuid: str
    units: tuple[Unit, ...]


def visible_units(gpus: Sequence[Gpu], setting: str | None) -> list[Unit]:
    """Return the units that `setting` lets through, in its order.

    gpus: all boards in the driver's (PCI bus) order. Numbers in `setting` count in that order; CUDA does
        the same with `CUDA_DEVICE_ORDER=PCI_BUS_ID`, and always if all boards are of one kind.
    setting: None lets everything through, an empty text nothing. Otherwise numbers, or beginnings of
        uuids (`GPU-…`, `MIG-…`), with commas between. As in CUDA, the list ends before the first entry that
        matches nothing (`-1`, say) or more than one thing, or is a uuid after numbers or the reverse; and
        a device that is named twice hides all of them.

    One process can use no more than one slice, and CUDA shows it the first. Here all are let through, and
    a board in MIG mode means all of its slices, because other processes can use the others.
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
        # A whole board's uuid is its unit's, too: slices are searched only if no board fits.
        found = found or [(unit,) for gpu in gpus for unit in gpu.units if unit.uuid.startswith(entry)]
    return found[0] if len(found) == 1 else None


def devices_of(units: Sequence[Unit]) -> tuple[DeviceInfo, ...]:
    """Number `units` as CUDA does and leave out those whose total is unknown: nothing can be placed there."""
    return tuple(
        DeviceInfo(index, unit.uuid, unit.name, unit.total_mb)
        for index, unit in enumerate(units)
        if unit.total_mb is not None
    )


def visible_devices(uuids: Sequence[str]) -> str | None:
    """Return the `CUDA_VISIBLE_DEVICES` with which CUDA sees these devices; None if some are no GPUs.

    Names are valid in every process, however its own `CUDA_VISIBLE_DEVICES` restricts and numbers what it sees.
    """
    numbers = [_NUMBERED.fullmatch(uuid) for uuid in uuids]
    names = [number[1] if number else uuid for number, uuid in zip(numbers, uuids, strict=True)]
    known = all(number or _UUID.fullmatch(uuid) for number, uuid in zip(numbers, uuids, strict=True))
    return ",".join(names) if known else None


def server_setting(source: object, uuids: Sequence[str]) -> tuple[str, str] | None:
    """Return the variable, and its value, that show a model server only these devices; None if they are no GPUs.

    source: the memory source that knows the devices. A source whose devices are not CUDA's has a method
    `server_setting` of its own, which gets `uuids` and answers in its place.
    """
    own = getattr(source, "server_setting", None)
    if own is not None:
        setting: tuple[str, str] | None = own(uuids)
        return setting
    visible = visible_devices(uuids)
    return (VISIBLE_VARIABLE, visible) if visible else None
