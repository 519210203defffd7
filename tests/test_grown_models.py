"""Models that have once grown beyond the limit: they are loaded again wherever they could have done so before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from device import SimulatedDevice
from devices.simulated_gpu import SimulatedGpus
from harness import (
    NewDevice,
    NewGpus,
    NewManager,
    NewProcess,
    Seat,
    acquire,
    copies_of,
    learn,
    model_of,
    problems,
    release,
    wait_until,
    waiting,
)
from loaders import LoadsObject, LoadsServer, MakesServed, served
from policy_views import A, device, in_use, model, ticket, view

from mpmm import ModelManager, ModelTooLargeError
from mpmm.observability.formatting import needs
from mpmm.policy.plan import make_plan
from mpmm.policy.view import DeviceView, Load, Refuse, Resume, SuspendedInstance, Wait
from mpmm.shared_state.snapshot import read_snapshot

# The limit of 900 MB is what the default slack leaves of a device of 1 000 MB.
SETTINGS: dict[str, Any] = {"memory_source": "nvml", "slack_percentage": 0.1, "poll_interval": 0.05}


def server(gpus: SimulatedGpus, tag: str, mb: float) -> LoadsServer:
    return LoadsServer(tag, MakesServed(cast(Any, gpus), mb))


def grow(seat: Seat, gpus: SimulatedGpus, tag: str, by_mb: float) -> None:
    """Load a model of 300 MB, have it grow while it is used, and unload it."""
    manager: ModelManager = seat.manager
    with manager.model(tag, server(gpus, tag, 300)) as handle:
        served(handle).grow(by_mb)
        assert manager._monitor.refresh()
    manager.unload(tag)
    wait_until(lambda: gpus.used_mb(0) < 300, "its memory is back")


def test_a_model_that_has_grown_past_the_limit_is_loaded_again(
    namespace: str, new_manager: NewManager, new_gpus: NewGpus
) -> None:
    gpus = new_gpus(1000)
    manager = new_manager(**SETTINGS)
    grow(Seat(manager), gpus, "a", 650)
    assert model_of(namespace, "a").estimate_mb == 950, "what it took is recorded as it was"
    with manager.model("a", server(gpus, "a", 300)):
        [begun] = [event for event in read_snapshot(namespace).events if event.kind == "load_began"][1:]
        assert begun.value == 900, "the limit is reserved"
    assert problems(namespace) == []


def test_it_is_in_a_later_run_and_under_another_limit(
    new_manager: NewManager, new_gpus: NewGpus, tmp_path: Path
) -> None:
    gpus, file = new_gpus(1000), tmp_path / "estimates.json"
    first = new_manager(**SETTINGS, estimates_path=file)
    grow(Seat(first), gpus, "a", 550)
    first.shutdown()
    later = new_manager(**{**SETTINGS, "namespace": "later", "slack_percentage": 0.2}, estimates_path=file)
    found: list[float | None] = []

    def load() -> Any:
        # Once it is loaded, samples that show 300 MB lower the estimate.
        found.append(model_of("later", "a").estimate_mb)
        return server(gpus, "a", 300)()

    with later.model("a", load):
        assert found == [850]
    later.shutdown()


@pytest.fixture(name="whole")
def _whole(new_device: NewDevice) -> SimulatedDevice:
    """A device of which only the memory in use as a whole is measured."""
    return new_device(1000)


def grow_alone(seat: Seat, whole: SimulatedDevice, tag: str, by_mb: float) -> None:
    """Load an unknown model of 300 MB, alone, have it grow while it is used, and unload it."""
    with seat.manager.model(tag, LoadsObject(tag, device=whole, mb=300)):
        grown = whole.allocate(by_mb)
    whole.free(grown)
    seat.manager.unload(tag)
    wait_until(lambda: whole.used_mb() == 0, "its memory is back")


WHOLE: dict[str, Any] = {"slack_percentage": 0.1, "poll_interval": 0.05, "wait_timeout_seconds": 20.0}


def test_one_that_grew_while_it_ran_alone_is_loaded_again(
    namespace: str, new_manager: NewManager, whole: SimulatedDevice
) -> None:
    manager = new_manager(memory_source=whole, **WHOLE)
    grow_alone(Seat(manager), whole, "a", 650)
    assert (model_of(namespace, "a").estimate_mb, model_of(namespace, "a").measured) == (950, False)
    with manager.model("a", LoadsObject("a", device=whole, mb=300)):
        [copy] = copies_of(namespace, "a")
        assert copy.mb == 900, "the limit is reserved"
    assert problems(namespace) == []


def test_one_of_which_more_than_the_limit_was_inferred_from_several_readings_is_loaded_again(
    namespace: str, new_manager: NewManager, whole: SimulatedDevice
) -> None:
    manager = new_manager(memory_source=whole, **WHOLE)
    observe(manager, "never loaded")
    with pytest.raises(ModelTooLargeError, match="needs 950 MB"):
        manager.acquire_model("never loaded", LoadsObject("b"))
    # It does not run alone, because its users say what it takes.
    with manager.model("a", LoadsObject("a", device=whole, mb=950), expect_mb=300):
        pass
    manager.unload("a")
    observe(manager, "a")
    assert model_of(namespace, "a").estimate_mb == pytest.approx(950)
    with manager.model("a", LoadsObject("a", device=whole, mb=300)):
        pass
    assert problems(namespace) == []


def observe(manager: ModelManager, tag: str) -> None:
    """Add readings from which 950 MB follow for a model."""
    for copies in (1, 2, 3):
        for _ in range(5):
            manager._estimator.add_observation({tag: copies}, 950 * copies)


@pytest.mark.parametrize(("span", "mb", "expected"), [(1, 950, None), (1, 850, 850), (2, 1750, 1750), (2, 1900, None)])
def test_what_was_inferred_in_an_earlier_run_has_no_model_refused(
    new_manager: NewManager, new_device: NewDevice, tmp_path: Path, span: int, mb: float, expected: float | None
) -> None:
    source, file = new_device(1000, 1000), tmp_path / "estimates.json"
    first = new_manager(memory_source=source, **WHOLE, estimates_path=file)
    learn(Seat(first), a=mb)
    first.shutdown()
    later = new_manager(memory_source=source, **{**WHOLE, "namespace": "later"}, estimates_path=file)
    found: list[float | None] = []

    def load() -> Any:
        found.append(model_of("later", "a").estimate_mb)
        return LoadsObject("a")()

    with later.model("a", load, span=span):
        assert found == [expected]
    later.shutdown()


def test_it_waits_for_all_that_the_device_can_give_and_says_so(
    namespace: str, new_process: NewProcess, new_gpus: NewGpus
) -> None:
    gpus = new_gpus(1000, reserved_mb=50)
    first, second = (new_process(**SETTINGS, wait_timeout_seconds=60.0) for _ in range(2))
    first.call(grow, gpus, "a", 620)
    second.call(learn, b=300)
    second.call(acquire, "b", server(gpus, "b", 300))
    first.send(acquire, "a", server(gpus, "a", 300))
    wait_until(lambda: waiting(namespace, "a"), "there is no room beside the other one")
    snapshot = read_snapshot(namespace)
    [ticket] = [ticket for ticket in snapshot.tickets if ticket.tag == "a"]
    assert needs(snapshot)(ticket) == 900
    second.call(release)
    first.result()
    assert copies_of(namespace, "b") == []
    assert problems(namespace) == []


def test_what_users_say_that_it_takes_is_refused_where_it_does_not_fit(
    namespace: str, new_manager: NewManager, new_gpus: NewGpus
) -> None:
    gpus = new_gpus(1000)
    manager = new_manager(**SETTINGS)
    with pytest.raises(ModelTooLargeError, match="needs 950 MB"):
        manager.acquire_model("a", server(gpus, "a", 300), expect_mb=950)
    learn(Seat(manager), b=950)
    with pytest.raises(ModelTooLargeError, match="needs 950 MB"):
        manager.acquire_model("b", server(gpus, "b", 300))
    assert problems(namespace) == []


# ---- the plan: limits are 90 % of each device ------------------------------------------------------------------------

SMALL, LARGE = device(0), device(1, 2000.0)


@pytest.mark.parametrize(
    ("devices", "need_mb", "span", "loadable_on", "expected"),
    [
        ([SMALL], 950.0, 1, (), Load(1, (0,), 900.0, False)),
        ([SMALL], 5000.0, 1, (), Load(1, (0,), 900.0, False)),
        ([SMALL], 850.0, 1, (), Load(1, (0,), 850.0, False)),
        # It is loaded where it may be, and takes all of the limit there; the other device is not the measure.
        ([SMALL, LARGE], 950.0, 1, (), Load(1, (1,), 950.0, False)),
        ([SMALL, LARGE], 950.0, 1, (0,), Load(1, (0,), 900.0, False)),
        ([SMALL, LARGE], 1900.0, 1, (), Load(1, (1,), 1800.0, False)),
        # Over several devices, the smallest of them limits the share of each.
        ([SMALL, LARGE], 1900.0, 2, (), Load(1, (1, 0), 1800.0, False)),
        *(
            (
                [device(row, total) for row in range(span)],
                1e6,
                span,
                (),
                Load(1, tuple(range(span)), 0.9 * total * span, False),
            )
            for span, total in ((3, 1000.1), (5, 81559.0), (6, 24576.3), (7, 40959.7))
        ),
    ],
)
def test_a_measured_estimate_above_the_limit_counts_as_the_limit(
    devices: list[DeviceView], need_mb: float, span: int, loadable_on: tuple[int, ...], expected: Load
) -> None:
    asks = replace(ticket(1, A), span=span, loadable_on=loadable_on, usable_on=loadable_on)
    grown = replace(model(A, need_mb), fitted=True)
    assert make_plan(view([grown], [asks], devices=devices)).decisions == (expected,)
    stated = make_plan(view([model(A, need_mb)], [asks], devices=devices)).decisions
    assert stated == (expected if expected.need_mb == need_mb else Refuse(1),)


def test_a_second_copy_waits_until_the_first_is_given_back() -> None:
    grown = replace(model(A, 950, owned={2: 1}), fitted=True)
    there = view([grown], [ticket(1, A)], devices=[device(used=950)], busy=(in_use(5, A, 950, 1.0),))
    [decision] = make_plan(there).decisions
    assert isinstance(decision, Wait) and decision.why.need_mb == 900


def test_a_copy_that_was_suspended_after_it_had_grown_is_resumed() -> None:
    grown = replace(model(A, 950), fitted=True)
    away = (SuspendedInstance(7, A, 0, 950.0, since_s=1.0, resume_s=0.1),)
    [decision] = make_plan(replace(view([grown], [ticket(1, A)]), suspended=away)).decisions
    assert decision == Resume(1, 7)
