"""All processes of a user find the same namespaces and servers by default, whatever their environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from containers import can_unshare, run_unshared
from harness import CHECKOUT, import_path, wait_until

from mpmm.shared_state.runtime_dir import root_below

# A server looks once a second whether a client is left.
ENDS_WITHIN_S = 10.0
PROGRAM = """
import json, sys, tempfile
from mpmm import ModelManager, MultiProcessShared
from mpmm.multi_process_shared import server_pid
from mpmm.shared_state.runtime_dir import default_root
from mpmm.shared_state.snapshot import read_snapshot

class Counter:
    def __init__(self):
        self.count = 0

    def counted(self):
        self.count += 1
        return self.count

if __name__ == "__main__":
    name, arguments, tempfile.tempdir = json.loads(sys.argv[1])
    if "path" in arguments:
        arguments["path"] = tempfile.gettempdir()
    with ModelManager(namespace=name, memory_source="booked") as manager:
        manager.all_models()
        counter = MultiProcessShared(Counter, tag=name, spawn_process=True, always_proxy=True, **arguments).acquire()
        workers = [member for member in read_snapshot(name).members if member.kind == "worker"]
        print(json.dumps([str(default_root()), counter.counted(), server_pid(name), len(workers)]), flush=True)
        sys.stdin.read()
        MultiProcessShared(Counter, tag=name, **arguments).release(counter)
"""
JOINS_AND_ACQUIRES = """
import mpmm
for call in (
    lambda: mpmm.ModelManager(namespace="n", memory_source="booked"),
    lambda: mpmm.MultiProcessShared(dict, "tag", always_proxy=True).acquire(),
    lambda: mpmm.MultiProcessShared(dict, "tag", path="/tmp", always_proxy=True).acquire(),
):
    try:
        call()
    except mpmm.RuntimeDirectoryError as error:
        print(error)
"""
Start = Callable[..., list[Any]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts programs that join and use one namespace and one server until the test ends; returns what each has found.

    The namespace has a name of its own, because it is in the folder that is the default, not in the test's.
    """
    name = f"{tmp_path.name[-30:]}-{os.getpid()}"
    (tmp_path / "program.py").write_text(PROGRAM)
    programs: list[subprocess.Popen[str]] = []

    def begin(folder: str, tempdir: str | None = None, **arguments: Any) -> list[Any]:
        """folder: the working directory and the environment. tempdir: set for `tempfile` once mpmm is imported."""
        own = tmp_path / folder
        own.mkdir()
        kept = {key: value for key, value in os.environ.items() if key not in ("MPMM_RUNTIME_DIR", "XDG_RUNTIME_DIR")}
        environment = {**kept, "PYTHONPATH": import_path(), "MPMM_ZYGOTE": "0", "TMPDIR": str(own)}
        if folder == "login":
            (own / "xdg").mkdir(mode=0o700)
            environment["XDG_RUNTIME_DIR"] = str(own / "xdg")
        command = [sys.executable, str(tmp_path / "program.py"), json.dumps([name, arguments, tempdir])]
        program = subprocess.Popen(
            command, cwd=own, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        programs.append(program)
        assert program.stdout is not None
        return list(json.loads(program.stdout.readline()))

    yield begin
    for program in programs:
        program.communicate()
    assert [program.returncode for program in programs] == [0] * len(programs)
    folder = Path(root_below("/tmp"), name)
    wait_until(lambda: not folder.exists(), "the namespace is gone", ENDS_WITHIN_S)


def test_processes_of_a_login_shell_and_of_cron_share_a_namespace_and_a_server(start: Start, tmp_path: Path) -> None:
    root, count, server, workers = start("login")
    assert (root, count, workers) == (root_below("/tmp"), 1, 1)
    # Without XDG_RUNTIME_DIR, as `docker exec`, `sudo` and services, too; and each in folders of its own.
    assert start("cron") == [root, 2, server, 2]
    # A program that chooses another folder for temporary files later, and one that names that folder, as Beam does.
    assert start("late", tempdir=str(tmp_path)) == [root, 3, server, 3]
    assert start("named", path="tempfile") == [root, 4, server, 4]
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert made == {"program.py", "login", "login/xdg", "cron", "late", "named"}


@can_unshare
def test_a_host_without_a_folder_for_temporary_files_is_an_error_that_says_what_to_set(tmp_path: Path) -> None:
    answer = run_unshared(
        ["--mount"],
        f"""
        import os, subprocess, sys, sysconfig

        # The checkout and its virtual environment may be below one of the folders that are to be hidden.
        subprocess.run(["mount", "-t", "tmpfs", "none", "/mnt"], check=True)
        for source, name in (("{CHECKOUT / "mpmm"}", "mpmm"), (sysconfig.get_paths()["purelib"], "packages")):
            os.mkdir(f"/mnt/{{name}}")
            subprocess.run(["mount", "--bind", source, f"/mnt/{{name}}"], check=True)
        for folder in ("/tmp", "/var/tmp"):
            subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", folder], check=True)
        environment = {{key: value for key, value in os.environ.items() if key not in ("MPMM_RUNTIME_DIR", "TMPDIR")}}
        environment.update(PYTHONPATH="/mnt:/mnt/packages", PYTHONDONTWRITEBYTECODE="1")
        subprocess.run([sys._base_executable, "-c", {JOINS_AND_ACQUIRES!r}], cwd="/proc", env=environment)
        """,
    )
    root = root_below("/tmp")
    why = (
        "Read-only file system: nothing can be written there; set MPMM_RUNTIME_DIR to a folder that this user can write"
    )
    expected = [f"cannot create the runtime directory {root}/{name}: {why}" for name in ("n", "shared", "shared")]
    assert answer.splitlines() == expected
