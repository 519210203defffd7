"""Reading the frames of all threads neither blocks nor ends the interpreter, whatever is collected meanwhile."""

from __future__ import annotations

import ast
import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
from harness import call_in_thread, returned_frame
from patience import DEADLINE_S

from mpmm.interpreter import thread_frames
from mpmm.interpreter.thread_frames import caller_of, innermost_frame, innermost_frames, may_be_running

ROOT = Path(__file__).parent.parent

# Garbage whose end asks Python 3.11 for its lock of threads, and a collector that comes by in the middle of the walk: a
# frame that nobody has looked at yet is a new object.
COLLECTED_MEANWHILE = """
import gc, threading
from mpmm.interpreter.thread_frames import innermost_frames

THREADS = 200
leave = threading.Event()

class Cycle:
    def __init__(self):
        self.me, self.local = self, threading.local()
        self.local.value = 1

threads = [threading.Thread(target=leave.wait) for _ in range(THREADS)]
for thread in threads:
    thread.start()
gc.collect()
Cycle()
gc.set_threshold(THREADS // 2)
frames = innermost_frames({thread.ident for thread in threads})
gc.set_threshold(700)
assert {thread.ident for thread in threads} == set(frames)
assert gc.isenabled()
leave.set()
"""


def test_what_is_collected_during_a_look_does_not_stop_the_process() -> None:
    subprocess.run([sys.executable, "-c", COLLECTED_MEANWHILE], check=True, timeout=DEADLINE_S)


# Garbage whose end lets a thread return while another one looks up the callers of its frames.
RETURNS_MEANWHILE = """
import gc, sys, threading
from mpmm.interpreter.thread_frames import innermost_frame, is_on_stack

waits, leave = threading.Event(), threading.Event()

def go_down(depth):
    if depth:
        go_down(depth - 1)
    else:
        waits.set()
        leave.wait()

class Cycle:
    def __init__(self):
        self.me = self

    def __del__(self):
        leave.set()
        thread.join()

thread = threading.Thread(target=go_down, args=(900,))
thread.start()
waits.wait()
top = innermost_frame(thread.ident)
mine = sys._getframe()
gc.collect()
Cycle()
gc.set_threshold(1)
assert not is_on_stack(mine, top)
gc.set_threshold(700)
assert gc.isenabled()
assert leave.is_set(), "the garbage was collected during the walk"
"""


# From 3.12 on, an allocation does not collect.
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="only Python 3.11 collects there")
def test_a_thread_may_return_while_its_stack_is_looked_at() -> None:
    subprocess.run([sys.executable, "-c", RETURNS_MEANWHILE], check=True, timeout=DEADLINE_S)


@pytest.mark.parametrize("collects", [True, False])
def test_a_look_leaves_the_collector_as_it_was(collects: bool) -> None:
    (gc.enable if collects else gc.disable)()
    try:
        mine = innermost_frame(threading.get_ident())
        assert gc.isenabled() is collects
        assert mine is not None
        assert caller_of(mine) is mine.f_back
        assert gc.isenabled() is collects
    finally:
        gc.enable()


def test_a_thread_that_goes_on_during_a_look_may_be_running_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    with call_in_thread() as (frame, thread):
        # A function that the thread was in when its stack was taken, and has left since.
        looks = iter([returned_frame()])
        with monkeypatch.context() as patched:
            patched.setattr(thread_frames, "innermost_frame", lambda of: next(looks, None) or innermost_frame(of))
            assert may_be_running(frame, thread)
        assert may_be_running(frame, thread)
    assert not may_be_running(frame, thread)
    assert may_be_running(sys._getframe(), threading.get_ident())
    assert not may_be_running(returned_frame(), threading.get_ident())


def test_a_look_keeps_nothing_alive() -> None:
    class Model:
        """What a variable of another thread refers to."""

    entered, leave = threading.Event(), threading.Event()
    made: list[weakref.ref[Model]] = []

    def use() -> None:
        model = Model()
        made.append(weakref.ref(model))
        entered.set()
        leave.wait()

    thread = threading.Thread(target=use)
    thread.start()
    entered.wait()
    gc.disable()
    try:
        assert innermost_frame(thread.ident or 0) is not None
        innermost_frames((thread.ident or 0, threading.get_ident())).clear()
        leave.set()
        thread.join()
        assert made[0]() is None, "alive until the next garbage collection"
    finally:
        gc.enable()


@pytest.mark.parametrize("folder", ["mpmm", "tools"])
def test_nothing_else_asks_the_interpreter(folder: str) -> None:
    asking = {
        path.name
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in {"_current_frames", "_current_exceptions"}
    }
    assert asking == ({"thread_frames.py"} if folder == "mpmm" else set())
