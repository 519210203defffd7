"""A process ends while its threads work: none of them delays the end, writes a traceback, or joins again.

Threads that the process waits for continue as usual.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from harness import import_path
from patience import DEADLINE_S

# The first exit handler to be registered is the last to run, when mpmm's have.
PROGRAM = """
import atexit, asyncio, sys, threading, time

has_left, goes_on = threading.Event(), threading.Event()

def in_the_end():
    has_left.set()
    print("goes on" if goes_on.wait(0.3) else "stands still", flush=True)

atexit.register(in_the_end)

from mpmm import ClosedError, ModelManager
from mpmm.shared_state.snapshot import read_snapshot

manager = ModelManager(namespace="ends", memory_source="booked", fallback_memory_mb=100, default_estimate_mb=100)
"""
# What a daemon thread does: it calls `begins`, and would end only after the process has left.
CALLS = {
    "waits for a model": "begins.set(); manager.acquire_model('b', dict)",
    "waits for a lease": "begins.set(); manager.reserve(50, name='mine')",
    "waits in an event loop": """
        async def use():
            begins.set()
            async with manager.model_async("b", dict):
                pass
        asyncio.run(use())
    """,
    "begins to use a model in an event loop": """
        async def use():
            begins.set()
            has_left.wait()
            async with manager.model_async("b", dict):
                pass
        asyncio.run(use())
    """,
    "waits for an unload": "begins.set(); manager.unload('held')",
    "begins to use a model": "begins.set(); has_left.wait(); manager.acquire_model('b', dict)",
    "ends a block": """
        with manager.model("shared", dict):
            begins.set()
            has_left.wait()
    """,
    "ends a block in an event loop": """
        async def use():
            async with manager.model_async("shared", dict):
                begins.set()
                has_left.wait()
        asyncio.run(use())
    """,
    "releases a model": """
        model = manager.acquire_model("shared", dict)
        begins.set()
        has_left.wait()
        manager.release_model("shared", model)
    """,
    "asks for settings": "begins.set(); has_left.wait(); manager.pin('held')",
}


def run(program: str) -> tuple[int, str, str]:
    """Run a program; return its exit status, and what it says on either stream."""
    command = [sys.executable, "-c", PROGRAM + textwrap.dedent(program)]
    environment = {"PYTHONPATH": import_path()}
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_daemon_thread_stands_still_as_the_process_ends(runtime_root: Path, call: str) -> None:
    shares = "shared" in call
    program = f"""
        begins = threading.Event()

        def work():
{textwrap.indent(textwrap.dedent(call).strip(), " " * 12)}
            goes_on.set()

        held = None if {shares} else manager.acquire_model("held", dict)
        threading.Thread(target=work, daemon=True).start()
        begins.wait()
        while {"has_left" not in call and "unload" not in call} and not read_snapshot("ends").tickets:
            time.sleep(0.001)
    """
    assert run(program) == (0, "stands still\n", "")
    assert not (runtime_root / "ends").exists()


def test_an_exit_handler_does_not_wait_forever_for_a_lock_of_a_thread_that_stands_still(runtime_root: Path) -> None:
    program = """
        from mpmm.interpreter import process_end

        process_end._STAND_STILL_S = 0.1
        lock, begins = threading.Lock(), threading.Event()

        def work():
            with lock:
                begins.set()
                try:
                    manager.acquire_model("b", dict)
                except ClosedError as error:
                    print(error)

        def take(timeout):
            with lock:
                return True

        goes_on.wait = take
        manager.acquire_model("a", dict)
        threading.Thread(target=work, daemon=True).start()
        begins.wait()
        while not read_snapshot("ends").tickets:
            time.sleep(0.001)
    """
    assert run(program) == (0, "the manager was shut down while a thread waited for a model\ngoes on\n", "")


def test_an_exit_handler_that_runs_after_the_process_has_left_is_told_so(runtime_root: Path) -> None:
    program = """
        def use():
            try:
                manager.acquire_model("b", dict)
            except ClosedError as error:
                print(error)

        goes_on.wait = lambda timeout: use()
        manager.acquire_model("a", dict)
    """
    told = "the interpreter is ending, and this process has left namespace 'ends'\n"
    assert run(program) == (0, f"{told}stands still\n", "")
    assert not (runtime_root / "ends").exists()


def test_a_thread_for_which_a_child_waits_at_its_end_is_told_that_the_manager_is_closed(runtime_root: Path) -> None:
    program = """
        import multiprocessing

        def wait(begins):
            begins.set()
            try:
                manager.acquire_model("b", dict)
            except ClosedError as error:
                print(error, flush=True)

        def work():
            manager.acquire_model("a", dict)
            begins = threading.Event()
            threading.Thread(target=wait, args=(begins,)).start()
            begins.wait()

        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        child.join()
    """
    assert run(program) == (0, "the manager was shut down while a thread waited for a model\nstands still\n", "")
    assert not (runtime_root / "ends").exists()


def test_an_event_loop_goes_on_with_loads_and_waits_when_the_main_thread_has_ended(runtime_root: Path) -> None:
    program = """
        async def use(tag):
            async with manager.model_async(tag, dict) as model:
                return type(model).__name__

        async def main():
            while threading.main_thread().is_alive():
                await asyncio.sleep(0.001)
            print(await asyncio.gather(*map(use, "abab")), flush=True)

        threading.Thread(target=lambda: asyncio.run(main())).start()
    """
    assert run(program) == (0, "['dict', 'dict', 'dict', 'dict']\nstands still\n", "")
    assert not (runtime_root / "ends").exists()
