"""What snapshots, `reads` and `tables` read from random rows, recorded as checksums in `recorded_reads.txt`.

`random_operations` makes the rows. For each question and each seed there is a checksum of all answers. After a change
of the random operations, or an intended one of an answer, run `PYTHONPATH=tools python tests/random_reads.py` to record
the answers again.
"""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from harness import NOBODYS_PID
from random_operations import step
from random_tables import SERVERS, RandomTables

from mpmm.errors import TableFullError
from mpmm.policy.view import Reason
from mpmm.scheduling import Scheduler
from mpmm.shared_state.events import Cause
from mpmm.shared_state.invariants import check_invariants
from mpmm.shared_state.layout import Header, Instance, Member, Ticket
from mpmm.shared_state.runtime_dir import RUNTIME_DIR_VARIABLE
from mpmm.shared_state.snapshot import as_json, read_snapshot
from mpmm.shared_state.transaction import Transaction

RECORDED = Path(__file__).parent / "recorded_reads.txt"
SEEDS = range(10)
# The number of states that are read for each seed, and the operations before each.
LOOKS, STEPS = 6, 25
WALL_S = 1.7e9
START_NS = 10**15
# Fields of a snapshot that depend on the process or the machine.
OF_THE_PROCESS = ("lock", "segment", "namespace", "root", "suspend_budget_mb", "created_wall_s")


class RandomRows:
    """Random rows, and the questions about them."""

    def __init__(self, made: RandomTables) -> None:
        self.made = made
        self.namespace, self.tables, self.layout = self.made.namespace, self.made.tables, self.made.layout
        self.words = self.namespace.segment.words
        self.scheduler = Scheduler(self.namespace)
        with self.namespace.transaction() as t:
            at = self.tables.member(0)
            t.set(at + Member.PID, NOBODYS_PID)
            t.set(at + Member.STARTED_WALL, 1)
            t.set_text(at + Member.NAME, b"ours")

    def answers(self) -> dict[str, str]:
        """Return the current answers, by question."""
        return {name: self._shown(answer) for name, answer in self._answers()}

    def _shown(self, answer: Any) -> str:
        # The pid is the only thing in rows that differs from process to process.
        return repr(answer).replace(f"pid={os.getpid()},", "pid=ours,")

    def answers_without_the_scheduler(self) -> list[tuple[str, str]]:
        """Return the current answers to the questions that only rows can answer, by question."""
        with self.namespace.transaction():
            found = list(self._of_rows())
        return [(name, self._shown(answer)) for name, answer in (*self._of_snapshots(), *found)]

    def _answers(self) -> Iterator[tuple[str, Any]]:
        yield from self._of_snapshots()
        with self.namespace.transaction():
            yield from self._of_rows()
            yield from self._of_views()
            yield from self._of_the_scheduler()
        yield from self._of_changes()

    def _of_rows(self) -> Iterator[tuple[str, Any]]:
        yield from self._of_instances()
        yield from self._of_models()
        yield from self._of_the_queue()
        yield from self._of_members_and_devices()

    def _of_snapshots(self) -> Iterator[tuple[str, Any]]:
        snapshot = read_snapshot(self.namespace.name)
        yield "check_invariants", check_invariants(snapshot)
        found = as_json(snapshot)
        for event in found["events"]:
            event.pop("pid")
        for name, value in found.items():
            if name not in OF_THE_PROCESS:
                yield f"snapshot.{name}", json.dumps(value)

    def _of_instances(self) -> Iterator[tuple[str, Any]]:
        reads, tables, twins = self.namespace.reads.instances, self.tables, self.namespace.transitions.twins
        yield "instances.in_use", list(reads.in_use())
        yield "idle_copies", tables.idle_copies()
        rows = range(self.layout.instances.capacity)
        generations = [self.words[tables.instance(row) + Instance.GENERATION] for row in rows]
        places = [0, 1, 2, 3, 5, 7]
        yield "instances.is_idle", [[reads.is_idle(row, 0, bits) for bits in places] for row in rows]
        yield (
            "instances.is_idle of a generation",
            [[reads.is_idle(row, generation + more) for more in (0, 1)] for row, generation in enumerate(generations)],
        )
        yield (
            "instances.is_held",
            [
                [reads.is_held(row, generation + more, slot) for more in (0, 1) for slot in range(5)]
                for row, generation in enumerate(generations)
            ],
        )
        yield (
            "instances.is_still",
            [[reads.is_still(row, generation + more) for more in (0, 1)] for row, generation in enumerate(generations)],
        )
        of_rows: list[Callable[[int], Any]] = [
            *(reads.is_unused, reads.is_suspended, reads.use, reads.held, reads.named_server, reads.server),
            *(tables.seats_of, tables.copy_of, tables.is_in_use, tables.idle_since, tables.handle_of),
            *(twins.any_of, twins.unloads_handle),
        ]
        for ask in of_rows:
            yield ask.__qualname__, [ask(row) for row in rows]
        used = tables.used_rows(self.layout.instances)
        yield "used_rows", used
        yield "shares_of", [tables.shares_of(row) for row in used]
        yield "runs_alone", [self.namespace.transitions.isolation.runs_alone(row) for row in used]
        yield "isolated_under", [self.namespace.reads.devices.isolated_under(row) for row in used]
        yield "any_of_all", sorted(twins.any_of_all())

    def _of_models(self) -> Iterator[tuple[str, Any]]:
        reads, queue, tables = self.namespace.reads, self.namespace.reads.queue, self.tables
        rows = tables.used_rows(self.layout.models)
        yield "model_rows", tables.model_rows()
        yield "first_idle", [[reads.instances.first_idle(row, bits) for bits in (0, 1, 2, 3, 6)] for row in rows]
        of_rows: list[Callable[[int], Any]] = [
            *(reads.models.figures, reads.models.durations_s, reads.models.size, reads.models.is_sized),
            *(reads.models.is_lease, reads.models.requests, reads.models.in_use, reads.models.copies_serve_everybody),
            *(queue.waits_for, queue.waits_for_others_than, tables.tag_of, tables.shown),
        ]
        for ask in of_rows:
            yield ask.__qualname__, [ask(row) for row in rows]
        tags = [*(tables.tag_of(row) for row in rows), "no such tag"]
        for of_tag in (tables.model_row, tables.shown_for, tables.called, queue.waits_for_tag):
            yield of_tag.__qualname__, [of_tag(tag) for tag in tags]
        yield "pin_row", [[tables.pin_row(row, member) for member in range(5)] for row in rows]
        yield "kept_ns", [tables.kept_ns(row, 7.0) for row in rows]

    def _of_the_queue(self) -> Iterator[tuple[str, Any]]:
        queue, tables = self.namespace.reads.queue, self.tables
        used = tables.used_rows(self.layout.tickets)
        for ask in (queue.anybody_waits, queue.waiting, queue.newest, queue.only_one):
            yield ask.__qualname__, ask()
        yield "queue.views", queue.views(used)
        of_rows: list[Callable[[int], Any]] = [
            *(queue.is_waiting, queue.asker, queue.told, queue.told_at, queue.answer, queue.number, queue.state),
        ]
        for of_row in of_rows:
            yield of_row.__qualname__, [of_row(row) for row in range(self.layout.tickets.capacity)]
        yield "is_still", [[queue.is_still(row, queue.number(row) + more) for more in (0, 1)] for row in range(10)]
        yield "can_use", [[queue.can_use(row, model, bits) for model in range(3) for bits in (1, 2, 3)] for row in used]
        yield "newest_wants", [queue.newest_wants(row) for row in range(self.layout.instances.capacity)]

    def _of_members_and_devices(self) -> Iterator[tuple[str, Any]]:
        tables, reads = self.tables, self.namespace.reads.devices
        yield "used_members", tables.used_members()
        yield "free_members", list(tables.free_members())
        yield "server_shares_mb", [tables.server_shares_mb(slot, span) for slot in SERVERS for span in (1, 2)]
        for ask in (reads.anything_runs_alone, reads.all_isolated, reads.only_whole_devices_are_measured):
            yield ask.__qualname__, ask()
        rows = tables.used_rows(self.layout.devices)
        yield "on_device", [tables.on_device(row) for row in rows]
        yield "device_name", [(tables.device_name(row), tables.device_uuid(row)) for row in rows]
        yield "ledgers", [self.namespace.transitions.ledgers.read(row) for row in rows]

    def _of_views(self) -> Iterator[tuple[str, Any]]:
        can_be_suspended, tables = self.scheduler.suspension.can_be_suspended, self.tables
        copies = [row for row in tables.used_rows(self.layout.instances) if not tables.instances[row].seat_of]
        yield "can_be_suspended", [can_be_suspended(row) for row in copies]
        yield "view", self.scheduler.read_view()
        yield "room", self.scheduler.views.room()

    def _of_the_scheduler(self) -> Iterator[tuple[str, Any]]:
        tables, scheduler, shortcuts = self.tables, self.scheduler, self.scheduler.shortcuts
        instances, tickets = tables.used_rows(self.layout.instances), tables.used_rows(self.layout.tickets)
        models, suspension = tables.used_rows(self.layout.models), scheduler.suspension
        of_models: list[Callable[[int], Any]] = [
            *(shortcuts.known_wait, scheduler.demand.of, scheduler.demand.rate),
            *(scheduler.need_mb, scheduler.expected_mb, scheduler.is_known),
        ]
        for of_model in of_models:
            yield of_model.__qualname__, [of_model(row) for row in models]
        yield "may_know_the_wait", [shortcuts.may_know_the_wait(tables.tag_of(row)) for row in models]
        yield "first_user", [[shortcuts.first_user(row, bits) for bits in (1, 2, 4, 3)] for row in models]
        held = [row for row in instances if tables.instances[row].state == Instance.ACTIVE]
        yield "moves_nobody", [shortcuts.moves_nobody(self.namespace.reads.instances.held(row)) for row in held]
        idle = [row for row in instances if tables.instances[row].state == Instance.IDLE]
        yield "may_take", [shortcuts.may_take(row) for row in idle]
        of_tickets: list[Callable[[int], Any]] = [
            *(scheduler.why, scheduler.expected_wait_s, scheduler.backs_off_for_s, scheduler.called_up_at),
            *(scheduler.is_model_idle, shortcuts.holds_up_nobody),
        ]
        waiting = [row for row in tickets if tables.tickets[row].state == Ticket.WAITING]
        for of_ticket in of_tickets:
            yield of_ticket.__qualname__, [of_ticket(row) for row in waiting]
        yield "expected_waits_s", sorted(scheduler.expected_waits_s(waiting).items())
        yield "isolation_matters", shortcuts.isolation_matters(shortcuts.waiting())
        yield "host", (suspension.budget_mb, suspension.free_mb, suspension.used_mb())
        devices, copies = tables.used_rows(self.layout.devices), scheduler.read_copies()
        yield "device_views", scheduler.device_views(copies)
        yield "used_mb", [(scheduler.used_mb(row, copies), scheduler.limit_mb(row)) for row in devices]
        room = scheduler.room()
        yield "shows_more_room", [scheduler.shows_more_room([mb - less for mb in room]) for less in (0.0, 0.5, 1.5)]
        yield "has_row_for_instance", scheduler.table_rows.has_row_for_instance()

    def _of_changes(self) -> Iterator[tuple[str, Any]]:
        """Yield what the scheduler would change; every change is rolled back."""
        scheduler, tables, reset = self.scheduler, self.tables, self.made.transitions.reset
        held = tables.rows_where(self.layout.instances, Instance.STATE, Instance.ACTIVE)
        waiting = tables.rows_where(self.layout.tickets, Ticket.STATE, Ticket.WAITING)
        changes: dict[str, Callable[[Transaction], Any]] = {
            "advance": lambda t: scheduler.advance(t),
            "count_requests": lambda t: scheduler.count_requests(t),
            "make_room_for_instance": lambda t: scheduler.table_rows.make_room_for_instance(t, waiting[0]),
            "make_room_for_model": lambda t: scheduler.make_room_for_model(t, 1),
            "free_seat": lambda t: scheduler.table_rows.free_seat(t),
            "drop_oldest": lambda t: scheduler.suspension.drop_oldest(t, 1, Cause(Reason.HOST_SHORT)),
            "reset": lambda t: reset(t),
        }
        for name, change in changes.items():
            if waiting or name != "make_room_for_instance":
                yield f"changes of {name}", self._changed_by(change)
        for place, row in enumerate(held[:3]):
            yield f"changes of release {place}", self._changed_by(partial(scheduler.release, instance=row))
            for call_up in (False, True):
                keep = partial(scheduler.keep, instance=row, used=True, call_up=call_up)
                yield f"changes of keep {place} {call_up}", self._changed_by(keep)
        for place, row in enumerate(waiting[:2]):
            yield f"why_not_at_once {place}", self._changed_by(lambda t, row=row: scheduler.why_not_at_once(row))  # type: ignore[misc]  # a default of its own

    def _changed_by(self, change: Callable[[Transaction], Any]) -> tuple[Any, list[tuple[int, int]]]:
        """Return what a change returns, and the words that it changes."""
        end = self.layout.observations.end
        # Generations, and words on which others wait, are never rolled back.
        before = self.words[:end].tolist()
        with self.made.attempt() as t:
            try:
                found = change(t)
            except TableFullError as error:
                found = error.table
            after = self.words[:end].tolist()
            count = self.words[Header.NEXT_GENERATION] - before[Header.NEXT_GENERATION]
        own = {Header.NEXT_GENERATION, Header.LOCK_HOLDER, Header.CHANGE, Header.UNDO_COUNT, Header.CONTENDED}
        changed = [(word, now) for word, (now, was) in enumerate(zip(after, before, strict=True)) if now != was]
        return found, [(count, 0), *((word, now) for word, now in changed if word not in own)]


def answers_of(seed: int) -> dict[str, list[str]]:
    """Return the answers to each question, in one state of the rows after another."""
    found: dict[str, list[str]] = {}
    made: list[RandomTables] = []
    with (
        mock.patch("time.monotonic_ns", side_effect=lambda: made[0].now if made else START_NS),
        mock.patch("time.time", return_value=WALL_S),
    ):
        made.append(RandomTables(seed))
        with closing(made[0]):
            rows = RandomRows(made[0])
            for _ in range(LOOKS):
                for _ in range(STEPS):
                    step(made[0])
                for name, answer in rows.answers().items():
                    found.setdefault(name, []).append(answer)
    return found


def lines_of(seed: int) -> list[str]:
    """Return a line for each question, with a checksum of the answers."""
    return [f"{seed} {zlib.crc32(' '.join(answers).encode()):08x} {name}" for name, answers in answers_of(seed).items()]


def main() -> None:
    """Record the answers."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {RUNTIME_DIR_VARIABLE: folder}):
        RECORDED.write_text("".join(f"{line}\n" for seed in SEEDS for line in lines_of(seed)))


if __name__ == "__main__":
    main()
