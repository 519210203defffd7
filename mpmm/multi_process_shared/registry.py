"""The registry: one folder in which clients and servers of shared objects find each other.

    key             32 random bytes that a connecting process must know
    alive.lock      held shared by every client process as long as it lives
    lifecycle.lock  held shared by a model server while it starts another one, exclusively while the registry is removed
    <tag>.lock      held by a process that looks for the tag's server and starts one if there is none
    <tag>.life      held by the tag's server as long as it lives; its text is the server's `ServerRecord`
    <tag>-*.sock    the server's socket, a new name for each server
    <tag>.attach    the tag's object is attached in every process; there is no server
    handles/<tag>   the tag is or was a handle: a manager's loader made its server; the text names the namespaces
    servers.log     the output of servers whose starters have ended; see `output`
    zygote/         lock, life lock and socket of the process from which servers are forked; see `forkserver.zygote`

`<tag>` is a digest of the tag, so that tags may contain any characters and names stay short. Order of locks:
alive, lifecycle, tag, life.

When no client holds the alive lock and no server its life lock, the last of them to leave removes the folder. It
renames the folder first, so that a process that makes the registry again never loses files to the one that is still
deleting; other processes notice the removal by `LockFile.is_current`.

A cleaner may remove files that are in use. Each server puts its own back (`Host.look_after_files`), at once if a
process looks for it (`ServerRegistry.find`). A client holds the removed alive lock until it next uses the registry, and
newcomers hold a new one: a server lives by both (`AliveLock`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import select
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import psutil

from mpmm.interpreter.fork_hooks import call_once_at_exit, in_forked_child
from mpmm.interpreter.thread_locks import new_rlock
from mpmm.multi_process_shared.life import LifeLock, address_for, wait_for_answer
from mpmm.shared_state.file_errors import told_by_file
from mpmm.shared_state.liveness import pid_namespace
from mpmm.shared_state.lock_file import LockFile, is_locked
from mpmm.shared_state.runtime_dir import (
    REGISTRY_FOLDER,
    RUNTIME_DIR_VARIABLE,
    RuntimeDirectory,
    absolute,
    default_root_text,
    root_below,
)
from mpmm.text.arguments import checked_path_text

__all__ = ["ServerRecord", "ServerRegistry", "registry_at", "registry_for", "start_time_of"]

KEY_BYTES = 32
# An exclusive holder of the alive lock probes for microseconds, or is a server that is ending.
ALIVE_LOCK_TIMEOUT_S = 60.0
SHORT_LOCK_TIMEOUT_S = 10.0
# How long the kernel may take to close a server's locks after the server's last line.
DYING_TIMEOUT_S = 2.0
LEAVE_PRIORITY = 10
# How long to wait for a server that is to restore its files.
ANSWERS_WITHIN_S = 5.0
# The kernel's flag for a task that is being torn down, in /proc/<pid>/stat.
PF_EXITING = 0x4
HANDLES = "handles"
# Some kilobytes of names; the oldest are removed first, and then look as if they had never been handles.
MOST_HANDLES = 4096

# A process that a model server has started is part of it: a data loader's worker, say, which imports the program, too,
# and as a client would keep alive the server that keeps it alive.
LIVES_BY_VARIABLE = "MPMM_SERVER_LIVES_BY"


def _inherited_locks() -> tuple[str, ...] | None:
    """Return the alive locks of the model server that started this process; None if none did."""
    with contextlib.suppress(KeyError, ValueError, TypeError):
        return tuple(map(str, json.loads(os.environ[LIVES_BY_VARIABLE])))
    return None


_server_lives_by: tuple[str, ...] | None = _inherited_locks()


@dataclass(frozen=True)
class ServerRecord:
    """The text of a life file: the server that holds its lock.

    start_time belongs to pid, see start_time_of. ready: the server answers. leaving: it answers no more.
    has_looked: and it has looked whether anybody still uses the registry, so that others need not expect it to.
    """

    tag: str
    pid: int
    start_time: float
    incarnation: str
    socket_name: str
    spawned: bool
    ready: bool
    leaving: bool = False
    has_looked: bool = False
    # The namespaces whose loaders started the server, and its object's constructor and types, see `identity`.
    namespaces: tuple[str, ...] = ()
    constructor: str = ""
    types: tuple[str, ...] = ()
    # Its object has `sleep()` and `wake_up()`.
    sleeps: bool = False
    # The memory that its object says it takes, see `host.declared_mb`; None if it gives no usable figure.
    expect_mb: float | None = None
    # The pid namespace in which `pid` is its number, see `pid_namespace`; 0 if unknown.
    pids_of: int = 0

    @property
    def is_here(self) -> bool:
        """Tell whether `pid` is its number here: in another container that is another process, or none."""
        return 0 in (self.pids_of, pid_namespace()) or self.pids_of == pid_namespace()

    def is_running(self) -> bool:
        """Tell whether this very process (not another one with its pid) is running and not about to end.

        True for a process of another pid namespace, of which the life lock alone is known here.
        """
        if not self.is_here:
            return True
        try:
            if psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE:
                return False
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:
            return True
        return start_time_of(self.pid) == self.start_time and not _is_dying(self.pid)

    def has_ended(self) -> bool:
        """Tell whether the process has given back all its resources.

        A zombie main thread does not mean that: until the other threads have ended, they keep memory and descriptors.
        """
        if not self.is_here:
            # Nothing is known but that it has released its lock.
            return True
        if not hasattr(os, "pidfd_open"):
            return not self.is_running()
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        except OSError:
            return not self.is_running()
        try:
            ended = bool(select.select([fd], [], [], 0)[0])
        except ValueError:
            # The descriptor's number is too large for select.
            return not self.is_running()
        finally:
            os.close(fd)
        return ended or start_time_of(self.pid) != self.start_time


_FIELDS = frozenset(field.name for field in fields(ServerRecord))


def become_server_process(lives_by: tuple[str, ...]) -> None:
    """Note that this process is a model server, which lives while the alive locks `lives_by` are held by others."""
    global _server_lives_by
    _server_lives_by = lives_by
    os.environ[LIVES_BY_VARIABLE] = json.dumps(lives_by)


def is_server_process() -> bool:
    """Tell whether this process is a model server (even before it imports the main module) or was started by one."""
    return _server_lives_by is not None


def server_lives_by() -> tuple[str, ...] | None:
    """Return the alive locks that keep this process alive if it is a model server, else None."""
    return _server_lives_by


def start_time_of(pid: int) -> float | None:
    """Return when a process started, in a unit that is good for comparing only; None if it is gone."""
    try:
        # Clock ticks since boot; psutil's figure would move when the wall clock is set.
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return float(text.rpartition(")")[2].split()[19])
    except FileNotFoundError:
        pass
    except ProcessLookupError:
        return None
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return None


def _is_dying(pid: int) -> bool:
    """Tell whether a process was killed but has not ended yet: freeing takes a while for each gigabyte it has."""
    try:
        flags = int(
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[6]
        )
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError, IndexError):
        return False
    pending = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd:", "ShdPnd:"))]
    return bool(flags & PF_EXITING) or any(bits >> (signal.SIGKILL - 1) & 1 for bits in pending)


class ServerRegistry:
    """One registry as this process sees it. Thread-safe; made by `registry_at` and `registry_for` only."""

    def __init__(self, root: str | Path) -> None:
        self.directory = RuntimeDirectory(REGISTRY_FOLDER, root)
        # As text, see `RuntimeDirectory`.
        self.folder = self.directory.text
        # Reentrant, because a signal handler or finalizer may use a shared object while its thread joins.
        self._mutex = new_rlock()
        self._alive: LockFile | None = None

    def __repr__(self) -> str:
        return f"ServerRegistry({self.folder!r})"

    @property
    def root(self) -> Path:
        """The folder that contains the registry's folder."""
        return self.directory.root

    @property
    def path(self) -> Path:
        """The registry's folder."""
        return self.directory.path

    def _file(self, name: str) -> str:
        return os.path.join(self.folder, name)

    @property
    def alive_path(self) -> str:
        """Path of the lock that every client holds."""
        return self._file("alive.lock")

    def life_path(self, tag: str) -> str:
        """Path of the lock that the tag's server holds."""
        return self._file(f"{digest_of(tag)}.life")

    def attach_marker(self, tag: str) -> Path:
        """Path of the file that says that the tag's object is attached in every process."""
        return self.path / f"{digest_of(tag)}.attach"

    def socket_name(self, tag: str, incarnation: str) -> str:
        """Name of the socket of one server of the tag."""
        return f"{digest_of(tag)}-{incarnation[:8]}.sock"

    def remember_handle(self, tag: str, namespaces: tuple[str, ...]) -> None:
        """Note that the tag is a handle of these namespaces, for processes that look for its server after its end."""
        folder = self.path / HANDLES
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
            (folder / digest_of(tag)).write_text(" ".join(namespaces), encoding="ascii")
            found = list(os.scandir(folder))
            if len(found) > MOST_HANDLES:
                found.sort(key=lambda entry: entry.stat().st_mtime)
                for entry in found[: len(found) - MOST_HANDLES * 3 // 4]:
                    os.unlink(entry.path)

    def namespaces_of_handle(self, tag: str) -> tuple[str, ...]:
        """Return the namespaces of which the tag is or was a handle; empty if it never was, or too long ago."""
        try:
            return tuple((self.path / HANDLES / digest_of(tag)).read_text(encoding="ascii").split())
        except OSError:
            return ()

    def forget_handle(self, tag: str) -> None:
        """Free the tag for another object: a user has deleted the one that it stood for."""
        with contextlib.suppress(OSError):
            (self.path / HANDLES / digest_of(tag)).unlink()

    def join(self) -> None:
        """Make the registry if need be and become one of its clients until this process ends; cheap when repeated.

        A model server only makes the registry: if servers counted as clients, they would keep each other alive.
        Raises RuntimeDirectoryError; LockTimeoutError if a server that is ending keeps the alive lock too long.
        """
        if _server_lives_by is not None:
            self.directory.ensure()
            return
        with self._mutex:
            before = self._alive
            if before is not None and before.is_current():
                return
            call_once_at_exit(leave_all_registries, LEAVE_PRIORITY)
            joined = self._lock(self.alive_path, lambda lock: lock.shared(ALIVE_LOCK_TIMEOUT_S))
            # Not `before`, if a signal handler has joined in between.
            before, self._alive = self._alive, joined
            if before is not None:
                # Only now: a server that finds no client in between would end.
                before.close()

    def leave(self) -> None:
        """Stop being a client, and remove the registry if no other process uses it."""
        with self._mutex:
            alive, self._alive = self._alive, None
        if alive is None:
            return
        claim: LockFile | None = None
        try:
            alive.unlock()
            # The last client to unlock finds the lock free here, or held by another one leaving, which does the rest.
            if alive.try_exclusive() and alive.is_current():
                self.remove_if_unused()
            elif not alive.is_current():
                # Something has removed the file, and clients that have come since hold the one in its place.
                claim = self.claim_if_abandoned()
                if claim is not None:
                    self.remove_if_unused()
                # If the folder was removed, it was not this process that removed it, and the root with it.
                self.directory.remove_empty_root()
        finally:
            alive.close()
            if claim is not None:
                claim.close()

    def forget_after_fork(self) -> None:
        """Start without the alive lock in a forked child; the inherited descriptor has been closed."""
        self._mutex = new_rlock()
        self._alive = None

    def claim_if_abandoned(self) -> LockFile | None:
        """Take the alive lock exclusively if the registry has no client; return None if it has one or is gone."""
        try:
            lock = open_lock(self.alive_path)
        except FileNotFoundError:
            return None
        deadline = time.monotonic() + SHORT_LOCK_TIMEOUT_S
        while time.monotonic() < deadline:
            if lock.try_exclusive():
                if lock.is_current():
                    return lock
                break
            if lock.try_shared():
                # A client, or another process that probes. A client that has just left may have taken this probe for
                # a client, so every process that unlocks tries once more: the last one to do so finds the lock free.
                lock.unlock()
                if lock.try_exclusive() and lock.is_current():
                    return lock
                break
            # Neither: a process probes, or leaves and may have taken this one for a client. Wait for its outcome.
            time.sleep(0.000_5)
        lock.close()
        return None

    def remove_if_unused(self, but: LockFile | None = None) -> None:
        """Remove the registry unless a server lives or is being started. Hold the alive lock exclusively.

        A server that is leaving counts until it has looked, too: it looks as soon as the alive lock is free.
        but: the life lock of this process, which does not count because the process ends.
        """
        try:
            lifecycle = open_lock(self.path / "lifecycle.lock")
        except FileNotFoundError:
            return
        try:
            lives = [life for life in self.path.glob("*.life") if but is None or life != but.path]
            if not lifecycle.try_exclusive() or any(_will_stay_locked(life) for life in lives):
                return
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.path, self.root / f"{REGISTRY_FOLDER}.gone.{os.urandom(8).hex()}")
        finally:
            lifecycle.close()
        # Also what a process that was killed between these two steps left behind.
        for gone in list(self.root.glob(f"{REGISTRY_FOLDER}.gone.*")):
            RuntimeDirectory(gone.name, self.root).remove()

    def key(self) -> bytes:
        """Return the registry's key, made by the first process that asks. Call after `join`."""
        # A file of full length has the whole key: one write stores the bytes, and the length changes after them.
        with contextlib.suppress(FileNotFoundError):
            key = _contents(self._file("key"))
            if len(key) == KEY_BYTES:
                return key
        with contextlib.closing(open_lock(self._file("key"))) as lock:
            lock.shared(SHORT_LOCK_TIMEOUT_S)
            key = os.pread(lock.fd, KEY_BYTES + 1, 0)
            if len(key) == KEY_BYTES:
                return key
            lock.unlock()
            lock.exclusive(SHORT_LOCK_TIMEOUT_S)
            key = os.pread(lock.fd, KEY_BYTES + 1, 0)
            if len(key) != KEY_BYTES:
                key = os.urandom(KEY_BYTES)
                with told_by_file(lock.path):
                    os.ftruncate(lock.fd, 0)
                    os.pwrite(lock.fd, key, 0)
            return key

    @contextmanager
    def tag_lock(self, tag: str, timeout_seconds: float = math.inf) -> Iterator[None]:
        """Hold the tag's lock, with the registry in place; wait without limit if the holder may be loading a model.

        Raises LockTimeoutError.
        """
        folder_lock: LockFile | None = None
        lock: LockFile | None = None
        try:
            self.join()
            if _server_lives_by is not None:
                # A model server is no client, so only this lock keeps the registry while the new server comes up.
                folder_lock = self._lock(self._file("lifecycle.lock"), lambda lock: lock.shared(ALIVE_LOCK_TIMEOUT_S))
            lock = self._lock(self._tag_lock_path(tag), lambda lock: lock.exclusive(timeout_seconds))
            yield
        finally:
            for held in (lock, folder_lock):
                if held is not None:
                    held.close()

    def look(self, tag: str) -> tuple[bool, ServerRecord | None]:
        """Tell whether a server of the tag lives, and return its record: none if no server lives.

        True with None: the server has just taken its lock and not written its record yet.
        """
        path = self.life_path(tag)
        try:
            return (True, _read_record(path)) if is_locked(path) else (False, None)
        except FileNotFoundError:
            return False, None

    def find(self, tag: str, timeout_s: float = ANSWERS_WITHIN_S) -> tuple[bool, ServerRecord | None]:
        """Do what `look` does, but if something has removed the files of a living server, wait until it restores them.

        That takes milliseconds, unless the server is still making its object, or is stopped. One that takes longer than
        `timeout_s` counts as dead.
        """
        found = self.look(tag)
        if not found[0] and self.ask_for_files(tag, time.monotonic() + timeout_s):
            return self.look(tag)
        return found

    def ask_for_files(self, tag: str, deadline: float) -> bool:
        """Have the tag's server restore its files; return False if there is none.

        Wait until it has done so, or its life lock is there, or until the deadline (monotonic, s). See `life`.
        """
        return wait_for_answer(self._life_address(tag), lambda: time.monotonic() >= deadline or self.look(tag)[0])

    def restore_socket(self, record: ServerRecord) -> None:
        """Have a server put its socket back if something has removed it; call before connecting, or after a failure."""
        if not os.path.exists(self._file(record.socket_name)):
            self.ask_for_files(record.tag, time.monotonic() + ANSWERS_WITHIN_S)

    def _life_address(self, tag: str) -> bytes | None:
        return address_for(self.directory.root_text, digest_of(tag))

    def take_life(self, tag: str) -> LifeLock | None:
        """Take the life lock of the tag for this process; None if another process has it or the registry is gone."""
        try:
            life = LifeLock(self.life_path(tag))
        except FileNotFoundError:
            return None
        try:
            # A single try could fail, because a process that asks `is_locked` holds a shared lock for an instant.
            life.exclusive(1.0)
            if life.is_current():
                life.listen_at(self._life_address(tag))
                return life
        except TimeoutError:
            pass
        life.close()
        return None

    def tidy(self, tag: str) -> None:
        """Remove the files of a tag whose server is gone, unless a process is busy with the tag."""
        with contextlib.suppress(FileNotFoundError), contextlib.closing(open_lock(self._tag_lock_path(tag))) as lock:
            if lock.try_exclusive() and lock.is_current() and not is_locked(self.life_path(tag)):
                self.remove_sockets(tag)
                Path(self.life_path(tag)).unlink(missing_ok=True)
                lock.path.unlink(missing_ok=True)

    def remove_sockets(self, tag: str) -> None:
        """Remove the sockets that dead servers of the tag left behind. Hold the tag's lock or its life lock."""
        for leftover in list(self.path.glob(f"{digest_of(tag)}-*.sock")):
            leftover.unlink(missing_ok=True)

    def _tag_lock_path(self, tag: str) -> str:
        return self._file(f"{digest_of(tag)}.lock")

    def _lock(self, path: str, take: Callable[[LockFile], Any]) -> LockFile:
        """Open and `take` a lock of the registry; retry if the registry or the file was removed meanwhile."""
        while True:
            self.directory.ensure()
            try:
                lock = open_lock(path)
            except FileNotFoundError:
                continue
            try:
                take(lock)
                if lock.is_current():
                    return lock
            except BaseException:
                lock.close()
                raise
            lock.close()


def text_of(record: ServerRecord) -> bytes:
    """Return the text of a life file."""
    return json.dumps(asdict(record)).encode()


def write_record(life: LockFile, record: ServerRecord) -> None:
    """Write a server's record into its life file. Hold that file's lock."""
    text = text_of(record)
    # One write at least as long as the old text: a reader sees the old one, the new one, or something that is not JSON.
    text += b" " * max(0, os.fstat(life.fd).st_size - len(text))
    with told_by_file(life.path):
        os.pwrite(life.fd, text, 0)


def _contents(path: str | Path) -> bytes:
    """Return the contents of a small file."""
    # Not `Path.read_bytes`, which makes a new process load another twenty pages of code.
    with open(path, "rb", buffering=0) as file:
        return file.readall()


def _read_record(path: str | Path) -> ServerRecord | None:
    """Return the record in a life file, None while it has none; valid only if the lock is held."""
    try:
        found = json.loads(_contents(path).decode())
        for name in ("namespaces", "types"):
            found[name] = tuple(found.get(name, ()))
        # A later version may say more.
        return ServerRecord(**{name: value for name, value in found.items() if name in _FIELDS})
    except (ValueError, TypeError, AttributeError):
        return None


def _will_stay_locked(life: Path) -> bool:
    """Tell whether a server's life lock is held, after waiting for one that was killed, or has not said who it is.

    Never wait for a server that is leaving, because it may be waiting for this process.
    """
    deadline = time.monotonic() + DYING_TIMEOUT_S
    with contextlib.suppress(FileNotFoundError):
        while is_locked(life):
            record = _read_record(life)
            if record is not None and record.has_looked:
                # Only the kernel is not done with it.
                return False
            if (record is not None and record.is_running()) or time.monotonic() >= deadline:
                return True
            time.sleep(0.001)
    return False


def open_lock(path: str | Path) -> LockFile:
    """Open a lock file that forked children close. Raises FileNotFoundError when its folder is gone."""
    return LockFile(path)


def digest_of(tag: str) -> str:
    """Return a short name for a tag that is safe as part of a file name."""
    return hashlib.blake2b(tag.encode("utf-8", "surrogatepass"), digest_size=10).hexdigest()


_registries: dict[str, ServerRegistry] = {}
# Results of `registry_for`, by its argument, the setting and the user (`setuid` changes it): taking paths apart would
# cost more than a call.
_registries_by_argument: dict[tuple[str | None, str | None, int], ServerRegistry] = {}


def registry_at(root: str | Path) -> ServerRegistry:
    """Return this process's one object for the registry below `root`."""
    root = absolute(root)
    registry = _registries.get(root)
    # A single step instead of a lock, for which a signal handler might wait in its own thread.
    return _registries.setdefault(root, ServerRegistry(root)) if registry is None else registry


def registry_for(path: str | None) -> ServerRegistry:
    """Return the registry for Beam's `path` argument; None and the temp folder mean the user's runtime directory.

    Raises InvalidArgumentError.
    """
    if path is not None and not isinstance(path, str):
        path = checked_path_text("path", path, "a folder")
    argument = (path, os.environ.get(RUNTIME_DIR_VARIABLE), os.getuid())
    registry = _registries_by_argument.get(argument)
    if registry is None:
        if path is not None:
            path = checked_path_text("path", path, "a folder")
        root = default_root_text() if path is None or _is_for_temporary_files(path) else root_below(path)
        registry = registry_at(root)
        if os.path.isabs(root):
            _registries_by_argument[argument] = registry
    return registry


def _is_for_temporary_files(path: str) -> bool:
    try:
        return path == tempfile.gettempdir()
    except FileNotFoundError:
        # This process can write into no such folder.
        return False


def leave_all_registries() -> None:
    """Leave every registry; for the end of the process."""
    for registry in list(_registries.values()):
        with contextlib.suppress(OSError):
            registry.leave()


def _forget_registries_after_fork() -> None:
    for registry in _registries.values():
        registry.forget_after_fork()


in_forked_child(_forget_registries_after_fork)
