"""The command line."""

from __future__ import annotations

import importlib.metadata
import inspect
import io
import json
import os
import pydoc
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from harness import NewManager, NewProcess, acquire, import_path, wait_until, waiting
from loaders import Loads, LoadsObject

import mpmm.cli
from mpmm.cli import main
from mpmm.errors import InvalidArgumentError, NamespaceResetError
from mpmm.model_manager import ModelManager
from mpmm.observability.event_lines import _TEXTS, said
from mpmm.observability.findings import attention_texts, findings
from mpmm.observability.formatting import age, bar
from mpmm.observability.inspect_screen import render
from mpmm.policy.view import Reason
from mpmm.shared_state.events import EventKind
from mpmm.shared_state.layout import Header
from mpmm.shared_state.segment import segment_name
from mpmm.shared_state.snapshot import EventChoice, Snapshot, read_snapshot
from mpmm.text.arguments import checked_size_mb

Capture = pytest.CaptureFixture[str]


def test_inspect_shows_everything_as_text(busy: ModelManager, namespace: str, capsys: Capture) -> None:
    assert main(["inspect", namespace]) == 0
    text = capsys.readouterr().out
    assert f"leader: pid {os.getpid()}" in text
    assert "waiting: 1, the longest for" in text
    for section in ("devices:", "models:", "copies:", "waiting:", "members:"):
        assert section in text.splitlines()
    waiters = text.split("\nwaiting:\n")[1].split("\n\n")[0]
    assert "big" in waiters
    assert "in_use" in waiters or "unloading" in waiters
    assert "waits: needs 250 MB" in waiters
    assert "loads: needs 100 MB, 250 free" in text.split("\nlast decisions:\n")[1]
    held = text.split("\ncopies:\n")[1].splitlines()[1].split()
    assert (held[1], held[2], held[7]) == ("object", "active", str(os.getpid()))
    assert "all well" in text.splitlines()


def test_inspect_says_what_is_wrong(namespace: str, new_manager: NewManager, new_process: NewProcess) -> None:
    manager = new_manager(fallback_memory_mb=100)
    manager.acquire_model("held", Loads())
    waiter, dead = new_process(), new_process()
    waiter.send(acquire, "wanted")
    wait_until(lambda: waiting(namespace, "wanted"), "somebody waits")
    snapshot = read_snapshot(namespace)
    later = replace(
        snapshot,
        leader=None,
        rollbacks=2,
        # The snapshot may have fallen into a transaction.
        torn_words=0,
        members=tuple(replace(member, alive=member.pid != dead.pid) for member in snapshot.members),
        tickets=tuple(replace(ticket, waited_s=75.0) for ticket in snapshot.tickets),
        instances=tuple(replace(copy, for_s=400.0) for copy in snapshot.instances),
        devices=tuple(replace(device, sample_age_s=9.0) for device in snapshot.devices),
    )
    urgent = [finding.text for finding in findings(later) if finding.urgent]
    assert [text.split(":")[0] for text in urgent] == [
        "no leader",
        "the last sample of device 0 (booked) is 9.0 s old, poll_interval is 0.5 s",
        "dead, but not cleaned up yet",
        f"pid {waiter.pid} has waited for wanted for 75 s",
        f"pid {os.getpid()} has held held for 7 min while 1 request waits",
    ]
    assert str(dead.pid) in urgent[2]
    assert "in use" in urgent[3]
    assert [finding.text for finding in findings(later) if not finding.urgent] == [
        "since the namespace was created: transactions rolled back because their process died: 2"
    ]
    text = render(later)
    assert all(f"ATTENTION: {said}" in text for said in urgent)


@pytest.mark.parametrize(("limit", "status"), [("0", 1), ("3600", 0)])
def test_inspect_tells_scripts_that_somebody_waits(
    limit: str, status: int, busy: ModelManager, namespace: str, capsys: Capture
) -> None:
    assert main(["inspect", "--max-wait", limit, namespace]) == status
    assert main(["inspect", "--max-wait", limit, "--json", namespace]) == status


def test_a_bar_shows_what_is_used_reserved_returning_and_the_limit(busy: ModelManager, namespace: str) -> None:
    [device] = read_snapshot(namespace).devices
    full = replace(device, total_mb=100.0, limit_mb=90.0, used_mb=40.0, reserved_mb=20.0, returning_mb=10.0)
    assert bar(full, 10) == "███░▓▓···│"
    assert bar(replace(full, used_mb=None, reserved_mb=0.0, returning_mb=0.0), 10) == "·········│"
    assert bar(replace(full, used_mb=100.0, reserved_mb=50.0, returning_mb=0.0), 10) == "██████████"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "?"), (0.04, "0.0 s"), (9.94, "9.9 s"), (42.0, "42 s"), (600.0, "10 min"), (7200.0, "2.0 h"), (2e5, "2 d")],
)
def test_ages_are_short(seconds: float | None, text: str) -> None:
    assert age(seconds) == text


def test_the_newest_events_of_each_kind_are_chosen(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager()
    for _ in range(5):
        manager.release_model("m", manager.acquire_model("m", Loads()))
    everything = read_snapshot(namespace).events
    newest = read_snapshot(namespace, choice=EventChoice(newest_of_each=2)).events
    assert [event.kind for event in newest].count("hit") == 2
    assert [event.kind for event in newest].count("load_ended") == 1
    assert newest[-1].sequence == everything[-1].sequence
    assert [event.sequence for event in newest] == sorted(event.sequence for event in newest)
    after = everything[-3].sequence
    assert [event.sequence for event in read_snapshot(namespace, choice=EventChoice(after=after)).events] == [
        after + 1,
        after + 2,
    ]
    assert read_snapshot(namespace, events=False).events == ()


def test_inspect_as_json_has_every_field_of_the_snapshot(busy: ModelManager, namespace: str, capsys: Capture) -> None:
    assert main(["inspect", "--json", namespace]) == 0
    [line] = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["schema"] == 2
    assert set(found) == {"schema", "findings", *(field.name for field in fields(Snapshot))}
    assert found["accounting_only"] is True
    assert {"loadable_on", "usable_on", "head_of_line_for_s"} <= found["tickets"][0].keys()
    assert "mean_interarrival_s" in found["models"][0] and "unrelated_mb" in found["devices"][0]
    assert "unload_on_release" in found["instances"][0]
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
        assert main(["check"]) == 2
        assert "There are 2: second, test" in capsys.readouterr().err
        assert main(["inspect", "--json"]) == 2


def test_inspect_lists_several_namespaces(busy: ModelManager, capsys: Capture) -> None:
    with ModelManager(namespace="second", memory_source="booked"):
        assert main(["inspect"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines[2:4]] == ["second", "test"]
        assert "all well" in lines[2]
        assert main(["inspect", "--max-wait", "0"]) == 1


def test_inspect_without_any(capsys: Capture) -> None:
    assert main(["inspect"]) == 2
    assert "no process of this user has a model manager at present" in capsys.readouterr().err


def test_list_names_the_namespaces(busy: ModelManager, capsys: Capture) -> None:
    with ModelManager(namespace="second", memory_source="booked"):
        assert main(["list"]) == 0
        assert capsys.readouterr().out.split() == ["second", "test"]


def test_list_without_any(capsys: Capture) -> None:
    assert main(["list"]) == 0
    assert capsys.readouterr().out == "no namespaces\n"


def test_check_is_content_with_a_sound_state(busy: ModelManager, namespace: str, capsys: Capture) -> None:
    assert main(["check", namespace]) == 0
    # Without `--health`, it does not check what needs attention, and must not imply that nothing does.
    said = capsys.readouterr().out
    assert said == f"{namespace}: all invariants hold; `mpmm check --health` also says what needs attention\n"


def test_inspect_says_of_a_namespace_without_a_living_process_what_a_probe_says(
    busy: ModelManager, namespace: str
) -> None:
    snapshot = read_snapshot(namespace)
    dead = replace(snapshot, members=tuple(replace(member, alive=False) for member in snapshot.members))
    [urgent] = [finding.text for finding in findings(dead) if finding.urgent]
    assert attention_texts(dead) == [urgent]
    assert urgent.startswith("dead: none of its 2 processes is alive")
    assert "`mpmm prune` removes" in urgent
    assert f"ATTENTION: {urgent}" in render(dead)
    assert "has taken over yet" not in render(dead)


def test_settings_are_shown_under_the_names_of_the_parameters(
    new_manager: NewManager, namespace: str, capsys: Capture
) -> None:
    new_manager(suspend="checkpoint")
    assert main(["settings"]) == 0
    shown = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines())
    assert shown["suspend"] == "checkpoint"
    assert shown.keys() <= inspect.signature(ModelManager.__init__).parameters.keys()
    assert main(["settings", "set", "suspend", "auto"]) == 2
    assert "suspend cannot be changed at run time" in capsys.readouterr().err


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


def test_check_health_is_for_probes(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    manager = new_manager()
    assert main(["check", "--health"]) == 0
    assert capsys.readouterr().out == f"{namespace}: healthy\n"
    snapshot = read_snapshot(namespace)
    stale = replace(snapshot, polled_ago_s=60.0, active=7)
    monkeypatch.setattr(mpmm.cli, "read_snapshot", lambda *_, **__: stale)
    assert main(["check", "--health", namespace]) == 1
    broken, attention = capsys.readouterr().out.splitlines()
    assert broken.startswith(f"{namespace}: invariant broken: H2 ACTIVE")
    assert attention.startswith(f"{namespace}: ATTENTION: memory has not been polled for 60 s")
    monkeypatch.undo()
    manager.shutdown()


def test_check_health_fails_for_a_dead_namespace(
    namespace: str, new_process: NewProcess, capsys: Capture, runtime_root: Path
) -> None:
    assert main(["check", "--health"]) == 2
    assert main(["check", "--health", namespace]) == 2
    process = new_process()
    process.call(acquire, "held")
    process.kill()
    capsys.readouterr()
    assert main(["check", "--health", namespace]) == 1
    assert f"{namespace}: dead: none of its 1 processes is alive" in capsys.readouterr().out
    assert main(["ps", "--format", "{tag} {state}"]) == 0
    assert capsys.readouterr().out == "held lost\n"
    assert main(["--runtime-root", str(runtime_root), "prune"]) == 0


def test_ps_has_a_line_for_each_copy_and_lease(new_manager: NewManager, namespace: str, capsys: Capture) -> None:
    manager = new_manager()
    manager.acquire_model("object", LoadsObject())
    with manager.reserve(50, name="training"):
        assert main(["ps"]) == 0
        head, *lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert head[:3] == ["model", "copy", "state"]
        assert [(line[0], line[2]) for line in lines] == [("object", "active"), ("training", "leased")]
        assert main(["ps", namespace, "--format", "{tag:>8}\\t{mb:.1f} {pid} {peak_mb:.0f} {devices}"]) == 0
        assert capsys.readouterr().out.splitlines()[0] == f"  object\t100.0 {os.getpid()} - 0"
        assert main(["ps", "--format", "json"]) == 0
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [(copy["kind"], copy["mb"], copy["peak_mb"]) for copy in found] == [
            ("model", 100.0, None),
            ("lease", 50.0, None),
        ]
    with ModelManager(namespace="second", memory_source="booked") as second:
        second.acquire_model("b", LoadsObject())
        assert main(["ps"]) == 0
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["namespace", "second", namespace]


@pytest.mark.parametrize("template", ["{tag.__class__}", "{nothing}", "{tag", "{0}", "{mb:q}", "{}"])
def test_a_format_that_cannot_be_is_refused(template: str, busy: ModelManager, capsys: Capture) -> None:
    assert main(["ps", "--format", template]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("fields namespace, tag, name, copy")) == ("", 1)


def test_ps_without_any_namespace_has_nothing_but_the_head(capsys: Capture) -> None:
    assert main(["ps"]) == 0
    assert capsys.readouterr().out.split()[:3] == ["model", "copy", "state"]
    assert main(["ps", "nowhere"]) == 2


def test_events_are_lines_for_people_or_json(busy: ModelManager, namespace: str, capsys: Capture) -> None:
    assert main(["events", namespace, "--model", "object"]) == 0
    lines = capsys.readouterr().out.splitlines()
    [began] = [line for line in lines if "load begins on device 0, 100 MB reserved" in line]
    assert began.split()[1:3] == [str(os.getpid()), "object"]
    assert began.endswith("loads: needs 100 MB, 150 free")
    assert all(" object " in line for line in lines)
    assert main(["events", "--json", "-n", "1000"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["sequence"] for event in found] == list(range(1, len(found) + 1))
    assert {"namespace", "wall_s", "kind", "pid", "tag", "value", "why"} <= set(found[0])
    assert main(["events", "--last", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["events", "--last", "-1"]) == 2


def test_an_event_names_the_process_that_died_and_not_the_one_that_saw_it(
    namespace: str, new_manager: NewManager, new_process: NewProcess, capsys: Capture
) -> None:
    new_manager(fallback_memory_mb=100)
    dead = new_process()
    dead.call(acquire, "held")
    dead.kill()
    wait_until(lambda: read_snapshot(namespace).reaps, "it is taken care of")
    assert main(["events", namespace]) == 0
    lines = capsys.readouterr().out.splitlines()
    [found] = [line for line in lines if line.endswith(f"finds pid {dead.pid} dead, and takes back what it had")]
    assert found.split()[1] != str(dead.pid)
    [by_another] = [event for event in read_snapshot(namespace).events if event.kind == "reaped"]
    assert said(replace(by_another, kind="left")) == f"sees that pid {dead.pid} has ended"
    assert said(replace(by_another, kind="left", pid=dead.pid)) == "left"


def test_a_time_that_has_passed_is_not_shown_as_if_it_were_still_to_come(busy: ModelManager, namespace: str) -> None:
    snapshot = read_snapshot(namespace)
    [ticket] = snapshot.tickets
    waits = replace(ticket, reason=Reason.IN_USE, seconds=2.0)
    [*_, told] = [event for event in snapshot.events if event.kind == "waits"]

    def shown(ago_s: float) -> str:
        return render(replace(snapshot, tickets=(waits,), events=(replace(told, age_s=ago_s),)))

    assert "is in use, for about 0.50 s" in shown(1.5)
    assert "is in use, for an unknown time" in shown(2.1)


def test_times_that_nothing_is_known_of_are_not_shown_as_none(busy: ModelManager, namespace: str) -> None:
    snapshot = read_snapshot(namespace)
    models = tuple(replace(model, load_s=0.0, hold_s=1.5) for model in snapshot.models)
    head, *rows = render(replace(snapshot, models=models)).split("\nmodels:\n")[1].split("\n\n")[0].splitlines()
    at = head.index("hold s") + len("hold s")
    assert [row[:at].split()[-2:] for row in rows] == [["-", "1.500"]] * len(models)


def test_words_are_for_events_that_there_are() -> None:
    assert set(_TEXTS) <= {kind.name.lower() for kind in EventKind}


def test_events_are_followed_from_before_the_begin_to_the_end(namespace: str, new_process: NewProcess) -> None:
    command = [sys.executable, "-m", "mpmm", "events", "--follow", "--model", "followed", namespace]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as events:
        try:
            assert events.stdout is not None and events.stderr is not None
            process = new_process()
            process.call(acquire, "followed")
            for wanted in ("queues, needs", "load begins on", "load ended after"):
                assert wanted in events.stdout.readline()
            events.send_signal(signal.SIGINT)
            assert (events.wait(20), events.stderr.read()) == (0, "")
        finally:
            events.kill()


@pytest.mark.parametrize(
    ("text", "size_mb"),
    [
        *(("5120", 5120.0), ("5g", 5120.0), ("5GiB", 5120.0), ("5 GB", 5120.0), ("0.5t", 524288.0), ("512k", 0.5)),
        *(("800m", 800.0), (".5gb", 512.0), ("7MB", 7.0)),
    ],
)
def test_sizes_may_have_units(text: str, size_mb: float) -> None:
    assert checked_size_mb("--mb", text) == size_mb


@pytest.mark.parametrize("text", ["", "g", "5x", "-5g", "5ib", "5 g b", "nan", "inf", "1e3"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="expected a size such as 5g"):
        checked_size_mb("--mb", text)


@pytest.mark.parametrize(("answer", "status"), [("n\n", 1), ("", 1), ("Yes\n", 0)])
def test_reset_asks_at_a_terminal(
    answer: str, status: int, busy: ModelManager, namespace: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    terminal = io.StringIO(answer)
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert main(["reset", namespace]) == status
    said = f" copies of {namespace}, 1 of them in use, and cancels 1 waiting requests. Continue? [y/N] "
    assert said in capsys.readouterr().out
    assert read_snapshot(namespace).resets == 1 - status
    assert main(["reset", "--yes", namespace]) == 0
    assert "Continue?" not in capsys.readouterr().out


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


def test_a_reset_says_that_and_nothing_else(busy: ModelManager, namespace: str) -> None:
    done = run_python("-m", "mpmm.cli", "reset", namespace)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{namespace}: reset\n", "")


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


def test_the_runtime_root_can_be_named_behind_the_command(tmp_path: Path) -> None:
    root = tmp_path / "elsewhere"
    tool = [sys.executable, str(Path(__file__).parent.parent / "tools" / "inspect_state.py")]
    with ModelManager(namespace="there", memory_source="booked", runtime_root=root):
        found = subprocess.run(
            [*tool, "--runtime-root", str(root), "--json", "there"], capture_output=True, text=True, timeout=60
        )
        assert (json.loads(found.stdout)["namespace"], found.stderr, found.returncode) == ("there", "", 0)
        # The one behind the command counts.
        assert main(["--runtime-root", str(tmp_path / "nowhere"), "check", "--runtime-root", str(root)]) == 0


@pytest.mark.parametrize("command", ["inspect", "ps", "events", "trace", "metrics", "check", "top"])
def test_the_namespace_can_be_named_by_an_option_as_with_commands_about_a_model(
    command: str, busy: ModelManager, namespace: str, capsys: Capture
) -> None:
    assert main([command, "--namespace", namespace]) == 0
    assert capsys.readouterr().out
    assert main([command, "--namespace", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([command, namespace, "--namespace", "nowhere"])
    assert f"two namespaces: {namespace} and --namespace nowhere" in capsys.readouterr().err


def test_a_reset_is_of_a_namespace_that_was_named(busy: ModelManager, namespace: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["reset", "--yes"])
    assert "expected the name of the namespace" in capsys.readouterr().err
    assert read_snapshot(namespace).resets == 0
    assert main(["reset", "--yes", "--namespace", namespace]) == 0
    assert read_snapshot(namespace).resets == 1


def test_a_program_without_the_dashes_is_pointed_to_them(capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--mb", "100", "sleep", "1"])
    assert "unrecognized arguments: sleep 1; write the program and its arguments after `--`" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", "--none"])
    assert capsys.readouterr().err.endswith("unrecognized arguments: --none\n")


def test_a_reader_that_has_seen_enough_gets_no_traceback(busy: ModelManager, namespace: str) -> None:
    command = [sys.executable, "-m", "mpmm.cli", "inspect", "--json", namespace]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as inspect:
        assert inspect.stdout is not None and inspect.stderr is not None
        inspect.stdout.close()
        assert inspect.stderr.read() == b""
    assert inspect.returncode == 0


def test_every_public_name_is_there() -> None:
    assert [name for name in mpmm.__all__ if not hasattr(mpmm, name)] == []


def test_dir_shows_the_api_and_imports_nothing() -> None:
    code = (
        "import sys, mpmm; before = set(sys.modules); names = dir(mpmm); assert set(sys.modules) == before; "
        "assert 'mpmm.model_manager' not in before; assert set(mpmm.__all__) <= set(names); "
        "print([name for name in names if not name.startswith('__') and name not in mpmm.__all__])"
    )
    assert run_python("-c", code).stdout == "[]\n"


def test_help_teaches() -> None:
    text = pydoc.plain(pydoc.render_doc(mpmm))
    for wanted in ("with manager.model(", "mpmm inspect", "class ModelManager", f"VERSION\n    {mpmm.__version__}"):
        assert wanted in text


def test_without_a_command_all_are_shown(capsys: Capture) -> None:
    assert main([]) == 2
    assert "inspect             one screen" in capsys.readouterr().err


def test_what_there_is_one_of_is_not_said_in_the_plural(new_manager: NewManager, namespace: str) -> None:
    new_manager()
    assert f"namespace {namespace}, 1 worker and 0 model servers, up for" in render(read_snapshot(namespace))


def test_that_nothing_was_suspended_is_said_with_what_can_be(
    new_manager: NewManager, namespace: str, capsys: Capture
) -> None:
    manager = new_manager()
    manager.release_model("plain", manager.acquire_model("plain", LoadsObject()))
    assert main(["suspend", "plain", "--namespace", namespace]) == 1
    shown = capsys.readouterr()
    assert shown.out == f"{namespace}: 0 copies of plain suspended\n"
    assert "a copy can be suspended if it is idle, and" in shown.err


def test_it_runs_as_a_module(busy: ModelManager, namespace: str) -> None:
    done = run_python("-W", "error", "-m", "mpmm", "inspect", "--json", namespace)
    assert json.loads(done.stdout)["namespace"] == namespace
    assert done.stderr == ""


def test_the_version_is_the_packages() -> None:
    assert run_python("-m", "mpmm", "--version").stdout == f"mpmm {mpmm.__version__}\n"
    assert mpmm.__version__ == importlib.metadata.version("mpmm")


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the interpreter on this checkout; it must succeed."""
    path = import_path()
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
