"""Shared buffers for payloads: when they exist, and what deaths, forks and signals leave of them."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import payloads
import psutil
import pytest
from harness import Process, Seat, stop_process, wait_until
from patience import DEADLINE_S
from payload_store import shared_buffers
from payloads import LARGE, LARGER_THAN_A_BUFFER, NUMBERS, TAG, acquired, assert_same

from mpmm.errors import ModelServerError
from mpmm.multi_process_shared.registry import registry_for
from mpmm.multi_process_shared.rpc import channel, receive_buffers, shared_buffer, sockets
from mpmm.multi_process_shared.rpc.channel import Channel, Message
from mpmm.multi_process_shared.rpc.receive_buffers import SLAB_BYTES, drop_spare_slabs
from mpmm.multi_process_shared.rpc.shared_buffer import LIMIT_VARIABLE, SHARED_BUFFER_BYTES, SLOT_BYTES, cut_into_slots

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="there are shared buffers on Linux only")
in_room = payloads.in_room
spawned = payloads.spawned
pair = payloads.pair


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

    def echo_through_another_connection() -> None:
        assert_same(spawned.echo(NUMBERS), NUMBERS)
        assert shared_buffers() == 1

    in_thread(echo_through_another_connection)
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
        spawned.keep(LARGER_THAN_A_BUFFER)
        assert shared_buffers() == 0
        # Threads of earlier tests may still be closing theirs, and opening them.
        wait_until(lambda: psutil.Process().num_fds() == before, "no descriptor is left")
    assert_same(spawned.get_kept()[0], LARGER_THAN_A_BUFFER)
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
    # As above.
    wait_until(lambda: psutil.Process().num_fds() == before, "no descriptor is left")


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
    for thing in (1, LARGER_THAN_A_BUFFER):
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
    # In the middle: the receiver is stopped, and the payload is larger than what can be in transit at once.
    spawned.echo(NUMBERS)
    stop_process(pid)
    raised: list[BaseException] = []

    def send() -> None:
        try:
            spawned.echo(LARGER_THAN_A_BUFFER)
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

    payload = LARGER_THAN_A_BUFFER
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
        """Like KeyboardInterrupt: a BaseException that is no Exception passes through unpickling unchanged."""

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
