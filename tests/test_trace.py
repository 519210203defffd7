"""Traces and plots: their contents, which follow the rules of the format."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from harness import NewManager, NewProcess, Process, acquire, force_reset, release, shut_down, wait_until, waiting
from loaders import Loads, LoadsObject

from mpmm.cli import main
from mpmm.model_manager import ModelManager
from mpmm.observability.event_reader import EventReader
from mpmm.observability.plot import draw, histories, read_trace
from mpmm.observability.trace import Tracer
from mpmm.observability.trace_tracks import DEVICE_PID, NAMESPACE_PID
from mpmm.observability.trace_writer import recent_trace
from mpmm.shared_state.layout import Capacities
from mpmm.shared_state.snapshot import read_snapshot

Capture = pytest.CaptureFixture[str]
Events = Iterable[dict[str, Any]]


def broken_rules(events: Events) -> list[str]:
    """Return where a trace breaks the rules of the Trace Event Format, in so far as it uses it."""
    broken, spans, arrows = [], defaultdict(list), defaultdict(list)
    for event in events:
        kind = event.get("ph")
        numbers = [event.get(name) for name in ("ts", "pid", "tid")]
        if kind not in ("X", "M", "C", "i", "s", "f") or not isinstance(event.get("name"), str):
            broken.append(f"unknown or without a name: {event}")
        elif not all(isinstance(number, int | float) and number >= 0 for number in numbers):
            broken.append(f"without time and place: {event}")
        elif kind == "X":
            if not event.get("dur", -1) >= 0:
                broken.append(f"without a duration: {event}")
            spans[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        elif kind == "M":
            wanted = {"process_name": "name", "thread_name": "name", "process_sort_index": "sort_index"}
            if wanted.get(event["name"]) not in event["args"]:
                broken.append(f"metadata that means nothing: {event}")
        elif kind == "C" and not all(isinstance(value, int | float) for value in event["args"].values()):
            broken.append(f"a counter that counts nothing: {event}")
        elif kind == "i" and event.get("s") not in ("g", "p", "t"):
            broken.append(f"of no scope: {event}")
        elif kind in ("s", "f"):
            if kind == "f" and event.get("bp") != "e":
                broken.append(f"bound to the next span: {event}")
            arrows[event["cat"], event["name"], event["id"]].append(event)
    for place, taken in spans.items():
        ordered = sorted(taken)
        for (_, end), (begin, _) in itertools.pairwise(ordered):
            if begin < end - 0.002:
                broken.append(f"spans of {place} overlap: {end} is after {begin}")
    for name, ends in arrows.items():
        if sorted(end["ph"] for end in ends) != ["f", "s"]:
            broken.append(f"arrow {name} has {len(ends)} ends")
            continue
        tail, head = sorted(ends, key=lambda end: bool(end["ph"] == "f"))
        if head["ts"] < tail["ts"] - 0.002:
            broken.append(f"arrow {name} goes back in time")
        for end in ends:
            here = spans[end["pid"], end["tid"]]
            if not any(begin - 0.002 <= end["ts"] <= until + 0.002 for begin, until in here):
                broken.append(f"an end of arrow {name} lies in no span: {end}")
    return broken


def named(events: Events, name: str, kind: str = "X") -> list[dict[str, Any]]:
    return [event for event in events if event["name"] == name and event["ph"] == kind]


@pytest.fixture
def story(namespace: str, new_manager: NewManager, new_process: NewProcess) -> tuple[ModelManager, Process]:
    """A hand-over between processes, an eviction for another model, a copy in use, and a request that waits for it."""
    manager, other = new_manager(fallback_memory_mb=250), new_process()
    handle = manager.acquire_model("a", Loads())
    manager.acquire_model("kept", Loads())
    other.send(acquire, "a")
    wait_until(lambda: waiting(namespace, "a"), "the other one waits")
    manager.release_model("a", handle)
    other.result()
    other.call(release)
    other.call(acquire, "b")
    other.call(release)
    other.call(acquire, "b")
    return manager, other


def test_a_trace_tells_what_happened(story: tuple[ModelManager, Process], namespace: str) -> None:
    _, other = story
    events = recent_trace(namespace)
    assert broken_rules(events) == []
    ours = os.getpid()
    assert {event["pid"] for event in named(events, "load a")} == {ours}
    first, second = sorted(named(events, "hold a"), key=lambda event: float(event["ts"]))
    assert (first["pid"], second["pid"]) == (ours, other.pid)
    [wait] = named(events, "wait a")[-1:]
    assert wait["pid"] == other.pid
    assert "in use" in wait["args"]["why"]
    [unload] = named(events, "unload a")
    assert (unload["args"]["evicted"], unload["args"]["for"]) == (True, "b")
    [lying] = named(events, "a")
    assert (lying["pid"], lying["args"]["evicted"]) == (DEVICE_PID, True)
    assert lying["ts"] + lying["dur"] == pytest.approx(unload["ts"], abs=0.01)
    unfinished = {event["name"] for event in events if event["ph"] == "X" and event["args"].get("unfinished")}
    assert unfinished == {"hold b", "hold kept", "b", "kept", f"pid {ours} leads"}
    arrows = {
        (event["name"], event["pid"], end["pid"])
        for event in events
        for end in events
        if event["ph"] == "s" and end["ph"] == "f" and event["id"] == end["id"]
    }
    assert ("hand-over", ours, other.pid) in arrows
    assert ("after waiting", other.pid, other.pid) in arrows
    assert "made room" in {name for name, _, _ in arrows}
    names = {event["args"]["name"] for event in named(events, "process_name", "M")}
    assert {f"namespace {namespace}", "device 0: booked"} < names
    assert [event["args"]["used"] for event in named(events, "memory MB", "C")] == [200.0]
    loaded = [event["args"]["loaded"] for event in named(events, "models MB", "C")]
    # Copies loaded at the end of a trace are not shown as unloaded.
    assert (loaded[:3], loaded[-1]) == ([0, 100.0, 200.0], 200.0)


def test_following_gives_the_same_spans_as_looking_once(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, process = new_manager(fallback_memory_mb=100), new_process()
    reader, tracer = EventReader(namespace), Tracer()
    events = []
    for tag in ("a", "b", "a"):
        manager.release_model(tag, manager.acquire_model(tag, Loads()))
        events += tracer.add(reader.step())
        process.call(acquire, tag)
        events += tracer.add(reader.step())
        process.call(release)
    manager.acquire_model("c", LoadsObject())
    process.call(force_reset)
    wait_until(lambda: not read_snapshot(namespace).instances, "all is unloaded")
    step = reader.step()
    events += tracer.add(step) + tracer.finish(step.snapshot)
    once = Tracer()
    whole = once.add(EventReader(namespace).step())
    assert broken_rules(events) == []
    assert broken_rules(whole) == []

    def spans(found: Events) -> set[tuple[str, int, float]]:
        kinds = ("wait", "load", "hold", "unload")
        return {
            (event["name"], event["pid"], round(event["ts"], 1))
            for event in found
            if event["ph"] == "X" and event["cat"] in kinds and not event["args"].get("unfinished")
        }

    assert spans(whole) == spans(events)
    assert named(events, "reset", "i")
    assert tracer.lost == 0


def test_overwritten_events_are_counted_and_said(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(capacities=Capacities(events=16))
    reader, tracer = EventReader(namespace), Tracer()
    held = manager.acquire_model("held", Loads())
    events = tracer.add(reader.step())
    before = read_snapshot(namespace).events_written
    for _ in range(20):
        manager.release_model("a", manager.acquire_model("a", Loads()))
    manager.release_model("held", held)
    step = reader.step()
    events += tracer.add(step) + tracer.finish(step.snapshot)
    assert step.lost == step.snapshot.events_written - before - len(step.events) > 0
    assert tracer.lost == step.lost
    assert named(events, f"{step.lost} events were overwritten before they could be read", "i")
    assert broken_rules(events) == []
    assert reader.step().events == ()


def test_what_was_there_before_the_first_event_is_in_the_trace(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(capacities=Capacities(events=16))
    manager.acquire_model("old", Loads())
    for _ in range(20):
        manager.release_model("a", manager.acquire_model("a", Loads()))
    events = recent_trace(namespace)
    assert broken_rules(events) == []
    [old] = named(events, "hold old")
    assert (old["pid"], old["args"]["unfinished"]) == (os.getpid(), True)
    assert {event["name"] for event in events if event.get("cat") == "loaded"} == {"old", "a"}


def test_another_namespace_of_the_same_name_begins_anew(namespace: str, new_manager: NewManager) -> None:
    reader, tracer = EventReader(namespace), Tracer()
    events = []
    for tag in ("a", "b"):
        manager = new_manager()
        manager.acquire_model(tag, Loads())
        step = reader.step()
        assert step.fresh
        events += tracer.add(step)
        manager.shutdown()
        with pytest.raises(FileNotFoundError):
            reader.step()
    events += tracer.finish(step.snapshot)
    assert broken_rules(events) == []
    assert len(named(events, "hold a")) == len(named(events, "hold b")) == 1


def test_a_busy_ring_is_looked_at_more_often(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    reader = EventReader(namespace)
    reader.step()
    longest = reader.pause_s
    for _ in range(1100):
        manager.release_model("a", manager.acquire_model("a", Loads()))
    reader.step()
    assert reader.pause_s == longest / 2
    reader.step()
    assert reader.pause_s == longest


def test_the_command_follows_a_job_from_its_begin_to_its_end(
    namespace: str, new_process: NewProcess, tmp_path: Path
) -> None:
    file = tmp_path / "trace.json"
    recorder = subprocess.Popen(
        [sys.executable, "-m", "mpmm.cli", "trace", namespace, "--follow", "-o", str(file)], stderr=subprocess.PIPE
    )
    try:
        worker = new_process()
        worker.call(acquire, "a")
        wait_until(lambda: file.exists() and "load a" in file.read_text(), "the load is in the trace")
        # The end is not written yet, but the trace can be read.
        assert named(read_trace(file), "load a")
        worker.call(release)
        worker.call(shut_down)
        _, said = recorder.communicate(timeout=20)
    finally:
        recorder.kill()
    assert recorder.returncode == 0
    assert b"entries written" in said
    events = json.loads(file.read_text())
    assert broken_rules(events) == []
    assert len(named(events, "hold a")) == 1


def test_an_earlier_trace_is_kept_where_there_is_nothing_to_write(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "trace.json"
    assert main(["trace", "nowhere", "-o", str(file)]) == 2
    assert not file.exists()
    file.write_text("[\n]\n")
    assert main(["trace", "nowhere", "-o", str(file)]) == 2
    assert file.read_text() == "[\n]\n"
    assert "there is no namespace 'nowhere'" in capsys.readouterr().err


def test_an_interrupt_ends_a_trace_in_good_order(story: tuple[ModelManager, Process], namespace: str) -> None:
    recorder = subprocess.Popen(
        [sys.executable, "-m", "mpmm.cli", "trace", namespace, "--follow"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert recorder.stdout is not None
    begun = recorder.stdout.readline() + recorder.stdout.readline()
    recorder.send_signal(signal.SIGINT)
    rest = recorder.stdout.read()
    recorder.communicate(timeout=20)
    assert recorder.returncode == 0
    assert broken_rules(json.loads(begun + rest)) == []


def test_plots_of_a_namespace_and_of_a_trace(
    story: tuple[ModelManager, Process], namespace: str, tmp_path: Path, capsys: Capture
) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    trace = tmp_path / "trace.json"
    assert main(["trace", namespace, "-o", str(trace)]) == 0
    assert "entries written\n" in capsys.readouterr().err
    history = histories(read_trace(trace))[0]
    assert history.name == "device 0: booked"
    assert [tag for *_, tag, evicted in history.loaded if evicted] == ["a"]
    assert history.limit[-1][1] == 250.0
    assert main(["plot", "--trace", str(trace), "-o", str(tmp_path / "plot.svg")]) == 0
    drawn = (tmp_path / "plot.svg").read_text()
    assert "<svg" in drawn
    assert main(["plot", namespace, "-o", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_leases_are_drawn_also_those_that_are_held_still(
    namespace: str, new_manager: NewManager, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    manager = new_manager(fallback_memory_mb=2000)
    with manager.reserve(300, name="training"):
        pass
    with manager.reserve(1200, name="training"):
        events = recent_trace(namespace)
        draw(events, tmp_path / "plot.png")
    history = histories(events)[0]
    assert [(name, mb) for _, _, name, mb in history.leased] == [("training", 300.0), ("training", 1200.0)]
    assert [mb for _, mb in history.leased_mb()] == [300.0, 0.0, 1200.0, 0.0]
    # No process's track has it as a copy that is loaded.
    assert history.loaded == []
    assert broken_rules(events) == []


SPAN = {"ph": "X", "cat": "loaded", "name": "a", "ts": 1, "dur": 5, "pid": DEVICE_PID, "tid": 0, "args": {}}
BROKEN: list[dict[str, object]] = [{"ts": "now"}, {"dur": None}, {"args": []}, {"ts": math.inf}]
MEMORY = {"ph": "C", "name": "memory MB", "ts": 1, "pid": DEVICE_PID, "tid": 0, "args": {"used": 1}}


@pytest.mark.parametrize("tag", ["a$b^$", "$\\nothing$", "\x1b[31m", "模型", "\udcff", "x" * 511, "_a"])
def test_a_tag_of_any_letters_is_drawn_as_it_is(tag: str, tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    file = tmp_path / "trace.json"
    device = {"ph": "M", "pid": DEVICE_PID, "name": "process_name", "args": {"name": f"device {tag}"}}
    lease = {**SPAN, "cat": "leased", "args": {"MB": 3}}
    file.write_text(json.dumps([device, {**SPAN, "name": tag}, {**lease, "name": tag}]))
    assert main(["plot", "--trace", str(file), "-o", str(tmp_path / "plot.svg")]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "content",
    [b"\x1f\x8b\x08\x00\xff\x90", "[]".encode("utf-16"), b"[" * 100_000, b"[" + b"1" * 10_000 + b"]"],
    ids=("gzip", "utf-16", "deep", "long"),
)
def test_a_file_that_is_no_text_or_more_than_python_reads_is_no_trace(
    content: bytes, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "trace.json"
    file.write_bytes(content)
    assert main(["plot", "--trace", str(file), "-o", "plot.png"]) == 2
    assert capsys.readouterr().err == f"mpmm: {file} is not a trace: expected the JSON that `mpmm trace` writes\n"


@pytest.mark.parametrize("pid", ["main", None, [1], 1.5, 7, DEVICE_PID + 64])
def test_processes_of_another_programs_trace_are_no_devices(pid: object, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "trace.json"
    file.write_text(json.dumps([{**SPAN, "pid": pid}]))
    assert main(["plot", "--trace", str(file), "-o", "plot.png"]) == 2
    assert "nothing to draw" in capsys.readouterr().err


@pytest.mark.parametrize(
    "event",
    [
        *(
            {name: value for name, value in SPAN.items() if name != left_out}
            for left_out in ("name", "ts", "dur", "args")
        ),
        *({**SPAN, **other} for other in BROKEN),
        *({**MEMORY, "args": args} for args in ({}, {"used": math.nan}, {"used": "much"}, None)),
    ],
    ids=str,
)
def test_events_of_another_programs_trace_are_refused(
    event: dict[str, object], tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "trace.json"
    file.write_text(json.dumps([MEMORY, event]))
    assert main(["plot", "--trace", str(file), "-o", "plot.png"]) == 2
    assert "this is not a trace of mpmm: `mpmm trace` writes no event" in capsys.readouterr().err


def test_what_cannot_be_drawn_is_said(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "trace.json"
    file.write_text("no trace")
    assert main(["plot", "--trace", str(file), "-o", "plot.png"]) == 2
    assert "is not a trace" in capsys.readouterr().err
    file.write_text("[]")
    assert main(["plot", "--trace", str(file), "-o", "plot.png"]) == 2
    assert "nothing to draw" in capsys.readouterr().err
    assert main(["plot", "--trace", str(file), "-o", "plot.txt"]) == 2
    assert "expected a name that ends in one of .png" in capsys.readouterr().err
    assert main(["plot", "--trace", str(tmp_path / "missing"), "-o", "plot.png"]) == 2
    assert "No such file" in capsys.readouterr().err
    file.write_text(json.dumps([MEMORY]))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plot", "--trace", str(file), "-o", "plot.png"]) == 2
    assert "pip install 'mpmm[plot]'" in capsys.readouterr().err
    assert NAMESPACE_PID < DEVICE_PID


def test_a_dash_stands_for_the_standard_output(
    namespace: str,
    new_manager: NewManager,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    new_manager()
    monkeypatch.chdir(tmp_path)
    assert main(["trace", namespace, "-o", "-"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), (dict, list))
    assert list(tmp_path.iterdir()) == []
