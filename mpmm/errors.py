"""Every error that mpmm raises on purpose.

`MpmmError` is the base and is never raised itself. Each child stands for one thing that a caller can act on, and also
derives from the built-in exception that fits, so that code which knows only Python (or Beam, which expects
`RuntimeError` from a time-out) catches it too. The text names the object, what was found, what was expected and, where
there is one, the setting to change; the same facts are attributes. All of them survive pickling, because they cross
process boundaries.

The docstrings are what `mpmm help errors` prints: when the error is raised, then `What to do:`, then `Attributes:`.
"""

from __future__ import annotations

from typing import Any

from mpmm.text.printable import printable_lines

__all__ = [
    "AcquireTimeoutError",
    "ClosedError",
    "DeadlockError",
    "GreenThreadsError",
    "InvalidArgumentError",
    "LayoutMismatchError",
    "LeaseTooLargeError",
    "LoadTimeoutError",
    "LockTimeoutError",
    "ModelServerError",
    "ModelTooLargeError",
    "MpmmError",
    "NamespaceResetError",
    "NoEventLoopError",
    "NotAcquiredError",
    "ProcessLimitError",
    "QueueFullError",
    "ReentrantCallError",
    "RemoteCallError",
    "RuntimeDirectoryError",
    "SegmentAllocationError",
    "SegmentCorruptError",
    "SegmentLostError",
    "ServerStartError",
    "SharedObjectReleasedError",
    "SourceUnavailableError",
    "SuspendError",
    "SuspendTimeoutError",
    "TableFullError",
    "UnloadTimeoutError",
]


class MpmmError(Exception):
    """Base of every mpmm error; never raised itself. Keyword arguments become attributes."""

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts
        self.__dict__.update(facts)

    def __str__(self) -> str:
        # Tracebacks appear on terminals, and the message may contain a tag.
        return printable_lines(self.message)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, self.facts))


def _rebuild(cls: type[MpmmError], message: str, facts: dict[str, Any]) -> MpmmError:
    return cls(message, **facts)


class InvalidArgumentError(MpmmError, ValueError):
    """A parameter has the wrong type, is out of range or is too long; nothing was changed.

    It is also raised if the tag already belongs to what another constructor makes, or to another namespace's server.

    What to do: pass what the text expects; for a tag, choose another one.
    """


class SourceUnavailableError(InvalidArgumentError):
    """A memory source that was chosen by name cannot work on this host.

    What to do: install what the text names, choose another `memory_source`, or `auto`; `mpmm doctor` lists those that
    work.
    Attributes: `source`, `reason`.
    """

    source: str
    reason: str


class RuntimeDirectoryError(MpmmError, PermissionError):
    """The runtime directory cannot be used, or cannot be trusted because others may write to it.

    It must be private (mode 0700), and on a file system that supports `flock`, which NFS and Lustre may not. The error
    is also raised if the program has closed the descriptors of mpmm's lock files.

    What to do: set MPMM_RUNTIME_DIR to a private folder on a local file system.
    Attributes: `path`.
    """

    path: str


class ProcessLimitError(MpmmError, OSError):
    """A process cannot join a namespace because it may not open more files or start more threads.

    What to do: raise the limit that the text names, or close what the program has left open.
    Attributes: `limit`.
    """

    limit: str


class SegmentAllocationError(MpmmError, MemoryError):
    """The shared memory for the segment could not be allocated, for example because `/dev/shm` is full.

    What to do: free or enlarge `/dev/shm` (`mpmm prune` removes what dead processes left behind), or use smaller
    `Capacities`.
    Attributes: `name`, `size_bytes`.
    """

    name: str
    size_bytes: int


class SegmentCorruptError(MpmmError, RuntimeError):
    """A live segment contains something that mpmm never writes, so another program has written into it.

    What to do: end the namespace's processes; the next one makes a new segment.
    Attributes: `name`.
    """

    name: str


class SegmentLostError(MpmmError, RuntimeError):
    """The segment of a namespace in use was removed (RemoveIPC, systemd-tmpfiles), so new processes cannot join.

    What to do: end the namespace's processes, and keep the segment from being removed; see `mpmm help operating`.
    Attributes: `name`.
    """

    name: str


class LayoutMismatchError(MpmmError, RuntimeError):
    """A live segment has another layout version, or belongs to another runtime directory.

    What to do: end the processes that run another version of mpmm, or choose another namespace.
    Attributes: `name`, `found`, `expected`.
    """

    name: str
    found: str
    expected: str


class TableFullError(MpmmError, RuntimeError):
    """A table of the segment has no free row.

    What to do: create the namespace with larger `Capacities`; the text names the field.
    Attributes: `table`, `capacity`, `setting`.
    """

    table: str
    capacity: int
    setting: str


class LockTimeoutError(MpmmError, TimeoutError):
    """The lock did not become free within `lock_timeout_seconds`; the process that holds it may be stopped.

    What to do: continue or end the process that the text names.
    Attributes: `path`, `timeout_seconds`, `holder_pid` (None if unknown).
    """

    path: str
    timeout_seconds: float
    holder_pid: int | None


class AcquireTimeoutError(MpmmError, TimeoutError, RuntimeError):
    """No copy of the model, or no room for the lease, became available in time; the text gives the last reason.

    What to do: see `mpmm help stall` for how to find the cause; raise `wait_timeout_seconds` if the wait was justified.
    Attributes: `tag` (for a lease, its name), `waited_seconds`, `retry_after_seconds` (how much longer the wait would
    have taken, judging by the loads and holds so far; None for a lease).
    """

    tag: str
    waited_seconds: float
    retry_after_seconds: float | None


class QueueFullError(MpmmError, RuntimeError):
    """As many requests already wait for the model as `max_waiting` allows; nothing was changed.

    What to do: try again after `retry_after_seconds`; a web service answers 503 with that as Retry-After.
    Attributes: `tag`, `waiting`, `max_waiting`, `retry_after_seconds` (how long a request made now would wait for
    its copy, judging by the loads and holds so far).
    """

    tag: str
    waiting: int
    max_waiting: int
    retry_after_seconds: float


class ModelTooLargeError(MpmmError, MemoryError):
    """The model needs more than the limit of any device, so it can never be loaded.

    What to do: lower `slack_percentage`, raise `memory_budget_mb` or `fallback_memory_mb`, or use a larger device.
    Attributes: `tag`, `need_mb`, `limit_mb`, `device`.
    """

    tag: str
    need_mb: float
    limit_mb: float
    device: str


class LeaseTooLargeError(MpmmError, MemoryError):
    """The lease asks for more than the limit of any device, so it can never be granted.

    What to do: ask for less, or raise the limit as for `ModelTooLargeError`.
    Attributes: `name`, `need_mb`, `limit_mb`, `device`.
    """

    name: str
    need_mb: float
    limit_mb: float
    device: str


class DeadlockError(MpmmError, RuntimeError):
    """The thread would wait for something that only it can release; raised at once, not after the time-out.

    It is raised only where that is certain; see `ModelManager.model`.

    What to do: release what the thread holds first, or hold one copy for both uses.
    Attributes: `tag`, `held` (the tags, or names of leases, that the thread holds).
    """

    tag: str
    held: tuple[str, ...]


class UnloadTimeoutError(MpmmError, TimeoutError):
    """Copies that `unload` waits for are still loaded, usually because they are in use.

    What to do: nothing, if they may stay until they are released; mpmm unloads them then. `mpmm inspect` shows which
    processes hold them.
    Attributes: `tag`, `left` (copies), `waited_seconds`.
    """

    tag: str
    left: int
    waited_seconds: float


class SuspendTimeoutError(MpmmError, TimeoutError):
    """Copies that `suspend` waits for are not suspended yet, usually because of a steady load or lease on their device.

    What to do: nothing, if they may be suspended later; mpmm does that. The text says what they wait for.
    Attributes: `tag`, `left` (copies), `waited_seconds`.
    """

    tag: str
    left: int
    waited_seconds: float


class LoadTimeoutError(MpmmError, TimeoutError):
    """The load took longer than `load_timeout_seconds` and was abandoned; its reservation is free again.

    What to do: raise `load_timeout_seconds`, or fix the loader.
    Attributes: `tag`, `timeout_seconds`.
    """

    tag: str
    timeout_seconds: float


class SuspendError(MpmmError, RuntimeError):
    """A copy could not be suspended or resumed.

    What to do: nothing, if it is acceptable that the model is loaded again; the text says what failed.
    Attributes: `tag`.
    """

    tag: str


class NotAcquiredError(MpmmError, ValueError):
    """The process releases or unpins something that it does not hold: it never had it, or has already released it.

    What to do: fix the caller, or use `with manager.model(...)`, which releases exactly once.
    Attributes: `tag`.
    """

    tag: str


class NamespaceResetError(MpmmError, RuntimeError):
    """`mpmm reset`, or `force_reset`, took away the caller's copy or its place in the queue.

    What to do: acquire the model again.
    Attributes: `tag`.
    """

    tag: str


class ClosedError(MpmmError, RuntimeError):
    """The manager was shut down, perhaps by another thread during the call, or the process has left the namespace.

    What to do: create a new manager.
    """


class GreenThreadsError(MpmmError, RuntimeError):
    """gevent or eventlet has replaced threads with greenlets, so a wait for a model would stop all greenlets at once.

    What to do: use threads, processes or an event loop.
    """


class NoEventLoopError(MpmmError, RuntimeError):
    """`model_async` was entered while no event loop of asyncio was running, for example under trio.

    What to do: use `model` in a thread that the other loop starts.
    """


class ReentrantCallError(MpmmError, RuntimeError):
    """A finalizer or signal handler made a call that cannot run in the middle of a transaction of its own thread.

    Also: one, or a constructor, acquired a shared object in the middle of an acquire of the same tag.

    What to do: only give things back there (`release_model`, `unpin`, `Lease.release`, `shutdown`), and make other
    calls elsewhere.
    """


class ModelServerError(MpmmError, ConnectionError):
    """The process that holds a shared object is gone, or refuses the call.

    Outside a loader, a handle never starts a new server.

    What to do: release the handle and acquire the model again.
    Attributes: `tag`, `server_pid` (None if unknown).
    """

    tag: str
    server_pid: int | None


class RemoteCallError(MpmmError, RuntimeError):
    """A method of a shared object ran, but its outcome cannot be sent: it cannot be pickled, or is not an `Exception`.

    The text says what the outcome was and, for an exception, includes the server's traceback.

    What to do: return or raise something that can be pickled.
    Attributes: `tag`, `method`.
    """

    tag: str
    method: str


class ServerStartError(MpmmError, RuntimeError):
    """The constructor of a shared object failed, or its server could not import the main module.

    The text includes the server's traceback.

    What to do: fix the constructor; guard code that starts work by `if __name__ == "__main__":`.
    Attributes: `tag`.
    """

    tag: str


class SharedObjectReleasedError(MpmmError, RuntimeError):
    """A proxy was used after its `release`.

    What to do: acquire the object again.
    Attributes: `tag`.
    """

    tag: str
