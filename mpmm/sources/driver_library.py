"""Common parts of the sources that ask a driver's management library: its sessions, and trust in its answers.

- A session is valid only in the process that has opened it. After a failure it is ended and another one opened, at
  most every `RETRY_S`, because a GPU that was reset, or a driver that was reloaded, is only found that way.
- Silence is not a measurement: a library may list no process, withhold what each takes, or list processes of another
  pid namespace. Its lists count once it has shown a process of ours.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

from mpmm.errors import SourceUnavailableError
from mpmm.sources.base import DeviceInfo, DeviceSample, process_exists

__all__ = ["RETRY_S", "LibraryDoor", "LibrarySession", "ProcessTrust", "Sessions", "without_figures"]

RETRY_S = 2.0


class LibraryDoor(Protocol):
    """The only place that calls a library. error: why it refused the last call, None if it did not."""

    error: str | None

    def ask(self, function: str, *arguments: Any) -> Any:
        """Return what a function of the library returns, or None (and `error` set) when it refuses."""
        ...


@dataclass(frozen=True, kw_only=True)
class LibrarySession:
    """An initialised library: valid in one process only. Libraries count their users, so others keep theirs.

    handles: the library's, keyed by the devices' uuids. shut_down: the function that ends a session.
    """

    door: LibraryDoor
    handles: Mapping[str, Any]
    shut_down: str
    pid: int = field(default_factory=os.getpid)
    # Held once the session has ended.
    _ended: Any = field(default_factory=threading.Lock)

    def end(self) -> bool:
        """End the session; return False if it has ended already, or is another process's."""
        if self.pid != os.getpid() or not self._ended.acquire(blocking=False):
            return False
        self.door.ask(self.shut_down)
        return True


Session = TypeVar("Session", bound=LibrarySession)


class Sessions(Generic[Session]):
    """One session after the other, each replaced as a whole.

    So threads need no lock, and a forked child, which must initialise the library for itself, finds no lock held.

    doubted: the last sample lacked figures. trouble: why the library could not be initialised again.
    """

    def __init__(self, first: Session, open_session: Callable[[], Session], retry_s: float) -> None:
        """open_session: raises SourceUnavailableError. retry_s: how long it is not tried again after a failure."""
        self._session: Session | None = first
        self._open_session = open_session
        self._retry_s = retry_s
        self.retry_at = 0.0
        self.doubted = False
        self.trouble: str | None = None

    def usable(self) -> Session | None:
        """Return a session of this process, a new one if that is due; None if the library does not start."""
        old, now = self._session, time.monotonic()
        if old is not None and old.pid == os.getpid():
            if not self.doubted or now < self.retry_at or not old.end():
                return old
        elif old is None and now < self.retry_at:
            return None
        self.retry_at = now + self._retry_s
        try:
            new = self._open_session()
        except SourceUnavailableError as error:
            self._session, self.trouble = None, error.reason
            return None
        other = self._session
        if other is not None and other is not old:
            new.end()  # another thread was faster
            return other
        self._session = new
        return new

    def close(self) -> None:
        """End the session of this process, if there is one; the next `usable` opens another."""
        session, self._session = self._session, None
        self.retry_at = 0.0
        if session is not None:
            session.end()


class ProcessTrust:
    """Keeps track of what a library's lists of processes have shown so far."""

    def __init__(self) -> None:
        # All figures are withheld now; one of ours was seen; the pids are those of another namespace.
        self._withheld = False
        self._shown = False
        self._foreign_pids = False
        # The pids in the last lists that do not exist here.
        self._missing: frozenset[int] = frozenset()

    @property
    def knowledge(self) -> bool | None:
        """See `mpmm.sources.base.process_knowledge`."""
        if self._withheld or self._foreign_pids:
            return False
        return True if self._shown else None

    def note_ours(self) -> None:
        """Note that the lists have shown what one of ours takes."""
        self._shown, self._withheld = True, False
        self._missing, self._foreign_pids = frozenset(), False

    def note_others(self, pids: Collection[int], *, withheld: bool) -> None:
        """Note the lists of a sample that had no figure for any of ours.

        pids: the listed ones. withheld: the lists had no figures at all, or one of ours without its figure.
        """
        self._withheld = withheld
        missing = frozenset(pid for pid in pids if not process_exists(pid))
        # A process that does not exist may have just ended, but not twice in a row.
        if missing & self._missing:
            self._foreign_pids = True
        self._missing = missing

    def as_far_as_trusted(self, samples: Sequence[DeviceSample]) -> tuple[DeviceSample, ...]:
        """Return samples without the claims about processes that cannot be trusted."""
        if self._foreign_pids:
            return tuple(replace(sample, process_mb={}, processes_known=False) for sample in samples)
        if not self._shown:
            return tuple(replace(sample, processes_known=False) for sample in samples)
        return tuple(samples)


def without_figures(devices: Sequence[DeviceInfo], trouble: str | None) -> tuple[DeviceSample, ...]:
    """Return the samples of devices that cannot be read. trouble: why."""
    taken_ns = time.monotonic_ns()
    return tuple(
        DeviceSample(device.index, None, taken_ns, trouble=trouble, done_ns=time.monotonic_ns()) for device in devices
    )
