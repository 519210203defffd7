"""A declared size counts until the model is measured, so that the model need not be loaded alone."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from harness import (
    NewDevice,
    NewManager,
    NewProcess,
    Seat,
    acquire,
    copies_of,
    model_of,
    problems,
    wait_until,
    waiting,
)
from loaders import Loads, LoadsObject, Weights
from policy_views import RULES, A, B, D, device, model, ticket, view

from mpmm.beam.run_inference import options_of_handler
from mpmm.cli import main
from mpmm.errors import InvalidArgumentError, ModelTooLargeError
from mpmm.model_manager.request import AcquireOptions
from mpmm.multi_process_shared import MultiProcessShared, registry
from mpmm.policy.plan import make_plan
from mpmm.policy.view import Load, PlacedInstance, Reason, Wait
from mpmm.shared_state.snapshot import read_snapshot


class Says:
    """A model that says what it takes."""

    def __init__(self, mb: Any) -> None:
        self.expect_mb = mb


def test_a_declared_size_counts_where_nothing_is_measured(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(fallback_memory_mb=1000, slack_percentage=0.0, default_estimate_mb=800)
    with manager.model("a", Loads(), expect_mb=1), manager.model("b", Loads(), expect_mb=999):
        assert [copy.mb for copy in read_snapshot(namespace).instances] == [1, 999]
    assert model_of(namespace, "a").estimate_mb == 1
    # The last word counts.
    with manager.model("c", Loads(), expect_mb=2.5), manager.model("a", Loads(), expect_mb=7):
        assert model_of(namespace, "a").estimate_mb == 1
    for mb in (7, 3, 9):
        manager.unload("a")
        with manager.model("a", Loads(), expect_mb=mb):
            assert [copy.mb for copy in copies_of(namespace, "a")] == [mb]
    assert problems(namespace) == []


def test_every_way_to_a_copy_takes_a_size(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(default_estimate_mb=800)
    manager.release_model("a", manager.acquire_model("a", Loads(), expect_mb=11))
    assert manager.preload("b", Loads(), expect_mb=12) == 1

    @manager.uses("c", Loads(), expect_mb=13)
    def use(model: str) -> str:
        return model

    async def use_in_loop() -> None:
        async with manager.model_async("d", Loads(), expect_mb=14):
            pass

    use()
    asyncio.run(use_in_loop())
    assert [copy.mb for copy in read_snapshot(namespace).instances] == [11, 12, 13, 14]


def test_a_declared_model_is_not_loaded_alone_and_a_larger_measurement_is_believed(
    namespace: str, new_manager: NewManager, new_device: NewDevice
) -> None:
    simulated = new_device(1000)
    # Without polls, which might solve for the sizes while the copies are loaded.
    manager = new_manager(memory_source=simulated, poll_interval=3600)
    with (
        manager.model("a", LoadsObject("a", device=simulated, mb=60), expect_mb=50),
        manager.model("b", LoadsObject("b", device=simulated, mb=30), expect_mb=30),
    ):
        snapshot = read_snapshot(namespace)
        assert (snapshot.isolated, snapshot.active) == (None, 2)
        assert [(model.expect_mb, model.estimate_mb) for model in snapshot.models] == [(50, None), (30, None)]
        assert [event.reason for event in snapshot.events if event.kind == "load_began"] == [Reason.FITS] * 2
    manager._estimator.set_initial_estimate("a", 60)
    manager.unload("a")
    with manager.model("a", LoadsObject("a", device=simulated, mb=60), expect_mb=5):
        assert [copy.mb for copy in copies_of(namespace, "a")] == [60]
    assert problems(namespace) == []


def test_an_object_says_itself_what_it_takes(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(default_estimate_mb=100)
    for tag, says in (("a", 42), ("b", -1), ("c", "lots"), ("d", math.nan)):
        with manager.model(tag, lambda says=says: Says(says)):  # type: ignore[misc]  # mypy has no type for a lambda's default
            pass
    assert [copy.mb for copy in read_snapshot(namespace).instances] == [42, 100, 100, 100]
    assert model_of(namespace, "a").estimate_mb == 42


@pytest.mark.parametrize("size", [0, -1, math.inf, math.nan, "5", True])
def test_sizes_that_cannot_be_change_nothing(namespace: str, new_manager: NewManager, size: Any) -> None:
    manager = new_manager()
    for call in (manager.acquire_model, manager.preload):
        with pytest.raises(InvalidArgumentError, match="expect_mb="):
            call("a", Loads(), expect_mb=size)
    with pytest.raises(InvalidArgumentError, match="expect_mb="), manager.model("a", Loads(), expect_mb=size):
        pass
    assert read_snapshot(namespace).models == ()


def test_an_option_that_there_is_not_is_named_at_once(new_manager: NewManager) -> None:
    manager: Any = new_manager()
    for call in (manager.model, manager.model_async, manager.uses, manager.acquire_model, manager.preload):
        with pytest.raises(TypeError, match="unexpected option 'expects_mb': expected devices, span, expect_mb"):
            call("a", Weights, expects_mb=3)


def test_a_declared_size_that_no_device_has_is_refused(new_manager: NewManager) -> None:
    manager = new_manager(fallback_memory_mb=1000, slack_percentage=0.1)
    with pytest.raises(ModelTooLargeError, match="needs 901 MB"):
        manager.acquire_model("a", Loads(), expect_mb=901)


def test_what_waits_shows_the_declared_size(
    namespace: str, new_manager: NewManager, new_process: NewProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    manager, waiter = new_manager(fallback_memory_mb=1000, slack_percentage=0.0), new_process()
    with manager.reserve(900):
        waiter.send(acquire_sized, "a", 150)
        wait_until(lambda: waiting(namespace, "a"), "there is no room")
        assert main(["inspect", namespace]) == 0
        shown = capsys.readouterr().out
        assert "waits: needs 150 MB" in shown
        assert "~ 150" in shown
    waiter.result()


def acquire_sized(seat: Seat, tag: str, mb: float) -> None:
    seat.held.append((tag, seat.manager.acquire_model(tag, Loads(), expect_mb=mb)))


def test_an_assumption_is_no_more_than_the_largest_part_that_can_be_free() -> None:
    held = PlacedInstance(7, D, 0, 600)
    leased = device(reserved_mb=600, leased_mb=600)
    rules = replace(RULES, isolate_unknown=False)
    unknown = model(A, 4000, known=False)
    (decision,) = make_plan(
        view([unknown], [ticket(1, A, priority=0)], devices=[leased], leases=(held,), rules=rules)
    ).decisions
    assert isinstance(decision, Load)
    assert decision.need_mb == 300
    (decision,) = make_plan(view([model(B, 400)], [ticket(1, B)], devices=[leased], leases=(held,))).decisions
    assert isinstance(decision, Wait)
    assert decision.reason == Reason.LEASED


def test_an_assumed_model_loads_beside_a_lease_that_is_held_for_ever(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, other = new_manager(fallback_memory_mb=1000, default_estimate_mb=900), new_process()
    with manager.reserve(500):
        other.call(acquire, "a", Loads())
        (copy,) = copies_of(namespace, "a")
        assert copy.mb == 500
    # The next one is not taken for less because of that.
    assert model_of(namespace, "a").estimate_mb == 900
    assert problems(namespace) == []


# ---- what objects elsewhere say ------------------------------------------------------------------------------------


class Served42:
    """An object of a model server that says by its class what it takes, and has a method as well."""

    expect_mb = 42

    def one(self) -> int:
        """Return 1."""
        return 1


class Fails:
    """An object that cannot say what it takes."""

    @property
    def expect_mb(self) -> float:
        """Raise."""
        raise RuntimeError("not yet known")


@dataclass(frozen=True)
class Hosts:
    """A loader that returns the handle of an object, or with `as_proxy` a proxy; in a process of its own if `spawn`."""

    tag: str
    makes: Callable[[], Any]
    spawn: bool = True
    as_proxy: bool = False

    def __call__(self) -> Any:
        """Host the object."""
        shared: MultiProcessShared[Any] = MultiProcessShared(
            self.makes, tag=self.tag, always_proxy=True, spawn_process=self.spawn
        )
        proxy = shared.acquire()
        return proxy if self.as_proxy else self.tag


@pytest.mark.parametrize("as_proxy", [False, True], ids=["handle", "proxy"])
@pytest.mark.parametrize("spawn", [False, True], ids=["here", "spawned"])
def test_an_object_in_a_server_says_itself_what_it_takes(
    namespace: str, new_manager: NewManager, new_process: NewProcess, spawn: bool, as_proxy: bool
) -> None:
    manager = new_manager(default_estimate_mb=100)
    with manager.model("a", Hosts("a-1", Served42, spawn, as_proxy)):
        assert [copy.mb for copy in copies_of(namespace, "a")] == [42]
    assert model_of(namespace, "a").estimate_mb == 42
    assert new_process().call(known_mb, "a") == 42
    if as_proxy and not spawn:
        # A process serves its own objects to the end.
        MultiProcessShared(Served42, tag="a-1").unsafe_hard_delete()
    assert problems(namespace) == []


def known_mb(seat: Seat, tag: str) -> float:
    return float(seat.manager._estimator.get_estimate(tag))


def test_a_server_that_is_not_forked_from_the_warm_process_says_it_too(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPMM_ZYGOTE", "0")
    with new_manager(default_estimate_mb=100).model("a", Hosts("a-1", Served42)):
        assert [copy.mb for copy in copies_of(namespace, "a")] == [42]


@pytest.mark.parametrize("makes", [partial(Says, "lots"), partial(Says, -3), partial(Says, math.inf), Fails], ids=str)
def test_what_an_object_says_that_is_no_size_is_ignored_wherever_it_is(
    namespace: str, new_manager: NewManager, makes: Callable[[], Any]
) -> None:
    manager = new_manager(default_estimate_mb=100)
    for tag, load in (("a", makes), ("b", Hosts("b-1", makes, spawn=False)), ("c", Hosts("c-1", makes))):
        with manager.model(tag, load):
            assert [copy.mb for copy in copies_of(namespace, tag)] == [100]
    assert problems(namespace) == []


def test_code_that_says_what_an_object_takes_does_not_run_under_the_lock(
    namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager(default_estimate_mb=100)
    lock = manager._connected().namespace.lock
    seen: list[bool] = []

    class Looks:
        @property
        def expect_mb(self) -> float:
            seen.append(lock.held_by_this_thread())
            return 42

    with manager.model("a", Looks):
        assert [copy.mb for copy in copies_of(namespace, "a")] == [42]
    assert seen == [False]


def test_what_a_later_version_says_of_its_server_is_read_as_far_as_it_is_known(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    for says, mb in (
        ({"expect_mb": 42, "colour": "red"}, 42),
        ({"expect_mb": "42 MB"}, 100),
        ({"expect_mb": None}, 100),
    ):
        manager, tag = new_manager(default_estimate_mb=100), f"model-{len(read_snapshot(namespace).models)}"
        with monkeypatch.context() as patched:
            patched.setattr(
                "mpmm.multi_process_shared.registry.asdict", lambda record, says=says: {**asdict(record), **says}
            )
            with manager.model(tag, Hosts(f"{tag}-1", Weights, spawn=False)):
                assert [copy.mb for copy in copies_of(namespace, tag)] == [mb]
        lives, found = registry.registry_for(None).look(f"{tag}-1")
        assert lives
        assert found is not None


def test_a_proxy_of_an_object_elsewhere_has_no_other_attribute(new_manager: NewManager) -> None:
    shared: MultiProcessShared[Any] = MultiProcessShared(Served42, tag="a", always_proxy=True, spawn_process=True)
    proxy = shared.acquire()
    assert (proxy.expect_mb, proxy.one()) == (42, 1)
    other: MultiProcessShared[Any] = MultiProcessShared(Weights, tag="b", always_proxy=True, spawn_process=True)
    with pytest.raises(AttributeError, match="plain attributes are not shared"):
        _ = other.acquire().expect_mb
    for one in (shared, other):
        one.unsafe_hard_delete()


# ---- where others ask for the model --------------------------------------------------------------------------------


class Handler:
    """A model handler of Beam, as far as that matters here."""

    mpmm_expect_mb = 42


class Around:
    """A handler around another one."""

    def __init__(self, base: Any, **says: Any) -> None:
        self._base = base
        vars(self).update(says)


def test_a_handler_says_what_its_model_takes(namespace: str, new_manager: NewManager) -> None:
    assert options_of_handler(Around(Handler(), mpmm_users=3)) == {"expect_mb": 42, "users": 3}
    assert options_of_handler(Around(Handler(), mpmm_expect_mb=7)) == {"expect_mb": 7}
    manager = new_manager(default_estimate_mb=100)
    manager.set_request_defaults("a", **options_of_handler(Around(Handler())))
    # As Beam asks for it, and as it is loaded ahead.
    manager.release_model("a", manager.acquire_model("a", Loads()))
    assert [copy.mb for copy in copies_of(namespace, "a")] == [42]
    manager.unload("a")
    assert manager.preload("a", Loads(), if_free=True) == 1
    assert [copy.mb for copy in copies_of(namespace, "a")] == [42]
    # The request's own size counts.
    manager.unload("a")
    with manager.model("a", Loads(), expect_mb=7):
        assert [copy.mb for copy in copies_of(namespace, "a")] == [7]
    manager.unload("a")
    # Nothing is set any more; the last declared size remains.
    manager.set_request_defaults("a")
    with manager.model("a", Loads()):
        assert [copy.mb for copy in copies_of(namespace, "a")] == [7]
    assert problems(namespace) == []


@pytest.mark.parametrize(
    ("sizes", "options", "said"),
    [
        ((42, 7.5, None), {}, {"expect_mb": 49.5}),
        ((42, 7.5, 50), {"max_models_per_worker_hint": 2}, {"expect_mb": 92.0}),
        ((None, None, None), {}, {}),
        # As if it were a handler of its own.
        ((42, "much", None), {}, {"expect_mb": "much"}),
        ((42, -1, None), {}, {"expect_mb": -1}),
    ],
)
def test_the_handlers_in_a_keyed_one_say_what_a_copy_takes_that_holds_their_models(
    sizes: tuple[Any, ...], options: dict[str, int], said: dict[str, Any]
) -> None:
    from apache_beam.ml.inference.base import KeyedModelHandler, KeyModelMapping, ModelHandler

    def handler(mb: Any) -> Any:
        made = ModelHandler()
        if mb is not None:
            made.mpmm_expect_mb = mb
        return made

    mappings = [KeyModelMapping([str(key)], handler(mb)) for key, mb in enumerate(sizes)]
    keyed = KeyedModelHandler(mappings, **options)
    assert options_of_handler(keyed) == said
    assert options_of_handler(Around(keyed, mpmm_users=3)) == {"users": 3, **said}
    keyed.mpmm_expect_mb = 9
    assert options_of_handler(keyed) == {"expect_mb": 9}


@pytest.mark.parametrize(("size", "mb"), [("42", 42), ("0.5g", 512), ("64MiB", 64), ("64mb", 64)])
def test_a_preload_at_a_prompt_says_what_the_model_takes(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch, size: str, mb: float
) -> None:
    new_manager(default_estimate_mb=100)
    monkeypatch.chdir(Path(__file__).parent)
    assert main(["preload", "a", "test_administration:load_in_server", "--expect-mb", size]) == 0
    assert [copy.mb for copy in copies_of(namespace, "a")] == [mb]
    for nonsense in ("lots", "-5", "0", "nan", ""):
        assert main(["preload", "b", "test_administration:load_in_server", f"--expect-mb={nonsense}"]) == 2
    assert not [model for model in read_snapshot(namespace).models if model.tag == "b"]


def test_a_model_that_fits_nowhere_is_refused_at_once_while_another_one_runs_alone(
    namespace: str, new_manager: NewManager, new_process: NewProcess, new_device: NewDevice
) -> None:
    whole = new_device(1000)
    manager, other = new_manager(memory_source=whole, wait_timeout_seconds=5.0), new_process(memory_source=whole)
    other.call(acquire, "unknown", LoadsObject())
    for says in (AcquireOptions(expect_mb=1001), AcquireOptions()):
        # The second request finds what the first one said, and asks for nothing in particular.
        with pytest.raises(ModelTooLargeError, match="needs 1001 MB"):
            manager.acquire_model("a", Loads("a"), **says)
    assert problems(namespace) == []
