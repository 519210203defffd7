"""Memory figures from the `nvidia-smi` program, for hosts where NVML itself cannot be loaded.

A sample starts a process, so it costs tens of milliseconds, some seconds if the driver is not kept loaded, and with a
broken driver the program can hang, even after SIGKILL. It is killed after `timeout_s`; the monitor takes samples in a
thread of its own, so that no other thread waits for it.

- Only lines of the requested form count: a GPU's uuid, and a figure or the program's reason for not giving one,
  `[N/A]`, `[GPU is lost]` or the like. Everything else is a message to people, such as
  `WARNING: infoROM is corrupted at gpu 0000:01:00.0`, which the program prints among the lines before it ends with
  status 14: that is logged once, and the figures count.
- If the program fails otherwise, for which one lost GPU is enough, it is asked for each GPU alone: a lost GPU has no
  figure, and if it is lost at the start, it keeps its number; the others have theirs.
- If this process ignores SIGCHLD, a shell runs the program, and prints its status.
- A GPU that shares the host's memory (GB10, Jetson) reports no memory of its own, `[N/A]`, or a figure that counts the
  page cache as used. See `mpmm.sources.unified_memory`.
- Its CSV shows whether a GPU is cut into MIG slices, but not their memory: such a GPU is left out.
- Processes are not measured. It could be done (`--query-compute-apps`), but with one more run of the program for each
  sample; and nvidia-smi itself uses NVML, so where it runs, that source can do it in a hundredth of the time.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

from mpmm.sources.base import DeviceInfo, DeviceSample, unavailable
from mpmm.sources.unified_memory import (
    counts_page_cache,
    is_host_total,
    is_not_told,
    unified_total_mb,
    unified_used_mb,
)
from mpmm.sources.visible_devices import VISIBLE_VARIABLE, Gpu, Unit, devices_of, visible_units
from mpmm.text.printable import printable_logger

__all__ = ["NvidiaSmiSource"]

TIMEOUT_S = 5.0

_LOG = printable_logger(__name__)
# The program has answered, but says that the infoROM of a GPU is corrupted.
_INFOROM_CORRUPTED = 14
# There is no GPU of the number that `-i` names.
_NO_SUCH_GPU = 6
# Wrong arguments, no GPU, no driver, no library, a library that is too old: asking for each GPU alone would not help.
_HOPELESS = (2, _NO_SUCH_GPU, 9, 12, 13)
_MOST_GPUS = 16
# Precedes the status that a shell prints.
_STATUS = "mpmm-status:"
_UUID = re.compile(r"GPU-\S+")
# The field of a figure: the figure, perhaps with a unit, or why there is none.
_VALUE = re.compile(r"(?P<number>[-+]?\d+(\.\d*)?|nan)( *MiB)?|\[[^\]]*\]")


@dataclass(frozen=True)
class _Board:
    """One line of the program's list. total: as printed, empty for a GPU that was lost at the start."""

    uuid: str
    name: str
    is_cut: bool
    total: str


class NvidiaSmiSource:
    """The GPUs that `nvidia-smi` lists, one line each, and `CUDA_VISIBLE_DEVICES` lets through.

    Used memory is total minus free, which counts what the driver reserves for itself; `memory.used` of
    newer drivers does not.
    """

    name = "nvidia-smi"
    measures_processes = False
    frees_late = True
    cheap = False
    ignores_names = True

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        """List the GPUs. Raises SourceUnavailableError: no program, no driver, no visible device.

        timeout_s: the program is killed after that.
        """
        self._timeout_s = timeout_s
        # The warning that was not given yet: only one thread takes it out.
        self._unwarned = ["infoROM"]
        self._has_uuids = True
        try:
            boards = self._boards()
            self._is_unified = len(boards) == 1 and self._shares_host_memory(boards[0])
        except Exception as error:
            raise unavailable(self.name, f"nvidia-smi not found or failed: {error}") from error
        gpus = [
            Gpu(board.uuid, () if board.is_cut else (Unit(board.uuid, board.name, self._total_mb(board)),))
            for board in boards
        ]
        self._devices = devices_of(visible_units(gpus, os.environ.get(VISIBLE_VARIABLE)))
        self._line_of = {board.uuid: line for line, board in enumerate(boards)}
        if not self._devices:
            cut = sum(board.is_cut for board in boards)
            raise unavailable(
                self.name,
                f"none of {len(boards)} GPU(s) ({cut} cut into MIG slices, which its CSV does not show) has a readable "
                f"total and is in {VISIBLE_VARIABLE}",
            )

    def devices(self) -> tuple[DeviceInfo, ...]:
        """Return the visible devices as they were at the start."""
        return self._devices

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Run the program and return its figures, None for what is no number. `server_pids` is not needed.

        If no GPU has a figure, raises the failure of the program: subprocess.TimeoutExpired, OSError, ….
        """
        taken_ns = time.monotonic_ns()
        if self._is_unified:
            used_mb = unified_used_mb()
            return tuple(
                DeviceSample(device.index, used_mb, taken_ns, done_ns=time.monotonic_ns()) for device in self._devices
            )
        told = self._free()
        done_ns = time.monotonic_ns()
        return tuple(self._reading(device, told.get(device.uuid), taken_ns, done_ns) for device in self._devices)

    def close(self) -> None:
        """Do nothing."""

    def _reading(self, device: DeviceInfo, text: str | None, taken_ns: int, done_ns: int) -> DeviceSample:
        free_mb = None if text is None else _number(text)
        used_mb = None if free_mb is None else max(0.0, device.total_mb - free_mb)
        trouble = None if used_mb is not None else text or "not in the list"
        return DeviceSample(device.index, used_mb, taken_ns, trouble=trouble, done_ns=done_ns)

    def _free(self) -> dict[str, str]:
        """Return what the program prints for the free memory of each GPU, or why it does not, by uuid."""
        if not self._has_uuids:
            lines, failure = self._ask("memory.free")
            values = _values(lines)
            if failure is not None and not values:
                raise copy(failure)
            return {uuid: values[line] for uuid, line in self._line_of.items() if line < len(values)}
        lines, failure = self._ask("uuid,memory.free")
        found = self._by_uuid(lines)
        if failure is None:
            return found
        troubles: dict[str, str] = {}
        for uuid in (device.uuid for device in self._devices if device.uuid not in found):
            try:
                lines, lost = self._ask("uuid,memory.free", uuid)
            except subprocess.TimeoutExpired as error:
                troubles[uuid] = str(error)
                continue
            found |= self._by_uuid(lines)
            if lost is not None:
                troubles[uuid] = " ".join(lines) or str(lost)
        if not found:
            raise copy(failure)
        return troubles | found

    def _by_uuid(self, lines: Sequence[str]) -> dict[str, str]:
        """Return the values of lines that begin with the uuid of a GPU."""
        parts = [line.partition(",") for line in lines]
        return {uuid.strip(): value.strip() for uuid, _, value in parts if uuid.strip() in self._line_of}

    def _ask(self, fields: str, gpu: str | None = None) -> tuple[list[str], subprocess.CalledProcessError | None]:
        """Return the program's lines, for all GPUs or one, and the failure that they ended with, if any.

        Raise a copy of it: the traceback of what is raised has the frame, so it and a variable would keep each other.
        Raises OSError, subprocess.TimeoutExpired.
        """
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        if gpu is not None:
            command += ["-i", gpu]
        failure = None
        try:
            output = _output(command, self._timeout_s)
        except subprocess.CalledProcessError as error:
            output = error.output
            if error.returncode == _INFOROM_CORRUPTED:
                self._warn(output)
            else:
                failure = error.with_traceback(None)
        return output.strip().splitlines(), failure

    def _warn(self, output: str) -> None:
        with contextlib.suppress(IndexError):
            what = self._unwarned.pop()
            said = [line for line in output.splitlines() if what in line]
            _LOG.warning(
                "nvidia-smi ends with status 14 (%s): its figures are used all the same", "; ".join(said) or what
            )

    def _boards(self) -> list[_Board]:
        """Return all GPUs, those that cannot be read included. Raises the failure of the program."""
        lines, failure = self._ask("memory.total")
        if failure is not None:
            if failure.returncode in _HOPELESS:
                raise copy(failure)
            return self._boards_one_by_one()
        totals = _values(lines)
        labels = self._labels(len(totals))
        if not labels:
            self._has_uuids = False
            labels = [(f"gpu{number}", f"gpu{number}", False) for number in range(len(totals))]
        return [_Board(*label, total) for label, total in zip(labels, totals, strict=True)]

    def _boards_one_by_one(self) -> list[_Board]:
        """Return all GPUs, asked for by number; those that are lost keep their numbers, as CUDA counts."""
        boards: list[_Board] = []
        for number in range(_MOST_GPUS):
            lines, failure = self._ask("memory.total", str(number))
            totals = _values(lines)
            if failure is not None and failure.returncode in _HOPELESS:
                break
            labels = self._labels(1, str(number)) if len(totals) == 1 else []
            boards.append(_Board(*labels[0], totals[0]) if labels else _Board(f"gpu{number}", "lost", False, ""))
        return boards

    def _shares_host_memory(self, board: _Board) -> bool:
        if is_not_told(board.total):
            return True
        total_mb = _number(board.total)
        if total_mb is None or not is_host_total(total_mb):
            return False
        values = _values(self._ask("memory.free")[0])
        free_mb = _number(values[0]) if values else None
        return free_mb is not None and counts_page_cache(total_mb, free_mb)

    def _total_mb(self, board: _Board) -> float | None:
        return unified_total_mb() if self._is_unified else _number(board.total)

    def _labels(self, count: int, gpu: str | None = None) -> list[tuple[str, str, bool]]:
        """Return (uuid, name, is cut into MIG slices) of each GPU, or of one; [] if the program does not print that."""
        for fields in ("uuid,mig.mode.current,name", "uuid,name"):  # older programs do not know MIG
            try:
                lines, _ = self._ask(fields, gpu)
            except Exception:  # names are a nicety: if the program fails for any reason, go on without
                continue
            rows = [[part.strip() for part in line.split(",", fields.count(","))] for line in lines]
            rows = [row for row in rows if len(row) == fields.count(",") + 1 and _UUID.fullmatch(row[0])]
            labels = [(row[0], row[-1], "Enabled" in row[1:-1]) for row in rows]
            if len({uuid for uuid, name, _ in labels if name}) == len(labels) == count:
                return labels
        return []


def _output(command: list[str], timeout_s: float) -> str:
    """Return what a program prints. Raises OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired."""
    if signal.getsignal(signal.SIGCHLD) != signal.SIG_IGN:
        return subprocess.check_output(command, text=True, timeout=timeout_s)
    # With SIGCHLD ignored, the kernel keeps no exit status of this process's children, and each would pass for 0. A
    # shell does not ignore the signal, even if it inherits that, and can print the status.
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), command[0])
    shell = ["/bin/sh", "-c", f'"$@"; echo "{_STATUS}$?"', "sh", *command]
    with subprocess.Popen(shell, stdout=subprocess.PIPE, text=True, start_new_session=True) as running:
        try:
            told, _ = running.communicate(timeout=timeout_s)
        except BaseException:
            # Both the shell and the program, which would keep the pipe open.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
            raise
    output, _, status = told.rpartition(_STATUS)
    if status.strip() != "0":
        code = int(status) if status.strip().isdigit() else 1
        raise subprocess.CalledProcessError(code, command, output)
    return output


def _values(lines: Sequence[str]) -> list[str]:
    """Return the lines that are a figure, or the reason why there is none; the others are messages to people."""
    return [line.strip() for line in lines if _VALUE.fullmatch(line.strip())]


def _number(text: str) -> float | None:
    """Return the MiB that `text` begins with; None for `[N/A]`, `[Not Supported]` or junk."""
    match = _VALUE.match(text)
    # Not the beginning of a word.
    if match is None or text[match.end() : match.end() + 1] not in ("", " ", "\t", ","):
        return None
    value = float(match["number"] or math.nan)
    return value if math.isfinite(value) and value >= 0 else None
