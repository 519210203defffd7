"""Leases with a named program, beside a source that lists all processes: what such a program takes counts once.

Nothing is external where the devices have no other memory in use than the programs' own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from random import Random
from typing import Any

import pytest
from harness import NOBODYS_PID, NewManager, in_thread, model_of, problems, wait_until, waiting
from loaders import Loads

from mpmm import ModelManager
from mpmm.errors import AcquireTimeoutError, QueueFullError
from mpmm.model_manager.lease import Lease
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.sources import DeviceInfo, DeviceSample

TOTAL_MB = 10000.0
PROGRAM, CHILD = NOBODYS_PID, NOBODYS_PID + 1


class Lists:
    """Devices that list all processes with memory. The test says which: MB by pid, for each device.

    refused: how many lists of processes it withholds from now on. unread: a device that cannot be read then, too.
    """

    name = "lists"
    measures_processes = True
    frees_late = True
    cheap = True

    def __init__(self, devices: int = 1) -> None:
        self.taken_mb: list[dict[int, float]] = [{} for _ in range(devices)]
        self.others_mb = 0.0
        self.refused = 0
        self.unread: int | None = None

    def devices(self) -> tuple[DeviceInfo, ...]:
        """Return the devices."""
        return tuple(DeviceInfo(i, f"lists-{i}", "made up", TOTAL_MB) for i in range(len(self.taken_mb)))

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Measure."""
        taken_ns, found = time.monotonic_ns(), []
        for index, mb in enumerate(self.taken_mb):
            refused = self.refused > 0 and self.unread in (None, index)
            used_mb = None if refused and self.unread == index else sum(mb.values()) + self.others_mb
            listed = {} if refused else dict(mb)
            found.append(DeviceSample(index, used_mb, taken_ns, listed, not refused, done_ns=time.monotonic_ns()))
        self.refused = max(0, self.refused - 1)
        return tuple(found)

    def close(self) -> None:
        """Nothing is open."""


def manager_on(source: Lists, new_manager: NewManager, **settings: Any) -> ModelManager:
    """Return a manager that measures when the test says so."""
    return new_manager(memory_source=source, poll_interval=3600, **settings)


def leased(manager: ModelManager, mb: float, pid: int = PROGRAM, **where: Any) -> Lease:
    """Return a lease that a program uses."""
    lease = manager.reserve(mb, **where)
    lease.used_by(pid)
    return lease


def poll(manager: ModelManager) -> None:
    """Have a sample taken and published."""
    assert manager._monitor.refresh()


def external_mb(namespace: str) -> list[float]:
    """Return what is in use and not ours, for each device; all that is committed beside it is leased."""
    return [round(device.external_mb or 0.0, 3) for device in read_snapshot(namespace).devices]


def committed_mb(namespace: str) -> list[float]:
    """Return what admission counts as taken, for each device."""
    return [round(device.committed_mb, 3) for device in read_snapshot(namespace).devices]


def expect_refused(manager: ModelManager, mb: float, **where: Any) -> None:
    """Fail unless there is no room for a model."""
    with pytest.raises(QueueFullError):
        manager.acquire_model("big", Loads(), expect_mb=mb, max_waiting=0, **where)


def test_a_lease_whose_program_has_no_memory_at_the_moment_is_not_given_away(
    namespace: str, new_manager: NewManager
) -> None:
    source = Lists()
    manager = manager_on(source, new_manager)
    with leased(manager, 8000):
        for taken in ({PROGRAM: 8000.0}, {}, {CHILD: 0.0}, {PROGRAM: 3000.0}):
            source.taken_mb[0] = taken
            poll(manager)
            assert (external_mb(namespace), committed_mb(namespace)) == ([0], [8000]), taken
        source.taken_mb[0] = {}
        poll(manager)
        expect_refused(manager, 8000)
    assert problems(namespace) == []


def test_a_list_that_may_lack_the_program_of_a_lease_says_nothing_about_it(
    namespace: str, new_manager: NewManager
) -> None:
    source = Lists()
    manager = manager_on(source, new_manager)
    with leased(manager, 8000):
        source.taken_mb[0] = {PROGRAM: 8000.0}
        poll(manager)
        source.refused = 1
        poll(manager)
        assert (external_mb(namespace), committed_mb(namespace)) == ([0], [8000])


def test_what_a_program_takes_on_one_device_leaves_its_lease_on_another(
    namespace: str, new_manager: NewManager
) -> None:
    source = Lists(2)
    manager = manager_on(source, new_manager)
    with leased(manager, 8000, devices=[0]), leased(manager, 8000, devices=[1]):
        for taken in ([{}, {PROGRAM: 8000.0}], [{PROGRAM: 2000.0}, {PROGRAM: 8000.0}], [{PROGRAM: 8000.0}, {}]):
            source.taken_mb = [dict(one) for one in taken]
            poll(manager)
            assert (external_mb(namespace), committed_mb(namespace)) == ([0, 0], [8000, 8000]), taken
            expect_refused(manager, 8000)
    assert problems(namespace) == []


def test_the_program_of_a_lease_on_two_devices_may_fill_one_of_them_first(
    namespace: str, new_manager: NewManager
) -> None:
    source = Lists(2)
    manager = manager_on(source, new_manager)
    with leased(manager, 8000, span=2):
        for first_mb, second_mb in ((0.0, 4000.0), (1000.0, 4000.0), (4000.0, 0.0), (0.0, 0.0)):
            source.taken_mb = [{PROGRAM: first_mb}, {PROGRAM: second_mb}]
            poll(manager)
            assert (external_mb(namespace), committed_mb(namespace)) == ([0, 0], [4000, 4000])
            [lease] = read_snapshot(namespace).instances
            assert (lease.mb, list(lease.shares_mb.values())) == (first_mb + second_mb, [first_mb, second_mb])
        # What it takes of a device beyond its share there belongs to no lease.
        source.taken_mb = [{}, {PROGRAM: 7000.0}]
        poll(manager)
        assert (external_mb(namespace), committed_mb(namespace)) == ([0, 3000], [4000, 7000])
    assert problems(namespace) == []


def test_several_leases_of_one_program_are_filled_one_by_one_on_each_device(
    namespace: str, new_manager: NewManager
) -> None:
    source = Lists(2)
    manager = manager_on(source, new_manager)
    with leased(manager, 3000, devices=[0]), leased(manager, 2000, devices=[1]), leased(manager, 4000, span=2):
        source.taken_mb = [{PROGRAM: 4500.0}, {PROGRAM: 1000.0}]
        poll(manager)
        assert [list(one.shares_mb.values()) for one in read_snapshot(namespace).instances] == [
            [3000],
            [1000],
            [1500, 0],
        ]
        assert (external_mb(namespace), committed_mb(namespace)) == ([0, 0], [5000, 4000])


@pytest.mark.parametrize("late", [True, False], ids=["frees late", "frees at once"])
@pytest.mark.parametrize("loaded", [False, True], ids=["alone", "beside an idle copy"])
def test_what_the_program_of_a_lease_takes_is_given_to_others_once_a_figure_shows_that_it_is_back(
    late: bool, loaded: bool, namespace: str, new_manager: NewManager
) -> None:
    source = Lists()
    source.frees_late = late
    manager = manager_on(source, new_manager)
    if loaded:
        manager.release_model("idle", manager.acquire_model("idle", Loads(), expect_mb=1000))
        source.others_mb = 1000
    lease = leased(manager, 8000)
    source.taken_mb[0] = {PROGRAM: 8000.0}
    poll(manager)
    thread, got = in_thread(lambda: manager.acquire_model("big", Loads(), expect_mb=8000))
    wait_until(lambda: waiting(namespace, "big"), "the model waits for the lease to end")
    lease.release()
    assert waiting(namespace, "big"), "the program has its memory yet"
    assert committed_mb(namespace)[0] >= 8000
    poll(manager)
    assert waiting(namespace, "big"), "the program has its memory yet"
    source.taken_mb[0] = {}
    poll(manager)
    thread.join()
    manager.release_model("big", got[0])
    assert len(read_snapshot(namespace).instances) == 1 + loaded, "nothing had to be unloaded for it"
    assert problems(namespace) == []


def test_a_lease_whose_program_has_no_memory_leaves_room_at_once(namespace: str, new_manager: NewManager) -> None:
    source = Lists()
    manager = manager_on(source, new_manager)
    lease = leased(manager, 8000)
    poll(manager)
    lease.release()
    assert committed_mb(namespace) == [0]


@pytest.mark.parametrize("seed", range(5))
def test_what_is_external_or_awaited_is_the_figure_less_what_the_programs_of_leases_take(
    seed: int, namespace: str, new_manager: NewManager
) -> None:
    source, chance = Lists(2), Random(seed)
    manager = manager_on(source, new_manager)
    held: list[Lease] = []
    for step in range(40):
        if chance.random() < 0.3 and held:
            held.pop(chance.randrange(len(held))).release()
        elif chance.random() < 0.5:
            where: Any = chance.choice([{"devices": [0]}, {"devices": [1]}, {"span": 2}])
            pid, mb = PROGRAM + chance.randrange(3), chance.choice([1000, 3000, 8000])
            with suppress(AcquireTimeoutError):
                held.append(leased(manager, mb, pid, timeout_seconds=0, **where))
        # Some live on after their lease, and some take more than they have leased.
        for taken in source.taken_mb:
            pid, mb = PROGRAM + chance.randrange(3), chance.choice([0, 500, 2500, 3300])
            taken.pop(pid, None)
            taken.update({pid: mb} if mb else {})
        poll(manager)
        snapshot = read_snapshot(namespace)
        for device, taken in zip(snapshot.devices, source.taken_mb, strict=True):
            rest_mb = sum(taken.values()) - sum(one.shares_mb.get(device.row, 0.0) for one in snapshot.instances)
            external_mb, returning_mb = device.external_mb, device.returning_mb
            assert external_mb is not None and external_mb >= 0, step
            # What an ended lease's program has yet to give back is either awaited or external.
            assert external_mb + returning_mb >= rest_mb, step
            assert returning_mb or external_mb == rest_mb, step
    assert problems(namespace) == []


# ---- what an object takes of this process ------------------------------------------------------------------------


class Grows:
    """A loader of an object that takes memory in this process."""

    def __init__(self, source: Lists, mb: float, index: int = 0) -> None:
        self._source, self._mb, self._index = source, mb, index

    def __call__(self) -> object:
        """Load, while the source answers again."""
        taken_mb, self._source.refused = self._source.taken_mb[self._index], 0
        taken_mb[os.getpid()] = taken_mb.get(os.getpid(), 0.0) + self._mb
        return self


@pytest.mark.parametrize(
    ("unread", "refused"), [(None, 1000), (0, 1000), (None, 0)], ids=["no list", "a device without figures", "all"]
)
def test_what_a_process_had_before_a_load_is_learnt_as_the_model_never(
    unread: int | None, refused: int, namespace: str, new_manager: NewManager
) -> None:
    source = Lists(2)
    manager = manager_on(source, new_manager, default_estimate_mb=3000)
    manager.acquire_model("a", Grows(source, 4000), devices=[0])
    # So that there are figures of the other device, too.
    source.taken_mb[1][PROGRAM] = 10.0
    source.refused, source.unread = refused, unread
    manager.acquire_model("b", Grows(source, 2000, 1), devices=[1])
    found = model_of(namespace, "b")
    if refused:
        assert not found.measured and found.estimate_mb in (None, 0, 3000), "its size is not known"
    else:
        assert (found.estimate_mb, found.measured) == (2000, True)


def test_a_process_that_is_on_no_complete_list_had_nothing(namespace: str, new_manager: NewManager) -> None:
    source = Lists()
    manager = manager_on(source, new_manager, default_estimate_mb=3000)
    source.taken_mb[0][PROGRAM] = 10.0
    poll(manager)
    manager.acquire_model("a", Grows(source, 2000))
    assert (model_of(namespace, "a").estimate_mb, model_of(namespace, "a").measured) == (2000, True)
