"""Bounds on what each instance and lease had of a device while a figure of it was taken: at least, and at most."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from row_changes import SECOND_NS, RowChanges
from row_changes import it as it  # the fixture

from mpmm.shared_state.layout import Device, Header, Instance, Member
from mpmm.shared_state.transaction import Transaction, float_bits

# More than all that there is, so that each bound shows.
FIGURE_MB = 8000.0
# How many seconds before now the figure was requested, and had arrived.
TAKEN_S, DONE_S = 20, 10
Made = Callable[[RowChanges], int]
NAMES = ("SINCE", "LOADED_AT", "PROGRAM", "SEATS", "SERVER", "MB", "SHARES")
WORDS = {**{name: getattr(Instance, name) for name in NAMES}, "SHARES_1": Instance.SHARES + 1}


class _Undo(Exception):
    pass


def bounds_of(it: RowChanges, t: Transaction, device: int) -> tuple[float, float]:
    """Return what of a figure is ours at least and at most, by what it leaves to others."""
    at, found = it.tables.device(device), []
    for external in (math.nan, 0.0):
        words = [(Device.EXTERNAL_MB, external), (Device.EXTERNAL_LEAST_MB, external)]
        t.set_all([(at + word, float_bits(mb)) for word, mb in words])
        t.set_all([(at + Device.RETURN_COUNT, 0), (at + Device.SAMPLED, 0)])
        it.to.devices.sample(t, device, FIGURE_MB, it.now - TAKEN_S * SECOND_NS, it.now - DONE_S * SECOND_NS)
        found.append(FIGURE_MB - it.floats[at + Device.EXTERNAL_MB])
    return found[0], found[1]


def measured(it: RowChanges, mb: float = 470.0, instance: int = 2) -> None:
    """Let the source have measured the server of the copy in row 1."""
    it.poke(it.tables.member(3) + Member.MEASURED_MB, mb)
    it.poke(it.tables.member(3) + Member.INSTANCE, instance)


def put(it: RowChanges, row: int, **seconds_ago: float) -> int:
    """Write words of a row: times as seconds before now."""
    for name, value in seconds_ago.items():
        is_time = name in ("SINCE", "LOADED_AT")
        it.poke(it.tables.instance(row) + WORDS[name], it.now - int(value * SECOND_NS) if is_time else value)
    return row


BEFORE, MEANWHILE, JUST_AFTER, AFTER = 30, 15, DONE_S - 1e-6, 5
CASES: list[tuple[str, Made, tuple[float, float]]] = [
    # A copy takes 500 MB, a load reserves 600.
    ("in use", lambda it: put(it, it.active(), LOADED_AT=BEFORE), (500, 500)),
    ("idle", lambda it: put(it, it.idle(), LOADED_AT=BEFORE), (500, 500)),
    ("loaded as it was asked for", lambda it: put(it, it.active(), LOADED_AT=TAKEN_S), (0, 500)),
    ("loaded just before", lambda it: put(it, it.active(), LOADED_AT=TAKEN_S + 1e-6), (500, 500)),
    ("loaded meanwhile", lambda it: put(it, it.active(), LOADED_AT=MEANWHILE), (0, 500)),
    ("loading", lambda it: put(it, it.loading(), SINCE=BEFORE), (0, 600)),
    ("loading since it was there", lambda it: put(it, it.loading(), SINCE=DONE_S), (0, 600)),
    ("loading since just after", lambda it: put(it, it.loading(), SINCE=DONE_S - 1e-6), (0, 0)),
    ("loading on two devices", lambda it: put(it, it.loading(devices=(0, 1)), SINCE=BEFORE), (0, 300)),
    ("on two devices", lambda it: put(it, it.active(devices=(0, 1)), LOADED_AT=BEFORE), (250, 250)),
    ("unloading", lambda it: put(it, it.unloading(), LOADED_AT=BEFORE, SINCE=MEANWHILE), (0, 500)),
    ("unloading since it was there", lambda it: put(it, it.unloading(), LOADED_AT=BEFORE, SINCE=DONE_S), (0, 500)),
    (
        "unloading since just after",
        lambda it: put(it, it.unloading(), LOADED_AT=BEFORE, SINCE=DONE_S - 1e-6),
        (500, 500),
    ),
    ("unloading with seats", lambda it: put(it, it.unloading(), LOADED_AT=BEFORE, SINCE=BEFORE, SEATS=1), (500, 500)),
    ("suspending", lambda it: put(it, it.suspending(), LOADED_AT=BEFORE, SINCE=MEANWHILE), (0, 500)),
    ("suspending since just after", lambda it: put(it, it.suspending(), LOADED_AT=BEFORE, SINCE=AFTER), (500, 500)),
    ("suspended", lambda it: put(it, it.suspended(), LOADED_AT=BEFORE, SINCE=MEANWHILE), (0, 0)),
    ("resuming", lambda it: put(it, it.resuming(), LOADED_AT=BEFORE, SINCE=MEANWHILE), (0, 500)),
    ("resuming since just after", lambda it: put(it, it.resuming(), LOADED_AT=BEFORE, SINCE=AFTER), (0, 0)),
    ("leased", lambda it: it.leased(), (0, 300)),
    ("leased on two devices", lambda it: it.leased(devices=(0, 1)), (0, 150)),
    ("leased to a program", lambda it: put(it, it.leased(), PROGRAM=4711, MB=80.0), (80, 80)),
    (
        "leased to a program on two devices",
        lambda it: put(it, it.leased(devices=(0, 1)), PROGRAM=4711, MB=80.0, SHARES=30.0, SHARES_1=50.0),
        (50, 50),
    ),
]
MEASURED: list[tuple[str, Made, tuple[float, float]]] = [
    ("in use", lambda it: put(it, it.active(server=3), LOADED_AT=MEANWHILE), (470, 470)),
    ("loading", lambda it: put(it, it.loading(), SERVER=4, SINCE=AFTER), (470, 470)),
    ("unloading", lambda it: put(it, it.unloading(server=3), LOADED_AT=BEFORE, SINCE=MEANWHILE), (470, 470)),
    ("suspended before", lambda it: put(it, it.suspended(server=3), SINCE=TAKEN_S), (470, 470)),
    ("suspended meanwhile", lambda it: put(it, it.suspended(server=3), SINCE=TAKEN_S - 1e-6), (0, 470)),
]


def check(it: RowChanges, expected: tuple[float, float], device: int = 1) -> None:
    with pytest.raises(_Undo), it.namespace.transaction() as t:
        assert bounds_of(it, t, device) == pytest.approx(expected)
        raise _Undo


@pytest.mark.parametrize(("make", "bounds"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_figure_says_of_what_is_not_measured_by_itself(
    it: RowChanges, make: Made, bounds: tuple[float, float]
) -> None:
    it.wait(60)
    make(it)
    check(it, bounds)
    # Of a figure that is about processes alone, nothing is ours which is in none of them.
    is_lease = it.tables.instances[1].state == Instance.LEASED
    it.poke(Header.SOURCE_COUNTS_NAMED, 1)
    check(it, bounds if is_lease else (0.0, 0.0))


@pytest.mark.parametrize(("make", "bounds"), [case[1:] for case in MEASURED], ids=[case[0] for case in MEASURED])
def test_a_server_had_what_it_was_measured_to_have(it: RowChanges, make: Made, bounds: tuple[float, float]) -> None:
    it.wait(60)
    row = make(it)
    measured(it)
    check(it, bounds)
    # A process that ends is on no list any more while its memory is torn down.
    it.poke(Header.SOURCE_FREES_LATE, 1)
    going = it.tables.instances[row].state == Instance.UNLOADING
    check(it, (470, 500) if going else bounds)
    if going:
        measured(it, 530.0)
        check(it, (530, 530))


def test_what_is_not_told_of_a_server_is_not_measured(it: RowChanges) -> None:
    it.wait(60)
    put(it, it.active(server=3), LOADED_AT=MEANWHILE)
    measured(it, math.nan)
    check(it, (0, 500))
    measured(it, instance=3)
    check(it, (0, 500))
    measured(it)
    it.poke(Header.SOURCE_MEASURES_PROCESSES, 0)
    check(it, (0, 500))


def test_a_server_on_two_devices_had_its_share_of_each(it: RowChanges) -> None:
    it.wait(60)
    it.active(server=3, devices=(0, 1))
    it.do(lambda t: it.to.measurements.measure(t, 3, {0: 210.0, 1: 320.0}))
    check(it, (210, 210), 0)
    check(it, (320, 320), 1)


def test_a_lease_of_a_program_that_nobody_measures_may_be_used_or_not(it: RowChanges) -> None:
    put(it, it.leased(), PROGRAM=4711, MB=80.0)
    it.poke(Header.SOURCE_MEASURES_PROCESSES, 0)
    check(it, (0, 300))


@pytest.mark.parametrize(
    ("make", "counts_named", "is_sure"),
    [
        (lambda it: it.active(server=3), 0, True),
        (lambda it: it.active(), 0, False),
        (lambda it: it.active(), 1, True),
        (lambda it: put(it, it.leased(), PROGRAM=4711, MB=80.0), 0, True),
        (lambda it: it.leased(), 0, False),
    ],
    ids=["a server", "a copy without one", "a copy outside the figure", "a program", "a lease without one"],
)
def test_what_is_not_ours_is_known_for_sure_where_all_that_is_ours_is_measured_by_itself(
    it: RowChanges, make: Made, counts_named: int, is_sure: bool
) -> None:
    it.wait(60)
    make(it)
    measured(it)
    it.poke(Header.SOURCE_COUNTS_NAMED, counts_named)
    at = it.tables.device(1)
    for word in (Device.EXTERNAL_MB, Device.EXTERNAL_LEAST_MB):
        it.poke(at + word, 0.0)
    it.sample(1, FIGURE_MB)
    external_mb, sure_mb = it.floats[at + Device.EXTERNAL_MB], it.floats[at + Device.EXTERNAL_LEAST_MB]
    assert external_mb > FIGURE_MB / 2
    assert sure_mb == (external_mb if is_sure else 0.0)
