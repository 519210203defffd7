"""`mpmm top`: its screen, in a real terminal of changing size."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import NewManager, NewProcess, acquire, wait_until, waiting
from loaders import Loads, LoadsObject

from mpmm.cli import main
from mpmm.model_manager import ModelManager
from mpmm.observability.controls import SORTS, Controls
from mpmm.observability.inspect_screen import Section
from mpmm.shared_state.snapshot import Snapshot, read_snapshot

rich_console = pytest.importorskip("rich.console", reason="needs the extra cli")
from mpmm.observability.top import History, Looks, _fitting, screen  # noqa: E402  # needs rich

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
# The escape sequence by which a program leaves the alternate screen.
LEFT = "\x1b[?1049l"


@pytest.fixture
def busy(namespace: str, new_manager: NewManager, new_process: NewProcess) -> ModelManager:
    """A model in use, and a request that waits for its memory."""
    manager = new_manager(fallback_memory_mb=100, wait_timeout_seconds=60)
    manager.acquire_model("held", Loads())
    waiter = new_process(wait_timeout_seconds=60)
    waiter.send(acquire, "wanted")
    wait_until(lambda: waiting(namespace, "wanted"), "somebody waits")
    return manager


def drawn(snapshot: Snapshot, width: int, height: int, controls: Controls | None = None) -> list[str]:
    """Return the lines of a screen of that size."""
    history = History()
    history.add(snapshot)
    console = rich_console.Console(file=io.StringIO(), width=width, height=height, force_terminal=False)
    console.print(screen(snapshot, history, width, height, controls or Controls()))
    return str(console.file.getvalue()).splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 60), (60, 15)])
def test_the_screen_fits_the_terminal(width: int, height: int, busy: ModelManager, namespace: str) -> None:
    lines = drawn(read_snapshot(namespace), width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert f"namespace {namespace}" in text
    assert "100 of 100 MB" in text
    assert "wanted" in text


def test_a_large_screen_has_everything(busy: ModelManager, namespace: str) -> None:
    text = "\n".join(drawn(read_snapshot(namespace), 200, 60))
    for title in ("memory", "waiting", "copies", "models", "last evictions"):
        assert title in text
    assert "waits: needs 100 MB, 0 free" in text
    assert "all well" in text


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 60)])
def test_leases_are_on_the_screen(width: int, height: int, new_manager: NewManager, namespace: str) -> None:
    manager = new_manager()
    assert "leases" not in "\n".join(drawn(read_snapshot(namespace), width, height))
    with manager.reserve(300, name="training"):
        manager.acquire_model("held", Loads())
        lines = drawn(read_snapshot(namespace), width, height)
    at = next(number for number, line in enumerate(lines) if line.strip() == "leases")
    assert lines[at + 1].split()[:3] == ["lease", "name", "MB"]
    assert lines[at + 2].split()[1:3] == ["training", "300"]
    assert len(lines) <= height


def test_rows_that_do_not_fit_are_counted(busy: ModelManager, namespace: str) -> None:
    snapshot = read_snapshot(namespace)
    many = replace(snapshot, tickets=snapshot.tickets * 50)
    lines = drawn(many, 120, 40)
    assert len(lines) <= 40
    [title] = [line for line in lines if line.startswith("waiting (")]
    shown = sum("wanted" in line and "in_use" in line for line in lines)
    assert title.startswith(f"waiting (… and {50 - shown} more)")


def test_the_history_is_a_line_of_blocks(busy: ModelManager, namespace: str) -> None:
    snapshot = read_snapshot(namespace)
    [device] = snapshot.devices
    history = History()
    for used_mb in (0.0, 50.0, 100.0):
        history.add(replace(snapshot, devices=(replace(device, used_mb=used_mb),)))
    assert history.line(device, 5) == "   ▄█"
    assert history.line(device, 2) == "▄█"
    before = History()
    before.add(replace(snapshot, devices=(replace(device, samples=((2.0, 100.0), (1.0, 0.0))),)))
    assert before.line(device, 3) == "█ █"


def test_each_look_adds_to_the_history(busy: ModelManager, namespace: str) -> None:
    looks = Looks(namespace, None)
    for _ in range(3):
        looks.look()
    assert looks.snapshot is not None
    [device] = looks.snapshot.devices
    known = len(device.samples)
    assert looks.history.line(device, known + 4) == " " + "█" * (known + 3)


def test_sentences_go_on_where_there_is_room(busy: ModelManager, namespace: str) -> None:
    snapshot = read_snapshot(namespace)
    for height in (24, 50):
        shown = "\n".join(drawn(snapshot, 80, height))
        assert "waits: needs 100 MB, 0 free, 100 kept for it where held is in use" in re.sub(r"\n +", " ", shown)
    # Where there is none, the row is worth more.
    low = drawn(snapshot, 80, 15)
    assert any("wanted" in line and "in_use" in line for line in low)
    assert not any("why: " in line for line in low)


def test_of_many_waiters_the_first_one_has_its_sentence_and_others_have_rows(
    busy: ModelManager, namespace: str
) -> None:
    snapshot = read_snapshot(namespace)
    lines = drawn(replace(snapshot, tickets=snapshot.tickets * 9), 80, 34)
    rows = [number for number, line in enumerate(lines) if "wanted" in line and "in_use" in line]
    assert len(rows) > 1
    assert lines[rows[0] + 1].strip().startswith("why: waits: needs 100 MB")
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("sizes", "room", "found"),
    [
        ([3], 4, (1, 1)),
        ([3], 2, (1, 0)),
        ([3, 3, 3], 4, (2, 1)),
        ([3, 3, 3], 7, (3, 2)),
        ([3, 3, 3], 9, (3, 3)),
        ([5, 1, 1], 3, (3, 0)),
        ([1, 1, 1, 1], 2, (2, 2)),
    ],
)
def test_rows_and_sentences_share_the_room(sizes: list[int], room: int, found: tuple[int, int]) -> None:
    assert _fitting(sizes, room) == found


def test_figures_of_memory_are_not_cropped_for_a_longer_bar(busy: ModelManager, namespace: str) -> None:
    snapshot = read_snapshot(namespace)
    [device] = snapshot.devices
    full = replace(device, name="NVIDIA H100 80GB HBM3", used_mb=45000.0, limit_mb=72000.0, reserved_mb=12000.0)
    text = "\n".join(drawn(replace(snapshot, devices=(full,)), 70, 24))
    assert "45000 of 72000 MB, 12000 reserved" in text


@contextlib.contextmanager
def top_in_a_terminal(*arguments: str, status: int = 0) -> Iterator[tuple[int, int, subprocess.Popen[bytes]]]:
    """Start `mpmm top` in a terminal of 24 lines; give our end of that, its own, and the process. It is as it was."""
    ours, theirs = pty.openpty()
    try:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        before = termios.tcgetattr(theirs)
        command = [sys.executable, "-m", "mpmm.cli", "top", "--interval", "0.05", *arguments]
        terminal = {**os.environ, "TERM": "xterm"}
        for name in ("COLUMNS", "LINES"):
            terminal.pop(name, None)
        top = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=terminal)
        try:
            yield ours, theirs, top
            assert top.wait(20) == status
        finally:
            top.kill()
            top.wait()
        assert termios.tcgetattr(theirs) == before
    finally:
        os.close(ours)
        os.close(theirs)


def test_it_runs_in_a_terminal_and_ends_with_q(busy: ModelManager, namespace: str) -> None:
    with top_in_a_terminal(namespace) as (ours, theirs, _):
        read_until(ours, "wanted")
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 160, 0, 0))
        # A column for which 100 are too few.
        assert "reason  why" not in "".join(drawn(read_snapshot(namespace), 100, 24))
        read_until(ours, "reason  why")
        os.write(ours, b"h")
        read_until(ours, "the last picture stays on the terminal")
        os.write(ours, b"h/nothing-like-it")
        read_until(ours, "copies with 'nothing-like-it': 0 of 1")
        os.write(ours, b"\x1b")
        read_until(ours, "/ filter  space pause")
        os.write(ours, b"xq")
        # Back on the ordinary screen, where the last picture stays.
        left = read_until(ours, LEFT).rpartition(LEFT)[2]
        read_until(ours, "wanted", left)


def test_it_waits_for_the_begin_and_keeps_the_last_picture_at_the_end(namespace: str) -> None:
    with top_in_a_terminal() as (ours, _, _):
        read_until(ours, "waiting for a namespace in")
        with ModelManager(namespace=namespace, memory_source="booked") as manager:
            manager.acquire_model("seen", LoadsObject())
            read_until(ours, "seen")
        assert "seen" in read_until(ours, "this is its last picture; waiting for the namespace to start again")[-20000:]
        with ModelManager(namespace=namespace, memory_source="booked") as manager:
            manager.acquire_model("another", LoadsObject())
            read_until(ours, "another")
            os.write(ours, b"q")
            read_until(ours, LEFT)


def test_an_interrupt_ends_it_in_good_order(runtime_root: Path) -> None:
    with top_in_a_terminal("later") as (ours, _, top):
        read_until(ours, "waiting for namespace later")
        top.send_signal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_the_terminal_as_it_was(busy: ModelManager, namespace: str, number: int) -> None:
    # It is ignored in tests that run under nohup, and in what they start.
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with top_in_a_terminal(namespace, status=128 + number) as (ours, _, top):
            read_until(ours, "wanted")
            top.send_signal(number)
            read_until(ours, LEFT)
    finally:
        signal.signal(number, before)


def test_a_signal_that_is_to_be_ignored_ends_nothing(busy: ModelManager, namespace: str) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with top_in_a_terminal(namespace) as (ours, _, top):
            read_until(ours, "wanted")
            top.send_signal(signal.SIGHUP)
            os.write(ours, b"q")
            read_until(ours, LEFT)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_filter_may_be_the_pid_of_a_process(busy: ModelManager, namespace: str) -> None:
    snapshot = read_snapshot(namespace)
    others = {member.pid for member in snapshot.members} - {os.getpid()}
    mine, theirs = ("".join(drawn(snapshot, 200, 60, Controls(filter=str(pid)))) for pid in (os.getpid(), others.pop()))
    assert f"copies with '{os.getpid()}': 1 of 1" in mine
    assert "copies with" in theirs and "0 of 1" in theirs


def test_keys_sort_filter_hold_and_help() -> None:
    controls = Controls()
    rows = [
        SimpleNamespace(tag=tag, mb=mb, reserved_mb=0.0, for_s=for_s, uses=uses)
        for tag, mb, for_s, uses in (("Beta", 1.0, 3.0, 2), ("alpha", 2.0, 1.0, 9), ("gamma", 3.0, 2.0, 5))
    ]
    section: Section[Any] = Section("copies", (), rows, lambda row: (), 10)

    def order() -> list[str]:
        return [row.tag for row in controls.arranged(section).items]

    orders = {}
    for _ in SORTS:
        orders[controls.sort] = "".join(tag[0] for tag in order())
        controls.press("s")
    assert orders == {"state": "Bag", "MB": "gaB", "age": "Bga", "name": "Bag", "uses": "agB"}
    controls.press("r")
    assert order() == ["gamma", "alpha", "Beta"]
    controls.press("r")
    for key in "/qetx\x7f\r":
        assert not controls.press(key)
    assert (controls.filter, controls.typing, order()) == ("qet", False, [])
    for key in "\x1b/BETA":
        controls.press(key)
    assert (order(), controls.footer().split("   ")[0]) == (["Beta"], "filter: BETA_")
    assert controls.arranged(section).title == "copies with 'BETA': 1 of 3"
    for key in "\r ?":
        controls.press(key)
    assert (controls.paused, controls.helping) == (True, True)
    assert "continue (paused)" in controls.footer()
    assert controls.press("q")


def read_until(descriptor: int, text: str, seen: str = "") -> str:
    """Read from a terminal until a text appears; return everything read. seen: what was read before."""
    deadline = time.monotonic() + 20
    while text not in seen and text not in _ESCAPES.sub("", seen):
        assert time.monotonic() < deadline, seen[-2000:]
        if select.select([descriptor], [], [], 0.1)[0]:
            seen += os.read(descriptor, 65536).decode("utf-8", "replace")
    return seen


def test_without_the_library_it_says_what_to_install(
    busy: ModelManager, namespace: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "mpmm.observability.top")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["top", namespace]) == 2
    assert capsys.readouterr().err == "mpmm: this needs rich; install it with: pip install 'mpmm[cli]'\n"


def test_what_is_asked_for_must_be_there(runtime_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "nowhere"]) == 2
    assert "there is no namespace 'nowhere'" in capsys.readouterr().err
    assert main(["top", "nowhere", "--interval", "0"]) == 2
    assert "expected seconds from 0.05" in capsys.readouterr().err
    assert main(["top", "nowhere", "--sort", "colour"]) == 2
    assert "expected one of state, MB, age, name, uses" in capsys.readouterr().err


def test_without_a_terminal_one_picture_is_printed(
    busy: ModelManager, namespace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["top", "--filter", "wanted"]) == 0
    printed = capsys.readouterr().out
    assert "wanted" in printed
    assert "with 'wanted': 0 of 1" in printed
