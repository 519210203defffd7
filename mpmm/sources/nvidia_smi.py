"""Memory figures from the `nvidia-smi` program, for hosts where NVML itself cannot be loaded.

A sample starts a process, so it costs tens of milliseconds, some seconds where the driver is not kept loaded,
and with a sick driver the program can hang, even beyond SIGKILL.

- So it is run by a thread, and a sample waits for it only so long (`patience_s`). Then the sample has no figures;
  the next one takes what the program has said meanwhile, dated from when it was started. After `timeout_s` the
  program is killed. There is never more than one at a time.
- A figure of `[N/A]`, `[GPU is lost]` or the like is none; the other devices have theirs. If the program fails as
  a whole, which one lost GPU is enough for, it is asked for each GPU alone.
- Its CSV tells whether a GPU is cut into MIG slices, but not what they have: such a GPU is left out.
- Processes are not measured. It could be done (`--query-compute-apps`), but by one more run of the program for each
  sample; and nvidia-smi itself uses NVML, so where it runs, that source can do it in a hundredth of the time.
"""

from __future__ import annotations

import math
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from mpmm.sources.base import DeviceInfo, DeviceSample, unavailable
from mpmm.sources.visible_devices import VISIBLE_VARIABLE, Gpu, Unit, devices_of, visible_units

__all__ = ["NvidiaSmiSource"]

TIMEOUT_S = 5.0
PATIENCE_S = 0.5

# What the program prints instead of a figure begins like this.
_NO_VALUE = "["


class NvidiaSmiSource:
    """The GPUs that `nvidia-smi` lists, one line each, and `CUDA_VISIBLE_DEVICES` lets through.

    Used memory is total minus free, which counts what the driver reserves for itself; `memory.used` of
    newer drivers does not.
    """

    name = "nvidia-smi"
    measures_processes = False
    settles_late = True
    cheap = False

    def __init__(self, timeout_s: float = TIMEOUT_S, patience_s: float = PATIENCE_S) -> None:
        """List the GPUs. Raises SourceUnavailableError: no program, no driver, no visible device."""
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._run: _Run | None = None
        try:
            totals = [_number(line) for line in self._ask("memory.total")]
        except Exception as error:
            raise unavailable(self.name, f"nvidia-smi not found or failed: {error}") from error
        self._has_uuids = True
        labels = self._labels(len(totals))
        if not labels:
            self._has_uuids = False
            labels = [(f"gpu{number}", f"gpu{number}", False) for number in range(len(totals))]
        gpus = [
            Gpu(uuid, () if cut else (Unit(uuid, name, total_mb),))
            for (uuid, name, cut), total_mb in zip(labels, totals, strict=True)
        ]
        self._devices = devices_of(visible_units(gpus, os.environ.get(VISIBLE_VARIABLE)))
        self._line_of = {gpu.uuid: line for line, gpu in enumerate(gpus)}
        if not self._devices:
            cut = sum(cut for _, _, cut in labels)
            raise unavailable(
                self.name,
                f"none of {len(gpus)} GPU(s) ({cut} cut into MIG slices, which its CSV does not show) has a readable "
                f"total and is in {VISIBLE_VARIABLE}",
            )

    def devices(self) -> tuple[DeviceInfo, ...]:
        """Return the visible devices as they were at the start."""
        return self._devices

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Take the program's figures, waiting for them for `patience_s`; what is no number gives None.

        `server_pids` is not needed. Raises what the program's failure raises (subprocess.TimeoutExpired, OSError,
        …), and TimeoutError while it is still at work.
        """
        run, late = self._run, None
        if run is not None and (run.pid != os.getpid() or run.done.is_set()):
            # One that was too slow for the last sample is better than nothing, but one from now is better.
            late = run if run.pid == os.getpid() else None
            run = None
        if run is None:
            run = self._run = _Run(self._free)
        if not run.done.wait(self._patience_s):
            if late is None:
                waited_s = (time.monotonic_ns() - run.began_ns) / 1e9
                raise TimeoutError(f"nvidia-smi has not answered for {waited_s:.1f} s")
            run = late
        else:
            self._run = None
        free = run.result()
        return tuple(self._reading(device, free.get(device.uuid), run) for device in self._devices)

    def close(self) -> None:
        """Do nothing: a program that still runs is seen off by its thread."""

    def _reading(self, device: DeviceInfo, text: str | None, run: _Run) -> DeviceSample:
        free_mb = None if text is None else _number(text)
        used_mb = None if free_mb is None else max(0.0, device.total_mb - free_mb)
        trouble = None if used_mb is not None else text or "not in the list"
        return DeviceSample(device.index, used_mb, run.began_ns, trouble=trouble, done_ns=run.ended_ns)

    def _free(self) -> Mapping[str, str]:
        """Return what the program says of the free memory of each GPU, by uuid."""
        if not self._has_uuids:
            lines = self._ask("memory.free")
            return {uuid: lines[line] for uuid, line in self._line_of.items() if line < len(lines)}
        try:
            return self._pairs(self._ask("uuid,memory.free"))
        except subprocess.CalledProcessError:
            found: dict[str, str] = {}
            failure = None
            for device in self._devices:
                try:
                    found |= self._pairs(self._ask("uuid,memory.free", device.uuid))
                except subprocess.CalledProcessError as error:
                    failure = error
            if failure is not None and not found:
                raise failure from None
            return found

    @staticmethod
    def _pairs(lines: Sequence[str]) -> dict[str, str]:
        return {uuid.strip(): value.strip() for uuid, _, value in (line.partition(",") for line in lines)}

    def _ask(self, fields: str, gpu: str | None = None) -> list[str]:
        """Return the program's lines, for all GPUs or one. Raises what its failure raises."""
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        if gpu is not None:
            command += ["-i", gpu]
        return subprocess.check_output(command, text=True, timeout=self._timeout_s).strip().splitlines()

    def _labels(self, count: int) -> list[tuple[str, str, bool]]:
        """Return (uuid, name, is cut into MIG slices) of each GPU; nothing where the program does not say."""
        for fields in ("uuid,mig.mode.current,name", "uuid,name"):  # older ones do not know of MIG
            try:
                lines = self._ask(fields)
            except Exception:  # names are a nicety: whatever keeps the program from telling them, go on without
                continue
            rows = [[part.strip() for part in line.split(",", fields.count(","))] for line in lines]
            if len(rows) != count or any(len(row) != fields.count(",") + 1 for row in rows):
                continue
            labels = [(row[0], row[-1], len(row) > 2 and row[1] == "Enabled") for row in rows]
            told = all(uuid and name and not uuid.startswith(_NO_VALUE) for uuid, name, _ in labels)
            if told and len({uuid for uuid, _, _ in labels}) == count:
                return labels
        return []


class _Run:
    """One question to the program, asked by a thread. `done` is set once there is a result."""

    def __init__(self, ask: Callable[[], Mapping[str, str]]) -> None:
        self.pid = os.getpid()
        self.began_ns = time.monotonic_ns()
        self.ended_ns = 0
        self.done = threading.Event()
        self._answer: Mapping[str, str] = {}
        self._error: BaseException | None = None
        threading.Thread(target=self._work, args=(ask,), name="mpmm-nvidia-smi", daemon=True).start()

    def result(self) -> Mapping[str, str]:
        """Return the answer, or raise what asking for it has raised."""
        if self._error is not None:
            raise self._error
        return self._answer

    def _work(self, ask: Callable[[], Mapping[str, str]]) -> None:
        try:
            self._answer = ask()
        except BaseException as error:  # is raised again by who waits for the answer
            self._error = error
        self.ended_ns = time.monotonic_ns()
        self.done.set()


def _number(text: str) -> float | None:
    """Return the MiB that `text` says; None for `[N/A]`, `[Not Supported]` or junk."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None
