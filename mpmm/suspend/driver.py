"""The CUDA driver's checkpoint calls: they move all GPU memory of a process into its host memory, and back.

The suspended process does nothing for it and is not asked: once it is locked, its CUDA calls block, and its other
threads run on. Needs driver 570 (for PyTorch 575) and Linux on x86-64; does not work under MIG or MPS, nor with managed
or, before 610, IPC memory. The caller calls `cuInit`, so it must be a process that never forks: see `helper.py`.

    running ──lock──> locked ──checkpoint──> checkpointed ──restore──> locked ──unlock──> running

`suspend` and `resume` start from whatever state they find, so they continue an operation that was cut off.
"""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Callable
from enum import IntEnum, unique
from pathlib import Path

__all__ = ["GOOD_BRANCHES", "HAZARDOUS_BRANCHES", "CheckpointDriver", "DriverError", "State", "driver_branch"]

LIBRARY = "libcuda.so.1"
# The values of CUresult that these calls are known to return.
SUCCESS, OUT_OF_MEMORY, NOT_INITIALIZED, ILLEGAL_STATE, NOT_READY, NOT_SUPPORTED = 0, 2, 3, 401, 600, 801
REASONS = {
    1: "there is no such process, or it has no GPU context",
    OUT_OF_MEMORY: "too little memory on the device",
    NOT_INITIALIZED: "the driver is not initialised",
    100: "there is no device",
    ILLEGAL_STATE: "the process is in another state",
    NOT_READY: "the work that the process has submitted did not end in time",
    800: "not permitted",
    NOT_SUPPORTED: "not supported: an old driver, MIG, MPS, or managed or shared memory",
    999: "unknown error",
}
# Branches of the kernel driver on which weights, captured graphs and connections were seen to survive, and killed
# processes to leave nothing behind.
GOOD_BRANCHES = frozenset({580})
# On these the end of a restored process hung the whole host, unless the process was suspended again before.
HAZARDOUS_BRANCHES = frozenset({595})
_VERSION_FILE = Path("/proc/driver/nvidia/version")
# A process that initialises CUDA at the same moment makes a lock fail.
LOCK_TRIES = 5
RETRY_S = 0.05
# How long submitted work may take at most; the copy is not in use.
LOCK_TIMEOUT_MS = 5000


def driver_branch(version_file: Path = _VERSION_FILE) -> int | None:
    """Return the branch of NVIDIA's kernel driver, such as 580; None if there is none."""
    try:
        found = re.search(r"\b(\d{3})\.\d+", version_file.read_text(encoding="ascii", errors="replace"))
    except OSError:
        return None
    return int(found[1]) if found else None


@unique
class State(IntEnum):
    """The states that `GetState` returns; the last two from driver 13.4 on."""

    RUNNING = 0
    LOCKED = 1
    CHECKPOINTED = 2
    FAILED = 3
    CHECKPOINTING = 4
    RESTORING = 5


class DriverError(Exception):
    """A call of the driver failed. Attributes: `call`, `code` (CUresult, 0 if there is none)."""

    def __init__(self, call: str, code: int, text: str = "") -> None:
        super().__init__(f"{call}: {text or REASONS.get(code, 'error')}" + (f" (CUDA error {code})" if code else ""))
        self.call = call
        self.code = code


class _LockArguments(ctypes.Structure):
    """`CUcheckpointLockArgs`: 64 bytes, of which all but the first word are 0."""

    _fields_ = [("timeout_ms", ctypes.c_uint), ("reserved", ctypes.c_char * 60)]


class CheckpointDriver:
    """The initialised library. Thread-safe for calls about different processes."""

    def __init__(self) -> None:
        """Load and initialise the library. Raises DriverError if there is none, or it is too old."""
        try:
            self._library = ctypes.CDLL(LIBRARY)
            self._calls = {
                name: self._library[f"cuCheckpointProcess{name}"]
                for name in ("GetState", "Lock", "Checkpoint", "Restore", "Unlock")
            }
        except (OSError, AttributeError) as error:
            raise DriverError("load", 0, f"{LIBRARY} has no checkpoint calls: {error}") from error
        for call in self._calls.values():
            call.argtypes = (ctypes.c_int, ctypes.c_void_p)
            call.restype = ctypes.c_int
        self._library.cuInit.argtypes = (ctypes.c_uint,)
        code = self._library.cuInit(0)
        if code:
            raise DriverError("cuInit", code)

    def state(self, pid: int) -> State:
        """Return the state of a process. Raises DriverError."""
        state = ctypes.c_int(-1)
        self._call("GetState", pid, ctypes.byref(state))
        try:
            return State(state.value)
        except ValueError:
            raise DriverError("GetState", 0, f"unknown state {state.value}") from None

    def suspend(self, pid: int, deadline: float) -> None:
        """Bring a process to CHECKPOINTED from any state; if that fails, the process runs again.

        deadline: as `time.monotonic()`, for another caller's operation to end. Raises DriverError, also for FAILED.
        """
        self._go(pid, State.CHECKPOINTED, {State.RUNNING: self._lock, State.LOCKED: self._checkpoint}, deadline)

    def resume(self, pid: int, deadline: float, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Bring a process to RUNNING from any state. Raises DriverError like `suspend`.

        is_wanted: called before a restore begins; if it returns False, the process stays CHECKPOINTED.
        """

        def restore(pid: int) -> None:
            if not is_wanted():
                raise DriverError("restore", 0, "no process waits for it any more")
            self._restore(pid)

        self._go(pid, State.RUNNING, {State.CHECKPOINTED: restore, State.LOCKED: self._unlock}, deadline)

    def _go(self, pid: int, goal: State, steps: dict[State, Callable[[int], None]], deadline: float) -> None:
        while (state := self.state(pid)) != goal:
            if state in steps:
                steps[state](pid)
            elif state == State.FAILED:
                raise DriverError("GetState", 0, f"process {pid} has failed in the driver, and is lost")
            elif time.monotonic() > deadline:
                raise DriverError("GetState", 0, f"process {pid} is still {state.name.lower()}")
            else:
                time.sleep(RETRY_S)

    def _lock(self, pid: int) -> None:
        for tried in range(LOCK_TRIES):
            try:
                self._call("Lock", pid, ctypes.byref(_LockArguments(LOCK_TIMEOUT_MS)))
                return
            except DriverError as error:
                if error.code != ILLEGAL_STATE or tried == LOCK_TRIES - 1:
                    raise
            time.sleep(RETRY_S)

    def _checkpoint(self, pid: int) -> None:
        try:
            self._call("Checkpoint", pid, None)
        except DriverError:
            # If it stayed locked, the process would never run again.
            if self.state(pid) == State.LOCKED:
                self._unlock(pid)
            raise

    def _restore(self, pid: int) -> None:
        self._call("Restore", pid, None)

    def _unlock(self, pid: int) -> None:
        self._call("Unlock", pid, None)

    def _call(self, name: str, pid: int, argument: object) -> None:
        code = self._calls[name](pid, argument)
        if code:
            raise DriverError(name.lower(), code)
