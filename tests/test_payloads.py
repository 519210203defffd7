"""Large payloads through shared objects: they arrive unchanged, and nothing changes them afterwards."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from array import array as number_array
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, SupportsIndex

import numpy as np
import payloads
import pytest
from patience import DEADLINE_S
from payload_store import CallsWhenUnpickled, CarriesArray, HasBuffer, Registered, RegisteredAsBeamExpects, Subclass
from payloads import LARGE, LARGER_THAN_A_BUFFER, NUMBERS, acquired, assert_same

from mpmm.multi_process_shared.rpc import pickling, receive_buffers
from mpmm.multi_process_shared.rpc.channel import LARGE_BYTES, Channel, Message
from mpmm.multi_process_shared.rpc.pickling import dump, load
from mpmm.multi_process_shared.rpc.receive_buffers import SLAB_BYTES, SPARE_BYTES, drop_spare_slabs, receive_memory
from mpmm.multi_process_shared.rpc.shared_buffer import SHARED_BUFFER_BYTES, SLOT_BYTES

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="there are shared buffers on Linux only")
in_room = payloads.in_room
spawned = payloads.spawned
pair = payloads.pair


@pytest.fixture(params=[False, True], ids=["hosted", "spawned"])
def proxy(request: pytest.FixtureRequest, in_room: None) -> Any:
    return acquired(request.param)


def read_only(array: Any) -> Any:
    array.flags.writeable = False
    return array


ARRAYS: dict[str, Any] = {
    "small": np.arange(40.0),
    "large": NUMBERS,
    "larger than a shared buffer": LARGER_THAN_A_BUFFER,
    "exactly the threshold": np.zeros(LARGE_BYTES, np.uint8),
    "one below the threshold": np.zeros(LARGE_BYTES - 1, np.uint8),
    "exactly a slot": np.ones(SLOT_BYTES, np.uint8),
    "exactly a shared buffer": np.ones(SHARED_BUFFER_BYTES, np.uint8),
    "Fortran order, small": np.asfortranarray(NUMBERS[:3, :4]),
    "Fortran order, large": np.asfortranarray(NUMBERS),
    "every other column, small": NUMBERS[:4, ::2],
    "every other column, large": NUMBERS[:, ::2],
    "backwards": NUMBERS[::-1],
    "read-only, small": read_only(np.arange(4)),
    "read-only, large": read_only(NUMBERS.copy()),
    "empty": np.zeros((3, 0, 2)),
    "no dimension": np.array(3),
    "objects": np.array([1, "two", None, 3.5], dtype=object),
    "many objects": np.array([{"number": i} for i in range(20_000)], dtype=object),
    "records": np.zeros(20_000, [("a", "<i4"), ("b", "<f8", (2,))]),
    "truth values": NUMBERS > 0.5,
    "complex": NUMBERS + 1j * NUMBERS,
    "half": NUMBERS.astype(np.float16),
    "long double": np.arange(5, dtype=np.longdouble),
    "other byte order": np.arange(7, dtype=">i2"),
    "dates": np.arange("2020-01", "2023-01", dtype="datetime64[D]"),
    "texts": np.array(["short", "longer than short"]),
    "bytes": np.array([b"a", b"bc"]),
    "masked": np.ma.masked_greater(NUMBERS, 0.5),
    "a subclass": NUMBERS[:2].view(Subclass),
    "scalar": np.float32(2.5),
    "type": np.dtype("f4"),
}


# Arrival.


def test_arrays_arrive_as_from_a_plain_pickle_but_writable(proxy: Any) -> None:
    wrong = {}
    for name, array in ARRAYS.items():
        expected = pickle.loads(pickle.dumps(array, 5))
        if name.startswith("read-only"):
            assert not expected.flags.writeable
            expected = expected.copy(order="K")
        try:
            assert_same(proxy.echo(array), expected)
        except Exception as error:
            wrong[name] = error
    assert wrong == {}


def test_arrays_own_their_memory_where_they_do_with_beam(proxy: Any) -> None:
    # Beam's pickles are of this protocol: up to 1000 bytes are copied out of them.
    owned = [name for name, array in ARRAYS.items() if owns_memory(pickle.loads(pickle.dumps(array, 4)))]
    assert {"small", "read-only, small", "Fortran order, small", "objects", "texts"} <= set(owned)
    for name in owned:
        found = proxy.echo(ARRAYS[name])
        assert owns_memory(found), name
        if type(found) is np.ndarray:
            found.resize(100)
            assert len(found) == 100, name


def owns_memory(array: Any) -> bool:
    """Tell whether an array owns its memory."""
    return isinstance(array, np.ndarray) and array.flags.owndata


def test_nested_structures_arrive_equal(proxy: Any) -> None:
    batch = [np.full(75_000, float(number)) for number in range(32)]
    found = proxy.echo({"batch": batch, "deep": (NUMBERS, [{"text": "x" * LARGE_BYTES}]), 3: None})
    assert list(found) == ["batch", "deep", 3]
    for array, expected in zip(found["batch"], batch, strict=True):
        assert_same(array, expected)
    assert_same(found["deep"][0], NUMBERS)
    assert found["deep"][1] == [{"text": "x" * LARGE_BYTES}]


def test_an_array_that_is_sent_twice_in_a_message_arrives_as_one(proxy: Any) -> None:
    first, second = proxy.echo([NUMBERS, NUMBERS])
    assert first is second


def test_more_buffers_than_a_frame_has_room_for_arrive_in_order(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    buffers = [memoryview(bytes([number % 251]) * (number % 7 + 1)) for number in range(20_000)]
    sender = threading.Thread(target=ours.send, args=(Message(b"head", buffers),))
    sender.start()
    head, found = theirs.receive()
    sender.join(DEADLINE_S)
    assert bytes(head) == b"head"
    assert [bytes(buffer) for buffer in found] == [bytes(buffer) for buffer in buffers]


def test_bytes_in_a_pickle_buffer_arrive_equal(proxy: Any) -> None:
    for size in (10, 5 * LARGE_BYTES):
        for kind in (bytes, bytearray):
            data = kind(os.urandom(size))
            found = proxy.echo(pickle.PickleBuffer(data))
            assert (type(found), found) == (kind, data)


def test_a_class_that_gives_its_data_as_a_buffer_gets_one_back(proxy: Any) -> None:
    for count in (3, LARGE):
        assert proxy.echo(HasBuffer(number_array("d", range(count)))).numbers == number_array("d", range(count))


def test_long_bytes_and_texts_arrive_equal(proxy: Any) -> None:
    kinds: tuple[Callable[[bytes], Any], ...] = (bytes, bytearray, bytes.hex)
    for kind in kinds:
        data = kind(os.urandom(SHARED_BUFFER_BYTES + 3))
        assert proxy.echo(data) == data


def test_exceptions_arrive_with_the_arrays_that_they_carry(proxy: Any) -> None:
    for array in (np.arange(3), NUMBERS):
        with pytest.raises(CarriesArray) as caught:
            proxy.fail_with(array)
        assert_same(caught.value.args[0], array)
        assert "in fail_with" in str(caught.value.__cause__)


def test_data_frames_arrive_equal(proxy: Any) -> None:
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    frame = pandas.DataFrame({"a": np.arange(50_000), "b": np.arange(50_000) / 3, "c": ["text"] * 50_000})
    pandas.testing.assert_frame_equal(proxy.echo(frame), frame)


def test_a_column_of_pandas_arrives_as_an_array_that_can_be_changed(proxy: Any) -> None:
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    for count in (4, LARGE):
        # Read-only from pandas 3 on.
        column = pandas.Series(np.arange(float(count))).to_numpy()
        found = proxy.echo(column)
        found -= found.mean()
        assert found[0] == -(count - 1) / 2


def test_tensors_on_the_cpu_arrive_equal(proxy: Any) -> None:
    torch = pytest.importorskip("torch", reason="needs torch, which is too large for the extra dev")
    tensors = [
        torch.arange(10.0),
        torch.rand(300, 400),
        torch.rand(300, 400).to(torch.bfloat16),
        torch.rand(300, 400).t(),
        torch.zeros(0, 3),
        torch.tensor(4),
        torch.rand(5, requires_grad=True),
        torch.rand(300, 400) > 0.5,
    ]
    for found, tensor in zip(proxy.echo(tensors), tensors, strict=True):
        assert (found.dtype, found.requires_grad) == (tensor.dtype, tensor.requires_grad)
        assert torch.equal(found, tensor)


def test_a_tensor_on_an_accelerator_is_pickled_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tensor:
        __module__ = "torch"
        device = SimpleNamespace(type="cuda")

        def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
            return str, ("as torch does",)

    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(Tensor=Tensor))
    try:
        assert load(dump(Tensor())) == "as torch does"
    finally:
        pickling._Pickler.dispatch_table.pop(Tensor)


def test_reducers_that_others_have_registered_are_used(proxy: Any) -> None:
    assert proxy.echo([NUMBERS, Registered(1)])[1].number == 3
    assert proxy.echo([NUMBERS, RegisteredAsBeamExpects(1)])[1].number == 3
    with pytest.raises(ValueError, match="carries it") as caught:
        proxy.fail_with_attribute(RegisteredAsBeamExpects(1))
    error: Any = caught.value
    assert error.thing.number == 3


def test_views_of_a_dict_arrive_as_lists_as_with_beam(proxy: Any) -> None:
    assert proxy.views() == [["a"], [1], [("a", 1)]]
    assert proxy.echo({"a": 1}.values()) == [1]


def test_what_is_only_a_descriptor_is_refused_and_the_server_keeps_its_own(spawned: Any) -> None:
    ours, theirs = multiprocessing.Pipe()
    one, other = socket.socketpair()
    with ours, theirs, one, other:
        before = spawned.descriptors()
        for thing in (ours, one):
            for wrong in (thing, [NUMBERS, thing]):
                with pytest.raises(TypeError, match=r"a .* is a file descriptor of this process"):
                    spawned.echo(wrong)
        # A result that cannot be sent stays there.
        pipe = spawned.open_pipe()
        assert not isinstance(pipe, Connection)
        assert pipe.readable
        del pipe
        gc.collect()
        # Its other end was closed at once.
        assert spawned.echo(1) == 1
        assert spawned.descriptors() == before
        ours.send(1)
        assert theirs.recv() == 1


def test_a_call_in_the_middle_of_unpickling_does_not_disturb_the_answer(spawned: Any) -> None:
    sent = [CallsWhenUnpickled(os.getpid(), spawned), "y" * 1000]
    assert spawned.echo(sent) == ["x" * 1000, "y" * 1000]


# Ownership of memory.


def test_what_was_received_does_not_change_with_later_calls(spawned: Any) -> None:
    found = [spawned.echo(np.full(LARGE, float(number))) for number in range(20)]
    for number, array in enumerate(found):
        assert (array == number).all()


def test_what_the_object_keeps_does_not_change_with_later_calls(spawned: Any) -> None:
    array = np.zeros(LARGE)
    for number in range(10):
        array[:] = number
        spawned.keep(array)
    for number, kept in enumerate(spawned.get_kept()):
        assert (kept == number).all()


def test_what_was_received_can_be_written_to_and_is_nobody_elses(spawned: Any) -> None:
    spawned.keep([np.zeros(LARGE), np.zeros(LARGE)])
    first, second = spawned.get_kept()[0]
    first[:] = 1
    assert not second.any()
    assert not any(kept.any() for kept in spawned.get_kept()[0])


def test_a_forked_child_has_copies_of_what_was_received(spawned: Any) -> None:
    arrays = spawned.echo([np.zeros(LARGE), np.zeros(SLAB_BYTES)])
    child = os.fork()
    if child == 0:
        for received in arrays:
            received[:] = 1
        os._exit(0)
    os.waitpid(child, 0)
    assert not any(received.any() for received in arrays)


def test_buffers_of_a_message_share_a_slab_only_while_it_is_small() -> None:
    views = receive_memory([600_000] * 32 + [SLAB_BYTES + 1, 5])
    assert [view.nbytes for view in views] == [600_000] * 32 + [SLAB_BYTES + 1, 5]
    arrays = [np.frombuffer(view, np.uint8) for view in views]
    assert all(array.ctypes.data % 16 == 0 for array in arrays)
    for number, array in enumerate(arrays):
        array[:] = number
    assert all((array == number).all() for number, array in enumerate(arrays))
    slabs: dict[int, int] = {}
    for view in views:
        slabs[id(view.obj)] = slabs.get(id(view.obj), 0) + view.nbytes
    assert 5 < len(slabs) < 15, "a few large ones"
    assert max(slabs.values()) <= SLAB_BYTES + 5 + 1


def test_memory_of_what_was_received_is_used_again_once_nobody_can_reach_it() -> None:
    drop_spare_slabs()
    first = np.frombuffer(receive_memory([SLAB_BYTES])[0], np.uint8)
    address = first.ctypes.data
    part = first[5:10].reshape(5, 1)
    del first
    gc.collect()
    second = np.frombuffer(receive_memory([SLAB_BYTES])[0], np.uint8)
    assert second.ctypes.data != address
    del part
    assert np.frombuffer(receive_memory([SLAB_BYTES])[0], np.uint8).ctypes.data == address


def test_memory_that_is_kept_is_bounded_and_is_dropped_when_idle() -> None:
    drop_spare_slabs()
    views = receive_memory([SLAB_BYTES] * (SPARE_BYTES // SLAB_BYTES + 3))
    assert receive_buffers._kept_bytes() == SPARE_BYTES
    drop_spare_slabs()
    assert receive_buffers._kept_bytes() == SPARE_BYTES
    views = receive_memory([2 * SPARE_BYTES])
    assert receive_buffers._kept_bytes() == SPARE_BYTES
    views = receive_memory([SPARE_BYTES])
    assert [slab.size for slab in receive_buffers._slabs] == [SPARE_BYTES]
    del views
    drop_spare_slabs()
    assert receive_buffers._slabs == []


def test_what_a_signal_handler_raises_at_the_end_of_an_array_is_not_lost() -> None:
    class Interrupted(Exception):
        pass

    def interrupt(number: int, frame: Any) -> None:
        raise Interrupted

    def receive(deadline: float) -> None:
        while time.monotonic() < deadline:
            receive_memory([SLAB_BYTES])

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(200):
            interrupted = False
            deadline = time.monotonic() + DEADLINE_S
            # Not `pytest.raises`, because the signal could also arrive while it is entered.
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.000_2)
                # In a function of its own: Python 3.13 guards no jump back of a loop that stands in a `try` itself.
                receive(deadline)
            except Interrupted:
                interrupted = True
            assert interrupted
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_array_that_is_kept_to_the_end_of_the_process_ends_in_silence(runtime_root: Path) -> None:
    script = (
        "import numpy, sys\n"
        "from mpmm.multi_process_shared import MultiProcessShared\n"
        "kept = MultiProcessShared(dict, 'it', always_proxy=True).acquire()\n"
        "kept.update(array=numpy.ones(1_000_000))\n"
        "sys.kept = [array, again] = [kept.get('array'), kept.get('array')]\n"
        "numpy.kept = kept.get('array')\n"
        "print(array.sum() + again.sum())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=DEADLINE_S)
    assert (done.stdout, done.stderr) == ("2000000.0\n", "")
