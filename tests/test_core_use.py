"""Which processes use the compiled core of the warm path, whether it exists, and which version it is."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
from core_calls import Caller, built, place_of
from core_calls import lab as lab  # the fixture
from crash_lab import Lab
from harness import NewManager, problems

from mpmm import ModelManager
from mpmm.errors import InvalidArgumentError
from mpmm.observability import doctor
from mpmm.shared_state import core as core_module
from mpmm.shared_state.core import CORE_VARIABLE, is_compiled, which

SOURCE = Path(core_module.__file__).with_name("_core.c")


@built
@pytest.mark.parametrize("model", ["handle", "object"])
def test_the_manager_uses_it(namespace: str, new_manager: NewManager, model: str) -> None:
    manager = new_manager()
    core = manager._connected().namespace.lock.core
    assert core is not None
    values = {"handle": "a handle", "object": object()}

    def block() -> None:
        with manager.model("a", lambda: values[model]) as got:
            assert got is values[model] or got == values[model]

    def pair() -> None:
        manager.release_model("a", manager.acquire_model("a", lambda: values[model]))

    async def in_loop() -> None:
        async with manager.model_async("a", lambda: values[model]):
            pass

    block()
    block()
    for use in (block, pair, lambda: asyncio.run(in_loop())):
        done = core.done
        for _ in range(20):
            use()
        # The background thread may have the lock for a moment.
        assert core.done >= done + 30, use
    assert problems(namespace) == []


@built
def test_it_leaves_alone_what_an_exception_has_left(lab: Lab) -> None:
    caller = Caller(lab, lab.idle("a", b"h"))
    place, core = place_of(lab.segment)
    # Taken by a thread that an exception has kept from noting its frame, and from giving it back. If the core went on
    # at the same time, nobody would find two looks the same, by which it is told from one that is in use.
    thread = threading.Thread(target=place.lock._mutex.acquire)
    thread.start()
    thread.join()
    assert caller.take(place, core) is None
    for _ in range(2):
        place.lock.end_abandoned()
    assert caller.take(place, core) is not None
    place.lock._mutex.acquire()
    assert not caller.release(place, core)
    with place.lock():
        pass
    assert caller.release(place, core)
    place.lock.close()


@built
def test_threads_of_one_process_take_turns(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(max_model_copies=3)
    failed: list[BaseException] = []

    def use() -> None:
        try:
            for number in range(100):
                with manager.model("ab"[number % 2], lambda: uuid.uuid4().hex):
                    pass
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert problems(namespace) == []
    assert manager._connected().namespace.lock.core is not None


# ---- which one it is ---------------------------------------------------------------------------------------------


def test_the_environment_chooses(namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CORE_VARIABLE, "python")
    assert which() == "python"
    manager = new_manager()
    assert manager._connected().namespace.lock.core is None
    with manager.model("a", lambda: "a"):
        pass
    assert "Python" in core_line()
    monkeypatch.setenv(CORE_VARIABLE, "fast")
    with pytest.raises(InvalidArgumentError, match="MPMM_CORE='fast': expected python or compiled"):
        ModelManager(namespace="elsewhere", memory_source="booked")


def test_without_the_extension_python_does_it(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The interpreter treats this as a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "mpmm.shared_state._core", None)
    assert which() == "python"
    assert new_manager()._connected().namespace.lock.core is None
    monkeypatch.setenv(CORE_VARIABLE, "compiled")
    with pytest.raises(InvalidArgumentError, match="the compiled core is missing"):
        ModelManager(namespace="elsewhere", memory_source="booked")
    assert core_line().startswith("MPMM_CORE=compiled: ")


@pytest.mark.parametrize(
    ("choice", "there", "expected"),
    [
        ("", True, "compiled"),
        ("", False, "python"),
        ("python", True, "python"),
        ("python", False, "python"),
        ("compiled", True, "compiled"),
        ("compiled", False, None),
        ("fast", True, None),
        ("fast", False, None),
    ],
)
def test_which_one_it_is_depends_on_the_environment_and_on_what_is_built(
    monkeypatch: pytest.MonkeyPatch, choice: str, there: bool, expected: str | None
) -> None:
    extension = SimpleNamespace(Core=object) if there else None
    monkeypatch.setitem(sys.modules, "mpmm.shared_state._core", extension)
    monkeypatch.setenv(CORE_VARIABLE, choice)
    assert is_compiled() is (expected == "compiled")
    if expected is None:
        with pytest.raises(InvalidArgumentError, match=f"{CORE_VARIABLE}="):
            which()
    else:
        assert which() == expected


@pytest.mark.parametrize(
    ("processors", "nanoseconds"), [(1, 0), (2, 10_000), (3, 20_000), (16, 150_000), (17, 160_000), (64, 160_000)]
)
def test_a_process_spins_for_as_many_others_as_there_are_processors(
    monkeypatch: pytest.MonkeyPatch, processors: int, nanoseconds: int
) -> None:
    asked: list[int] = []

    def processors_of(pid: int) -> set[int]:
        asked.append(pid)
        return set(range(processors))

    monkeypatch.setattr(os, "sched_getaffinity", processors_of)
    assert core_module._spin_ns() == nanoseconds
    assert asked == [0], "of this process"


@built
def test_the_doctor_tells_which(monkeypatch: pytest.MonkeyPatch) -> None:
    assert core_line() == "the compiled core runs the transactions of the warm path"


def core_line() -> str:
    [check] = [check for check in doctor._versions() if "warm path" in check.text or "MPMM_CORE" in check.text]
    return check.text


# A compiler or Python's headers may be missing, where the package works nevertheless.
@pytest.mark.skipif(
    shutil.which("cc") is None or not Path(sysconfig.get_paths()["include"], "Python.h").exists(),
    reason="no C compiler, or none of Python's headers",
)
def test_it_compiles_without_a_warning(tmp_path: Path) -> None:
    command = ["cc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    include = f"-I{sysconfig.get_paths()['include']}"
    done = subprocess.run([*command, include, str(SOURCE)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
