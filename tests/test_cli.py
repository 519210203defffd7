"""The command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from processes import Loads, LoadsObject, Process, acquire, wait_until, waiting

from mpmm.cli import main
from mpmm.errors import NamespaceResetError
from mpmm.model_manager import ModelManager
from mpmm.shared_state.layout import Header
from mpmm.shared_state.segment import segment_name
from mpmm.shared_state.snapshot import Snapshot, read_snapshot

NewManager = Callable[..., ModelManager]
NewProcess = Callable[..., Process]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def busy(namespace: str, new_manager: NewManager, new_process: NewProcess) -> ModelManager:
    """A namespace with a bit of everything."""
    manager = new_manager(fallback_memory_mb=250)
    manager._estimator.set_initial_estimate("big", 250)
    manager.release_model("idle", manager.acquire_model("idle", Loads("handle")))
    manager.acquire_model("object", LoadsObject())
    waiter = new_process()
    waiter.send(acquire, "big")
    wait_until(lambda: waiting(namespace, "big"), "somebody waits")
    return manager


def test_inspect_shows_everything_as_text(busy: ModelManager, namespace: str, capsys: Capture) -> None:
    assert main(["inspect", namespace]) == 0
    text = capsys.readouterr().out
    assert f"leader: pid {os.getpid()}" in text
    for section in ("devices:", "models:", "copies:", "waiting:", "members:"):
        assert section in text.splitlines()
    waiters = text.split("\nwaiting:\n")[1].split("\n\n")[0]
    assert "big" in waiters
    assert "in_use" in waiters or "unloading" in waiters
    assert "waits: needs 250 MB" in waiters
    assert "loads: needs 100 MB, 250 free" in text.split("\nlast decisions:\n")[1]
    assert "object" in text.split("\ncopies:\n")[1]
    assert "ATTENTION" not in text


def test_inspect_as_json_has_every_field_of_the_snapshot(busy: ModelManager, namespace: str, capsys: Capture) -> None:
    assert main(["inspect", "--json", namespace]) == 0
    [line] = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["schema"] == 1
    assert set(found) == {"schema", *(field.name for field in fields(Snapshot))}
    assert found["namespace"] == namespace
    assert found["settings"]["fallback_memory_mb"] == 250
    assert found["members"][0]["pid"] == os.getpid()
    assert all(member["alive"] for member in found["members"])
    assert {model["tag"] for model in found["models"]} == {"idle", "object", "big"}
    assert [ticket["tag"] for ticket in found["tickets"]] == ["big"]
    assert found["devices"][0]["total_mb"] == 250
    assert {event["kind"] for event in found["events"]} >= {"joined", "leader", "load_began", "load_ended", "queued"}


def test_without_a_name_the_only_namespace_is_meant(busy: ModelManager, namespace: str, capsys: Capture) -> None:
    assert main(["inspect"]) == 0
    assert f"namespace {namespace}," in capsys.readouterr().out
    with ModelManager(namespace="second", memory_source="booked"):
        assert main(["inspect"]) == 2
        assert "There are 2: second, test" in capsys.readouterr().err


def test_list_names_the_namespaces(busy: ModelManager, capsys: Capture) -> None:
    with ModelManager(namespace="second", memory_source="booked"):
        assert main(["list"]) == 0
        assert capsys.readouterr().out.split() == ["second", "test"]


def test_list_without_any(capsys: Capture) -> None:
    assert main(["list"]) == 0
    assert capsys.readouterr().out == "no namespaces\n"


def test_check_is_content_with_a_sound_state(busy: ModelManager, namespace: str, capsys: Capture) -> None:
    assert main(["check", namespace]) == 0
    assert capsys.readouterr().out == f"{namespace}: all well\n"


def test_check_finds_a_broken_word(
    new_manager: NewManager, namespace: str, runtime_root: Path, capsys: Capture
) -> None:
    new_manager()
    fd = os.open(f"/dev/shm/{segment_name(runtime_root, namespace)}", os.O_RDWR)
    try:
        os.pwrite(fd, (7).to_bytes(8, "little"), 8 * Header.ACTIVE)
        assert main(["check", namespace]) == 1
        os.pwrite(fd, bytes(8), 8 * Header.ACTIVE)
    finally:
        os.close(fd)
    out = capsys.readouterr().out
    assert "H2 ACTIVE is 7, the rows say 0" in out
    assert f"{namespace}: 1 invariants broken" in out
    assert main(["check", namespace]) == 0


def test_reset_sends_everybody_away(new_process: NewProcess, namespace: str, capsys: Capture) -> None:
    holder, waiter = new_process(fallback_memory_mb=100), new_process()
    holder.call(acquire, "a")
    waiter.send(acquire, "b")
    wait_until(lambda: waiting(namespace, "b"), "somebody waits")
    assert main(["reset", namespace]) == 0
    assert capsys.readouterr().out == f"{namespace}: reset\n"
    with pytest.raises(NamespaceResetError):
        waiter.result()
    snapshot = read_snapshot(namespace)
    assert (snapshot.instances, snapshot.resets, len(snapshot.members)) == ((), 1, 2)


@pytest.mark.parametrize("command", ["inspect", "check", "reset"])
def test_an_unknown_namespace_is_said_to_be_unknown(command: str, runtime_root: Path, capsys: Capture) -> None:
    assert main([command, "nowhere"]) == 2
    assert "there is no namespace 'nowhere'" in capsys.readouterr().err
    assert not (runtime_root / "nowhere").exists()


def test_an_impossible_name_is_refused(capsys: Capture) -> None:
    assert main(["inspect", "../etc"]) == 2
    assert "expected 1 to 64 characters" in capsys.readouterr().err


def test_the_runtime_root_can_be_named(tmp_path: Path, capsys: Capture) -> None:
    root = tmp_path / "elsewhere"
    with ModelManager(namespace="there", memory_source="booked", runtime_root=root):
        assert main(["--runtime-root", str(root), "list"]) == 0
        assert capsys.readouterr().out == "there\n"
        assert main(["--runtime-root", str(root), "check", "there"]) == 0


def test_it_runs_as_a_module(busy: ModelManager, namespace: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "mpmm.cli", "inspect", "--json", namespace],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
    )
    assert json.loads(done.stdout)["namespace"] == namespace
    assert done.stderr == ""
