"""Find, read and replace the files of simulated GPUs; `simulated_gpu` lists them."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

__all__ = ["MAX_GPUS", "MIB", "Device", "new_number", "place_of", "read_about", "read_bytes", "start_of", "write"]

MIB = 2**20
MAX_GPUS = 8
# A GPU's number, the number of one and of its slice, or a uuid.
Device = int | tuple[int, int] | str
_numbers = itertools.count(1)


def place_of(folder: Path, device: Device) -> Path:
    """Return the directory of a device. Raises LookupError for an unknown uuid."""
    if isinstance(device, int):
        return folder / f"gpu{device}"
    if isinstance(device, tuple):
        return folder / f"gpu{device[0]}" / f"mig{device[1]}"
    for place in (*folder.glob("gpu*"), *folder.glob("gpu*/mig*")):
        if read_about(place)["uuid"] == device:
            return place
    raise LookupError(f"no simulated device {device!r}")


def read_about(place: Path) -> dict[str, str]:
    """Return the contents of a device's file `about`."""
    return dict(line.split(" ", 1) for line in (place / "about").read_text().splitlines())


def new_number() -> int:
    """Return a number that this function has not returned in this process."""
    return next(_numbers)


def write(path: Path, text: str) -> None:
    """Replace a file as a whole. The library does not count its temporary name."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.{new_number()}")
    aside.write_text(text)
    aside.replace(path)


def read_bytes(path: Path) -> int:
    """Return the number in a file, 0 if there is no file."""
    try:
        return int(path.read_text())
    except FileNotFoundError:
        return 0


def start_of(pid: int) -> str | None:
    """Return a process's start time in the kernel's clock ticks; None if it has ended or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
