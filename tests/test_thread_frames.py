"""Reading the frames of all threads never blocks the interpreter, whatever is garbage-collected meanwhile."""

from __future__ import annotations

import ast
import gc
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from patience import DEADLINE_S

from mpmm.interpreter.thread_frames import current_frames

ROOT = Path(__file__).parent.parent

# Garbage whose end asks Python 3.11 for its lock of threads, and a collector that comes by in the middle of the walk: a
# frame that nobody has looked at yet is a new object.
COLLECTED_MEANWHILE = """
import gc, threading
from mpmm.interpreter.thread_frames import current_frames

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
frames = current_frames()
gc.set_threshold(700)
assert {thread.ident for thread in threads} < set(frames)
assert gc.isenabled()
leave.set()
"""


def test_what_is_collected_during_a_look_does_not_stop_the_process() -> None:
    subprocess.run([sys.executable, "-c", COLLECTED_MEANWHILE], check=True, timeout=DEADLINE_S)


@pytest.mark.parametrize("collects", [True, False])
def test_a_look_leaves_the_collector_as_it_was(collects: bool) -> None:
    (gc.enable if collects else gc.disable)()
    try:
        frames = current_frames()
        assert gc.isenabled() is collects
        assert threading.get_ident() in frames
        frames.clear()
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
