"""`mpmm run`: any program, in any language, on a lease.

The program is a child of this process, in the same process group, with the same standard streams and environment. Its
environment also says which share of the memory it has, see `Lease.environment`, for engines that size themselves:

    mpmm run --mb 20g -- sh -c 'CUDA_VISIBLE_DEVICES=$MPMM_DEVICES exec vllm serve MODEL \
        --gpu-memory-utilization $MPMM_MEMORY_FRACTION'

This process waits its turn, stays in the namespace as long as the program runs, and ends as the program does.

Whichever of the two is killed, the lease lasts as long as the program:

- The program ends or dies: this process gives the lease back and leaves. Child processes that the program leaves behind
  are no longer counted.
- This process dies, by `kill -9` say: the kernel kills the program as well (Linux: PR_SET_PDEATHSIG), and the other
  members take the lease back once the program is gone. The kernel may not support that, the program may have changed
  its user or taken its time to die, or left children behind. A process that has inherited the descriptor of the lock
  that tells other members that this one is alive keeps the lease. But a program that closes descriptors when it starts
  a child, as Python's `subprocess` does by default, starts one that does not: that child lives on, and the memory that
  it takes is given to others, because no process is left that could kill it. Memory sources that measure see it as
  memory of an unrelated program.

This process passes on signals that are sent to it. Signals from keys, which a terminal sends to the whole group, reach
the program directly. While this process waits for its turn, a signal ends it as usual. On a terminal it prints what it
waits for: after a second, and then at growing intervals.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from mpmm.interpreter.thread_starts import kept_from_new_threads
from mpmm.memory.placement import with_share

if TYPE_CHECKING:
    from mpmm.model_manager.lease import Lease

__all__ = ["EXIT_CANNOT_RUN", "EXIT_NOT_FOUND", "run_on_lease"]

# As in `env`, `nohup` and shells, where the status of a program that a signal ended is 128 + the signal's number.
EXIT_CANNOT_RUN = 126
EXIT_NOT_FOUND = 127
EXIT_BY_SIGNAL = 128
# The signals that end this process while it waits, and those that it passes on once the program runs.
_ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
_PASSED_ON = frozenset((*_ENDING, signal.SIGUSR1, signal.SIGUSR2))
_FROM_KEYS = (signal.SIGINT, signal.SIGQUIT)
_WATCHED = _PASSED_ON | {signal.SIGCHLD}
_PR_SET_PDEATHSIG = 1
# How often this process looks whether its program has ended, should another thread have taken the signal that says so.
_LOOK_S = 1.0


def run_on_lease(
    command: Sequence[str],
    mb: float,
    *,
    name: str,
    namespace: str,
    root: Path | None,
    wait_seconds: float,
    priority: int = 0,
    steady_seconds: float = 0.0,
    says: logging.Handler | None = None,
) -> int:
    """Run a program on a lease of `mb` MB; return the exit status. wait_seconds: the longest wait for the lease.

    steady_seconds: how long after its start nothing else is loaded or unloaded on its devices. says: receives messages
    about what the lease waits for; None if no one reads them.

    Only for the main thread of a process that has no other threads. Raises what `ModelManager.reserve` does, and
    SystemExit if a signal ends the wait.
    """
    # Blocked before there are other threads, which inherit the mask, so that signals come to this one.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    # If the parent ignored it, this process would inherit that, and would neither wake up nor learn the exit status
    # when the program ends.
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        # Imported here, because NumPy's libraries start threads, too.
        from mpmm.model_manager.manager import ModelManager
        from mpmm.model_manager.waits import say_at_terminal

        with ModelManager(namespace=namespace, runtime_root=root) as manager:
            say_at_terminal(manager, says)
            with _ended_by_signals(mask), kept_from_new_threads(_WATCHED):
                lease = manager.reserve(
                    mb, name=name, timeout_seconds=wait_seconds, priority=priority, steady=steady_seconds > 0
                )
            with lease, _quiet_for(lease, steady_seconds):
                return _run(command, lease, mask)
    finally:
        signal.signal(signal.SIGCHLD, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def _quiet_for(lease: Lease, seconds: float) -> Iterator[None]:
    """End the quiet of a lease after this time, in a thread; with `inf` it lasts until the lease ends."""
    if not 0 < seconds < threading.TIMEOUT_MAX:
        yield
        return
    timer = threading.Timer(seconds, lease.settled)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _run(command: Sequence[str], lease: Lease, mask: Collection[int]) -> int:
    life = lease.descriptor()
    try:
        # Safe despite the background thread: in the child, mpmm starts over and holds no lock.
        program = subprocess.Popen(
            command,
            env=with_share(os.environ, lease.environment()),
            pass_fds=(life,),
            preexec_fn=_prepare_child(os.getpid(), mask),
        )
    # ValueError: no argument can have a null character, or half of a surrogate pair.
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        print(f"mpmm: cannot run {command[0]!r}: {why}", file=sys.stderr)
        return EXIT_NOT_FOUND if isinstance(error, FileNotFoundError) else EXIT_CANNOT_RUN
    finally:
        os.close(life)
    lease.used_by(program.pid)
    while (status := program.poll()) is None:
        received, from_key = _next_signal()
        if received not in (None, signal.SIGCHLD) and not from_key:
            program.send_signal(received)
    return status if status >= 0 else EXIT_BY_SIGNAL - status


def _prepare_child(parent: int, mask: Collection[int]) -> Callable[[], None]:
    """Return what the child runs before it becomes the program: it ties its life to ours, and unblocks signals."""
    # Looked up here, because between fork and exec nothing should run that might need a lock.
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def prepare() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                # The parent died in between, so the kernel will not kill this child.
                os._exit(EXIT_BY_SIGNAL + signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    return prepare


def _next_signal() -> tuple[int | None, bool]:
    """Wait for one of the watched signals; return it, and whether a key caused it, so that the whole group got it.

    On Linux, return None after `_LOOK_S`: a thread of a library or driver may have taken the signal.
    """
    if sys.platform == "linux":
        info = signal.sigtimedwait(_WATCHED, _LOOK_S)
        if info is None:
            return None, False
        # Above 0 it is from the kernel. The kernel also sends the SIGHUP of a lost terminal, but not to both of us.
        return info.si_signo, info.si_code > 0 and info.si_signo in _FROM_KEYS
    return signal.sigwait(_WATCHED), False


@contextlib.contextmanager
def _ended_by_signals(mask: Collection[int]) -> Iterator[None]:
    """Let signals end the block by SystemExit, so that this process leaves the queue and the namespace."""
    before = {number: signal.getsignal(number) for number in _ENDING}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, _end)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(EXIT_BY_SIGNAL + number)
