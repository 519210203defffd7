"""A namespace in which children die at a chosen store, to check what they leave: see `test_crash_points`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from harness import NOBODYS_PID

from mpmm.policy.suspension import Way
from mpmm.shared_state.invariants import check_invariants
from mpmm.shared_state.layout import Capacities, Event, Header, Member, Ticket
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.segment import Segment
from mpmm.shared_state.settings import Settings
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.shared_state.tables import Tables
from mpmm.shared_state.transaction import Transaction, TransactionLock
from mpmm.shared_state.transitions import Transitions

Operation = Callable[[Transaction, Transitions], object]


SMALL = Capacities(members=6, models=4, instances=6, tickets=6, pins=4, devices=2, observations=3, events=32, undo=4096)


FROZEN_NS = 10**15  # the children's clock: a second run of an operation stores the same times


KILLED = -signal.SIGKILL


class KillAt:
    """Words that kill the process before the n-th store."""

    def __init__(self, words: Any, store: int) -> None:
        self._words = words
        self._left = store

    def __getitem__(self, index: Any) -> Any:
        return self._words[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self._words[index] = value

    def release(self) -> None:
        self._words.release()


class KeepImages:
    """Words that write an image of the segment to a file before each store."""

    def __init__(self, words: Any, segment: Segment, path: Path) -> None:
        self._words = words
        self._segment = segment
        # The file lasts until the process ends.
        self._images = path.open("wb", buffering=0)

    def __getitem__(self, index: Any) -> Any:
        return self._words[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._images.write(self._segment.copy())
        self._words[index] = value

    def release(self) -> None:
        self._words.release()


def images_in(path: Path, size: int) -> list[bytes]:
    """Return the images that `KeepImages` has written: the n-th is from before the n-th store."""
    kept = path.read_bytes()
    # The last image may be incomplete, if the process ended while another thread wrote it.
    return [kept[at : at + size] for at in range(0, len(kept) - size + 1, size)]


def some_of(stores: int) -> set[int]:
    """Return some of the store numbers 1 to `stores`: the first, the middle and the last."""
    return {1, (stores + 1) // 2, stores}


def run_in_child(action: Callable[[], object]) -> int:
    """Run `action` in a forked child; return its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Lab:
    """A namespace whose state can be saved, restored and compared, and in which children die."""

    def __init__(self, name: str, capacities: Capacities = SMALL) -> None:
        self.namespace = Namespace.join(name, capacities=capacities, settings=Settings(memory_return_seconds=0.0))
        self.segment = self.namespace.segment
        self.words = self.segment.words
        self.layout = self.segment.layout
        self.tables = self.namespace.tables
        tickets, members = self.layout.tickets, self.layout.members
        self.wake_words = [
            *range(tickets.base + Ticket.SIGNAL, tickets.end, Ticket.WORDS),
            *range(members.base + Member.BELL, members.end, Member.WORDS),
        ]
        self.do(self._populate)

    def _populate(self, t: Transaction, tr: Transitions) -> None:
        tr.devices.describe(t, [(b"uuid-0", b"gpu 0", 1000.0), (b"uuid-1", b"gpu 1", 1000.0)])
        tr.members.lead(t, 0, b"test", (True, False, False))
        tr.members.join(t, self.victim, Member.WORKER, NOBODYS_PID, 1, b"victim")
        tr.members.join(t, self.server, Member.SERVER, NOBODYS_PID + 1, 2, b"server of a")

    victim = 1
    server = 2

    def do(self, operation: Operation) -> Any:
        """Run an operation in this process."""
        with self.namespace.transaction() as t:
            return operation(t, self.namespace.transitions)

    def model(self, tag: str = "a", known: bool = True) -> int:
        """Make a model row."""
        row: int = self.do(lambda t, tr: tr.models.claim(t, tag, tag.encode()))
        if known:
            self.do(lambda t, tr: tr.estimates.estimate(t, row, 100.0, measured=False))
        return row

    def loading(self, tag: str = "a", alone: bool = False) -> int:
        """Make an instance that the victim loads."""
        model = self.model(tag)
        row: int = self.do(lambda t, tr: tr.loads.begin(t, model, self.victim, 1, 100.0, alone))
        return row

    def active(self, tag: str = "a", handle: bytes = b"h", server: bool = False, alone: bool = False) -> int:
        """Make an instance that the victim holds."""
        row = self.loading(tag, alone)
        if server:
            self.do(lambda t, tr: tr.loads.link_server(t, row, self.server))
        kept = self.server + 1 if server else 0
        self.do(lambda t, tr: tr.loads.end(t, row, handle, 90.0, kept, server))
        return row

    def idle(self, tag: str = "a", handle: bytes = b"h", server: bool = False) -> int:
        """Make an idle instance."""
        row = self.active(tag, handle, server)
        self.do(lambda t, tr: tr.holds.release(t, row))
        return row

    def unloading(self, tag: str = "a") -> int:
        """Make an instance that the victim unloads."""
        row = self.idle(tag)
        self.do(lambda t, tr: tr.unloads.begin(t, row, self.victim, evicted=True))
        return row

    def sleeper(self, tag: str = "a", server: bool = False, handle: bytes = b"h") -> int:
        """Make an idle instance that can be suspended."""
        row = self.idle(tag, handle, server)
        self.do(lambda t, tr: tr.suspensions.note_way(t, row, Way.COOPERATIVE))
        return row

    def suspending(self, tag: str = "a", server: bool = False) -> int:
        """Make an instance that the victim suspends."""
        row = self.sleeper(tag, server)
        self.do(lambda t, tr: tr.suspensions.begin(t, row, self.victim, evicted=True))
        return row

    def suspended(self, tag: str = "a", server: bool = False) -> int:
        """Make a suspended instance."""
        row = self.suspending(tag, server)
        self.do(lambda t, tr: tr.suspensions.end(t, row))
        return row

    def resuming(self, tag: str = "a", server: bool = False) -> int:
        """Make an instance that the victim resumes."""
        row = self.suspended(tag, server)
        self.do(lambda t, tr: tr.suspensions.begin_resume(t, row, self.victim))
        return row

    def _take(self, row: int, t: Transaction, tr: Transitions) -> None:
        tr.holds.take_idle(t, row, self.victim + 1)

    def for_three(self, tag: str = "a") -> None:
        """Let copies of a model that are loaded from now on have three users at a time."""
        model = self.model(tag)
        self.do(lambda t, tr: tr.models.set_users(t, model, 3))

    def shared(self, used: int = 1, **options: Any) -> int:
        """Make a copy for three users; the victim uses `used` of its seats, but not its own row."""
        self.for_three()
        row = self.idle(**options)
        for seat in self.tables.seats_of(row)[:used]:
            self.do(partial(self._take, seat))
        return row

    def ticket(self, tag: str = "a", known: bool = True) -> int:
        """Let the victim wait."""
        model = self.model(tag, known)
        row: int = self.do(lambda t, tr: tr.tickets.enqueue(t, model, self.victim, 1, 100.0, 2**62))
        return row

    def lease_ticket(self) -> int:
        """Let the victim wait for a lease."""
        row: int = self.do(
            lambda t, tr: tr.tickets.enqueue(t, tr.leases.claim(t, b"lease", 70.0), self.victim, 1, 70.0, 2**62)
        )
        return row

    def lease(self) -> int:
        """Make the model row of a lease that the victim waits for."""
        row = self.lease_ticket()
        return int(self.words[self.tables.ticket(row) + Ticket.MODEL])

    def leased(self) -> int:
        """Make a lease that the victim holds."""
        ticket = self.lease_ticket()
        row: int = self.do(lambda t, tr: tr.hand_over.allow_load(t, ticket, 1, 70.0, alone=False))
        self.do(lambda t, tr: tr.hand_over.consume_answer(t, ticket))
        return row

    def without_pids(self, image: bytes) -> bytes:
        """Return an image without what differs between children: the pids of lock holders and of events."""
        copied = bytearray(image)
        words, events = memoryview(copied).cast("Q"), self.layout.events
        locks = Header.LOCK_HOLDER, Header.LOCK_TAKEN, Header.SPIN_LOCK
        for word in (*locks, *range(events.base + Event.PID, events.end, Event.WORDS)):
            words[word] = 0
        return bytes(copied)

    def save(self) -> bytes:
        """Return the whole segment."""
        return self.segment.copy()

    def restore(self, saved: bytes) -> None:
        """Put the segment back."""
        self.words[:] = memoryview(saved).cast("Q")

    def comparable(self) -> bytes:
        """Return the state without the words that are written raw or that no operation promises to restore."""
        copied = bytearray(self.segment.copy())
        words = memoryview(copied).cast("Q")
        raw = (Header.CHANGE, Header.LOCK_HOLDER, Header.LOCK_TAKEN, Header.ROLLBACKS, Header.NEXT_GENERATION)
        for word in (*raw, *self.wake_words):
            words[word] = 0
        for table in (self.layout.undo, self.layout.events):
            copied[8 * table.base : 8 * table.end] = bytes(8 * (table.end - table.base))
        # A rolled-back event may remain in the ring, but the number of events does not count it.
        return bytes(copied)

    def seen_by_sleepers(self) -> list[int]:
        """Return the words on which processes sleep."""
        return [self.words[word] for word in self.wake_words]

    def images(self, operation: Operation | None, path: Path) -> list[bytes]:
        """Run an operation (None: only the recovery) in a child; return an image from before each store."""
        assert self.child(operation, lambda words: KeepImages(words, self.segment, path)) == 0
        return images_in(path, self.layout.size_bytes)

    def killed_at(self, operation: Operation | None, store: int) -> bytes:
        """Run an operation (None: only the recovery) in a child that is killed at a store; return what it leaves."""
        assert self.child(operation, lambda words: KillAt(words, store)) == KILLED
        return self.save()

    def child(self, operation: Operation | None, wrap: Callable[[Any], Any]) -> int:
        """Run an operation (None: only the recovery) in a child whose stores go through `wrap(words)`."""

        def action() -> None:
            time.monotonic_ns = lambda: FROZEN_NS
            lock = TransactionLock(self.segment, 5.0)
            lock.intercept_stores(wrap)
            tables = Tables(self.segment)
            actor = _Actor(self.victim, self.namespace.settings)
            with lock() as t:
                if operation is not None:
                    operation(t, Transitions(tables, actor))

        return run_in_child(action)

    def recover(self) -> None:
        """Take the lock as the next process does, and change nothing."""
        with self.namespace.transaction():
            pass

    def problems(self) -> list[str]:
        """Check the invariants."""
        return check_invariants(read_snapshot(self.namespace.name, events=False))


@dataclass(frozen=True)
class _Actor:
    """A member without a process."""

    slot: int
    settings: Settings
    name: str = "lab"


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    monkeypatch.setenv("MPMM_RUNTIME_DIR", str(tmp_path / "run"))
    lab = Lab("lab")
    yield lab
    lab.namespace.leave()
