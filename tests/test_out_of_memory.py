"""Running out of memory: how mpmm recognises it, and what it does about it."""

from __future__ import annotations

import asyncio
import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from device import SimulatedDevice
from harness import (
    NewDevice,
    NewGate,
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
from loaders import Gate, LoadsObject, LoadsServer, MakesServed, Weights
from patience import DEADLINE_S, Stopwatch

from mpmm.errors import ModelTooLargeError, RemoteCallError, SegmentAllocationError, ServerStartError
from mpmm.memory.placement import current_placement
from mpmm.model_manager import ModelManager
from mpmm.policy.out_of_memory import bound_mb, is_out_of_memory, raised_estimate_mb
from mpmm.policy.view import Reason
from mpmm.shared_state.snapshot import read_snapshot


def of_library(module: str, name: str, text: str, *bases: type[BaseException]) -> BaseException:
    """Return an exception as a library that is not installed here would raise it."""
    made: BaseException = type(name, bases or (RuntimeError,), {"__module__": module})(text)
    return made


def caused(error: Exception, cause: BaseException) -> Exception:
    """Return an exception that was raised from another one."""
    error.__cause__ = cause
    return error


class LoadError(Exception):
    """An error in which a library might wrap every other."""


CUDA = "CUDA out of memory. Tried to allocate 166.00 MiB (GPU 0; 8.00 GiB total capacity; 6.93 GiB already allocated)"
TENSOR = "OOM when allocating tensor with shape[16,112,112,147] and type float on /job:localhost/replica:0/device:GPU:0"
XLA = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7406166528 bytes."
ARENA = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Conv node. Status "
    "Message: bfc_arena.cc:376 void* onnxruntime::BFCArena::AllocateRawInternal(size_t, bool) Failed to allocate "
    "memory for requested buffer of size 2830172160"
)
CUDA_CALL = (
    "[ONNXRuntimeError] : 1 : FAIL : cuda_call.cc:121 onnxruntime::CudaCall CUDA failure 2: out of memory ; GPU=0"
)
ORT = "onnxruntime.capi.onnxruntime_pybind11_state"
QUOTA = "429 RESOURCE_EXHAUSTED: Quota exceeded for quota metric 'Queries'"
TRACEBACK = 'Traceback (most recent call last):\n  File "load.py", line 3, in load\n{}: 600 MB asked for\n'

RECOGNISED: dict[str, BaseException] = {
    "torch": of_library("torch", "OutOfMemoryError", CUDA),
    "torch before 2.5": of_library("torch.cuda", "OutOfMemoryError", CUDA),
    "torch, whatever it says": of_library("torch", "OutOfMemoryError", "Allocation on device 0 would exceed"),
    "torch before 1.13": RuntimeError(CUDA),
    "torch, from the driver": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronous"),
    "torch on ROCm": RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
    "torch on Apple's": RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB, max allowed: 9.07 GB)"),
    "torch on the host": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 2359296 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "tensorflow": of_library("tensorflow.python.framework.errors_impl", "ResourceExhaustedError", TENSOR, Exception),
    "a subclass of tensorflow's": of_library(
        "keras", "Worse", "", type(of_library("tensorflow.errors", "ResourceExhaustedError", "", Exception))
    ),
    "tensorflow's text alone": RuntimeError(TENSOR),
    "jax": of_library("jaxlib.xla_extension", "XlaRuntimeError", XLA),
    "jax, other words": of_library("jaxlib._jax", "XlaRuntimeError", "RESOURCE_EXHAUSTED: Failed to allocate request"),
    "jax, new name": of_library("jax.errors", "JaxRuntimeError", XLA),
    "jax, text alone": RuntimeError(XLA),
    "onnxruntime": of_library(ORT, "RuntimeException", ARENA),
    "onnxruntime, from CUDA": of_library(ORT, "Fail", CUDA_CALL),
    "cupy": of_library("cupy.cuda.memory", "OutOfMemoryError", "Out of memory allocating 8,000,000,000 bytes"),
    "numba": RuntimeError("[CUresult.CUDA_ERROR_OUT_OF_MEMORY] Call to cuMemAlloc results in an error"),
    "C++": RuntimeError("std::bad_alloc"),
    "Python": MemoryError(),
    "numpy": of_library("numpy.core._exceptions", "_ArrayMemoryError", "Unable to allocate 7.45 GiB", MemoryError),
    "wrapped": caused(LoadError("cannot load"), of_library("torch", "OutOfMemoryError", CUDA)),
    "wrapped twice": caused(LoadError("no"), caused(LoadError("cannot load"), MemoryError())),
    "in a model server that was starting": ServerStartError(TRACEBACK.format("MemoryError"), tag="a"),
    "torch, in a model server": ServerStartError(TRACEBACK.format("torch.OutOfMemoryError"), tag="a"),
    "in a call to a model server": RemoteCallError(f"predict() raised\n{CUDA}", tag="a", method="predict"),
}
OTHERS: dict[str, BaseException] = {
    "anything": OSError("no such file"),
    "a quota": RuntimeError(QUOTA),
    "a quota, in google's words": of_library("google.api_core.exceptions", "ResourceExhausted", QUOTA),
    "another status of jax's": of_library("jaxlib.xla_extension", "XlaRuntimeError", "INVALID_ARGUMENT: shapes"),
    "another failure of onnxruntime's": of_library(ORT, "RuntimeException", "[ONNXRuntimeError] : 6 : bad shape"),
    "another's class of the name": of_library("patience", "OutOfMemoryError", "I forgot"),
    "a model that is too large": ModelTooLargeError("too large", tag="a"),
    "a segment that is not to be had": SegmentAllocationError("no room"),
    "a server that died": ServerStartError("died unexpectedly with exit code 1 while it made 'a'", tag="a"),
    "a server that speaks of it": ServerStartError(TRACEBACK.format("OSError: MemoryError"), tag="a"),
    "an interrupt": KeyboardInterrupt(),
    "wrapped": caused(LoadError("cannot load"), FileNotFoundError("no weights there")),
    "wrapped twice": caused(
        LoadError("no"), caused(RuntimeError("cannot load"), FileNotFoundError("no weights there"))
    ),
    "a wrapped refusal": caused(LoadError("cannot load"), ModelTooLargeError("too large", tag="a")),
    "what happened while it was handled": ValueError("in the except clause"),
}
OTHERS["what happened while it was handled"].__context__ = MemoryError()


@pytest.mark.parametrize("name", RECOGNISED)
def test_exceptions_of_known_class_or_text_are_recognised(name: str) -> None:
    assert is_out_of_memory(RECOGNISED[name])


@pytest.mark.parametrize("name", OTHERS)
def test_other_exceptions_are_not(name: str) -> None:
    assert not is_out_of_memory(OTHERS[name])


def test_a_raised_estimate_is_higher_but_never_impossible() -> None:
    assert raised_estimate_mb(400, 1000) == 500
    assert raised_estimate_mb(900, 1000) == 1000
    assert raised_estimate_mb(1000, 1000) == 1000
    assert raised_estimate_mb(1100, 1000) == 1100


def test_a_bound_is_what_was_free_but_never_impossible() -> None:
    assert bound_mb(400, 1000) == 400
    assert bound_mb(1000, 1000) == 999
    assert bound_mb(5000, 14400.000000000002) == 5000
    assert bound_mb(16000, 14400.7) + 1 <= 14400.7
    assert bound_mb(-20, 1000) == 0, "what was free says nothing"
    assert bound_mb(float("nan"), 1000) == 0, "it is not known what was free"


# ---- at load -----------------------------------------------------------------------------------------------


@dataclass
class Stubborn:
    """A loader that counts its calls, of which the first ones run out of memory."""

    failures: int
    errors: list[Exception] = field(default_factory=list)
    calls: int = 0

    def __call__(self) -> Any:
        """Load, or not."""
        self.calls += 1
        if self.calls <= self.failures:
            self.errors.append(MemoryError(f"attempt {self.calls}"))
            raise self.errors[-1]
        return Weights()


def fill(manager: ModelManager, device: SimulatedDevice, **mb: float) -> None:
    """Load models of these sizes and leave them idle."""
    learn(Seat(manager), **mb)
    for tag, size in mb.items():
        with manager.model(tag, LoadsObject(tag, device=device, mb=size)):
            pass


def test_a_load_that_runs_out_of_memory_is_repeated_once_there_is_more_room(
    namespace: str, new_manager: NewManager, new_device: NewDevice
) -> None:
    device = new_device(1000)
    manager = new_manager(memory_source=device, poll_interval=0.05)
    fill(manager, device, idle=300)
    learn(Seat(manager), greedy=400)
    # It takes twice as much as is known of it, which the device does not have beside the idle one.
    with manager.model("greedy", LoadsObject("greedy", device=device, mb=800)) as copy:
        assert isinstance(copy, Weights)
        snapshot = read_snapshot(namespace)
        assert (snapshot.out_of_memory, snapshot.failed_loads, snapshot.evictions) == (1, 1, 1)
        assert copies_of(namespace, "idle") == []
        # That much was free beside the idle one. The estimate was wrong, so it is measured alone.
        assert (model_of(namespace, "greedy").estimate_mb, model_of(namespace, "greedy").at_least_mb) == (None, 700)
        assert snapshot.isolated is not None
        assert problems(namespace) == []
    assert model_of(namespace, "greedy").estimate_mb == 800
    [event] = [event for event in snapshot.events if event.kind == "out_of_memory"]
    assert (event.tag, event.value) == ("greedy", 400)
    # The evicted copy's event says why.
    [unload] = [event for event in snapshot.events if event.kind == "unload_began"]
    assert (unload.tag, unload.reason) == ("idle", Reason.OUT_OF_MEMORY)


def test_after_the_second_attempt_the_loaders_exception_arrives_unchanged(
    namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager()
    loader = Stubborn(failures=9)
    with pytest.raises(MemoryError, match="attempt 2") as caught:
        manager.acquire_model("a", loader)
    assert caught.value is loader.errors[1]
    assert loader.calls == 2
    snapshot = read_snapshot(namespace)
    assert (snapshot.instances, snapshot.tickets, snapshot.out_of_memory) == ((), (), 2)
    assert model_of(namespace, "a").estimate_mb == 125


def test_when_there_is_no_second_turn_the_first_exception_arrives(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager = new_manager(fallback_memory_mb=1100, wait_timeout_seconds=1.0)
    holder = new_process()
    holder.call(learn, held=1000)
    holder.call(acquire, "held")
    loader = Stubborn(failures=9)
    # The accounts have room for 100 MB, and not for 125.
    with pytest.raises(MemoryError, match="attempt 1") as caught:
        manager.acquire_model("a", loader)
    assert (caught.value is loader.errors[0], loader.calls) == (True, 1)
    assert caught.value.__context__ is None
    assert (len(read_snapshot(namespace).instances), read_snapshot(namespace).tickets) == (1, ())


def test_what_a_signal_handler_raises_while_the_load_is_given_up_ends_the_call(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = new_manager()

    def is_interrupted(*arguments: Any) -> None:
        monkeypatch.undo()
        raise ZeroDivisionError("as the handler of a soft time limit does")

    monkeypatch.setattr(manager._connected().out_of_memory, "learn_from_load", is_interrupted)
    with pytest.raises(ZeroDivisionError):
        manager.acquire_model("a", Stubborn(failures=1))
    wait_until(lambda: not copies_of(namespace, "a"), "the load is taken back", 2)
    with manager.model("a", Stubborn(failures=0)):
        assert problems(namespace) == []


def test_another_exception_is_not_a_reason_to_try_again(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    calls = []

    def load() -> Any:
        calls.append(1)
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"):
        manager.acquire_model("a", load)
    assert (len(calls), read_snapshot(namespace).out_of_memory) == (1, 0)


def test_an_estimate_is_not_raised_above_what_can_ever_fit(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    learn(Seat(manager), a=950)
    loader = Stubborn(failures=1)
    with manager.model("a", loader):
        assert model_of(namespace, "a").estimate_mb == 1000


def test_the_second_attempt_waits_for_the_object_of_another_process_to_be_gone(
    namespace: str, new_process: NewProcess, new_device: NewDevice
) -> None:
    device = new_device(1000)
    owner, other = new_process(memory_source=device), new_process(memory_source=device)
    owner.call(learn, idle=400, greedy=300)
    owner.call(acquire, "idle", LoadsObject("idle", device=device, mb=400))
    owner.call(release)
    other.call(acquire, "greedy", LoadsObject("greedy", device=device, mb=900))
    assert copies_of(namespace, "idle") == []
    assert read_snapshot(namespace).out_of_memory == 1
    assert problems(namespace) == []


def test_pinned_copies_stay_when_a_load_runs_out_of_memory(
    namespace: str, new_manager: NewManager, new_device: NewDevice
) -> None:
    device = new_device(1000)
    manager = new_manager(memory_source=device)
    manager.pin("pinned")
    fill(manager, device, pinned=300, idle=200)
    learn(Seat(manager), greedy=300)
    with manager.model("greedy", LoadsObject("greedy", device=device, mb=650)):
        assert (model_of(namespace, "pinned").loaded, model_of(namespace, "idle").loaded) == (1, 0)


def test_what_the_first_attempt_had_loaded_is_gone_before_the_second(new_manager: NewManager) -> None:
    manager = new_manager()
    halves: list[weakref.ref[Weights]] = []
    left: list[Weights | None] = []

    def load() -> Any:
        gc.collect()
        left.extend(half() for half in halves)
        half = Weights()
        halves.append(weakref.ref(half))
        if len(halves) == 1:
            raise MemoryError("half way")
        return half

    with manager.model("a", load):
        assert left == [None]


def test_a_model_server_that_runs_out_of_memory_is_started_again(
    namespace: str, new_manager: NewManager, new_device: NewDevice
) -> None:
    device = new_device(1000)
    manager = new_manager(memory_source=device)
    fill(manager, device, idle=300)
    learn(Seat(manager), greedy=400)
    with manager.model("greedy", LoadsServer("greedy", MakesServed(device, 800))) as handle:
        assert handle == "greedy"
        assert copies_of(namespace, "idle") == []
    assert problems(namespace) == []


def test_an_unknown_model_that_runs_out_of_memory_alone_is_still_to_be_measured(
    namespace: str, new_manager: NewManager, new_device: NewDevice
) -> None:
    device = new_device(1000)
    manager = new_manager(memory_source=device)
    loader = Stubborn(failures=9)
    with pytest.raises(MemoryError, match="attempt 1"):
        manager.acquire_model("unknown", loader)
    assert model_of(namespace, "unknown").estimate_mb is None
    assert read_snapshot(namespace).isolated is None


def test_a_load_that_had_the_device_to_itself_gets_no_second_turn(
    namespace: str, new_manager: NewManager, new_gpus: Callable[..., Any]
) -> None:
    gpus = new_gpus(1000)
    manager = new_manager(memory_source="nvml", memory_return_seconds=30.0)
    fails = LoadsServer("huge", MakesServed(gpus, 1500))
    for _ in range(2):
        watch = Stopwatch()
        with pytest.raises(ServerStartError):
            manager.acquire_model("huge", fails)
        assert watch.calm_s() < 10, "nothing was waited for"
    # It is not refused, since it is not certain why the loader ran out.
    model = model_of(namespace, "huge")
    assert (model.estimate_mb, model.at_least_mb, read_snapshot(namespace).out_of_memory) == (None, 999, 2)
    assert problems(namespace) == []


def test_beside_pinned_copies_a_load_gets_no_second_turn_either(
    namespace: str, new_manager: NewManager, new_device: NewDevice
) -> None:
    device = new_device(1000)
    manager = new_manager(memory_source=device)
    manager.pin("pinned")
    fill(manager, device, pinned=300)
    learn(Seat(manager), greedy=300)
    loader = Stubborn(failures=9)
    with pytest.raises(MemoryError, match="attempt 1"):
        manager.acquire_model("greedy", loader)
    assert model_of(namespace, "greedy").at_least_mb == 700


def test_what_ran_out_of_memory_on_a_small_device_gets_its_second_turn_on_a_larger_one(
    namespace: str, new_manager: NewManager, new_device: NewDevice
) -> None:
    device = new_device(500, 2000)
    manager = new_manager(memory_source=device)
    learn(Seat(manager), big=400)
    places: list[int] = []

    def load() -> Any:
        placement = current_placement()
        assert placement is not None
        places.extend(placement.indices)
        return Weights("big", device, 1200, placement.indices[0])

    with manager.reserve(1900, devices=[1]):
        pass
    with manager.reserve(1700, devices=[1]) as lease:
        # The larger one is full at first, so that the smaller one is tried.
        places_tried = Thread(target=lambda: manager.release_model("big", manager.acquire_model("big", load)))
        places_tried.start()
        wait_until(lambda: read_snapshot(namespace).out_of_memory == 1, "it has run out on the small one")
        wait_until(lambda: waiting(namespace, "big"), "its second turn waits for the lease")
        lease.release()
        places_tried.join(DEADLINE_S)
    assert places == [0, 1]
    assert problems(namespace) == []


def test_what_loads_in_its_second_turn_is_measured_like_everything_else(
    namespace: str, new_manager: NewManager, new_gpus: Callable[..., Any]
) -> None:
    gpus = new_gpus(16000)
    manager = new_manager(memory_source="nvml", default_estimate_mb=1000)
    for turn, tag in enumerate("abab"):
        with manager.model(tag, LoadsServer(f"{tag}{turn}", MakesServed(gpus, 9000))):
            pass
    snapshot = read_snapshot(namespace)
    assert {model.tag: (model.estimate_mb, model.measured) for model in snapshot.models} == {
        "a": (9000, True),
        "b": (9000, True),
    }
    assert (snapshot.out_of_memory, model_of(namespace, "b").at_least_mb) == (1, 7000)
    assert problems(namespace) == []


def test_a_wrong_estimate_is_measured_anew_where_the_source_knows_processes(
    namespace: str, new_manager: NewManager, new_gpus: Callable[..., Any]
) -> None:
    gpus = new_gpus(1000)
    manager = new_manager(memory_source="nvml")
    learn(Seat(manager), idle=300, greedy=400)
    with manager.model("idle", LoadsServer("idle", MakesServed(gpus, 300))):
        pass
    with manager.model("greedy", LoadsServer("greedy", MakesServed(gpus, 800))):
        pass
    assert (model_of(namespace, "greedy").estimate_mb, read_snapshot(namespace).out_of_memory) == (800, 1)


def test_what_others_load_meanwhile_is_not_taken_for_free(
    namespace: str, new_process: NewProcess, new_device: NewDevice, new_gate: NewGate
) -> None:
    device = new_device(1000)
    first, second = new_process(memory_source=device), new_process(memory_source=device)
    first.call(learn, slow=200, quick=500)
    began, go = new_gate(), new_gate()
    first.send(fails_with_memory_error, "slow", began, go)
    began.wait()
    second.call(acquire, "quick", LoadsObject("quick", device=device, mb=500))
    go.open()
    wait_until(lambda: read_snapshot(namespace).out_of_memory == 1, "it has run out of memory")
    assert model_of(namespace, "slow").at_least_mb == 500, "not 1000"
    second.call(release)
    with pytest.raises(MemoryError):
        first.result()


def fails_with_memory_error(seat: Seat, tag: str, began: Gate, go: Gate) -> None:
    """Acquire with a loader that says when it begins, and runs out of memory when it may go on."""

    def load() -> Any:
        began.open()
        go.wait()
        raise MemoryError("too much")

    seat.manager.acquire_model(tag, load)


def test_an_estimate_that_was_kept_on_disk_does_not_come_back_after_it_was_refuted(
    namespace: str, tmp_path: Path, new_manager: NewManager, new_device: NewDevice
) -> None:
    device = new_device(1000)
    path = tmp_path / "estimates.json"
    entry = {"mb": 400.0, "measured": False, "updated": 1.0}
    content = {"format": "mpmm estimates", "version": 1, "devices": {"device 0": {"greedy": entry}}}
    path.write_text(json.dumps(content), encoding="utf-8")
    manager = new_manager(memory_source=device, estimates_path=path)
    fill(manager, device, idle=300)
    with manager.model("greedy", LoadsObject("greedy", device=device, mb=800)):
        assert read_snapshot(namespace).out_of_memory == 1
        assert (model_of(namespace, "greedy").estimate_mb, model_of(namespace, "greedy").at_least_mb) == (None, 700)
    assert model_of(namespace, "greedy").estimate_mb == 800


def test_a_preload_that_runs_out_of_memory_is_repeated(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    loader = Stubborn(failures=1)
    assert manager.preload("a", loader) == 1
    assert (loader.calls, model_of(namespace, "a").idle) == (2, 1)


def test_a_load_booked_by_hand_is_repeated(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    assert manager.should_spawn_model("a", 1)
    loader = Stubborn(failures=1)
    manager.release_model("a", manager.acquire_model("a", loader))
    assert loader.calls == 2


# ---- in use ------------------------------------------------------------------------------------------------


def test_a_block_that_runs_out_of_memory_makes_room_for_the_next_attempt(
    namespace: str, new_process: NewProcess, new_manager: NewManager, new_device: NewDevice
) -> None:
    device = new_device(1000)
    manager = new_manager(memory_source=device)
    fill(manager, device, idle=300, pinned=100)
    manager.pin("pinned")
    learn(Seat(manager), greedy=400)
    error = of_library("torch", "OutOfMemoryError", CUDA)
    with pytest.raises(RuntimeError) as caught, manager.model("greedy", LoadsObject("g", device=device, mb=400)):
        raise error
    assert caught.value is error
    # It had 400 MB of its own, and 200 that were free; a copy still takes 400.
    assert (model_of(namespace, "greedy").estimate_mb, model_of(namespace, "greedy").at_least_mb) == (400, 600)
    assert (model_of(namespace, "greedy").idle, model_of(namespace, "pinned").idle) == (1, 1)
    wait_until(lambda: not copies_of(namespace, "idle"), "what was idle is unloaded")
    assert read_snapshot(namespace).out_of_memory == 1
    assert problems(namespace) == []


def test_an_async_block_that_runs_out_of_memory_makes_room_too(
    namespace: str, new_manager: NewManager, new_device: NewDevice
) -> None:
    device = new_device(1000)
    manager = new_manager(memory_source=device)
    fill(manager, device, idle=300)
    learn(Seat(manager), greedy=400)

    async def use() -> None:
        async with manager.model_async("greedy", LoadsObject("g", device=device, mb=400)):
            raise MemoryError("a batch too large")

    with pytest.raises(MemoryError, match="a batch too large"):
        asyncio.run(use())
    assert (model_of(namespace, "greedy").estimate_mb, model_of(namespace, "greedy").at_least_mb) == (400, 700)
    wait_until(lambda: not copies_of(namespace, "idle"), "what was idle is unloaded")


def test_a_batch_that_is_too_large_for_the_device_does_not_make_its_model_impossible(
    namespace: str, new_manager: NewManager, new_device: NewDevice
) -> None:
    device = new_device(1000)
    manager = new_manager(memory_source=device)
    learn(Seat(manager), a=400)
    for _ in range(3):
        with pytest.raises(MemoryError), manager.model("a", LoadsObject("a", device=device, mb=400)):
            raise MemoryError("a batch too large")
    assert model_of(namespace, "a").at_least_mb <= 999
    fill(manager, device, other=500)
    with manager.model("a", LoadsObject("a", device=device, mb=400)):
        assert problems(namespace) == []


def test_another_exception_of_a_block_changes_nothing(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    with pytest.raises(ValueError, match="shape"), manager.model("a", Stubborn(failures=0)):
        raise ValueError("shape")
    assert read_snapshot(namespace).out_of_memory == 0
    assert model_of(namespace, "a").estimate_mb == 100
