"""What commands show in terminals: columns, wrapped sentences, colours."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace

import pytest
from harness import NewManager, import_path, wait_until
from loaders import Loads
from test_run import at_terminal, read_all

from mpmm.cli import main
from mpmm.model_manager import ModelManager
from mpmm.observability.colours import painter
from mpmm.observability.inspect_screen import render
from mpmm.observability.tables import table
from mpmm.shared_state.snapshot import read_snapshot

Capture = pytest.CaptureFixture[str]


def test_long_tables_are_cut_to_what_matters(namespace: str, new_manager: NewManager, capsys: Capture) -> None:
    manager = new_manager(fallback_memory_mb=10_000)
    for number in range(30):
        manager.release_model(f"m{number}", manager.acquire_model(f"m{number}", Loads()))
    manager.acquire_model("m17", Loads())
    assert main(["inspect", namespace]) == 0
    copies = capsys.readouterr().out.split("\ncopies:\n")[1].split("\n\n")[0].splitlines()
    assert "m17" in copies[1]
    assert copies[-1] == "  … and 20 more; --all shows them"
    assert len(copies) == 12
    assert main(["inspect", "--all", namespace]) == 0
    assert len(capsys.readouterr().out.split("\ncopies:\n")[1].split("\n\n")[0].splitlines()) == 31


@pytest.mark.parametrize("width", [60, 70, 80, 120])
def test_columns_that_do_not_fit_are_left_out_whole(width: int, busy: ModelManager, namespace: str) -> None:
    snapshot = read_snapshot(namespace)
    full, narrow = render(snapshot), render(snapshot, width=width)
    assert max(map(len, full.splitlines())) > 120
    assert max(map(len, narrow.splitlines())) <= width
    assert "…" not in narrow
    for title in ("devices", "waiting", "copies", "models", "members"):
        lines = (text.split(f"\n{title}:\n")[1].splitlines()[0] for text in (narrow, full))
        heads, all_heads = (re.split(r" {2,}", line.strip()) for line in lines)
        assert [head for head in all_heads if head in heads] == heads
    # The sentence is complete.
    assert "waits: needs 250 MB, " in " ".join(narrow.split())
    assert "rolled back 0" in " ".join(narrow.split())


@pytest.mark.parametrize("width", [70, 80, 120, 200])
def test_the_columns_by_which_a_wait_is_understood_stay_in_a_narrow_terminal(
    width: int, busy: ModelManager, namespace: str
) -> None:
    snapshot = read_snapshot(namespace)
    [ticket], [device] = snapshot.tickets, snapshot.devices
    tickets = (replace(ticket, tag="a model/of a name/that is longer than its column", time_left_s=math.inf),)
    # As on a GPU, where all of them are known.
    device = replace(device, name="NVIDIA H100 80GB HBM3", used_mb=45000.0, limit_mb=72000.0, total_mb=80000.0)
    devices = (replace(device, external_mb=900.0, reserved_mb=12000.0),)
    text = render(replace(snapshot, tickets=tickets, devices=devices), width=width)
    assert max(map(len, text.splitlines())) <= width
    head, row = text.split("\nwaiting:\n")[1].splitlines()[:2]
    wanted = ["for", "pid", "waited", "expected", "needs MB", "reason"] + ["ticket"] * (width >= 80)
    assert set(wanted) <= set(re.split(r" {2,}", head.strip()))
    assert "in_use" in row
    assert "waits: needs 250 MB, " in " ".join(text.split())
    head, row = text.split("\ndevices:\n")[1].splitlines()[:2]
    assert {"used MB", "reserved", "limit"} <= set(re.split(r" {2,}", head.strip()))
    assert {"45000", "12000", "72000"} <= set(row.split())


def test_prose_stands_below_its_row_where_not_everything_fits_beside_it() -> None:
    head = ("for", "left", "reason", "why")
    rows = [("m" * 30, "-", "in_use", "waits for a copy that others have"), ("n", "-", "behind", "")]
    beside = table(head, rows, 100, least=("left",), prose=True, below=True)
    assert beside == table(head, rows, 100, prose=True)
    assert beside[1].endswith("in_use  waits for a copy that others have")
    # Columns that say nothing are dropped first; then names are shortened before anything else is dropped.
    assert table(head, rows, 36, least=("reason", "left"), prose=True, below=True) == [
        "  for                         reason",
        f"  {'m' * 6}…{'m' * 19}  in_use",
        "    why: waits for a copy that",
        "      others have",
        "  n                           behind",
    ]
    short = table(head, rows, 36, least=("reason", "left"), prose=True, below=True, wrap=False)
    assert [line.split()[-1] for line in short] == ["reason", "in_use", "behind"]


def test_a_table_that_has_nothing_to_leave_out_shortens_its_longest_name() -> None:
    rows = [("m" * 90, "idle", "12"), ("n", "active", "4000")]
    assert table(("model", "state", "MB"), rows, 40) == [
        "  model                     state     MB",
        f"  {'m' * 5}…{'m' * 18}  idle      12",
        "  n                         active  4000",
    ]
    assert [line[-2:] for line in table(("model", "priority"), [("a", "+3"), ("b", "0")])] == ["ty", "+3", " 0"]
    assert table(("model", "state", "MB"), rows, 110)[1] == f"  {'m' * 90}  idle      12"


def test_colours_are_for_terminals_without_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert painter(Terminal())("urgent", "text") == "\x1b[1;31mtext\x1b[0m"
    assert painter(io.StringIO())("urgent", "text") == "text"
    monkeypatch.setenv("NO_COLOR", "")
    assert painter(Terminal())("well", "text") != "text"
    monkeypatch.setenv("NO_COLOR", "1")
    assert painter(Terminal())("urgent", "text") == "text"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert painter(Terminal())("urgent", "text") == "text"


@pytest.mark.parametrize("coloured", [True, False], ids=["coloured", "NO_COLOR"])
@pytest.mark.parametrize("columns", [70, 200])
@pytest.mark.parametrize("command", ["inspect", "ps", "check --health", "doctor"])
def test_what_commands_show_in_a_terminal_fits_and_has_colours_unless_no_color_is_set(
    busy: ModelManager, monkeypatch: pytest.MonkeyPatch, command: str, columns: int, coloured: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "" if coloured else "1")
    for name in ("COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", import_path())
    with at_terminal(command.split(), columns) as (_, terminal):
        shown = read_all(terminal)
    plain = re.sub("\x1b\\[[0-9;]*m", "", shown)
    assert "Traceback" not in plain and plain.strip()
    assert (plain != shown, "\x1b" in plain) == (coloured, False)
    assert max(map(len, plain.splitlines())) <= columns


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_events_are_wrapped_in_a_terminal_and_whole_in_a_pipe(
    busy: ModelManager, namespace: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    name = "a model/of a name/that is longer than its column"
    busy.acquire_model("idle", Loads("handle"))
    busy.pin(name)

    def events() -> str:
        assert main(["events"]) == 0
        return capsys.readouterr().out

    # What waits for the copies that have just been taken is told so by the next plan.
    wait_until(lambda: "where idle is in use" in events(), "the waiting request was told")
    whole = events()
    assert max(map(len, whole.splitlines())) > 100
    for variable in ("COLUMNS", "LINES"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PYTHONPATH", import_path())
    with at_terminal(["events"], columns) as (_, terminal):
        shown = read_all(terminal).splitlines()
    assert max(map(len, shown)) <= columns
    # Nothing is left out, and what goes on in another line is set apart. (Clocks are as exact as a look is.)
    clock = r"\d\d:\d\d:\d\d\.\d{3} "
    assert re.sub(clock, "", " ".join(shown)).split() == re.sub(clock, "", whole).split()
    assert all(re.match(clock + "|" + " " * 25 + r"\S", line) for line in shown)


def test_colours_change_nothing_else(busy: ModelManager, namespace: str) -> None:
    snapshot = read_snapshot(namespace)
    painted = render(snapshot, width=80, paint=lambda style, text: f"<{style}>{text}</>")
    assert "<well>all well</>" in painted
    assert "<title>waiting:</>\n<head>" in painted
    assert re.sub(r"</?[a-z]*>", "", painted) == render(snapshot, width=80)
