"""Many processes and threads pass one copy from hand to hand: no wake-up is lost."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from processes import Process, Seat, problems

from mpmm.shared_state.snapshot import read_snapshot

NewProcess = Callable[..., Process]

PROCESSES, THREADS = 4, 4
# 100 000 take a minute or two; the default suite has less time.
HAND_OVERS = int(os.environ.get("MPMM_TEST_HAND_OVERS", "8000"))


def pass_on(seat: Seat, rounds: int) -> float:
    """Acquire and release in several threads; return the longest wait in seconds."""
    waits: list[float] = []

    def run() -> None:
        longest = 0.0
        for _ in range(rounds):
            began = time.monotonic()
            handle = seat.manager.acquire_model("ball", lambda: "the ball")
            longest = max(longest, time.monotonic() - began)
            seat.manager.release_model("ball", handle)
        waits.append(longest)

    threads = [threading.Thread(target=run) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(waits) == THREADS, "a thread failed"
    return max(waits)


def test_no_hand_over_takes_a_second_for_want_of_a_wake_up(namespace: str, new_process: NewProcess) -> None:
    players = [new_process(fallback_memory_mb=100, wait_timeout_seconds=30.0) for _ in range(PROCESSES)]
    rounds = HAND_OVERS // (PROCESSES * THREADS)
    for player in players:
        player.send(pass_on, rounds)
    longest = [player.result(timeout_seconds=600.0) for player in players]
    snapshot = read_snapshot(namespace, events=False)
    assert snapshot.hits + snapshot.loads == rounds * PROCESSES * THREADS
    assert snapshot.loads == 1
    assert max(longest) < 1.0, f"the longest waits were {longest}"
    assert problems(namespace) == []
