"""Every error that mpmm raises on purpose.

`MpmmError` is the base and is never raised itself. Each child stands for one thing that a caller can
act on, and also derives from the built-in exception that fits, so that code which only knows Python
(or Beam, which expects `RuntimeError` from a time-out) catches it too. The text names the object, what
was found, what was expected and, where there is one, the setting to change; the same facts are
attributes. All of them survive pickling, because they cross process borders.
"""

from __future__ import annotations

from typing import Any

from mpmm.printable import printable_lines

__all__ = [
    "AcquireTimeoutError",
    "ClosedError",
    "DeadlockError",
    "InvalidArgumentError",
    "LayoutMismatchError",
    "LeaseTooLargeError",
    "LoadTimeoutError",
    "LockTimeoutError",
    "ModelServerError",
    "ModelTooLargeError",
    "MpmmError",
    "NamespaceResetError",
    "NotAcquiredError",
    "QueueFullError",
    "ReentrantCallError",
    "RemoteCallError",
    "RuntimeDirectoryError",
    "SegmentAllocationError",
    "SegmentCorruptError",
    "SegmentLostError",
    "ServerStartError",
    "SharedObjectReleasedError",
    "SuspendError",
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
        # A traceback shows it on a terminal, and a tag may be in it.
        return printable_lines(self.message)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, self.facts))


def _rebuild(cls: type[MpmmError], message: str, facts: dict[str, Any]) -> MpmmError:
    return cls(message, **facts)


class InvalidArgumentError(MpmmError, ValueError):
    """A parameter is of the wrong type, out of range or too long. Nothing was changed."""


class RuntimeDirectoryError(MpmmError, PermissionError):
    """The runtime directory cannot be trusted or used. Attribute: `path`."""

    path: str


class SegmentAllocationError(MpmmError, MemoryError):
    """The shared memory cannot be had (`/dev/shm` full, say). Attributes: `name`, `size_bytes`."""

    name: str
    size_bytes: int


class SegmentCorruptError(MpmmError, RuntimeError):
    """A live segment holds what mpmm never writes: somebody else has written into it. Attribute: `name`."""

    name: str


class SegmentLostError(MpmmError, RuntimeError):
    """Somebody has removed the segment of a namespace in use; newcomers cannot share it. Attribute: `name`."""

    name: str


class LayoutMismatchError(MpmmError, RuntimeError):
    """A live segment has another layout version or another owner directory.

    Attributes: `name`, `found`, `expected`.
    """

    name: str
    found: str
    expected: str


class TableFullError(MpmmError, RuntimeError):
    """A table of the segment has no free row. Attributes: `table`, `capacity`, `setting`."""

    table: str
    capacity: int
    setting: str


class LockTimeoutError(MpmmError, TimeoutError):
    """The lock was not to be had in time. Attributes: `path`, `timeout_seconds`, `holder_pid` or None."""

    path: str
    timeout_seconds: float
    holder_pid: int | None


class AcquireTimeoutError(MpmmError, TimeoutError, RuntimeError):
    """A model or lease was not to be had in time. Attributes: `tag` (name of the lease), `waited_seconds`.

    `retry_after_seconds`: how much longer it would have taken, as far as loads and holds so far tell; None for a lease.
    """

    tag: str
    waited_seconds: float
    retry_after_seconds: float | None


class QueueFullError(MpmmError, RuntimeError):
    """As many wait for a model as `max_waiting` allows. Nothing was changed; a web service answers 503.

    Attributes: `tag`, `waiting`, `max_waiting`, and for Retry-After `retry_after_seconds`: when a copy is expected for
    one who waited now, as far as loads and holds so far tell.
    """

    tag: str
    waiting: int
    max_waiting: int
    retry_after_seconds: float


class ModelTooLargeError(MpmmError, MemoryError):
    """The model can never fit. Attributes: `tag`, `need_mb`, `limit_mb`, `device`."""

    tag: str
    need_mb: float
    limit_mb: float
    device: str


class LeaseTooLargeError(MpmmError, MemoryError):
    """A lease can never be had. Attributes: `name`, `need_mb`, `limit_mb`, `device`."""

    name: str
    need_mb: float
    limit_mb: float
    device: str


class DeadlockError(MpmmError, RuntimeError):
    """A request that could be served only by what the requesting thread holds itself. Attributes: `tag`, `held` (tags).

    Raised at once, instead of a time-out later, where this is certain; see `ModelManager.model`.
    """

    tag: str
    held: tuple[str, ...]


class UnloadTimeoutError(MpmmError, TimeoutError):
    """Copies that were to be unloaded are still there: in use, mostly. They are unloaded when they are given back.

    Attributes: `tag`, `left` (copies), `waited_seconds`.
    """

    tag: str
    left: int
    waited_seconds: float


class LoadTimeoutError(MpmmError, TimeoutError):
    """A load took longer than `load_timeout_seconds` and was given up. Attributes: `tag`, `timeout_seconds`."""

    tag: str
    timeout_seconds: float


class SuspendError(MpmmError, RuntimeError):
    """A copy could not be suspended or resumed. Attribute: `tag`."""

    tag: str


class NotAcquiredError(MpmmError, ValueError):
    """A release of something that this process does not hold. Attribute: `tag`."""

    tag: str


class NamespaceResetError(MpmmError, RuntimeError):
    """`force_reset` took the ticket or the hold away. Attribute: `tag`."""

    tag: str


class ClosedError(MpmmError, RuntimeError):
    """The object was shut down, or this process has left the namespace."""


class ReentrantCallError(MpmmError, RuntimeError):
    """A finalizer or signal handler asked for what cannot be done in the middle of a transaction of its own thread."""


class ModelServerError(MpmmError, ConnectionError):
    """The process that holds a shared object is gone or refuses. Attributes: `tag`, `server_pid` or None."""

    tag: str
    server_pid: int | None


class RemoteCallError(MpmmError, RuntimeError):
    """A shared object's method ran, but its outcome cannot come here: it does not pickle, or is not an `Exception`.

    Attributes: `tag`, `method`; the text says what it was and, for an exception, carries the server's traceback.
    """

    tag: str
    method: str


class ServerStartError(MpmmError, RuntimeError):
    """A shared object could not be made. Attribute: `tag`; the text carries the server's traceback."""

    tag: str


class SharedObjectReleasedError(MpmmError, RuntimeError):
    """A proxy was used after its `release`. Attribute: `tag`."""

    tag: str
