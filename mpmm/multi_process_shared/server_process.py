"""A spawned model server, from its first line to its last.

It imports the main module like every process that `multiprocessing` spawns, takes the tag's life lock, makes the
object, serves it, and ends in one of three ways: a hard delete, a signal, or because no process holds any of its alive
locks. It always ends through `os._exit`, because exit handlers of the object's libraries may never return, and the
memory is needed at once.

One thread, started before the main module is imported, watches for signals, for the end of the starter, whose standard
streams the server then closes (`output`), and for the end of the last client.
"""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import process as mp_process
from multiprocessing import spawn
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from mpmm.errors import RuntimeDirectoryError, ServerStartError
from mpmm.interpreter.fork_hooks import end_forked_child
from mpmm.interpreter.thread_locks import new_rlock
from mpmm.multi_process_shared import hosted
from mpmm.multi_process_shared.context import ServerContext, attaching_to
from mpmm.multi_process_shared.host import end_all_hosts, host_object, new_record
from mpmm.multi_process_shared.identity import name_of_constructor, names_of_types
from mpmm.multi_process_shared.life import LifeLock
from mpmm.multi_process_shared.output import Output, Starter
from mpmm.multi_process_shared.registry import (
    ServerRecord,
    ServerRegistry,
    become_server_process,
    open_lock,
    registry_at,
    write_record,
)
from mpmm.shared_state.lock_file import LockFile
from mpmm.text.printable import printable_logger

__all__ = [
    "ATTACH",
    "CRASHED",
    "OCCUPIED",
    "READY",
    "AliveLock",
    "ServerPlan",
    "run_server",
    "wants_to_attach",
]

logger = printable_logger(__name__)

# A new server's reports to its starter, each with a text.
READY, OCCUPIED, ATTACH, CRASHED = "ready", "occupied", "attach", "crashed"
PROBE_INTERVAL_S = 1.0


@dataclass(frozen=True)
class ServerPlan:
    """Instructions for a new server. `contexts` and `constructor` are pickles, loaded after `environment` is set."""

    root: str
    tag: str
    environment: tuple[tuple[str, str | None], ...]
    # Its pid and start time, see `start_time_of`.
    starter: tuple[int, float | None]
    alive_locks: tuple[str, ...]
    contexts: bytes
    constructor: bytes

    def environment_in(self, starters: Mapping[str, str]) -> dict[str, str]:
        """Return the whole environment of the server: its starter's, with the plan's changes."""
        changed = {**starters, **dict(self.environment)}
        return {name: value for name, value in changed.items() if value is not None}


def wants_to_attach(shared: object) -> bool:
    """Tell whether an object is itself shared between processes, so that each makes its own instead of a proxy."""
    return bool(getattr(type(shared), "attach_in_place", False))


def run_server(
    plan: ServerPlan,
    starter: Connection,
    preparation: dict[str, Any] | None = None,
    on_made: Callable[[], None] | None = None,
) -> NoReturn:
    """Be the server: the main function of the new process.

    preparation: of `multiprocessing.spawn`, for `__main__` and the like; None if that is done already. on_made: called
    once the object is made. The plan's environment is set already.
    """
    # A session of its own, so that Ctrl-C or a hang-up at the starter's terminal does not end what other processes use.
    with suppress(OSError):
        os.setsid()
    # First of all, because the main module may make managers and shared objects, too.
    become_server_process(plan.alive_locks)
    _Server(plan, starter, on_made).run(preparation)


class _Server:
    def __init__(self, plan: ServerPlan, starter: Connection, on_made: Callable[[], None] | None) -> None:
        self.plan = plan
        self.on_made = on_made
        self.tag = plan.tag
        self.pid = os.getpid()
        self.registry: ServerRegistry = registry_at(Path(plan.root))
        self.starter: Connection | None = starter
        self.life: LifeLock | None = None
        self.record: ServerRecord | None = None
        self.contexts: tuple[ServerContext, ...] = ()
        self.kept: list[object] = []
        self.exiting = new_rlock()
        self.serving = False
        self.output = Output(self.registry.path)
        self.signals = _Signals(self.on_signal)

    def run(self, preparation: dict[str, Any] | None) -> NoReturn:
        try:
            self.host(preparation)
        except BaseException as error:
            if os.getpid() != self.pid:
                end_forked_child(error)
            # An exception of the constructor comes as a ServerStartError that has its text.
            text = error.message if isinstance(error, ServerStartError) else _crash_text("the server", self.tag)
            self.tell(CRASHED, text)
            # The starter itself waits for the end of this process.
            self.exit(1, keep_life=False)
        self.serving = True
        self.tell(READY)
        # Only signals interrupt this: their handlers run in this thread.
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
        self.exit(0)

    def host(self, preparation: dict[str, Any] | None) -> None:
        """Make the object and start serving it."""
        self.signals.listen()
        threading.Thread(target=self.watch, name="mpmm-watch", daemon=True).start()
        if preparation is not None:
            self.prepare(preparation)
        self.signals.listen()
        _log_as_beam_does()
        self.life = self.registry.take_life(self.tag)
        if self.life is None:
            self.tell(OCCUPIED)
            self.exit(0)
        self.record = record = new_record(self.registry, self.tag, spawned=True, ready=False)
        write_record(self.life, record)
        self.contexts = pickle.loads(self.plan.contexts)
        for context in self.contexts:
            if context.on_start is not None:
                self.kept.append(context.on_start(self.tag))
        constructor = _Construction(self.tag, self.plan.constructor)
        with attaching_to(self.tag, self.registry.root):
            shared = constructor()
        if os.getpid() != self.pid:
            end_forked_child(None)
        if self.on_made is not None:
            self.on_made()
        if wants_to_attach(shared):
            self.tell(ATTACH)
            self.exit(0, keep_life=False)
        # The constructor may have installed signal handlers of its own.
        self.signals.listen()
        namespaces = tuple(context.namespace for context in self.contexts if context.namespace)
        if namespaces:
            self.registry.remember_handle(self.tag, namespaces)
        self.record = replace(
            record,
            ready=True,
            namespaces=namespaces,
            constructor=name_of_constructor(constructor.unpickled),
            types=names_of_types(shared),
        )
        host_object(self.registry, self.record, constructor, shared, self.life, lambda: self.exit(0))

    def prepare(self, preparation: dict[str, Any]) -> None:
        """Do what `multiprocessing.spawn` does in a new process; if the main module fails, report that and end."""
        # A script without a main guard that starts servers must fail here, or each server would start another one.
        this_process: Any = mp_process.current_process()
        this_process._inheriting = True
        placed = {name: os.environ.get(name) for name, _ in self.plan.environment}
        try:
            spawn.prepare(preparation)
        except BaseException:
            trace = traceback.format_exc()
            self.tell(
                CRASHED,
                f"Shared Server Process crashed: the main module failed in pid {os.getpid()}, which imported it to "
                f"serve {self.tag!r}:\n{trace}",
            )
            self.exit(1)
        del this_process._inheriting
        for name, value in placed.items():
            # The main module sets variables for the program; for this server, the starter's values count.
            if value is not None and os.environ.get(name) != value:
                os.environ[name] = value

    def tell(self, what: str, text: str = "") -> None:
        """Report to the starter, which may have died."""
        starter, self.starter = self.starter, None
        if starter is not None:
            with suppress(OSError), starter:
                starter.send((what, text))

    def on_signal(self, number: int) -> None:
        """End the process on SIGTERM at any time, on SIGINT once it serves; called by any thread."""
        if number == signal.SIGTERM:
            self.exit(128 + number)
        elif number == signal.SIGINT and self.serving:
            self.exit(0)

    def watch(self) -> None:
        """Act on signals, the end of the starter, and that of the last client; runs in a thread of its own."""
        locks: list[AliveLock] = []
        starter: Starter | None = None
        next_probe = 0.0
        while True:
            try:
                if not locks:
                    starter = Starter(*self.plan.starter)
                    locks = [AliveLock(path) for path in dict.fromkeys(self.plan.alive_locks)]
                    next_probe = time.monotonic() + PROBE_INTERVAL_S
                starter = self._heed(starter, next_probe)
                if time.monotonic() >= next_probe:
                    next_probe = time.monotonic() + PROBE_INTERVAL_S
                    self._probe(locks)
            except Exception as error:
                # Out of descriptors for a moment, say. Without this thread the server would outlive all its clients.
                ends = _is_about_closed_descriptor(error)
                with suppress(Exception):
                    text = "mpmm: pid %d, which serves %r, failed to check for its clients and %s"
                    logger.exception(text, os.getpid(), self.tag, "ends" if ends else "tries again")
                if ends:
                    # Some code in the server has closed descriptors that are not its own: clients no longer reach it,
                    # and it would never notice that they are gone. It cleans up nothing, because by now its numbers may
                    # be those of other files.
                    os._exit(1)
                time.sleep(PROBE_INTERVAL_S)

    def _heed(self, starter: Starter | None, until: float) -> Starter | None:
        """Act on signals, or the end of the starter, that come before `until`; return the starter while it lives."""
        waited_for = [self.signals.fd] if starter is None or starter.fd is None else [self.signals.fd, starter.fd]
        ready = wait(waited_for, max(0.0, until - time.monotonic()))
        if self.signals.fd in ready:
            self.signals.heed()
        if starter is None or not (starter.fd in ready or starter.has_ended()):
            return starter
        starter.close()
        self.output.turn_to_log(
            f"pid {os.getpid()}, which serves {self.tag!r}, writes its output here from now on: its starter, "
            f"pid {starter.pid}, has ended"
        )
        return None

    def _probe(self, locks: list[AliveLock]) -> None:
        """End the process if no client is left."""
        if not all(lock.is_free() for lock in locks):
            for lock in locks:
                lock.give_up()
            self.output.bound()
            return
        if self.life is None:
            # The user's main module is still being imported, and may never finish.
            os._exit(1)
        registry_is_ours = any(lock.held and lock.path == str(self.registry.alive_path) for lock in locks)
        for lock in locks:
            if lock.path != str(self.registry.alive_path):
                lock.give_up()
        self.exit(0, keep_life=False, registry_is_ours=registry_is_ours)

    def exit(self, code: int, *, keep_life: bool = True, registry_is_ours: bool = False) -> NoReturn:
        """Clean up and end the process at once; the registry is removed, too, if this was the last process to use it.

        keep_life: hold the life lock to the very end, so that a process that waits for this one's memory can see it.
        registry_is_ours: the registry's alive lock is held exclusively already.
        """
        # Never released: the first thread to get here ends the process, while others wait. A signal handler that
        # interrupts that thread here repeats these steps, which is harmless.
        self.exiting.acquire()
        try:
            for host in hosted.every_host():
                host.leave_files()
            for child in multiprocessing.active_children():
                if child.daemon:
                    child.terminate()
            if self.life is not None and self.life.fd >= 0 and self.record is not None:
                # Before the alive lock is checked: clients that leave after that must know that this server is leaving.
                write_record(self.life, replace(self.record, ready=False, leaving=True))
                self.registry.remove_sockets(self.tag)
                end_all_hosts(but=self.life)
                if not keep_life:
                    self.life.stop_listening()
                if not keep_life and self.life.is_current():
                    self.life.path.unlink(missing_ok=True)
                self.clean_up_after_clients()
                self._leave_registry(self.life, replace(self.record, ready=False, leaving=True), registry_is_ours)
            for stream in (sys.stdout, sys.stderr):
                # None if the server was started without it.
                if stream is not None:
                    stream.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _leave_registry(self, life: LifeLock, record: ServerRecord, is_ours: bool) -> None:
        """Remove the registry if no other process uses it. is_ours: its alive lock is held exclusively already."""
        # Kept in a variable, because a lock that nothing refers to is released.
        claim = None if is_ours else self.registry.claim_if_abandoned()
        if is_ours or claim is not None:
            self.registry.remove_if_unused(but=life)
        # Before the lock is free: its next holder would otherwise expect that this process looks again.
        write_record(life, replace(record, has_looked=True))
        if not is_ours and claim is None:
            # A client has just held the lock. If it has left before that line, it has left the removal to this process.
            claim = self.registry.claim_if_abandoned()
            if claim is not None:
                self.registry.remove_if_unused(but=life)

    def clean_up_after_clients(self) -> None:
        """Call `on_last` of every context whose clients are all gone."""
        for context in self.contexts:
            if context.on_last is None:
                continue
            lock = AliveLock(context.alive_lock)
            free = lock.is_free() and lock.held
            lock.give_up()
            if free:
                try:
                    context.on_last()
                except Exception:
                    logger.exception("mpmm: pid %d: on_last failed for %r", os.getpid(), self.tag)


class _Signals:
    """The signals that end a server, acted on whatever its main thread is doing.

    Python runs a handler in the main thread, between two of its bytecodes: not while a constructor is in a long native
    call, and not at all if the signal arrives after the last bytecode before that thread falls asleep for good. But the
    C handler that the kernel runs writes the signal's number to a pipe at once (`signal.set_wakeup_fd`), and another
    thread reads it.
    """

    def __init__(self, on_signal: Callable[[int], None]) -> None:
        self._on_signal = on_signal
        self.fd, self._writer = os.pipe()
        for fd in (self.fd, self._writer):
            os.set_blocking(fd, False)
        self._mask_before_fork = threading.local()
        os.register_at_fork(
            before=self._before_fork,
            after_in_parent=self._after_fork_in_parent,
            after_in_child=self._after_fork_in_child,
        )

    def listen(self) -> None:
        """Handle SIGTERM, replacing any earlier handler, and survive clients that hang up; for the main thread."""
        signal.signal(signal.SIGTERM, self._handle)
        if signal.getsignal(signal.SIGPIPE) == signal.SIG_DFL:
            # Python's default. The main module, which is imported here, too, may have chosen to end with its reader.
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._on_signal(number)

    def heed(self) -> None:
        """Act on the signals that have arrived."""
        with suppress(BlockingIOError):
            for number in os.read(self.fd, 4096):
                self._on_signal(number)

    # A forked child's signals must not end the server: they wait until the child cannot write to this pipe.

    def _before_fork(self) -> None:
        self._mask_before_fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})

    def _after_fork_in_parent(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask_before_fork.mask)

    def _after_fork_in_child(self) -> None:
        if self.fd >= 0:
            signal.set_wakeup_fd(-1)
            if signal.getsignal(signal.SIGTERM) == self._handle:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            for fd in (self.fd, self._writer):
                os.close(fd)
            self.fd = self._writer = -1
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask_before_fork.mask)


def _log_as_beam_does() -> None:
    """Log records of level INFO to standard error, as Beam's servers do, unless the main module configured logging."""
    root = logging.getLogger()
    if not root.handlers and root.level == logging.WARNING:
        root.setLevel(logging.INFO)
        # Not `basicConfig`, so that the constructor can still call it.
        last_resort = logging.lastResort
        if last_resort is not None:
            last_resort.setLevel(logging.INFO)
            last_resort.setFormatter(logging.Formatter(logging.BASIC_FORMAT))


class _Construction:
    """The constructor, unpickled at the first use; what it raises becomes a ServerStartError with the traceback."""

    def __init__(self, tag: str, pickled: bytes) -> None:
        self.tag = tag
        self._pickled: bytes | None = pickled
        #: None before the first use.
        self.unpickled: Any = None

    def __call__(self) -> Any:
        try:
            if self._pickled is not None:
                self.unpickled = pickle.loads(self._pickled)
                self._pickled = None
            return self.unpickled()
        except ModuleNotFoundError:
            text = f"{_crash_text('the constructor', self.tag)}sys.path there: {sys.path}\n"
            raise ServerStartError(text, tag=self.tag) from None
        except Exception:
            raise ServerStartError(_crash_text("the constructor", self.tag), tag=self.tag) from None


class AliveLock:
    """A lock that keeps the server alive while others hold it; this process holds it only while it probes.

    If the file is removed, those that hold it go on, and newcomers hold the file that is put in its place; the server
    lives by both. But a namespace that was made anew, under the same name, knows nothing of this server: its folder has
    another token.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.held = False
        self._token = self._read_token()
        self._lock = self._opened()

    def _opened(self) -> LockFile | None:
        # A missing file is not created: its registry or namespace is gone, and with it all holders of the lock.
        with suppress(FileNotFoundError):
            if os.path.exists(self.path):
                return open_lock(Path(self.path))
        return None

    def _read_token(self) -> bytes | None:
        """Return what identifies the namespace; None for a registry, which a server's own files outlive."""
        with suppress(FileNotFoundError, NotADirectoryError):
            return Path(self.path).with_name("token").read_bytes()
        return None

    def is_free(self) -> bool:
        """Tell whether no client holds the lock; if so it is held exclusively now, or the file is gone."""
        while self._lock is not None:
            if not self._lock.try_exclusive():
                return False
            if self._lock.is_current():
                self.held = True
                return True
            # Removed or replaced. The old one is kept until that is done: if it fails, for want of descriptors say, the
            # next probe tries again.
            found = self._opened() if self._read_token() == self._token else None
            self.close()
            self._lock = found
        return True

    def give_up(self) -> None:
        """Release the lock until the next probe, so that clients can come and go."""
        if self.held and self._lock is not None:
            self._lock.unlock()
            self.held = False

    def close(self) -> None:
        """Close the lock file."""
        self.held = False
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _is_about_closed_descriptor(error: BaseException | None) -> bool:
    """Tell whether other code has closed a descriptor of mpmm; a lock file raises RuntimeDirectoryError for that."""
    if isinstance(error, RuntimeDirectoryError):
        error = error.__cause__
    return isinstance(error, OSError) and error.errno == errno.EBADF


def _crash_text(what: str, tag: str) -> str:
    return f"Shared Server Process crashed: {what} of {tag!r} failed in pid {os.getpid()}:\n{traceback.format_exc()}"
