"""Large payloads through shared objects: all arrives as it was, nothing changes afterwards, nothing is left behind."""

from __future__ import annotations

import fcntl
import gc
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from array import array as number_array
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from harness import Process, Seat, wait_until
from patience import DEADLINE_S
from payload_store import CallsWhenUnpickled, CarriesArray, HasBuffer, Registered, Store, Subclass, shared_buffers

from mpmm.errors import ModelServerError
from mpmm.multi_process_shared import MultiProcessShared, unload
from mpmm.multi_process_shared.client import forget_link, known_link
from mpmm.multi_process_shared.registry import registry_for
from mpmm.multi_process_shared.rpc import channel, receive_buffers, shared_buffer, sockets
from mpmm.multi_process_shared.rpc.channel import LARGE_BYTES, Channel, Message
from mpmm.multi_process_shared.rpc.receive_buffers import SLAB_BYTES, SPARE_BYTES, drop_spare_slabs, receive_memory
from mpmm.multi_process_shared.rpc.shared_buffer import LIMIT_VARIABLE, SHARED_BUFFER_BYTES, SLOT_BYTES, cut_into_slots

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="there are shared buffers on Linux only")

TAG = "payloads"
LARGE = 3 * LARGE_BYTES // 8  # numbers of 8 bytes


def resident_shared_kb() -> int:
    """Return how much memory of shared buffers this process sees."""
    resident, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, value = line.partition(" ")
        if not name.endswith(":"):
            inside = "memfd:mpmm-buffer" in line
        elif inside and name == "Rss:":
            resident += int(value.split()[0])
    return resident


def acquired(spawn: bool = True) -> Any:
    return MultiProcessShared(Store, tag=TAG, always_proxy=True, spawn_process=spawn).acquire()


@pytest.fixture
def in_room(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Deletes the shared object in the end."""
    # What is sent does not depend on how the server was started, and a single one is there soonest without a zygote.
    monkeypatch.setenv("MPMM_ZYGOTE", "0")
    yield
    unload(TAG)
    # With the last of these goes the connection, and with that the shared buffer.
    if (link := known_link(registry_for(None), TAG)) is not None:
        forget_link(link)
        del link
    gc.collect()


@pytest.fixture(params=[False, True], ids=["hosted", "spawned"])
def proxy(request: pytest.FixtureRequest, in_room: None) -> Any:
    return acquired(request.param)


@pytest.fixture
def spawned(in_room: None) -> Any:
    return acquired()


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    """Two ends of a connection in this process."""
    ours, theirs = (Channel(Connection(end.detach())) for end in socket.socketpair())
    yield ours, theirs
    ours.close()
    theirs.close()


def read_only(array: Any) -> Any:
    array.flags.writeable = False
    return array


NUMBERS = np.random.default_rng(7).random((300, 400))
ARRAYS: dict[str, Any] = {
    "small": np.arange(40.0),
    "large": NUMBERS,
    "larger than a shared buffer": np.arange(3 * SHARED_BUFFER_BYTES // 8 + 5),
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


def assert_same(found: Any, expected: Any) -> None:
    """Fail unless an array is like the one that a plain pickle brings."""
    assert type(found) is type(expected)
    np.testing.assert_array_equal(found, expected)
    if isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        for flag in ("writeable", "c_contiguous", "f_contiguous", "aligned"):
            assert getattr(found.flags, flag) == getattr(expected.flags, flag), flag


# What arrives.


def test_arrays_arrive_as_from_a_plain_pickle(proxy: Any) -> None:
    wrong = {}
    for name, array in ARRAYS.items():
        try:
            assert_same(proxy.echo(array), pickle.loads(pickle.dumps(array, 5)))
        except Exception as error:
            wrong[name] = error
    assert wrong == {}


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


def test_reducers_that_others_have_registered_are_used(proxy: Any) -> None:
    assert proxy.echo([NUMBERS, Registered(1)])[1].number == 3


def test_a_call_in_the_middle_of_unpickling_does_not_disturb_the_answer(spawned: Any) -> None:
    sent = [CallsWhenUnpickled(os.getpid(), spawned), "y" * 1000]
    assert spawned.echo(sent) == ["x" * 1000, "y" * 1000]


# Whose memory it is.


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
    assert len(slabs) > 5
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

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(200):
            interrupted = False
            deadline = time.monotonic() + DEADLINE_S
            # Not `pytest.raises`, on whose way in the signal could come, too.
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.000_2)
                while time.monotonic() < deadline:
                    receive_memory([SLAB_BYTES])
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


# Shared buffers: when there are some, and when not.


def test_a_connection_keeps_one_arena_for_both_directions(spawned: Any) -> None:
    assert (shared_buffers(), spawned.shared_buffers()) == (0, 0)
    for _ in range(5):
        spawned.echo(NUMBERS)
        assert (shared_buffers(), spawned.shared_buffers()) == (1, 1)


def test_the_side_that_has_something_large_makes_the_arena(spawned: Any) -> None:
    assert len(spawned.zeros(LARGE)) == LARGE
    assert (shared_buffers(), spawned.shared_buffers()) == (1, 1)
    spawned.keep(NUMBERS)
    assert (shared_buffers(), spawned.shared_buffers()) == (1, 1)


def test_beyond_the_limit_payloads_go_through_the_socket(spawned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Here only: the server may have shared buffers, so both offers and refusals of this process are tried.
    monkeypatch.setenv(LIMIT_VARIABLE, "0")
    assert_same(spawned.echo(NUMBERS), NUMBERS)
    assert len(spawned.zeros(LARGE)) == LARGE
    assert (shared_buffers(), spawned.shared_buffers()) == (0, 0)
    monkeypatch.setenv(LIMIT_VARIABLE, str(SHARED_BUFFER_BYTES / 2**20))
    assert_same(spawned.echo(NUMBERS), NUMBERS)
    in_thread(lambda: assert_same(spawned.echo(NUMBERS), NUMBERS))
    assert (shared_buffers(), spawned.shared_buffers()) == (1, 1)


def no_memory(*_: Any) -> None:
    raise OSError(28, "No space left on device")


class NothingAvailable:
    available = 0


@pytest.mark.parametrize(
    ("what", "instead"),
    [("os.posix_fallocate", no_memory), ("os.memfd_create", no_memory), ("psutil.virtual_memory", NothingAvailable)],
)
def test_without_memory_for_an_arena_payloads_go_through_the_socket(
    spawned: Any, monkeypatch: pytest.MonkeyPatch, what: str, instead: Any
) -> None:
    before = psutil.Process().num_fds()
    with monkeypatch.context() as patched:
        patched.setattr(f"mpmm.multi_process_shared.rpc.shared_buffer.{what}", instead)
        spawned.keep(ARRAYS["larger than a shared buffer"])
        assert shared_buffers() == 0
        # Threads of earlier tests may still be closing theirs, and opening them.
        wait_until(lambda: psutil.Process().num_fds() == before, "no descriptor is left")
    assert_same(spawned.get_kept()[0], ARRAYS["larger than a shared buffer"])
    assert shared_buffers() == 1


@pytest.mark.parametrize("offered", ["unsealed", "short"])
def test_a_file_that_may_shrink_is_not_taken_for_an_arena(
    pair: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch, offered: str
) -> None:
    ours, theirs = pair

    def create() -> tuple[Any, int]:
        fd = os.memfd_create("mpmm-buffer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.truncate(fd, SHARED_BUFFER_BYTES if offered == "unsealed" else SHARED_BUFFER_BYTES // 2)
        if offered == "short":
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, shared_buffer._seals())
        return None, fd

    before = psutil.Process().num_fds()
    monkeypatch.setattr(channel, "create_shared_buffer", create)
    sender = threading.Thread(target=ours.send, args=(Message(NUMBERS.tobytes()),))
    sender.start()
    head, _ = theirs.receive()
    sender.join(DEADLINE_S)
    assert bytes(head) == NUMBERS.tobytes()
    assert shared_buffers() == 0
    assert psutil.Process().num_fds() == before


def test_an_idle_arena_is_freed_on_both_sides_and_replaced_when_needed(
    in_room: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "IDLE_MS", 50)
    proxy = acquired(spawn=False)
    for _ in range(3):
        assert_same(proxy.echo(NUMBERS), NUMBERS)
        wait_until(lambda: resident_shared_kb() == 0, "the shared buffer's memory is free")
        assert shared_buffers() == 1
        assert proxy.echo(3) == 3


def test_a_payload_is_whole_although_its_sender_goes_before_it_was_copied(
    pair: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair
    gone = threading.Event()

    def send_and_go() -> None:
        ours.send(Message(NUMBERS.tobytes()))
        ours.close()
        gone.set()

    def cut_late(buffers: Sequence[memoryview]) -> Iterator[list[memoryview]]:
        yield from cut_into_slots(buffers)
        if threading.current_thread() is not sender:
            assert gone.wait(DEADLINE_S)

    monkeypatch.setattr(channel, "cut_into_slots", cut_late)
    sender = threading.Thread(target=send_and_go)
    sender.start()
    head, _ = theirs.receive()
    assert bytes(head) == NUMBERS.tobytes()
    sender.join(DEADLINE_S)


def test_a_payload_is_cut_into_full_slots() -> None:
    buffers = [memoryview(bytes(size)) for size in (5, SLOT_BYTES, 2 * SLOT_BYTES - 6, 3)]
    slots = list(cut_into_slots(buffers))
    assert [sum(piece.nbytes for piece in pieces) for pieces in slots] == [SLOT_BYTES, SLOT_BYTES, SLOT_BYTES, 2]
    assert list(cut_into_slots([])) == []


def test_a_lack_of_memory_for_an_answer_is_an_error_of_that_call_only(
    spawned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_slab(size: int) -> None:
        raise MemoryError(f"{size} bytes")

    drop_spare_slabs()
    monkeypatch.setattr(receive_buffers, "_Slab", no_slab)
    with pytest.raises(MemoryError, match=str(SLAB_BYTES)):
        spawned.zeros(SLAB_BYTES // 8)
    assert spawned.echo(3) == 3


# Deaths.


def echo_in_child(seat: Seat, proxy: Any) -> int:
    """Use a large payload; return how many shared buffers this process has."""
    assert_same(proxy.echo(NUMBERS), NUMBERS)
    seat.held.append(("proxy", proxy))
    return shared_buffers()


def test_a_killed_client_leaks_no_arena(spawned: Any, new_process: Callable[..., Process]) -> None:
    client = new_process(attached=False)
    assert client.call(echo_in_child, spawned) == 1
    assert spawned.shared_buffers() == 1
    client.kill()
    wait_until(lambda: spawned.shared_buffers() == 0, "the server has let go of the shared buffer")
    assert_same(spawned.echo(NUMBERS), NUMBERS)


def test_a_killed_server_leaks_no_arena(spawned: Any) -> None:
    assert_same(spawned.echo(NUMBERS), NUMBERS)
    for thing in (1, ARRAYS["larger than a shared buffer"]):
        with pytest.raises(ModelServerError):
            spawned.end_abruptly(thing)
    assert shared_buffers() == 0
    assert acquired().echo(1) == 1


@pytest.mark.parametrize("limit_mb", ["64", "0"], ids=["shared buffer", "socket"])
def test_a_server_that_is_killed_in_the_middle_of_a_payload_is_an_error(
    spawned: Any, monkeypatch: pytest.MonkeyPatch, limit_mb: str
) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, limit_mb)
    pid = spawned.pid()
    # In the middle: what is received is stopped, and the payload larger than what is on its way at once.
    spawned.echo(NUMBERS)
    os.kill(pid, signal.SIGSTOP)
    raised: list[BaseException] = []

    def send() -> None:
        try:
            spawned.echo(ARRAYS["larger than a shared buffer"])
        except ModelServerError as error:
            raised.append(error)

    sender = threading.Thread(target=send)
    sender.start()
    os.kill(pid, signal.SIGKILL)
    sender.join(DEADLINE_S)
    assert [type(error) for error in raised] == [ModelServerError]


@pytest.mark.parametrize("said", ["the frame", "half the frame", "a slot"])
def test_a_client_that_goes_in_the_middle_of_a_payload_costs_the_server_nothing(spawned: Any, said: str) -> None:
    assert_same(spawned.echo(NUMBERS), NUMBERS)
    before = (spawned.descriptors(), spawned.shared_buffers())
    _, record = registry_for(None).look(TAG)
    assert record is not None
    line = Channel(sockets.dial(registry_for(None).path, record.socket_name, registry_for(None).key()))
    size = 3 * SHARED_BUFFER_BYTES
    frame = channel._FRAME.pack(0, 1) + size.to_bytes(8, "little")
    line._socket.sendall(frame[:6] if said == "half the frame" else frame)
    if said == "a slot":
        assert line._byte() == channel.LACK
        assert line._offer_shared_buffer()
        line._socket.sendall(channel.FILLED)
    line.close()
    wait_until(
        lambda: (spawned.descriptors(), spawned.shared_buffers()) == before, "the server has forgotten the client"
    )
    assert_same(spawned.echo(NUMBERS), NUMBERS)


# Forks, threads, signals.


def test_a_forked_child_has_no_part_in_its_parents_arena(spawned: Any, new_process: Callable[..., Process]) -> None:
    assert_same(spawned.echo(NUMBERS), NUMBERS)
    child = new_process(attached=False)
    assert child.call(count_arenas) == 0
    assert child.call(echo_in_child, spawned) == 1
    assert spawned.shared_buffers() == 2
    assert_same(spawned.echo(NUMBERS), NUMBERS)


def count_arenas(_: Seat) -> int:
    return shared_buffers()


def in_thread(action: Callable[[], None]) -> None:
    """Run `action` in a thread of its own and raise what it raises."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    for error in errors:
        raise error


def test_threads_send_at_the_same_time(spawned: Any) -> None:
    barrier = threading.Barrier(4)
    failures: list[int] = []

    def echo(number: int) -> None:
        barrier.wait(DEADLINE_S)
        for turn in range(10):
            payload = [np.full(LARGE, number * 100.0 + turn), number]
            array, found = spawned.echo(payload)
            if found != number or not (array == payload[0]).all():
                failures.append(number)
        barrier.wait(DEADLINE_S)

    threads = [threading.Thread(target=echo, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert failures == []
    wait_until(lambda: shared_buffers() == 0, "the threads' shared buffers are gone")
    wait_until(lambda: spawned.shared_buffers() == 0, "the server has let go of them")


def test_a_call_from_a_signal_handler_in_the_middle_of_a_payload_has_a_connection_of_its_own(spawned: Any) -> None:
    answers: list[bool] = []
    handling: list[bool] = []

    def handle(number: int, frame: Any) -> None:
        if not handling:
            handling.append(True)
            answers.append(bool((spawned.echo(np.full(LARGE, len(answers))) == len(answers)).all()))
            handling.clear()

    payload = ARRAYS["larger than a shared buffer"]
    before = signal.signal(signal.SIGALRM, handle)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        deadline = time.monotonic() + DEADLINE_S
        while len(answers) < 20:
            assert_same(spawned.echo(payload), payload)
            assert time.monotonic() < deadline
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert all(answers)


def test_a_call_that_is_interrupted_in_the_middle_of_a_payload_is_not_answered_later(spawned: Any) -> None:
    class Interrupted(BaseException):
        """As KeyboardInterrupt: what is no Exception passes through unpickling as it is."""

    def interrupt(number: int, frame: Any) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    interruptions = 0
    try:
        while interruptions < 10:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.002 + 0.002 * interruptions)
                for number in range(1000):
                    assert (spawned.echo(np.full(2 * SHARED_BUFFER_BYTES // 8, number)) == number).all()
            except Interrupted:
                interruptions += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert spawned.echo(interruptions) == interruptions
    finally:
        signal.signal(signal.SIGALRM, before)
    gc.collect()
    wait_until(lambda: spawned.shared_buffers() <= 1, "the server has let go of what was interrupted")


def test_descriptors_do_not_leak_over_calls_and_connections(spawned: Any) -> None:
    spawned.echo(NUMBERS)
    before = (psutil.Process().num_fds(), spawned.descriptors(), shared_buffers(), spawned.shared_buffers())
    for _ in range(300):
        spawned.echo(NUMBERS[:40])
    for _ in range(20):
        in_thread(lambda: assert_same(spawned.echo(NUMBERS), NUMBERS))
    wait_until(
        lambda: (
            (psutil.Process().num_fds(), spawned.descriptors(), shared_buffers(), spawned.shared_buffers()) == before
        ),
        "all is as it was",
    )
