"""A thread pool at the end of the process."""

from __future__ import annotations

import subprocess
import sys

import pytest
from patience import DEADLINE_S

from mpmm.interpreter.thread_pools import ThreadPool


@pytest.mark.skipif(sys.version_info[:2] == (3, 12), reason="3.12 starts no thread once the main thread has ended")
def test_a_pool_runs_functions_while_the_main_thread_ends_and_after_that() -> None:
    code = f"""
import threading
from mpmm.interpreter.thread_pools import ThreadPool
pool = ThreadPool(2, "pool")
ending, asked = threading.Event(), threading.Event()

def end():
    ending.set()
    # The main thread counts as alive for so long.
    asked.wait({DEADLINE_S / 2})

def ask():
    ending.wait()
    try:
        print(threading.main_thread().is_alive(), pool.submit(lambda: "ran").result())
    finally:
        asked.set()
    threading.main_thread().join()
    print(threading.main_thread().is_alive(), pool.submit(lambda: "ran").result())

# Called after what `concurrent.futures` registers, which is imported next.
threading._register_atexit(end)
assert pool.submit(int).result() == 0
threading.Thread(target=ask).start()
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=DEADLINE_S, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True ran\nFalse ran\n", "")


def test_a_pool_that_can_start_no_thread_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ThreadPool(1, "pool")

    def start(self: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", start)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        pool.submit(int)
