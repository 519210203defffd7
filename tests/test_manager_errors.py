"""The manager: models that do not fit, wrong releases, failing loaders, and full tables."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from harness import (
    NewDevice,
    NewGate,
    NewManager,
    NewProcess,
    acquire,
    attach,
    copies_of,
    know,
    model_of,
    problems,
    release,
    shut_down,
    wait_until,
    waiting,
)
from loaders import LoadFails, Loads, LoadsObject, Weights

from mpmm.errors import (
    AcquireTimeoutError,
    InvalidArgumentError,
    ModelTooLargeError,
    NotAcquiredError,
    TableFullError,
)
from mpmm.model_manager import ModelManager
from mpmm.shared_state.layout import Capacities
from mpmm.shared_state.snapshot import read_snapshot

# ---- models that cannot be had -----------------------------------------------------------------------------


def test_a_model_larger_than_the_limit_is_refused_at_once(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(slack_percentage=0.1)
    know(manager, huge=901)
    held = manager.acquire_model("small", Loads())
    with pytest.raises(ModelTooLargeError, match="'huge' needs 901 MB, and the limit of 'booked' is 900 MB") as caught:
        manager.acquire_model("huge", LoadFails("not to be called"))
    error = caught.value
    assert (error.tag, error.need_mb, error.limit_mb, error.device) == ("huge", 901, 900, "booked")
    assert isinstance(error, MemoryError)
    assert waiting(namespace) == []
    manager.release_model("small", held)
    assert problems(namespace) == []


def test_the_limit_is_that_of_the_roomiest_device(new_manager: NewManager, new_device: NewDevice) -> None:
    device = new_device(500, 1000)
    manager = new_manager(memory_source=device)
    know(manager, fits=1000, huge=1001)
    with pytest.raises(ModelTooLargeError, match="device 1"):
        manager.acquire_model("huge", LoadFails("not to be called"))
    with manager.model("fits", LoadsObject("fits", device=device, mb=1000, index=1)):
        assert device.used_mb(1) == 1000


def test_two_gpus_in_the_answer_of_nvidia_smi_are_two_devices(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {
        "memory.total": "1000\n2000\n",
        "uuid,memory.free": "GPU-a, 900\nGPU-b, 1500\n",
        "uuid,name": "GPU-a, Small\nGPU-b, Big\n",
    }

    def nvidia_smi(command: list[str], **_: Any) -> str:
        return answers[command[1].removeprefix("--query-gpu=")]

    monkeypatch.setattr("subprocess.check_output", nvidia_smi)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    manager = new_manager(memory_source="nvidia-smi")
    devices = read_snapshot(namespace).devices
    assert [(d.uuid, d.total_mb, d.used_mb) for d in devices] == [("GPU-a", 1000, 100), ("GPU-b", 2000, 500)]
    assert manager._monitor.get_stats() == (600, 600, 3000)
    know(manager, small=800, big=1500)
    with manager.model("big", Loads("big")), manager.model("small", Loads("small")):
        assert {copy.tag: copy.device for copy in read_snapshot(namespace).instances} == {"big": 1, "small": 0}


def test_without_a_gpu_the_accounts_are_the_figures(new_manager: NewManager) -> None:
    manager = new_manager()
    assert manager._monitor.get_stats() == (0, 0, 1000)
    with manager.model("a", Loads()), manager.model("b", Loads()):
        assert manager._monitor.get_stats() == (200, 200, 1000)
    know(manager, c=900)
    with manager.model("c", Loads()):
        assert manager._monitor.get_stats()[0] == 1000
        assert sum(map(len, manager.all_models().values())) == 2, "one of the two made room"


def test_a_wait_ends_at_the_time_out_and_says_what_it_waited_for(namespace: str, new_manager: NewManager) -> None:
    manager, impatient = new_manager(fallback_memory_mb=100), new_manager(wait_timeout_seconds=0.2)
    held = manager.acquire_model("a", Loads())
    with pytest.raises(
        AcquireTimeoutError, match=r"waiting to acquire model: b .*last reason: in_use: waits: needs 100 MB, 0 free"
    ) as caught:
        impatient.acquire_model("b", Loads())
    assert caught.value.tag == "b"
    assert isinstance(caught.value, RuntimeError)
    assert waiting(namespace) == []
    manager.release_model("a", held)
    assert problems(namespace) == []


# ---- releases that are wrong -------------------------------------------------------------------------------


def test_releasing_twice_is_an_error_and_changes_nothing(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    handle = manager.acquire_model("a", Loads())
    manager.release_model("a", handle)
    before = read_snapshot(namespace).instances[0].generation, model_of(namespace, "a").idle
    with pytest.raises(NotAcquiredError, match=f"this process does not hold '{handle}'") as caught:
        manager.release_model("a", handle)
    assert caught.value.tag == "a"
    assert (read_snapshot(namespace).instances[0].generation, model_of(namespace, "a").idle) == before == (before[0], 1)
    thing = manager.acquire_model("b", LoadsObject())
    manager.release_model("b", thing)
    with pytest.raises(NotAcquiredError, match="this Weights"):
        manager.release_model("b", thing)


def test_releasing_what_was_never_acquired_is_an_error(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, other = new_manager(), new_process()
    theirs = other.call(acquire, "a")
    for instance in (theirs, "unheard of", object()):
        with pytest.raises(NotAcquiredError):
            manager.release_model("a", instance)
    assert model_of(namespace, "a").active == 1
    other.call(release)


def test_a_wrong_tag_with_the_right_handle_is_put_up_with_and_logged(
    namespace: str, new_manager: NewManager, caplog: pytest.LogCaptureFixture
) -> None:
    manager = new_manager()
    handle = manager.acquire_model("right", Loads())
    with caplog.at_level(logging.WARNING, "mpmm"):
        manager.release_model("wrong", handle)
    assert "a copy of 'right' was released as 'wrong'" in caplog.text
    assert model_of(namespace, "right").idle == 1
    assert [model.tag for model in read_snapshot(namespace).models] == ["right"]


def test_the_tag_tells_equal_copies_of_two_models_apart(
    namespace: str, new_manager: NewManager, caplog: pytest.LogCaptureFixture
) -> None:
    manager = new_manager()
    for same in ("same", Weights()):
        for tag in "abc":
            manager.acquire_model(tag, lambda same=same: same)  # type: ignore[misc]  # mypy: a lambda with a default
        for tag in "bac":
            manager.release_model(tag, same)
            assert (model_of(namespace, tag).active, model_of(namespace, tag).idle) == (0, 1)
        manager.force_reset()
    assert "released as" not in caplog.text


# ---- loaders -----------------------------------------------------------------------------------------------


def test_what_a_loader_raises_arrives_unchanged(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    error = KeyError("weights")

    def load() -> str:
        raise error

    with pytest.raises(KeyError) as caught:
        manager.acquire_model("a", load)
    assert caught.value is error
    snapshot = read_snapshot(namespace)
    assert (snapshot.loading, snapshot.failed_loads, snapshot.devices[0].reserved_mb) == (0, 1, 0)
    assert problems(namespace) == []
    with manager.model("a", Loads()):
        pass


def test_after_a_failed_load_the_next_waiter_proceeds(
    namespace: str, new_process: NewProcess, new_gate: NewGate
) -> None:
    failing, next_one = new_process(fallback_memory_mb=100), new_process()
    began, go = new_gate(), new_gate()
    failing.send(acquire, "a", LoadFails("no such file", began, go))
    began.wait()
    next_one.send(acquire, "b", Loads("b"))
    wait_until(lambda: waiting(namespace, "b"), "the next one waits")
    go.open()
    with pytest.raises(OSError, match="no such file"):
        failing.result()
    assert next_one.result().startswith("b-")
    assert problems(namespace) == []


def test_a_model_whose_memory_could_not_be_read_while_it_ran_alone_stays_unknown(
    namespace: str, new_manager: NewManager, new_device: NewDevice
) -> None:
    device = new_device(1000)
    manager = new_manager(memory_source=device, memory_return_seconds=0.1)

    def load_in_the_dark() -> Any:
        device.go_dark()
        return LoadsObject("a", device=device, mb=300)()

    with manager.model("a", load_in_the_dark):
        assert read_snapshot(namespace).isolated is not None
    assert model_of(namespace, "a").estimate_mb is None
    device.come_back()
    with manager.model("a", LoadFails("there is an idle copy")):
        pass
    manager.force_reset()
    wait_until(lambda: device.used_mb() == 0, "the copy is unloaded")
    with manager.model("a", LoadsObject("a", device=device, mb=300)):
        assert read_snapshot(namespace).isolated is not None
    assert model_of(namespace, "a").estimate_mb == 300


def test_a_failed_profiling_load_ends_isolation(namespace: str, new_manager: NewManager, new_device: NewDevice) -> None:
    device = new_device(1000)
    manager = new_manager(memory_source=device)
    with pytest.raises(OSError, match="no such file"):
        manager.acquire_model("unknown", LoadFails())
    assert read_snapshot(namespace).isolated is None
    with manager.model("unknown", LoadsObject("u", device=device, mb=100)):
        assert read_snapshot(namespace).isolated is not None
    assert model_of(namespace, "unknown").estimate_mb == 100


@pytest.mark.parametrize("loaded", ["", "h" * 10000, "\ud800"], ids=["empty", "too long", "no text"])
def test_a_text_that_can_be_no_handle_is_an_object_of_its_process(
    namespace: str, new_manager: NewManager, caplog: pytest.LogCaptureFixture, loaded: str
) -> None:
    manager = new_manager()
    know(manager, a=100, b=100)
    for _ in range(2):
        assert manager.acquire_model("a", lambda: loaded) is loaded
        assert model_of(namespace, "a").active == 1
        # By value, like a handle.
        manager.release_model("a", "".join(list(loaded)))
        with pytest.raises(NotAcquiredError):
            manager.release_model("a", loaded)
    assert (model_of(namespace, "a").loads, model_of(namespace, "a").hits) == (1, 1)
    # Two copies at a time, and another model with the same text.
    first, second = manager.acquire_model("a", lambda: loaded), manager.acquire_model("a", lambda: loaded)
    other = manager.acquire_model("b", lambda: loaded)
    assert first == second == other
    assert (model_of(namespace, "a").active, model_of(namespace, "b").active) == (2, 1)
    for tag in ("a", "a", "b"):
        manager.release_model(tag, loaded)
    assert manager.unload("a") == 2
    assert copies_of(namespace, "a") == []
    said = [record.getMessage() for record in caplog.records if "can be no handle" in record.getMessage()]
    assert len(said) == 2
    assert ("the loader of a " in said[0], "the loader of b " in said[1]) == (True, True)
    assert problems(namespace) == []


def test_none_is_an_object_like_any_other(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    for _ in range(2):
        assert manager.acquire_model("a", lambda: None) is None
        assert model_of(namespace, "a").active == 1
        manager.release_model("a", None)
    assert (model_of(namespace, "a").loads, model_of(namespace, "a").hits) == (1, 1)


def test_an_impossible_tag_or_loader_is_refused_before_anything_happens(
    namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager()
    for tag in ("", "t" * 600, 7, None):
        with pytest.raises(InvalidArgumentError, match="model"):
            manager.acquire_model(tag, Loads())  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(InvalidArgumentError, match="'loader'"):
        manager.acquire_model("a", "loader")  # type: ignore[arg-type]  # wrong on purpose
    assert read_snapshot(namespace).models == ()


def test_the_with_block_releases_whatever_happens_in_it(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    with manager.model("a", Loads("a")) as copy:
        assert copy.startswith("a-")
        assert model_of(namespace, "a").active == 1
    with pytest.raises(ZeroDivisionError), manager.model("a", Loads()):
        raise ZeroDivisionError
    assert (model_of(namespace, "a").active, model_of(namespace, "a").idle) == (0, 1)


# ---- full tables -------------------------------------------------------------------------------------------


@contextmanager
def raises_full(table: str, capacity: int) -> Iterator[None]:
    """Expect a TableFullError about one table."""
    with pytest.raises(TableFullError, match=rf"the {table} table.*Capacities\.{table}") as caught:
        yield
    assert (caught.value.table, caught.value.capacity) == (table, capacity)
    assert caught.value.setting == f"Capacities.{table}"


@pytest.mark.parametrize("table", ["models", "instances"])
def test_a_full_table_of_models_or_copies_is_an_error_that_changes_nothing(
    namespace: str, new_manager: NewManager, table: str
) -> None:
    manager = new_manager(capacities=Capacities(**{table: 2}))
    held = {tag: manager.acquire_model(tag, Loads()) for tag in "ab"}
    before = read_snapshot(namespace)
    with raises_full(table, 2):
        manager.acquire_model("c", Loads())
    after = read_snapshot(namespace)
    assert (after.models, after.waiting, after.next_ticket) == (
        tuple(before_model for before_model in after.models if before_model.tag in held),
        0,
        before.next_ticket,
    )
    assert problems(namespace) == []
    for tag, copy in held.items():
        manager.release_model(tag, copy)
    with manager.model("a", Loads()) as copy:
        assert copy == held["a"]
    assert problems(namespace) == []


def test_a_full_table_of_models_recycles_the_tag_that_was_unused_longest(
    namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager(capacities=Capacities(models=2), fallback_memory_mb=200)
    for tag in "ab":
        manager._estimator.set_initial_estimate(tag, 50)
    with manager.model("a", Loads()), manager.model("c", Loads()):
        assert {model.tag for model in read_snapshot(namespace).models} == {"a", "c"}
    assert problems(namespace) == []


def test_a_full_table_of_waiters_is_an_error_that_changes_nothing(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager = new_manager(capacities=Capacities(tickets=1), fallback_memory_mb=100)
    waiter = new_process()
    held = manager.acquire_model("a", Loads())
    waiter.send(acquire, "b", Loads("b"))
    wait_until(lambda: waiting(namespace, "b"), "the table is full")
    with raises_full("tickets", 1):
        manager.acquire_model("c", Loads())
    assert problems(namespace) == []
    manager.release_model("a", held)
    assert waiter.result().startswith("b-")


def test_a_full_table_of_members_is_an_error_that_changes_nothing(namespace: str, new_process: NewProcess) -> None:
    first, second = new_process(capacities=Capacities(members=1)), new_process(attached=False)
    with raises_full("members", 1):
        second.call(attach, namespace=namespace, memory_source="booked")
    first.call(acquire, "a")
    assert problems(namespace) == []
    first.call(release)
    first.call(shut_down)
    second.call(attach, namespace=namespace, memory_source="booked", fallback_memory_mb=10000)
    assert len(read_snapshot(namespace).members) == 1


def test_too_many_devices_are_an_error_that_leaves_nothing(namespace: str, new_device: NewDevice) -> None:
    with pytest.raises(TableFullError, match="2 devices, the devices table has 1 rows"):
        ModelManager(namespace=namespace, memory_source=new_device(100, 200), capacities=Capacities(devices=1))
    with pytest.raises(FileNotFoundError):
        read_snapshot(namespace)


def test_a_full_table_of_copies_troubles_nobody_but_him_who_wants_one_more(
    namespace: str, new_manager: NewManager, new_process: NewProcess, new_device: NewDevice
) -> None:
    device = new_device(1000)
    arguments: dict[str, Any] = {"memory_source": device, "poll_interval": 0.05}
    manager = new_manager(capacities=Capacities(instances=2), **arguments)
    know(manager, a=100, b=100, c=100)
    ballast = device.allocate(800)
    held = {tag: manager.acquire_model(tag, LoadsObject(tag, device=device, mb=100)) for tag in "ab"}
    waiter = new_process(**arguments)
    waiter.send(acquire, "c", LoadsObject("c", device=device, mb=100))
    wait_until(lambda: waiting(namespace, "c"), "there is no memory for a third copy")
    device.free(ballast)
    # Now there is memory but no row. Samples must go on, and so must releases.
    wait_until(lambda: read_snapshot(namespace).devices[0].used_mb == 200, "the freed memory is seen", 5)
    assert waiting(namespace, "c")
    manager.release_model("a", held.pop("a"))
    assert waiter.result(), "the idle copy has made room in the table"
    assert copies_of(namespace, "a") == []
    manager.release_model("b", held.pop("b"))
    assert problems(namespace) == []
