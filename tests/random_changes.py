"""What random operations change, recorded in `recorded_changes.txt`: rows, events, and wake-ups, step by step.

`random_operations` and the operations below make the changes. For each seed and step there is a checksum of all that
the step has changed. After a change of the operations, or an intended one of what a transition changes, run
`PYTHONPATH=tools python tests/random_changes.py` to record the changes again.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from harness import NOBODYS_PID
from random_operations import OPERATIONS as USUAL
from random_operations import end_load, end_resume, end_suspension, fail_suspension, release, resume, take
from random_reads import START_NS, WALL_S, RandomRows
from random_tables import DEVICES, FLAGS, SECOND_NS, SERVERS, WORKERS, RandomTables
from row_changes import when_long

from mpmm.errors import SegmentCorruptError, TableFullError
from mpmm.policy.view import Reason
from mpmm.shared_state.events import Cause
from mpmm.shared_state.futex import wake_all
from mpmm.shared_state.invariants import check_invariants
from mpmm.shared_state.layout import WORD, Event, Header, Instance, Member, Model, Ticket
from mpmm.shared_state.runtime_dir import RUNTIME_DIR_VARIABLE
from mpmm.shared_state.settings import Settings
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.shared_state.transaction import Transaction
from mpmm.shared_state.transitions import Transitions

RECORDED = Path(__file__).parent / "recorded_changes.txt"
SEEDS = range(16)
STEPS = 200
# How many operations are tried in a step, until one of them changes something.
TRIES = 8
LOOK_EVERY = 50
CAUSE = Cause(Reason.CHEAPEST_RELOAD, 1.0, 2.0, 3.0, 4.0, 1, 3)
# Words whose values depend on the process, or on how the lock was taken.
OF_THE_PROCESS = (Header.LOCK_HOLDER, Header.LOCK_TAKEN, Header.CONTENDED, Header.SPIN_LOCK, Header.CHANGE)
# Operations of members that hold, load or resume a copy.
OF_HOLDERS = {
    *("end_load", "end_load_as_twin", "release", "hand_on", "end_resume", "fail_suspension", "turn_back"),
    *("give_up_load", "end_lease"),
}


class RandomChanges:
    """Random rows, and what each step changes of them."""

    def __init__(self, made: RandomTables) -> None:
        self.made = made
        self.tables, self.layout, self.chance = made.tables, made.layout, made.chance
        self.words = made.namespace.segment.words
        self.reset_before: tuple[int, int] | None = None
        # Slots that are dead, but not quite reaped.
        self.dying: list[int] = []
        self.actors = [made.transitions, *map(self._transitions_of, (1, -1))]

    def _transitions_of(self, slot: int) -> Transitions:
        actor = mock.Mock(slot=slot, settings=self.made.namespace.settings)
        actor.name = self.made.namespace.name
        return Transitions(self.tables, actor)

    def step(self) -> tuple[str, str, int]:
        """Make one operation; return its name, what it has changed, and the checksum of that."""
        self.made.now += self.chance.choice([10**6, 10**8, SECOND_NS, 3 * SECOND_NS])
        self.made.transitions = self.chance.choice(self.actors)
        weights = [weight for weight, _ in OPERATIONS]
        # Most operations need rows in certain states, and do nothing without them.
        for _, operation in self.chance.choices(OPERATIONS, weights, k=TRIES):
            before, events, after = self._copied(), self.words[Header.EVENTS], []
            result: Any
            try:
                with self.made.namespace.transaction() as t:
                    if operation.__name__ in OF_HOLDERS:
                        self._consume_answers(t)
                    result = operation(self, t)
                    after += t.after
            except (TableFullError, SegmentCorruptError) as error:
                result = type(error).__name__
            changed = self._changed(before)
            if changed:
                break
        said = [repr(result), *map(self._call, after)]
        checksum = zlib.crc32("\n".join([*said, *map(repr, changed)]).encode())
        count = self.words[Header.EVENTS] - events
        text = "; ".join([*(self._shown(word, value) for word, value in changed), f"{count} events", *said])
        return operation.__name__, text, checksum

    def _consume_answers(self, t: Transaction) -> None:
        """Have all waiters consume their answers, as each does before it uses, loads or resumes what it was given."""
        for ticket in self.tables.used_rows(self.layout.tickets):
            if self.tables.tickets[ticket].state in (Ticket.GRANTED, Ticket.LOAD):
                self.made.transitions.hand_over.consume_answer(t, ticket)

    def _copied(self) -> Any:
        return np.array(self.words[: self.layout.events.end])

    def _changed(self, before: Any) -> list[tuple[int, int]]:
        """Return the words that have other values than before, with their values."""
        now = self._copied()
        places = np.flatnonzero(now != before).tolist()
        return [(place, int(now[place])) for place in places if not self._is_of_the_process(place)]

    def _is_of_the_process(self, word: int) -> bool:
        table = self.layout.events
        of_event = word >= table.base and (word - table.base) % table.words == Event.PID
        return word in OF_THE_PROCESS or of_event

    def _shown(self, word: int, value: int) -> str:
        for table in self.layout.tables:
            if table.base <= word < table.end:
                row, place = divmod(word - table.base, table.words)
                return f"{table.name} {row} word {place}: {value}"
        return f"header word {word}: {value}"

    def _call(self, call: Any) -> str:
        """Return a call that follows the transaction, as text."""
        if not isinstance(call, partial):
            return str(call.__name__)
        if call.func is wake_all:
            return f"wake word {(call.args[0] - self.made.namespace.segment.address) // WORD}"
        return f"log {call.args[0] % call.args[1:]}".replace(self.made.namespace.name, "NAMESPACE")

    # ---- what there is ---------------------------------------------------------------------------------------

    def pick(self, rows: list[int]) -> int | None:
        """Return one of the rows, None if there is none."""
        return self.chance.choice(rows) if rows else None

    def some_ticket(self, *states: int) -> int | None:
        """Return a ticket in one of these states."""
        used = self.tables.used_rows(self.layout.tickets)
        return self.pick([row for row in used if self.tables.tickets[row].state in states])

    def some_user(self) -> int | None:
        """Return a ticket that waits for a copy to use."""
        waiting = self.tables.rows_where(self.layout.tickets, Ticket.STATE, Ticket.WAITING)
        return self.pick([row for row in waiting if not self.words[self.tables.ticket(row) + Ticket.PRELOAD]])

    def copies_for(self, ticket: int, *states: int) -> list[int]:
        """Return the rows in one of these states of the model that a ticket waits for, which its member may use."""
        asked, words = self.tables.ticket(ticket), self.words
        places = {row: self.tables.instance(row) for row in self.tables.used_rows(self.layout.instances)}
        return [
            row
            for row, at in places.items()
            if words[at] in states
            and words[at + Instance.MODEL] == words[asked + Ticket.MODEL]
            and words[at + Instance.OWNER] in (0, words[asked + Ticket.MEMBER])
            and not self.made.namespace.reads.devices.isolated_under(row)
        ]


# ---- hand-overs ----------------------------------------------------------------------------------------------


def grant(it: RandomChanges, t: Transaction) -> Any:
    ticket = it.some_user()
    if ticket is None or not (copies := it.copies_for(ticket, Instance.IDLE)):
        return None
    cause = it.chance.choice([None, CAUSE])
    return it.made.transitions.hand_over.grant(t, ticket, it.chance.choice(copies), cause)


def hand_on(it: RandomChanges, t: Transaction) -> Any:
    ticket = it.some_user()
    if ticket is None:
        return None
    held = it.copies_for(ticket, Instance.ACTIVE)
    may = [row for row in held if not it.words[it.tables.instance(row) + Instance.UNLOAD_ON_RELEASE]]
    row = it.pick([row for row in may if not it.made.transitions.isolation.runs_alone(row)])
    if row is None:
        return None
    return it.made.transitions.hand_over.from_holder(t, ticket, row, CAUSE, used=it.chance.random() < 0.7)


def allow_load(it: RandomChanges, t: Transaction) -> Any:
    ticket, devices = it.some_ticket(Ticket.WAITING), it.made.some_devices()
    if ticket is None or not devices:
        return None
    free = not any(it.tables.on_device(row) for row in range(3) if devices >> row & 1)
    alone, cause = free and it.chance.random() < 0.5, it.chance.choice([None, CAUSE])
    is_lease = it.words[it.tables.model(it.tables.tickets[ticket].model)] == Model.LEASE
    if not is_lease and it.made.has_enough(it.tables.tickets[ticket].model):
        return None
    if it.made.steady() and it.tables.tickets[ticket].steady:
        return None
    return it.made.transitions.hand_over.allow_load(t, ticket, devices, 110.0, alone and not is_lease, cause)


def allow_resume(it: RandomChanges, t: Transaction) -> Any:
    ticket = it.some_ticket(Ticket.WAITING)
    if ticket is None or not (copies := it.copies_for(ticket, Instance.SUSPENDED)):
        return None
    if it.made.has_enough(it.tables.tickets[ticket].model):
        return None
    return it.made.transitions.hand_over.allow_resume(
        t, ticket, it.chance.choice(copies), it.chance.choice([None, CAUSE])
    )


def take_idle(it: RandomChanges, t: Transaction) -> Any:
    idle = it.tables.rows_where(it.layout.instances, Instance.STATE, Instance.IDLE)
    row = it.pick([row for row in idle if not it.made.namespace.reads.devices.isolated_under(row)])
    if row is None:
        return None
    owner = it.words[it.tables.instance(row) + Instance.OWNER]
    return it.made.transitions.holds.take_idle(t, row, owner or it.chance.choice(WORKERS) + 1)


def consume_answer(it: RandomChanges, t: Transaction) -> Any:
    ticket = it.some_ticket(Ticket.GRANTED, Ticket.LOAD, Ticket.REFUSED, Ticket.RESET, Ticket.ENOUGH)
    return None if ticket is None else it.made.transitions.hand_over.consume_answer(t, ticket)


def give_up_waiting(it: RandomChanges, t: Transaction) -> Any:
    ticket = it.pick(it.tables.used_rows(it.layout.tickets))
    return None if ticket is None else it.made.transitions.hand_over.leave_queue(t, ticket)


def tell_no(it: RandomChanges, t: Transaction) -> Any:
    ticket, to = it.made.some_waiter(), it.made.transitions.tickets
    if ticket is None:
        return None
    answers: list[Callable[[], object]] = [
        lambda: to.refuse(t, ticket, it.chance.choice([None, CAUSE])),
        lambda: to.answer_enough(t, ticket),
        lambda: to.warn(t, ticket, "waits in vain"),
    ]
    return it.chance.choice(answers)()


# ---- loads, unloads and suspensions --------------------------------------------------------------------------


def suspend_any(it: RandomChanges, t: Transaction) -> Any:
    row, to = it.made.some_unused(), it.made.transitions
    if row is None or len(it.tables.instances[row].devices) > 1 or to.twins.any_of(row):
        return None
    to.suspensions.note_way(t, row, 1)
    evicted, cause = it.chance.random() < 0.5, it.chance.choice([None, CAUSE])
    return to.suspensions.begin(t, row, it.chance.choice(WORKERS), evicted, cause)


def end_load_as_twin(it: RandomChanges, t: Transaction) -> Any:
    row = it.made.some(Instance.LOADING)
    used, unload = it.tables.used_rows(it.layout.instances), Instance.UNLOAD_ON_RELEASE
    # The server of a lost copy is gone, and its handle leads to nothing.
    there = [one for one in used if it.words[it.tables.instance(one) + unload] != Instance.LOST]
    states = (Instance.ACTIVE, Instance.IDLE, Instance.UNLOADING)
    there = [one for one in there if it.words[it.tables.instance(one)] in states and it.tables.handle_of(one)]
    if row is None or not there or it.words[it.tables.instance(row) + Instance.SERVER]:
        return None
    other = it.chance.choice(there)
    handle, server = it.tables.handle_of(other).encode(), it.words[it.tables.instance(other) + Instance.SERVER]
    return it.made.transitions.loads.end(t, row, handle, 120.0, server, bool(server))


def give_up_load(it: RandomChanges, t: Transaction) -> Any:
    row = it.made.some(Instance.LOADING)
    if row is None or it.made.transitions is it.actors[-1]:
        return None
    to = it.made.transitions.loads
    return it.chance.choice([to.give_up, to.abandon])(t, row)


def begin_load_alone(it: RandomChanges, t: Transaction) -> Any:
    devices = it.made.some_devices()
    if not devices or any(it.tables.on_device(row) for row in range(3) if devices >> row & 1):
        return None
    model = it.made.claim_model(t)
    if it.made.has_enough(model):
        return None
    row = it.made.transitions.loads.begin(t, model, 1, devices, 130.0, True, CAUSE, 7)
    it.made.transitions.isolation.set_baseline(t, row)
    return row


def evict(it: RandomChanges, t: Transaction) -> Any:
    row = it.made.some(Instance.IDLE)
    if row is None:
        return None
    evicted, cause = it.chance.random() < 0.7, it.chance.choice([None, CAUSE])
    return it.made.transitions.unloads.begin(t, row, it.chance.choice(WORKERS), evicted, cause)


def end_unloads(it: RandomChanges, t: Transaction) -> Any:
    row, unloads = it.made.some_unloading(), it.made.transitions.unloads
    if row is None:
        return None
    ends_server = it.made.transitions.twins.unloads_handle(row)
    if it.tables.instances[row].owner is None and it.chance.random() < 0.3:
        unloads.hand_over(t, row, it.chance.choice(WORKERS))
    else:
        unloads.end(t, row)
    return ends_server


def ask_unload_of_any(it: RandomChanges, t: Transaction) -> Any:
    states = (Instance.LOADING, Instance.ACTIVE, Instance.IDLE)
    row = it.made.some(*states, Instance.SUSPENDED, Instance.SUSPENDING, Instance.RESUMING)
    return None if row is None else it.made.transitions.unloads.ask(t, row, it.chance.choice(WORKERS))


def discard(it: RandomChanges, t: Transaction) -> Any:
    row = it.made.some_place(Instance.ACTIVE)
    return None if row is None else it.made.transitions.holds.discard(t, row)


def turn_back(it: RandomChanges, t: Transaction) -> Any:
    row, to = it.made.some(Instance.RESUMING), it.made.transitions.suspensions
    if row is None:
        return None
    return to.turn_back(t, row, 2) if it.chance.random() < 0.5 else to.cancel(t, row)


def go_on_suspending(it: RandomChanges, t: Transaction) -> Any:
    row = it.made.some(Instance.SUSPENDING)
    if row is None or it.tables.instances[row].owner is not None:
        return None
    return it.made.transitions.suspensions.hand_over(t, row, it.chance.choice(WORKERS))


def drop(it: RandomChanges, t: Transaction) -> Any:
    row = it.made.some(Instance.SUSPENDED)
    if row is None:
        return None
    return it.made.transitions.suspensions.drop(t, row, it.chance.choice(WORKERS), it.chance.choice([None, CAUSE]))


def free_seat(it: RandomChanges, t: Transaction) -> Any:
    idle = it.tables.rows_where(it.layout.instances, Instance.STATE, Instance.IDLE)
    row = it.pick([row for row in idle if it.tables.instances[row].seat_of is not None])
    return None if row is None else it.made.transitions.seats.free(t, row)


# ---- members, devices, models and leases ---------------------------------------------------------------------


def die(it: RandomChanges, t: Transaction) -> Any:
    slot = it.pick(it.dying) if it.dying else it.chance.choice([*WORKERS[1:], *SERVERS])
    assert slot is not None
    members = it.made.transitions.members
    end: Callable[..., bool] = it.chance.choice([members.reap, members.reap, members.leave])
    if not when_long(t, lambda: end(t, slot), it.chance.choice([0, 1, 2, 4, 1000])):
        it.dying = [slot]
        return "more to do"
    it.dying = []
    # The others go on to use the slot.
    kind = Member.SERVER if slot in SERVERS else it.chance.choice([Member.WORKER, Member.WORKER, Member.GUEST])
    members.join(t, slot, kind, NOBODYS_PID + slot, it.made.now, b"one of another name"[: it.chance.randrange(20)])
    return "gone"


def empty(it: RandomChanges, t: Transaction) -> Any:
    before = it.reset_before
    to = it.actors[0]
    after = it.chance.choice([0, 1, 3, 8, 1000])
    left: Any = when_long(t, lambda: to.reset(t, before), after)
    it.reset_before = left
    return left


def lead(it: RandomChanges, t: Transaction) -> Any:
    members, chance = it.made.transitions.members, it.chance
    what: list[Callable[[], object]] = [
        lambda: members.lead(t, chance.choice(WORKERS), b"another", chance.choice(FLAGS), chance.random() < 0.3),
        lambda: members.note_poll(t, chance.choice([None, True, False])),
        lambda: members.note_source(t, chance.choice(WORKERS), 2),
        lambda: members.ring(t, chance.choice(WORKERS)),
        lambda: members.set_settings(t, Settings(poll_interval=chance.choice([0.5, 1.0]))),
    ]
    return chance.choice(what)()


def describe(it: RandomChanges, t: Transaction) -> Any:
    devices, chance = it.made.transitions.devices, it.chance
    used = DEVICES if len(it.made.places) > 1 else DEVICES[:1]
    for row in it.tables.used_rows(it.layout.devices):
        if chance.random() < 0.3:
            devices.reset_peaks(t, chance.choice([None, 1 << row]))
        devices.note_try(t, row, it.made.now)
    some = chance.sample(used, chance.randrange(len(used) + 1))
    first = devices.describe(t, some, replace=chance.random() < 0.5, measured=chance.random() < 0.5)
    return first, devices.describe(t, used, measured=chance.random() < 0.5)


def look(it: RandomChanges, t: Transaction) -> Any:
    to, chance, now = it.made.transitions, it.chance, it.made.now
    device = chance.choice(it.tables.used_rows(it.layout.devices))
    asked_ns = now - chance.choice([0, 10**6, SECOND_NS, 5 * SECOND_NS])
    slot = chance.choice(SERVERS)
    figures = {row: chance.choice([0.0, 95.0, 290.0]) for row in it.tables.used_rows(it.layout.devices)}
    if chance.random() < 0.2:
        to.measurements.forget(t, slot)
    else:
        to.measurements.measure(t, slot, figures, chance.choice([None, asked_ns]))
    mb = chance.choice([0.0, 200.0, 700.0, 3000.0])
    contradicted = to.ledgers.is_contradicted(device, mb, asked_ns, now)
    taken = to.devices.sample(t, device, mb, asked_ns, chance.choice([0, now]))
    to.ledgers.expire(t)
    row = it.made.some(Instance.ACTIVE, Instance.IDLE)
    if row is not None and not to.twins.any_of(row) and chance.random() < 0.3:
        to.measurements.set_measured_mb(t, row, 140.0)
    return contradicted, taken, to.devices.is_news(device, asked_ns), to.devices.peak_since(device, asked_ns)


def observe(it: RandomChanges, t: Transaction) -> Any:
    estimates, chance = it.made.transitions.estimates, it.chance
    models = it.tables.model_rows()
    some = chance.sample(models, min(len(models), chance.randrange(3)))
    copies = [(it.words[it.tables.model(row) + Model.GENERATION], chance.choice([1, 2])) for row in some]
    estimates.observe(t, copies, chance.choice([100.0, 300.0]), chance.choice([None, 0, 1]))
    if chance.random() < 0.3:
        estimates.note_solution(t, it.words[Header.OBSERVATIONS_MADE])


def learn(it: RandomChanges, t: Transaction) -> Any:
    to, chance, model = it.made.transitions, it.chance, it.made.claim_model(t)
    mb = chance.choice([50.0, 101.0, 300.0, 700.0])
    what: list[Callable[[], object]] = [
        lambda: to.estimates.estimate(t, model, mb, chance.random() < 0.5, 3.0, chance.random() < 0.5),
        lambda: to.estimates.raise_to(t, model, mb),
        lambda: to.estimates.expect(t, model, mb),
        lambda: to.estimates.record_out_of_memory(t, model, mb, loading=chance.random() < 0.7),
        lambda: to.estimates.record_out_of_memory(t, model),
        lambda: to.models.keep_alive(t, model, chance.randrange(3)),
        lambda: to.models.note_failure(t, model),
        lambda: to.models.forget_failures(t, model),
        lambda: to.models.note_demand(t, model, 2.5, 3, it.made.now),
        lambda: to.models.supersede(t, model, chance.random() < 0.5),
    ]
    return chance.choice(what)()


def pin_or_unpin(it: RandomChanges, t: Transaction) -> Any:
    pins = it.made.transitions.pins
    if it.chance.random() < 0.4 and (used := it.tables.used_rows(it.layout.pins)):
        return pins.unpin(t, it.chance.choice(used))
    model, member = it.made.claim_model(t), it.chance.choice([-1, 1, 2])
    return pins.pin(t, model, member) if it.tables.pin_row(model, member + 1) is None else None


def claim_another(it: RandomChanges, t: Transaction) -> Any:
    tag = f"another {it.chance.randrange(5)}"
    return it.made.transitions.models.claim(t, tag, tag.encode())


def link_program(it: RandomChanges, t: Transaction) -> Any:
    row = it.made.some(Instance.LEASED)
    return None if row is None else it.made.transitions.leases.link_program(t, row, 4321)


def usual(operation: Callable[[RandomTables, Transaction], None]) -> Callable[[RandomChanges, Transaction], Any]:
    """Return one of `random_operations` as an operation of this file."""

    def call(it: RandomChanges, t: Transaction) -> Any:
        return operation(it.made, t)

    call.__name__ = operation.__name__
    return call


# How often each operation is made, in relation to the others.
OPERATIONS: list[tuple[int, Callable[[RandomChanges, Transaction], Any]]] = [
    *((weight, usual(operation)) for weight, operation in USUAL if operation is not take),
    (8, take_idle),
    (12, grant),
    (8, hand_on),
    (6, allow_load),
    (25, allow_resume),
    (5, consume_answer),
    (3, give_up_waiting),
    (3, tell_no),
    (5, end_load_as_twin),
    (3, give_up_load),
    (3, begin_load_alone),
    (14, suspend_any),
    (5, usual(end_suspension)),
    (12, usual(release)),
    (8, usual(end_load)),
    (6, usual(end_resume)),
    (4, usual(resume)),
    (4, usual(fail_suspension)),
    (4, evict),
    (4, end_unloads),
    (3, ask_unload_of_any),
    (1, discard),
    (4, turn_back),
    (2, go_on_suspending),
    (1, drop),
    (1, free_seat),
    (3, die),
    (1, empty),
    (3, lead),
    (2, describe),
    (6, look),
    (3, observe),
    (8, learn),
    (3, pin_or_unpin),
    (2, claim_another),
    (2, link_program),
]


def steps_of(seed: int) -> Iterator[tuple[str, str, int]]:
    """Yield the name, the changes and their checksum of each step of a seed; and at times, what is read of the rows.

    Fail at the end unless all invariants hold.
    """
    made: list[RandomTables] = []
    with (
        mock.patch("time.monotonic_ns", side_effect=lambda: made[0].now if made else START_NS),
        mock.patch("time.time", return_value=WALL_S),
    ):
        made.append(RandomTables(seed))
        with closing(made[0]):
            it, rows = RandomChanges(made[0]), RandomRows(made[0])
            for number in range(STEPS):
                yield it.step()
                if number % LOOK_EVERY == LOOK_EVERY - 1:
                    for question, answer in rows.answers_without_the_scheduler():
                        yield question, answer, zlib.crc32(answer.encode())
            assert check_invariants(read_snapshot(made[0].namespace.name, events=False)) == []


def shown_checksum(checksum: int) -> str:
    """Return the part of a checksum that is recorded."""
    return f"{checksum & 0xFFFF:04x}"


def main() -> None:
    """Record the changes."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {RUNTIME_DIR_VARIABLE: folder}):
        lines = [" ".join(shown_checksum(checksum) for _, _, checksum in steps_of(seed)) for seed in SEEDS]
    RECORDED.write_text("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main()
