"""Servers that a zygote or one of its templates forks, and modules that note which processes import them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from counters import Counter
from shared_workers import is_running, wait_until

from mpmm.multi_process_shared import MultiProcessShared, server_pid, unload
from mpmm.multi_process_shared.forkserver.client import zygote_pid
from mpmm.multi_process_shared.forkserver.zygote import PROCESS_NAME
from mpmm.multi_process_shared.registry import registry_for

# How long a template may take to import modules that import nothing themselves.
LEARN_TIMEOUT_S = 20.0


def shared(path: str, tag: str = "it", constructor: Callable[[], Any] = Counter) -> Any:
    """Acquire an object that has a process of its own."""
    return MultiProcessShared(constructor, tag, path=path, spawn_process=True).acquire()


def parent_of(pid: int) -> int:
    """Return the pid of a process's parent."""
    return int(psutil.Process(pid).ppid())


def zygote_of(path: str) -> int:
    """Return the pid of the zygote, which must exist."""
    pid = zygote_pid(registry_for(path))
    assert pid is not None
    return pid


def templates_of(path: str) -> list[int]:
    """Return the pids of the zygote's living templates."""
    found = [child for child in psutil.Process(zygote_of(path)).children() if child.name() == PROCESS_NAME]
    return [child.pid for child in found if is_running(child.pid)]


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes modules that note the pids of the processes that import them, in a file of the same name."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def make(name: str, code: str = "") -> str:
        note = folder / f"{name}.pids"
        # A template would not import what asks for the pid.
        noted = f"open({str(note)!r}, 'a').write(os.readlink('/proc/self') + '\\n')"
        lines = ["import os", noted, "answer = 41", code]
        (folder / f"{name}.py").write_text("\n".join(lines))
        return name

    make.folder = folder  # type: ignore[attr-defined]  # for `pids_that_imported`
    return make


def pids_that_imported(modules: Any, name: str) -> list[int]:
    """Return the pids of the processes that have imported a module, in order."""
    note: Path = modules.folder / f"{name}.pids"
    return [int(line) for line in note.read_text().split()] if note.exists() else []


def wait_for_template_with(path: str, modules: Any, name: str, timeout_s: float = LEARN_TIMEOUT_S) -> int:
    """Wait until a template has imported the module; return its pid."""

    def found() -> list[int]:
        return [pid for pid in pids_that_imported(modules, name) if pid in templates_of(path)]

    wait_until(lambda: bool(found()), timeout_s, lambda: "no template imports the module")
    return found()[0]


def server_from(path: str, template: int, constructor: Callable[[], Any]) -> Any:
    """Return a server that the template has forked; start servers until it forks one."""
    for number in range(200):
        proxy = shared(path, f"from template {number}", constructor)
        pid = server_pid(f"from template {number}", path=path)
        assert pid is not None
        if parent_of(pid) == template:
            return proxy
        unload(f"from template {number}", path=path)
        time.sleep(0.02)
    raise AssertionError("the template forks nothing")
