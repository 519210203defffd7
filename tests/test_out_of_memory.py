"""Running out of memory: how it is recognised, and what is done about it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from processes import (
    Gate,
    LoadsObject,
    LoadsServer,
    MakesServed,
    Process,
    Seat,
    SimulatedDevice,
    Weights,
    acquire,
    copies_of,
    learn,
    model_of,
    problems,
    release,
    wait_until,
)

from mpmm.errors import ModelTooLargeError, RemoteCallError, SegmentAllocationError, ServerStartError
from mpmm.model_manager import ModelManager
from mpmm.policy.out_of_memory import is_out_of_memory, raised_estimate_mb
from mpmm.shared_state.snapshot import read_snapshot

NewManager = Callable[..., ModelManager]
NewProcess = Callable[..., Process]
NewGate = Callable[[], Gate]
NewDevice = Callable[..., SimulatedDevice]


def of_library(module: str, name: str, text: str, *bases: type[BaseException]) -> BaseException:
    """Return an exception as a library that is not installed here would raise it."""
    made: BaseException = type(name, bases or (RuntimeError,), {"__module__": module})(text)
    return made


def caused(error: Exception, cause: BaseException) -> Exception:
    """Return an exception that was raised from another one."""
    error.__cause__ = cause
    return error


class LoadError(Exception):
    """What a library might wrap every trouble in."""


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


# ---- at load -----------------------------------------------------------------------------------------------


@dataclass
class Stubborn:
    """A loader that counts its calls, of which the first so many run out of memory."""

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
        assert model_of(namespace, "greedy").estimate_mb == 500
        assert problems(namespace) == []
    [event] = [event for event in snapshot.events if event.kind == "out_of_memory"]
    assert (event.tag, event.value) == ("greedy", 400)


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
    assert (snapshot.instances, snapshot.tickets, snapshot.out_of_memory) == ((), (), 1)
    assert model_of(namespace, "a").estimate_mb == 125


def test_when_there_is_no_second_turn_the_first_exception_arrives(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager = new_manager(fallback_memory_mb=1100, wait_timeout_seconds=0.3)
    holder = new_process()
    holder.call(learn, held=1000)
    holder.call(acquire, "held")
    loader = Stubborn(failures=9)
    # The books have room for 100 MB, and not for 125.
    with pytest.raises(MemoryError, match="attempt 1") as caught:
        manager.acquire_model("a", loader)
    assert (caught.value is loader.errors[0], loader.calls) == (True, 1)
    assert caught.value.__context__ is None
    assert (len(read_snapshot(namespace).instances), read_snapshot(namespace).tickets) == (1, ())


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
    with pytest.raises(MemoryError, match="attempt 2"):
        manager.acquire_model("unknown", loader)
    assert model_of(namespace, "unknown").estimate_mb is None
    assert read_snapshot(namespace).isolated is None


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
    assert model_of(namespace, "greedy").estimate_mb == 500
    assert (model_of(namespace, "greedy").idle, model_of(namespace, "pinned").idle) == (1, 1)
    wait_until(lambda: not copies_of(namespace, "idle"), "what was idle is unloaded")
    assert read_snapshot(namespace).out_of_memory == 1
    assert problems(namespace) == []


def test_another_exception_of_a_block_changes_nothing(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    with pytest.raises(ValueError, match="shape"), manager.model("a", Stubborn(failures=0)):
        raise ValueError("shape")
    assert read_snapshot(namespace).out_of_memory == 0
    assert model_of(namespace, "a").estimate_mb == 100
