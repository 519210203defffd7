"""Faults of simulated GPUs that NVML and nvidia-smi show."""

from __future__ import annotations

from pathlib import Path

from devices.simulated_files import Device, place_of, write

__all__ = ["DRIVER_NOT_LOADED", "GPU_IS_LOST", "NOT_SUPPORTED", "NO_PERMISSION", "SimulatedFaults"]

# NVML's error codes, as in nvidia-ml-py.
NOT_SUPPORTED = 3
NO_PERMISSION = 4
DRIVER_NOT_LOADED = 9
GPU_IS_LOST = 15


class SimulatedFaults:
    """Makes the GPUs in a directory fail, refuse, hang or mislead, until the same method ends that."""

    def __init__(self, folder: Path) -> None:
        """folder: that of the GPUs."""
        self._folder = folder

    def fail_init(self, error: int = DRIVER_NOT_LOADED) -> None:
        """Let nvmlInit fail, and nvidia-smi with it; 0 ends it."""
        write(self._folder / "init", str(error))

    def lose(self, device: int) -> None:
        """Let a GPU fall off the bus: nvidia-smi then fails as a whole, NVML for this GPU until initialised anew."""
        (place_of(self._folder, device) / "lost").touch()

    def find(self, device: int) -> None:
        """Put a lost GPU back."""
        (place_of(self._folder, device) / "lost").unlink()

    def refuse(self, device: Device, what: str, error: int = NOT_SUPPORTED) -> None:
        """Let a device refuse questions about `what` (see the list in `simulated_gpu`); with error 0, answer again."""
        path = place_of(self._folder, device) / "refused"
        lines = dict(line.split() for line in path.read_text().splitlines()) if path.exists() else {}
        lines[what] = str(error)
        write(path, "".join(f"{key} {value}\n" for key, value in lines.items()))

    def hang(self, nvidia_smi_s: float = 0.0, nvml_s: float = 0.0) -> None:
        """Set how long nvidia-smi, and each figure of NVML, takes from now on."""
        write(self._folder / "smi_hang", str(nvidia_smi_s))
        write(self._folder / "nvml_hang", str(nvml_s))

    def shift_pids(self, by: int) -> None:
        """Report pids as from another pid namespace: higher by `by`."""
        write(self._folder / "pid_offset", str(by))

    def share_context(self, daemon: int) -> None:
        """Report processes as under MPS: a daemon computes for all, and the clients have their own list; 0 ends it."""
        write(self._folder / "mps_daemon", str(daemon))

    def corrupt_inforom(self, corrupted: bool = True) -> None:
        """Let nvidia-smi warn of a corrupted infoROM after its lines, and exit with status 14."""
        if corrupted:
            (self._folder / "inforom").touch()
        else:
            (self._folder / "inforom").unlink()
