"""Invalid values for the package's public functions: an MpmmError names them, and nothing changes.

The tables below hold every public function and parameter that takes a number, a text, a path or a choice of devices;
`test_every_parameter_is_in_a_table` fails if a new one is in none of them.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import SMALL, NewManager, problems

from mpmm import beam
from mpmm.cli import main
from mpmm.errors import InvalidArgumentError, MpmmError, RuntimeDirectoryError
from mpmm.memory.estimator import ResourceEstimator
from mpmm.memory.monitor import GPUMonitor
from mpmm.memory.shared_estimator import SharedResourceEstimator
from mpmm.model_manager import ModelManager
from mpmm.model_manager.lease import Lease
from mpmm.model_manager.request import AcquireOptions
from mpmm.multi_process_shared import MultiProcessShared, server_pid, unload
from mpmm.shared_state.layout import Capacities
from mpmm.shared_state.snapshot import as_json, find_namespaces, read_snapshot
from mpmm.sources.host_memory import HostMemorySource

LONE = "\ud800"
# Nothing that is no number, and no number that is none.
NO_NUMBER: tuple[Any, ...] = ("1", b"1", True, math.nan, [1], {}, object(), 1j, np.bool_(True), 10**400, -(10**400))
NO_TIME: tuple[Any, ...] = (*NO_NUMBER, -1, -0.5, -math.inf, np.float64(-1))
NO_MB: tuple[Any, ...] = (*NO_TIME, 0, math.inf, None)
NO_COUNT: tuple[Any, ...] = (*NO_TIME, 1.5, math.inf, None)
NO_TAG: tuple[Any, ...] = (None, 5, b"tag", "", LONE, "a" + LONE, ["a"], object(), "x" * 10000, True)
NO_LOADER: tuple[Any, ...] = (None, 5, "loader", object())
NO_DEVICES: tuple[Any, ...] = (0, 1.5, True, "0", b"0", [], (), {}, {0: 1}, [None], [True], [0.0], [[0]], object())
NO_PATH: tuple[Any, ...] = (5, b"/tmp", "", "/tmp/a\0b", LONE, ["/tmp"], object(), True)
NO_NAME: tuple[Any, ...] = ("", 0, False, 5, b"x", [], {}, ["x"], ".x", "a/b", LONE, "\x1b[31m", "n" * 65, object())


def _loader() -> object:
    return object()


def _made(**arguments: Any) -> None:
    ModelManager(**{**SMALL, "namespace": "other", **arguments}).shutdown()


SETTING: dict[str, tuple[Any, ...]] = {
    "slack_percentage": (*NO_NUMBER, None, -0.1, 1.0),
    "poll_interval": (*NO_TIME, None, 0, math.inf),
    "peak_window_seconds": (*NO_TIME, None, 0, math.inf),
    "min_data_points": (*NO_COUNT, 0),
    "smoothing_factor": (*NO_TIME, None, 1.1),
    "eviction_cooldown_seconds": (*NO_TIME, None),
    "min_model_copies": NO_COUNT,
    "wait_timeout_seconds": (*NO_TIME, None),
    "lock_timeout_seconds": (*NO_TIME, None, 0, math.inf),
    "memory_budget_mb": (*NO_TIME, 0),
    "fallback_memory_mb": NO_MB,
    "default_estimate_mb": NO_MB,
    "max_overtake_seconds": (*NO_TIME, None),
    "memory_return_seconds": (*NO_TIME, None),
    "load_timeout_seconds": (*NO_TIME, None, 0),
    "max_model_copies": (*NO_TIME, 0, 1.5),
    "idle_ttl_seconds": NO_TIME,
    "max_waiting": (*NO_TIME, 1.5),
    "suspend": (None, 5, True, "never", "", b"auto", ["auto"], object()),
    "suspend_budget_mb": NO_TIME,
    "namespace": NO_NAME,
    "monitor": (5, 0, "nvml", object(), GPUMonitor),
    "memory_source": (None, 5, True, object(), "no such source"),
    "devices": (*NO_DEVICES, [7]),
    "estimates_path": NO_PATH,
    "autoscaling_metric": ("", "Loaded", 5, ["demand"]),
    "capacities": (5, 0, "", {}, {"models": 5}, Capacities),
    "runtime_root": NO_PATH,
}
# Values used as true or false.
FLAGS = {"verbose_logging", "always_proxy", "spawn_process", "for_all", "if_free", "steady"}

Call = Callable[[ModelManager, Any], Any]
REQUEST: dict[str, tuple[Any, ...]] = {
    "tag": NO_TAG,
    "loader_func": NO_LOADER,
    "devices": NO_DEVICES,
    "span": (*NO_COUNT, 0, 2),
    "expect_mb": (0, -1, math.inf, math.nan, "5", True),
    "max_waiting": (-1, 1.5, math.inf, "5", True),
    "priority": (-11, 11, 0.5, None, "5", True),
    "keep_alive_seconds": (-2, -0.5, math.nan, "5", True),
    "users": (0, -1, 129, 1.5, math.inf, "5", True),
}
# By method: bad values for each parameter.
METHODS: dict[str, dict[str, tuple[Any, ...]]] = {
    "acquire_model": REQUEST,
    "model": REQUEST,
    "model_async": REQUEST,
    "uses": {"tag": NO_TAG, "loader_func": NO_LOADER, "argument": (None, 5, "", "other", ["model"])},
    "reserve": {
        "mb": NO_MB,
        "name": NO_TAG,
        "timeout_seconds": NO_TIME,
        "devices": NO_DEVICES,
        "span": (*NO_COUNT, 0, 2),
        "priority": (-11, 11, 0.5, None, "5", True),
    },
    "preload": {
        **REQUEST,
        "copies": (*NO_COUNT, 0, 10**9),
        "timeout_seconds": NO_TIME,
        "state": (None, 5, "", "active", ["idle"]),
    },
    "unload": {"tag": NO_TAG, "timeout_seconds": NO_TIME},
    "suspend": {"tag": NO_TAG, "timeout_seconds": NO_TIME},
    "resume": {"tag": NO_TAG, "timeout_seconds": NO_TIME},
    "pin": {"tag": NO_TAG},
    "unpin": {"tag": NO_TAG},
    "supersede": {"old": NO_TAG, "new": NO_TAG},
    "set_request_defaults": {name: REQUEST[name] for name in ("tag", "users", "expect_mb", "priority")},
    "all_models": {"tag": tuple(tag for tag in NO_TAG if tag is not None)},
    "try_enter_isolation_mode": {"tag": NO_TAG},
    "should_spawn_model": {"tag": NO_TAG},
    # Whatever the tag, what is held is given back.
    "release_model": {"tag": (5, None, LONE, ["a"])},
}
GOOD: dict[str, Any] = {
    "tag": "a",
    "loader_func": _loader,
    "mb": 10,
    "ticket_num": 1,
    "instance": None,
    "old": "a",
    "new": "b",
}


def _call(manager: ModelManager, method: str, arguments: dict[str, Any]) -> None:
    needed = inspect.signature(getattr(ModelManager, method)).parameters
    full = {**{name: value for name, value in GOOD.items() if name in needed}, **arguments}
    made = getattr(manager, method)(**full)
    if method == "model":
        with made:
            pass
    elif method == "model_async":
        asyncio.run(_enter(made))
    elif method == "uses":
        made(lambda model: None)


async def _enter(made: Any) -> None:
    async with made:
        pass


def test_a_manager_refuses_settings_that_are_none(new_manager: NewManager, namespace: str) -> None:
    new_manager()
    before = as_json(read_snapshot(namespace))
    tried = 0
    for name, values in SETTING.items():
        for value in values:
            with pytest.raises(InvalidArgumentError, match=r"\w") as raised:
                _made(**{name: value})
            assert name.removesuffix("s") in str(raised.value).replace(" ", "_"), (name, value, raised.value)
            tried += 1
    assert tried > 250
    assert find_namespaces() == [namespace]
    assert _accounts(before) == _accounts(as_json(read_snapshot(namespace)))


def test_a_manager_refuses_requests_that_are_none(new_manager: NewManager, namespace: str) -> None:
    manager = new_manager()
    manager.release_model("held", manager.acquire_model("held", _loader))
    before = as_json(read_snapshot(namespace))
    tried = 0
    for method, parameters in METHODS.items():
        for name, values in parameters.items():
            for value in values:
                try:
                    with pytest.raises(MpmmError):
                        _call(manager, method, {name: value})
                except BaseException as error:
                    raise AssertionError(f"{method}({name}={value!r:.40})") from error
                tried += 1
    assert tried > 300
    assert problems(namespace) == []
    assert _accounts(before) == _accounts(as_json(read_snapshot(namespace)))


def _accounts(found: dict[str, Any]) -> Any:
    """Return what a call that is refused may not change; the events since, because they tell of any change."""
    kept = ("members", "models", "instances", "tickets", "pins", "devices", "active", "waiting", "loads", "events")
    moving = ("_s", "samples", "alive")

    def still(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: still(one) for name, one in value.items() if not str(name).endswith(moving)}
        return [still(one) for one in value] if isinstance(value, list | tuple) else value

    return {name: still(found[name]) for name in kept if name in found}


ESTIMATES: dict[str, dict[str, tuple[Any, ...]]] = {
    "is_unknown": {"model_tag": (None, 5, ["a"])},
    "get_estimate": {"model_tag": (None, 5, ["a"])},
    "set_initial_estimate": {"model_tag": (None, 5, ["a"]), "cost": (*NO_TIME, math.inf, None)},
    "add_observation": {
        "active_snapshot": (None, 5, "a", ["a"], {5: 1}, {"a": -1}, {"a": 1.5}, {"a": True}, {"a": 10**9}, {"a": "1"}),
        "peak_memory": (*NO_TIME, math.inf, None),
    },
}


def test_estimators_refuse_what_is_no_tag_cost_or_reading(new_manager: NewManager, namespace: str) -> None:
    manager = new_manager()
    good = {"model_tag": "a", "cost": 5, "active_snapshot": {"a": 1}, "peak_memory": 5}
    for estimator in (ResourceEstimator(), manager._estimator):
        for method, parameters in ESTIMATES.items():
            needed = inspect.signature(getattr(ResourceEstimator, method)).parameters
            for name, values in parameters.items():
                for value in values:
                    arguments = {key: one for key, one in {**good, name: value}.items() if key in needed}
                    with pytest.raises(InvalidArgumentError):
                        getattr(estimator, method)(**arguments)
        assert (estimator.estimates, estimator.known_models, estimator.history) == ({}, set(), {})
    assert read_snapshot(namespace).models == ()


ELSEWHERE: dict[Callable[..., Any], dict[str, tuple[Any, ...]]] = {
    GPUMonitor: {
        "fallback_memory_mb": NO_MB,
        "poll_interval": (*NO_TIME, None, 0, math.inf),
        "peak_window_seconds": (*NO_TIME, None, math.inf),
        "source": (None, 5, True, object()),
        "budget_mb": (*NO_TIME, 0),
    },
    ResourceEstimator: {"smoothing_factor": (*NO_TIME, None, 1.1), "min_data_points": NO_COUNT},
    HostMemorySource: {"budget_mb": (*NO_TIME, 0)},
    Capacities: dict.fromkeys(Capacities.__dataclass_fields__, (*NO_COUNT, 2**40)),
    MultiProcessShared: {
        "tag": (None, 5, b"x", ["x"], LONE, object()),
        "path": NO_PATH,
    },
    unload: {
        "tag": (None, 5, b"x", ["x"], LONE),
        "path": NO_PATH,
        "timeout_seconds": (*NO_TIME, None),
        "pid": (*NO_NUMBER, 0, -1, 1.5, 2**31),
    },
    server_pid: {"tag": (None, 5, b"x", ["x"], LONE), "path": NO_PATH},
}


@pytest.mark.parametrize("function", list(ELSEWHERE), ids=lambda function: function.__name__)
def test_the_other_doors_refuse_what_they_cannot_use(function: Callable[..., Any], runtime_root: Path) -> None:
    good = {"constructor": dict, "tag": "a"}
    needed = inspect.signature(function).parameters
    for name, values in ELSEWHERE[function].items():
        for value in values:
            arguments = {key: one for key, one in {**good, name: value}.items() if key in needed}
            with pytest.raises(InvalidArgumentError):
                function(**arguments)


def test_a_constructor_is_asked_for_only_where_there_is_no_object() -> None:
    with pytest.raises(InvalidArgumentError, match="constructor None of 'a'"):
        MultiProcessShared(None, "a").acquire()  # type: ignore[arg-type]  # wrong on purpose
    handle: MultiProcessShared[Any] = MultiProcessShared(dict, "a")
    kept = handle.acquire()
    attached: MultiProcessShared[Any] = MultiProcessShared(None, "a")  # type: ignore[arg-type]  # as programs for Beam do
    attached.release(attached.acquire())
    handle.release(kept)
    handle.unsafe_hard_delete()


def test_a_lease_refuses_what_is_no_process(new_manager: NewManager, namespace: str) -> None:
    with new_manager().reserve(10) as lease:
        for pid in (*NO_NUMBER, None, 0, -1, 1.5, 2**31):
            with pytest.raises(InvalidArgumentError, match="pid"):
                lease.used_by(pid)
        assert read_snapshot(namespace).instances[0].program is None
        lease.used_by(np.int64(os.getpid()))
        assert read_snapshot(namespace).instances[0].program == os.getpid()


def test_numpy_scalars_are_numbers_everywhere(namespace: str, new_manager: NewManager) -> None:
    whole: Any = np.int64(1)
    manager = new_manager(
        poll_interval=np.float32(0.5), min_model_copies=whole, max_model_copies=np.int32(3), wait_timeout_seconds=whole
    )
    assert read_snapshot(namespace).settings.max_model_copies == 3
    manager.reserve(np.float32(10), timeout_seconds=np.int64(1), devices=list(np.array([0])), span=whole).release()
    assert manager.preload("a", _loader, copies=whole, devices=[np.int64(0)], timeout_seconds=np.float64(1)) == 1
    manager.release_model("a", manager.acquire_model("a", _loader, span=whole, devices=range(1)))
    manager._estimator.add_observation({"a": whole}, np.float64(100))
    Capacities(models=whole)
    monitor = GPUMonitor(np.int64(100), np.float32(1.0), np.int8(3), source="booked")
    assert monitor.devices()[0].total_mb == 100
    assert HostMemorySource(np.int64(100)).devices()[0].total_mb == 100


def test_a_tag_may_hold_the_bytes_of_a_file_name(namespace: str, new_manager: NewManager) -> None:
    tag = os.fsdecode(b"caf\xe9.bin")
    manager = new_manager()
    with manager.model(tag, _loader), manager.reserve(5, name=tag):
        assert {model.tag for model in read_snapshot(namespace).models} == {tag}
        assert {lease.tag for lease in read_snapshot(namespace).instances} == {tag}


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in ("/proc/nope", tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RuntimeDirectoryError, match="runtime directory"):
            _made(runtime_root=root)
    # A folder whose name is no UTF-8 is a folder like others.
    _made(runtime_root=os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--mb", "nan", "--", "true"),
        ("run", "--mb", "-1", "--", "true"),
        ("run", "--mb", "1e400", "--", "true"),
        ("run", "--mb", "0", "--", "true"),
        ("run", "--mb", "1", "--wait", "nan", "--", "true"),
        ("run", "--mb", "1", "--wait", "-1", "--", "true"),
        ("run", "--mb", "1", "--namespace", "", "--", "true"),
        ("run", "--mb", "1", "--namespace", "a/b", "--", "true"),
        ("run", "--mb", "1", "--name", "", "--", "true"),
        ("run", "--mb", "1", "--name", "x" * 10000, "--", "true"),
        ("inspect", ""),
        ("inspect", "a/b"),
        ("inspect", "--max-wait", "nan", "test"),
        ("inspect", "--max-wait", "-1", "test"),
        ("top", "--interval", "nan", "test"),
        ("top", "--interval", "inf", "test"),
        ("trace", ""),
        ("plot", "", "-o", "x.png"),
        ("metrics", ""),
        ("metrics", "--serve", "host:port"),
        ("metrics", "--serve", "70000"),
        ("check", ""),
        ("reset", ""),
        ("--runtime-root", "", "list"),
        ("--runtime-root", "/tmp/a\0b", "list"),
    ],
)
def test_the_command_line_refuses_what_it_cannot_use(
    arguments: tuple[str, ...], new_manager: NewManager, namespace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    new_manager()
    before = _accounts(as_json(read_snapshot(namespace)))
    try:
        status: object = main(arguments)
    except SystemExit as end:
        # The parser's own errors.
        status = end.code
    assert status in (2, 125)
    said = capsys.readouterr()
    assert said.err.startswith(("mpmm: ", "usage: mpmm "))
    assert said.out == ""
    assert find_namespaces() == [namespace]
    assert _accounts(as_json(read_snapshot(namespace))) == before


def test_every_parameter_is_in_a_table() -> None:
    def parameters(function: Any) -> set[str]:
        found = set(inspect.signature(function).parameters) - {"self", *FLAGS}
        return found - {"options"} | set(AcquireOptions.__annotations__) - FLAGS if "options" in found else found

    assert parameters(ModelManager) == set(SETTING)
    # Texts for the log or for people, and acquired objects may be anything.
    free = {"ticket_num", "instance", "message", "args", "kind", "error", "trace"}
    # As in `SETTING`, see `test_administration`.
    free.add("changes")
    for name, method in inspect.getmembers(ModelManager, inspect.isfunction):
        if not name.startswith("_"):
            # `uses` asks for nothing before the function is called.
            asked = parameters(method) - free - (set(AcquireOptions.__annotations__) if name == "uses" else set())
            assert asked == set(METHODS.get(name, {})), name
    for estimator in (ResourceEstimator, SharedResourceEstimator):
        for name, method in inspect.getmembers(estimator, inspect.isfunction):
            if not name.startswith("_") and name not in ("logging_info", "solve", "observations"):
                assert parameters(method) - {"default_mb"} == set(ESTIMATES[name]), name
    for function, asked_of in ELSEWHERE.items():
        assert parameters(function) - {"constructor"} == set(asked_of), function
    assert parameters(Lease.used_by) == {"pid"}
    for function in (beam.install, beam.uninstall, beam.is_installed):
        assert parameters(function) == set()
