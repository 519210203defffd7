"""Requests that could be served on one device do not wait for another one: real managers, and sizes that are given."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from device import BookedDevices
from harness import NewManager, copies_of, in_thread, wait_until, waiting
from loaders import Loads
from patience import DEADLINE_S

from mpmm import AcquireTimeoutError, ModelManager, ModelTooLargeError, MpmmError
from mpmm.observability.formatting import whys
from mpmm.policy.view import Reason
from mpmm.shared_state.snapshot import read_snapshot

HANDLES = Loads()


class Sleeps:
    """An object that can be suspended."""

    def sleep(self, level: int = 1) -> None:
        """Do nothing."""

    def wake_up(self) -> None:
        """Do nothing."""


class Requests:
    """Requests of threads, each of which keeps its copy until `over`."""

    def __init__(self, namespace: str, manager: ModelManager) -> None:
        self.over = threading.Event()
        self.threads: list[threading.Thread] = []
        self._namespace = namespace
        self.manager = manager

    def make(self, tag: str, mb: float | None = None, loader: Callable[[], Any] = HANDLES, **wishes: Any) -> list[Any]:
        """Have a thread acquire a copy; return a list in which True, or the exception, appears."""
        outcome: list[Any] = []

        def use() -> None:
            try:
                with self.manager.model(tag, loader, expect_mb=mb, **wishes):
                    outcome.append(True)
                    self.over.wait(3 * DEADLINE_S)
            except MpmmError as error:
                outcome.append(error)

        thread = threading.Thread(target=use)
        thread.start()
        self.threads.append(thread)
        return outcome

    def hold(self, tag: str, mb: float | None = None, loader: Callable[[], Any] = HANDLES, **wishes: Any) -> None:
        """Have a thread hold a copy."""
        outcome = self.make(tag, mb, loader, **wishes)
        wait_until(lambda: outcome, f"{tag} is held")
        assert outcome == [True]

    def wait(self, tag: str, mb: float | None = None, **wishes: Any) -> None:
        """Have a thread wait for a copy."""
        self.make(tag, mb, **wishes)
        wait_until(lambda: waiting(self._namespace, tag), f"{tag} waits")

    def loads_on(self, device: int, tag: str, mb: float | None = None, **wishes: Any) -> None:
        """Have a thread acquire a copy, and check that one has been loaded for it on this device."""
        self.hold(tag, mb, **wishes)
        assert device in [copy.device for copy in copies_of(self._namespace, tag)]


@pytest.fixture
def requests(namespace: str, new_manager: NewManager) -> Iterator[Requests]:
    """Makes requests for two devices of 1000 MB; those that still wait are served at the end, or give up."""
    made = Requests(
        namespace, new_manager(memory_source=BookedDevices(1000, 1000), wait_timeout_seconds=3 * DEADLINE_S)
    )
    yield made
    made.over.set()
    for thread in made.threads:
        thread.join()


def test_a_suspended_copy_whose_room_is_in_use_leaves_a_request_to_another_device(
    requests: Requests, namespace: str
) -> None:
    with requests.manager.model("a", Sleeps, expect_mb=800, devices=[0]):
        pass
    assert requests.manager.suspend("a") == 1
    requests.hold("x", 800, devices=[0])
    requests.loads_on(1, "a", loader=Sleeps)
    assert sorted(copy.state for copy in copies_of(namespace, "a")) == ["active", "suspended"]


def test_a_copy_elsewhere_does_not_have_a_request_wait_behind_one_for_another_device(requests: Requests) -> None:
    requests.hold("a", 800, devices=[0])
    requests.wait("c", 800, devices=[0])
    requests.loads_on(1, "a", devices=[1])


def test_a_request_for_one_device_does_not_hold_up_one_for_any(requests: Requests) -> None:
    requests.hold("x", 800, devices=[0])
    requests.wait("c", 800, devices=[0])
    requests.wait("a", 500, devices=[0])
    requests.loads_on(1, "a")


@pytest.mark.parametrize("devices", [None, [0]])
def test_a_model_that_never_fits_is_refused_at_once_behind_a_request_that_waits(
    requests: Requests, devices: list[int] | None
) -> None:
    requests.hold("x", 800, devices=[0])
    requests.wait("c", 800, devices=[0])
    outcome = requests.make("huge", 5000, devices=devices)
    wait_until(lambda: outcome, "it is refused")
    assert isinstance(outcome[0], ModelTooLargeError)


def test_no_copy_makes_way_for_one_that_never_fits(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(memory_source=BookedDevices(1000, 400), max_model_copies=1)
    assert manager.preload("a", HANDLES, expect_mb=800) == 1
    with pytest.raises(ModelTooLargeError):
        manager.acquire_model("a", HANDLES, devices=[1])
    assert len(copies_of(namespace, "a")) == 1


def test_one_that_a_pinned_copy_would_have_to_make_way_for_is_told_so(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(memory_source=BookedDevices(1000, 1000), max_model_copies=1)
    assert manager.preload("a", HANDLES, expect_mb=800, devices=[0]) == 1
    manager.pin("a")
    thread, outcome = in_thread(lambda: manager.acquire_model("a", HANDLES, devices=[1]))
    wait_until(lambda: waiting(namespace, "a") or outcome, "it waits")
    snapshot = read_snapshot(namespace)
    [ticket] = snapshot.tickets
    said = "waits: max_model_copies allows no more copies of a, and those that it cannot use are pinned"
    assert whys(snapshot)(ticket) == said
    manager.unpin("a")
    thread.join()
    manager.release_model("a", outcome[0])
    assert [copy.device for copy in copies_of(namespace, "a")] == [1]


def test_one_that_only_a_device_where_something_starts_could_take_waits_for_that_and_not_for_a_lease(
    requests: Requests, namespace: str
) -> None:
    with (
        requests.manager.reserve(500, devices=[0], steady=True) as lease,
        requests.manager.reserve(600, name="other", devices=[1]),
    ):
        outcome = requests.make("a", 450)
        wait_until(lambda: waiting(namespace, "a") or outcome, "it waits")
        assert outcome == []
        assert [Reason(one.reason) for one in waiting(namespace, "a")] == [Reason.QUIET]
        lease.settled()
        wait_until(lambda: outcome, "it is served")
        assert outcome == [True]


def test_an_outranked_request_is_told_which_one_it_waits_behind_now(
    requests: Requests, namespace: str, new_manager: NewManager
) -> None:
    brief = new_manager(wait_timeout_seconds=0.5)
    requests.hold("x", 900, devices=[0])
    requests.wait("a", 500, devices=[0])
    urgent, outcome = in_thread(lambda: brief.acquire_model("b", HANDLES, expect_mb=600, devices=[0], priority=5))
    requests.wait("c", 600, devices=[0], priority=4)
    urgent.join()
    assert isinstance(outcome[0], AcquireTimeoutError)
    [ticket] = waiting(namespace, "a")
    assert (Reason(ticket.reason), ticket.other) == (Reason.OUTRANKED, "c")
