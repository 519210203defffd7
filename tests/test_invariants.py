"""The checks find every broken invariant of `layout` that a snapshot shows; all other tests rely on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
from random_tables import RandomTables

from mpmm.policy.fairness import HIGHEST_URGENCY
from mpmm.policy.suspension import Way
from mpmm.shared_state.durations import LONGEST_NS
from mpmm.shared_state.invariants import check_invariants
from mpmm.shared_state.layout import MOST_USERS
from mpmm.shared_state.snapshot import InstanceInfo, Snapshot, read_snapshot
from mpmm.shared_state.transaction import Transaction

# Of a namespace in which models may have any number of copies.
SEED = 7
SERVER = 3
FREE_SLOT, FREE_ROW = 7, 79


def fill(made: RandomTables, t: Transaction) -> None:
    """Bring about each state of an instance and a ticket, once at least."""
    transitions = made.transitions
    models = {tag: transitions.models.claim(t, tag, tag.encode()) for tag in ("m0", "m1", "apart", "asleep", "shared")}
    for model in models.values():
        transitions.estimates.estimate(t, model, 100.0, measured=True, sd_mb=1.0)
        transitions.models.set_users(t, model, 1)
    loaded = {}
    for tag, devices, handle in [
        *[("m0", 1, b"active"), ("m0", 1, b"idle"), ("m0", 1, b"older"), ("m0", 1, b"oldest"), ("m1", 3, b"wide")],
        *[("apart", 4, b""), ("m1", 1, b"goes"), ("asleep", 1, b"s1"), ("asleep", 1, b"s2"), ("asleep", 1, b"s3")],
    ]:
        row = transitions.loads.begin(t, models[tag], 1, devices, 100.0, alone=False)
        transitions.loads.end(t, row, handle, 100.0, 0, False)
        loaded[handle] = row
        if tag == "asleep":
            transitions.suspensions.note_way(t, row, Way.COOPERATIVE)
        if handle != b"active":
            transitions.holds.release(t, row)
    transitions.unloads.begin(t, loaded[b"goes"], 1, evicted=True)
    for handle in (b"s1", b"s2", b"s3"):
        transitions.suspensions.begin(t, loaded[handle], 1, evicted=True)
    for handle in (b"s2", b"s3"):
        transitions.suspensions.end(t, loaded[handle])
    transitions.suspensions.begin_resume(t, loaded[b"s3"], 1)
    transitions.models.set_users(t, models["shared"], 3)
    shared = transitions.loads.begin(t, models["shared"], 1, 1, 100.0, alone=False)
    transitions.loads.end(t, shared, b"shared", 100.0, 0, False)
    loading = transitions.loads.begin(t, models["m1"], 2, 2, 100.0, alone=False)
    transitions.loads.link_server(t, loading, SERVER)
    transitions.isolation.begin_steady(t, loading)
    lease = transitions.leases.claim(t, b"lease", 50.0)
    transitions.leases.begin(t, lease, 0, 1, 50.0)
    transitions.pins.pin(t, models["m0"], 0)
    made.now += 10**9
    tickets = [transitions.tickets.enqueue(t, models["m0"], 2, 1, 100.0, LONGEST_NS) for _ in range(3)]
    transitions.hand_over.grant(t, tickets[1], loaded[b"idle"])
    transitions.hand_over.allow_load(t, tickets[2], 4, 100.0, alone=False)
    transitions.tickets.block(t, tickets[0])
    transitions.tickets.call_up(t, tickets[0])


@pytest.fixture
def whole(runtime_root: Any) -> Snapshot:
    """A snapshot of a namespace in which all is well."""
    made = RandomTables(SEED, devices=3)
    with closing(made), mock.patch("time.monotonic_ns", side_effect=lambda: made.now):
        with made.namespace.transaction() as t:
            fill(made, t)
        snapshot = read_snapshot(made.namespace.name)
    assert check_invariants(snapshot) == []
    states = {one.state for one in snapshot.instances}
    assert {"active", "idle", "loading", "unloading", "leased", "suspending", "suspended", "resuming"} <= states
    assert {one.state for one in snapshot.tickets} == {"waiting", "granted", "load"}
    return snapshot


FIGURES = (
    *("load_s", "hold_s", "mean_interarrival_s", "suspend_s", "resume_s"),
    *("sd_mb", "at_least_mb", "expect_mb"),
)
Break = Callable[[Snapshot], Snapshot]


def header(**changes: Any) -> Break:
    """Change fields of the header; a function is given the old value."""
    return lambda snapshot: _changed(snapshot, changes)


def rows(table: str, which: Callable[[Any], bool] = lambda row: True, **changes: Any) -> Break:
    """Change fields of the first row of a table for which `which` is true; a function is given the old value."""

    def apply(snapshot: Snapshot) -> Snapshot:
        found = list(getattr(snapshot, table))
        at = next(at for at, row in enumerate(found) if which(row))
        found[at] = _changed(found[at], changes)
        return with_rows(snapshot, table, found)

    return apply


def with_rows(snapshot: Snapshot, table: str, found: list[Any]) -> Snapshot:
    """Return a snapshot with other rows in a table."""
    changes: Any = {table: tuple(found)}
    return replace(snapshot, **changes)


def _changed(row: Any, changes: dict[str, Any]) -> Any:
    return replace(row, **{name: to(getattr(row, name)) if callable(to) else to for name, to in changes.items()})


def more(value: Any) -> Any:
    return (value or 0) + 1


def other(table: str, name: str, at: int = 0) -> Break:
    """Give the row behind the one `at` the value that this has in a field."""

    def apply(snapshot: Snapshot) -> Snapshot:
        found = list(getattr(snapshot, table))
        found[at + 1] = replace(found[at + 1], **{name: getattr(found[at], name)})
        return with_rows(snapshot, table, found)

    return apply


def again(table: str) -> Break:
    """Have the first row of a table twice."""
    return lambda snapshot: with_rows(snapshot, table, [*getattr(snapshot, table), getattr(snapshot, table)[0]])


def without(table: str, which: Callable[[Any], bool]) -> Break:
    """Leave rows out."""
    return lambda snapshot: with_rows(snapshot, table, [row for row in getattr(snapshot, table) if not which(row)])


def in_state(*states: str) -> Callable[[Any], bool]:
    return lambda row: str(row.state) in states


def tag(name: str) -> Callable[[Any], bool]:
    return lambda row: str(row.tag) == name


def is_seat(row: InstanceInfo) -> bool:
    return row.seat_of is not None


def is_copy(state: str) -> Callable[[Any], bool]:
    """Tell of a row whether it is that of a copy without seats, in a state."""
    return lambda row: row.state == state and row.seat_of is None and not row.seats


def in_list(row: InstanceInfo) -> bool:
    """Tell of a row whether it is in an idle list."""
    return row.state == "idle" and row.owner is None


def has_seats(row: InstanceInfo) -> bool:
    return row.seats > 0


CASES: list[tuple[str, str, Break]] = [
    ("H1", "odd", header(change=more)),
    ("H2", "waiting", header(waiting=more)),
    ("H2", "active", header(active=more)),
    ("H2", "loading", header(loading=more)),
    ("H3", "isolated", header(isolated_devices=(1,))),
    ("H3", "isolated device", rows("devices", isolated=0)),
    ("H3", "steady", header(steady_devices=())),
    ("H4", "next ticket", header(next_ticket=1)),
    *[
        ("H5", table, header(table_ends=lambda ends, table=table: {**ends, table: ends[table] - 1}))
        for table in ("members", "models", "instances", "tickets", "pins")
    ],
    ("B1", "generation", other("members", "generation")),
    ("M1", "loaded", rows("models", tag("m0"), loaded=more)),
    ("M1", "active", rows("models", tag("m0"), active=more)),
    ("M1", "idle", rows("models", tag("m0"), idle=more)),
    ("M2", "head", rows("models", tag("m0"), idle_head=None)),
    ("M2", "head elsewhere", rows("models", tag("m0"), idle_head=FREE_ROW)),
    ("M2", "previous", rows("instances", lambda row: in_list(row) and row.previous is not None, previous=None)),
    ("M2", "next", rows("instances", lambda row: in_list(row) and row.next is not None, next=None)),
    ("M2", "circle", lambda snapshot: _circle(snapshot)),
    ("M3", "loading", rows("models", tag("m1"), loading=more)),
    ("M3", "unloading", rows("models", tag("m1"), unloading=more)),
    ("M3", "suspended", rows("models", tag("asleep"), suspended=more)),
    ("M3", "waiting", rows("models", tag("m0"), waiting=more)),
    ("M4", "tag", other("models", "tag")),
    ("M5", "pins", rows("models", tag("m0"), pins=more)),
    ("M6", "copies", header(settings=lambda old: replace(old, max_model_copies=1.0))),
    ("M7", "size", rows("models", tag("lease"), estimate_mb=None)),
    ("M7", "twice", without("instances", in_state("leased"))),
    *[
        ("M8", f"{name} {value}", rows("models", tag("m0"), **{name: value}))
        for name in FIGURES
        for value in (-1.0, math.inf)
    ],
    ("M9", "failures", rows("models", tag("m0"), failures=1)),
    ("M9", "failed", rows("models", tag("m0"), failed_ago_s=1.0)),
    ("M10", "seats", rows("models", tag("shared"), seats=more)),
    ("M10", "users", rows("models", tag("shared"), users=MOST_USERS + 1)),
    *[("I1", f"{state} held", rows("instances", is_copy(state), holder=1)) for state in ("idle", "suspended")],
    *[
        ("I1", f"{state} not held", rows("instances", in_state(state), holder=None))
        for state in ("active", "loading", "leased", "unloading", "suspending", "resuming")
    ],
    ("I1", "late", rows("instances", is_copy("idle"), unload_late=True)),
    ("I1", "handed over", rows("instances", is_copy("idle"), handed_over_s=1.0)),
    *[
        ("I1", f"{state} of another owner", rows("instances", in_state(state), owner=0, holder=1))
        for state in ("unloading", "suspending", "resuming")
    ],
    ("I2", "model", rows("instances", model=FREE_ROW)),
    ("I2", "holder", rows("instances", in_state("active"), holder=FREE_SLOT)),
    ("I2", "owner", rows("instances", is_copy("idle"), owner=FREE_SLOT)),
    ("I2", "server", rows("instances", is_copy("idle"), server=FREE_SLOT)),
    *[
        ("I3", f"{state} reserves", rows("instances", is_copy(state), reserved_mb=1.0))
        for state in ("active", "idle", "unloading", "suspending", "suspended")
    ],
    ("I3", "negative", rows("instances", in_state("loading"), reserved_mb=-1.0)),
    ("I3", "unknown", rows("instances", in_state("loading"), reserved_mb=math.nan)),
    ("I3", "lease of nothing", rows("instances", in_state("leased"), reserved_mb=0.0)),
    ("I4", "generation", other("instances", "generation")),
    ("I5", "nowhere", rows("instances", is_copy("active"), shares_mb={})),
    ("I5", "sum", rows("instances", is_copy("active"), mb=more)),
    ("I5", "device", rows("instances", is_copy("active"), shares_mb={5: 100.0})),
    ("I6", "a lease's model", rows("models", tag("lease"), kind="model")),
    ("I6", "a copy's model", rows("models", tag("m0"), kind="lease")),
    ("I6", "owner", rows("instances", in_state("leased"), owner=1)),
    ("I6", "server", rows("instances", in_state("leased"), server=SERVER)),
    ("I7", "twins", rows("instances", is_copy("idle"), handle="active")),
    *[
        ("I8", f"{state} without a way", rows("instances", in_state(state), way=0))
        for state in ("suspending", "suspended", "resuming")
    ],
    ("I8", "device", rows("instances", is_copy("idle"), device_mb=1.0)),
    ("I8", "less than no device", rows("instances", in_state("suspended"), device_mb=-1.0)),
    ("I8", "host", rows("instances", is_copy("idle"), host_mb=1.0)),
    ("I8", "less than no host", rows("instances", in_state("suspended"), host_mb=-1.0)),
    ("I9", "steady", rows("instances", is_copy("idle"), steady=True)),
    ("I9", "two on a device", lambda snapshot: _steady_twice(snapshot)),
    ("I10", "MB", rows("instances", is_seat, mb=1.0)),
    ("I10", "reserved", rows("instances", is_seat, reserved_mb=1.0)),
    ("I10", "server", rows("instances", is_seat, server=SERVER)),
    ("I10", "way", rows("instances", is_seat, way=1)),
    ("I10", "state", rows("instances", is_seat, state="loading")),
    ("I10", "of nothing", rows("instances", is_seat, seat_of=FREE_ROW)),
    ("I10", "of a seat", lambda snapshot: _seat_of_a_seat(snapshot)),
    ("I10", "of what loads", rows("instances", has_seats, state="loading")),
    ("I10", "another model", rows("instances", is_seat, model=0)),
    ("I10", "another owner", rows("instances", is_seat, owner=1)),
    ("I10", "another device", rows("instances", is_seat, shares_mb={1: 0.0})),
    ("I10", "goes alone", rows("instances", is_seat, unload_on_release=True)),
    ("I10", "stays alone", rows("instances", has_seats, unload_on_release=True)),
    ("I10", "count", rows("instances", has_seats, seats=more)),
    ("T1", "number", again("tickets")),
    ("T1", "member", rows("tickets", member=FREE_SLOT)),
    ("T1", "model", rows("tickets", model=FREE_ROW)),
    ("T2", "waits with one", rows("tickets", in_state("waiting"), instance=0)),
    ("T2", "granted nothing", rows("tickets", in_state("granted"), instance=None)),
    ("T2", "loads nothing", rows("tickets", in_state("load"), instance=None)),
    ("T2", "granted what is free", rows("tickets", in_state("granted"), instance=FREE_ROW)),
    ("T2", "of another", rows("tickets", in_state("granted"), member=0)),
    ("T2", "granted a load", rows("tickets", in_state("load"), state="granted")),
    ("T2", "loads what is there", rows("tickets", in_state("granted"), state="load")),
    ("T3", "head", rows("tickets", in_state("waiting"), head_of_line_for_s=1e6)),
    ("T3", "called up", rows("tickets", in_state("waiting"), called_up_ago_s=1e6)),
    *[
        ("T4", f"{steps} steps", rows("tickets", urgency=steps))
        for steps in (HIGHEST_URGENCY + 1, -HIGHEST_URGENCY - 1)
    ],
    ("P1", "model", rows("pins", model=FREE_ROW)),
    ("P1", "lease", lambda snapshot: _pinned_lease(snapshot)),
    ("P1", "member", rows("pins", member=FREE_SLOT)),
    ("P1", "twice", again("pins")),
    *[("D1", f"{-age_s} s ahead", rows("devices", sample_age_s=age_s)) for age_s in (-1.5, -10.0)],
    ("D2", "sum", rows("devices", returning_mb=more)),
    ("D2", "negative", rows("devices", returning_mb=-1.0, returns_mb=(-1.0,))),
    ("D2", "others", rows("devices", unrelated_mb=-1.0)),
    ("D3", "not alone", rows("devices", isolated=0)),
]


def _circle(snapshot: Snapshot) -> Snapshot:
    last = next(row for row in snapshot.instances if in_list(row) and row.previous is not None)
    return rows("instances", lambda row: row is last, next=last.previous)(snapshot)


def _steady_twice(snapshot: Snapshot) -> Snapshot:
    loading = next(row for row in snapshot.instances if row.steady)
    lease = next(row for row in snapshot.instances if row.state == "leased")
    moved = replace(lease, steady=True, shares_mb=dict.fromkeys(loading.shares_mb, 0.0))
    return replace(snapshot, instances=tuple(moved if row is lease else row for row in snapshot.instances))


def _seat_of_a_seat(snapshot: Snapshot) -> Snapshot:
    first, second = [row for row in snapshot.instances if is_seat(row)]
    moved = replace(second, seat_of=first.row)
    return replace(snapshot, instances=tuple(moved if row is second else row for row in snapshot.instances))


def _pinned_lease(snapshot: Snapshot) -> Snapshot:
    lease = next(row for row in snapshot.models if row.kind == "lease")
    return rows("pins", model=lease.row)(snapshot)


@pytest.mark.parametrize(("invariant", "what", "breaks"), CASES, ids=[f"{name} {what}" for name, what, _ in CASES])
def test_what_is_wrong_is_found(whole: Snapshot, invariant: str, what: str, breaks: Break) -> None:
    found = check_invariants(breaks(whole))
    assert invariant in {line.split()[0] for line in found}, found


def test_an_idle_list_that_leads_astray_says_where_to(whole: Snapshot) -> None:
    (astray,) = [
        line for line in check_invariants(rows("models", tag("m0"), idle_head=FREE_ROW)(whole)) if "M2" in line
    ]
    assert astray.endswith(f"the idle list leads to row {FREE_ROW}, not of this model")
    (circle,) = [line for line in check_invariants(_circle(whole)) if "leads to" in line]
    assert circle.endswith(", again")


def test_a_lease_may_have_the_name_of_models_even_of_two(whole: Snapshot) -> None:
    twice = rows("models", tag("m1"), tag="m0")(whole)
    alike = rows("models", tag("lease"), tag="m0")(twice)
    assert len([line for line in check_invariants(alike) if line.startswith("M4")]) == 2


@pytest.mark.parametrize(
    "most",
    [
        rows("models", tag("shared"), users=MOST_USERS),
        *(rows("tickets", urgency=steps) for steps in (HIGHEST_URGENCY, -HIGHEST_URGENCY)),
        rows("tickets", in_state("waiting"), called_up_ago_s=lambda _: 0.0, head_of_line_for_s=0.0, waited_s=0.0),
        rows("devices", sample_age_s=-1.0),
    ],
)
def test_what_is_as_much_as_there_may_be_is_not_too_much(whole: Snapshot, most: Break) -> None:
    assert check_invariants(most(whole)) == []


@pytest.mark.parametrize(("which", "too_many"), [(is_seat, True), (has_seats, False)])
def test_a_copy_is_on_its_way_out_if_its_own_row_says_so_and_not_for_its_seats(
    whole: Snapshot, which: Callable[[Any], bool], too_many: bool
) -> None:
    going = rows("instances", which, unload_on_release=True)(whole)
    none_allowed: Any = mock.Mock(max_model_copies=0)
    found = check_invariants(replace(going, settings=none_allowed))
    assert any(line.startswith("M6 shared") for line in found) is too_many


@pytest.mark.parametrize(("state", "found"), [("idle", 2), ("active", 0)])
def test_seats_of_a_copy_on_its_way_out_are_in_use(whole: Snapshot, state: str, found: int) -> None:
    going = [
        replace(row, unload_on_release=True, state=state if is_seat(row) else row.state) if row.tag == "shared" else row
        for row in whole.instances
    ]
    lines = check_invariants(with_rows(whole, "instances", going))
    assert len([line for line in lines if line.startswith("I10")]) == found


def test_the_deviation_of_an_estimate_that_there_is_not_may_be_anything(whole: Snapshot) -> None:
    assert check_invariants(rows("models", tag("m0"), estimate_mb=None, sd_mb=math.inf)(whole)) == []


def test_there_is_a_case_for_each_invariant() -> None:
    assert {name for name, _, _ in CASES} == {
        *(f"H{number}" for number in range(1, 6)),
        "B1",
        *(f"M{number}" for number in range(1, 11)),
        *(f"I{number}" for number in range(1, 11)),
        *(f"T{number}" for number in range(1, 5)),
        "P1",
        *(f"D{number}" for number in range(1, 4)),
    }
