"""The dashboard: access, answers, and the command that starts it."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.parse
from dataclasses import replace
from pathlib import Path
from typing import Any

import dashboards
import pytest
from dashboards import TOKEN, Served, ask
from harness import NewManager, NewProcess, acquire, release, wait_until, waiting
from loaders import Loads
from sleepers import MakesSleeper, pretend_load_s

from mpmm.cli import main
from mpmm.model_manager import ModelManager
from mpmm.observability.dashboard import server
from mpmm.observability.dashboard.history import FINDINGS_SENT, POINTS_SENT, SAMPLES_KEPT, Recorder
from mpmm.observability.dashboard.watch import Watcher
from mpmm.observability.event_reader import EventReader, Step
from mpmm.observability.formatting import times_left
from mpmm.policy.view import Reason
from mpmm.shared_state.segment import segment_name
from mpmm.shared_state.snapshot import read_snapshot

Capture = pytest.CaptureFixture[str]
PAGE = Path(server.__file__).parent / "page"
served = dashboards.served
lively = dashboards.lively
crowded = dashboards.crowded


# ---- access ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/app.js", "/api/state", "/nothing-there"])
def test_without_the_token_nothing_is_answered(served: Served, path: str) -> None:
    refused = ask(served.url + path, token=None)
    assert refused.status == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    for wrong in ("", "x", TOKEN + "x", TOKEN[:-1], "ü"):
        refusals = (401,) if not wrong else (403,)
        assert ask(f"{served.url}{path}?token={urllib.parse.quote(wrong)}", token=None).status in refusals
        assert ask(served.url + path, token=wrong).status in refusals
    assert b"mpmm.observability.dashboard" not in refused.body
    assert b"/api/" not in refused.body


def test_the_token_is_taken_in_the_address_or_in_a_header(served: Served) -> None:
    assert ask(f"{served.url}/?token={TOKEN}", token=None).status == 200
    assert ask(f"{served.url}/api/state").status == 200
    assert ask(f"{served.url}/nothing-there").status == 404
    # A header that is wrong is not made good by an address that is right.
    assert ask(f"{served.url}/?token={TOKEN}", token="wrong").status == 403


def test_it_only_answers_questions(served: Served) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        for path in ("/", "/api/state", "/app.js"):
            assert ask(served.url + path, method=method).status == 405
    assert ask(served.url, method="HEAD").status == 200


def test_no_other_origin_is_let_in(served: Served) -> None:
    for method, token in (("GET", TOKEN), ("OPTIONS", TOKEN), ("OPTIONS", None)):
        asked = {"Origin": "http://elsewhere.example", "Access-Control-Request-Method": "GET"}
        answer = ask(f"{served.url}/api/state", token=token, method=method, **asked)
        assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_every_answer_lets_the_browser_load_this_page_only(served: Served) -> None:
    answers = [ask(served.url + path) for path in ("/", "/style.css", "/api/state", "/api/state?look=x", "/nothing")]
    answers += [ask(served.url, token=None), ask(served.url, token="wrong"), ask(served.url, method="POST")]
    assert [answer.status for answer in answers] == [200, 200, 200, 400, 404, 401, 403, 405]
    for answer in answers:
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert policy.pop("default-src") == "'none'"
        assert set(policy.values()) == {"'self'", "'none'"}
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert "set-cookie" not in answer.headers


def test_the_page_names_no_other_host_and_has_nothing_inline(served: Served) -> None:
    for path in PAGE.iterdir():
        urls = set(
            re.findall(r"(?:https?:)?//[\w.]+[^\s\"')]*", re.sub(r"^\s*//.*$", "", path.read_text(), flags=re.M))
        )
        assert urls <= {"http://www.w3.org/2000/svg"}, path.name
        assert "innerHTML" not in path.read_text(), "texts of others must never become markup"
    index = ask(served.url).body.decode()
    assert not re.search(r"<style|style=|<script(?![^>]*src=)|\son\w+=", index)
    linked = re.findall(r'(?:src|href)="([^#"]+)"', index)
    assert {link.split("?")[0] for link in linked} == {path.name for path in PAGE.iterdir()} - {"index.html"}
    for link in linked:
        answer = ask(f"{served.url}/{link}", token=None)
        assert answer.status == 200
        assert re.match("text/css|text/javascript|image/svg", answer.headers["content-type"])


# ---- what is answered --------------------------------------------------------------------------------------


def test_it_tells_what_is_loaded_and_by_whom_it_is_held(lively: ModelManager, served: Served, namespace: str) -> None:
    said = served.state()
    assert said["namespace"] == namespace
    assert [one["name"] for one in said["namespaces"]] == [namespace]
    state = said["state"]
    copies = {copy["tag"]: copy for copy in state["copies"]["set"].values()}
    assert {tag: copy["state"] for tag, copy in copies.items()} == {"held": "active", "<b>idle</b>": "idle"}
    assert copies["held"]["pid"] == os.getpid()
    assert copies["<b>idle</b>"]["pid"] is None
    assert (copies["held"]["mb"], copies["held"]["devices"]) == (100.0, [0])
    [device] = state["devices"]
    assert (device["total"], device["limit"], device["used"]) == (200.0, 200.0, 200.0)
    assert (device["active_mb"], device["idle_mb"], device["copies"]) == (100.0, 100.0, 2)
    models = {model["tag"]: model for model in state["models"]["set"].values()}
    assert (models["held"]["waiting"], models["evicted"]["evictions"]) == (1, 1)
    members = {member["pid"]: member for member in state["members"]["set"].values()}
    assert members[os.getpid()]["holds"] == 1
    assert sum(member["waits"] for member in members.values()) == 1
    assert state["head"]["states"] == {"active": 1, "idle": 1}
    assert state["memory"]["0"][-1][1:] == [200.0, 200.0]
    assert state["load"][-1][1:] == [1, 1, 0, 2]


def test_it_tells_who_waits_and_why(lively: ModelManager, served: Served, namespace: str) -> None:
    state = served.state()["state"]
    [waiter], [ticket] = state["waiters"], waiting(namespace)
    assert (waiter["pid"], waiter["tag"], waiter["number"]) == (ticket.pid, "held", ticket.number)
    assert waiter["why"].startswith("waits")
    assert waiter["expected"] > 0
    assert waiter["urgency"] == 0
    assert state["head"]["waiting"] == 1
    assert waiter["since"] <= state["head"]["now"]
    # Nobody knows any better how long the copy is held, once it has been held for longer than that.
    ticket = replace(ticket, reason=Reason.IN_USE, seconds=2.0)
    snapshot = read_snapshot(namespace)
    left_s = [times_left(snapshot, {ticket.number: snapshot.taken_s - ago_s})(ticket) for ago_s in (1.0, 3.0)]
    assert left_s == pytest.approx([1.0, math.inf])


def test_it_tells_the_last_decisions(lively: ModelManager, served: Served) -> None:
    decisions = served.state()["state"]["decisions"]
    numbers = [one["number"] for one in decisions]
    assert numbers == sorted(numbers)
    [evicted] = [one for one in decisions if one["kind"] == "unload_began"]
    assert evicted["tag"] == "evicted"
    assert "<b>idle</b>" in evicted["text"]
    assert all(one["text"] and one["category"] for one in decisions)
    assert not {"hit", "released"} & {one["kind"] for one in decisions}


def test_a_page_is_told_only_what_has_changed(lively: ModelManager, served: Served, namespace: str) -> None:
    first = served.state()["state"]
    assert first["complete"]
    seen = {"epoch": first["epoch"], "look": first["look"]}
    quiet = served.state(**seen)["state"]
    assert not quiet["complete"]
    assert quiet["copies"] == quiet["members"] == {"set": {}, "gone": []}
    assert quiet["spans"] == quiet["decisions"] == []
    assert len(quiet["memory"]["0"]) == 1
    lively.release_model("held", next(c.handle for c in read_snapshot(namespace).instances if c.tag == "held"))
    wait_until(lambda: not waiting(namespace), "the copy is handed over")
    changed = served.state(**seen)["state"]
    assert {copy["tag"] for copy in changed["copies"]["set"].values()} == {"held"}
    assert changed["waiters"] == []
    # A page of another incarnation, or of none, gets everything.
    assert served.state(epoch="other", look=first["look"])["state"]["complete"]


def test_rows_that_go_are_named(namespace: str, new_manager: NewManager, served: Served) -> None:
    manager = new_manager(fallback_memory_mb=200)
    manager.release_model("a", manager.acquire_model("a", Loads()))
    first = served.state()["state"]
    [key] = first["copies"]["set"]
    manager.force_reset()
    wait_until(lambda: not read_snapshot(namespace).instances, "the reset has unloaded it")
    after = served.state(epoch=first["epoch"], look=first["look"])["state"]
    assert after["copies"] == {"set": {}, "gone": [key]}
    assert not after["complete"]
    assert all(span[5] is not None for span in after["spans"])


def test_namespaces_come_and_end_and_come_again(served: Served, namespace: str) -> None:
    nothing = served.state()
    assert (nothing["namespaces"], nothing["namespace"], nothing["state"]) == ([], None, None)
    made: dict[str, Any] = {"memory_source": "booked", "fallback_memory_mb": 1000}
    with ModelManager(namespace=namespace, **made), ModelManager(namespace="second", **made) as second:
        second.release_model("a", second.acquire_model("a", Loads()))
        both = served.state()
        assert [one["name"] for one in both["namespaces"]] == ["second", namespace]
        assert both["namespace"] == "second", "the one with more copies is shown first"
        first = served.state(namespace=namespace)["state"]
    ended = served.state(namespace=namespace)
    assert "there is no namespace" in ended["problem"]
    assert ended["state"]["epoch"] == first["epoch"], "its last picture stays"
    with ModelManager(namespace=namespace, **made):
        again = served.state(namespace=namespace, epoch=first["epoch"], look=first["look"])
    assert again["problem"] is None
    assert again["state"]["complete"]
    assert again["state"]["epoch"] != first["epoch"]
    unknown = served.state(namespace="never")
    assert (unknown["namespace"], unknown["state"]) == ("never", None)


def test_ended_namespaces_are_forgotten_in_time(monkeypatch: pytest.MonkeyPatch, namespace: str) -> None:
    watcher = Watcher()
    with ModelManager(namespace=namespace, memory_source="booked", fallback_memory_mb=1000):
        watcher.look()
    watcher.look()
    assert [one["name"] for one in watcher.state(None, "", 0, 60)["namespaces"]] == [namespace]
    monkeypatch.setattr("mpmm.observability.dashboard.watch.ENDED_KEPT_S", 0.0)
    watcher.look()
    assert watcher.state(None, "", 0, 60)["namespaces"] == []


def test_one_that_cannot_be_read_is_named_and_others_are_shown(
    new_manager: NewManager, namespace: str, runtime_root: Path, served: Served
) -> None:
    new_manager()
    (runtime_root / "junk").mkdir(mode=0o700)
    segment = Path("/dev/shm") / segment_name(runtime_root, "junk")
    segment.write_bytes(b"junk" * 4096)
    try:
        said = served.state()
        problems = {one["name"]: one["problem"] for one in said["namespaces"]}
        assert problems[namespace] is None
        assert "cannot read namespace 'junk'" in str(problems["junk"])
        assert said["namespace"] == namespace
        assert "cannot read" in served.state(namespace="junk")["problem"]
    finally:
        segment.unlink()
        (runtime_root / "junk").rmdir()


def test_one_alone_is_shown_if_only_that_is_asked_for(new_manager: NewManager, namespace: str) -> None:
    new_manager()
    watcher = Watcher(namespace="later")
    watcher.look()
    before = watcher.state(None, "", 0, 60)
    assert (before["only"], before["namespace"], before["state"]) == ("later", "later", None)
    with ModelManager(namespace="later", memory_source="booked", fallback_memory_mb=1000):
        watcher.look()
        assert [one["name"] for one in watcher.state(None, "", 0, 60)["namespaces"]] == ["later"]
    assert watcher.state(namespace, "", 0, 60)["state"] is None, "others are none of its business"


def test_a_tag_that_is_not_utf8_is_shown_escaped(namespace: str, new_manager: NewManager, served: Served) -> None:
    manager, tag = new_manager(), os.fsdecode(b"models/caf\xe9.pt")
    manager.release_model(tag, manager.acquire_model(tag, Loads()))
    served.watcher.look()
    answer = ask(f"{served.url}/api/state")
    assert answer.status == 200
    models = answer.json["state"]["models"]["set"].values()
    assert [model["tag"] for model in models] == [r"models/caf\udce9.pt"]


def test_nonsense_is_refused(served: Served) -> None:
    for query in ("look=x", "look=-1", "look=1.5", "window=0", "window=-1", "window=nan", "window=4000", "window="):
        answer = ask(f"{served.url}/api/state?{query}")
        assert (answer.status, list(answer.json)) == (400, ["error"]), query


def test_to_look_changes_nothing(lively: ModelManager, served: Served, namespace: str) -> None:
    # At first the waiter expects the held copy soon; once it has been held for longer than a load takes, it wants room
    # for a copy of its own, of which there is none. After that nothing changes by itself.
    wait_until(lambda: [one.reason for one in waiting(namespace)] == [Reason.MEMORY], "the waiter wants room")
    wait_until(lambda: read_snapshot(namespace).torn_words == 0, "nobody writes")
    before = read_snapshot(namespace)
    for _ in range(3):
        served.state()
    after = read_snapshot(namespace)
    assert [member.pid for member in after.members] == [member.pid for member in before.members]
    assert after.events_written == before.events_written
    assert after.lock.last_holder_pid in [member.pid for member in after.members]


# ---- the timeline ------------------------------------------------------------------------------------------


def spans(watcher: Watcher, *kinds: str) -> list[dict[str, Any]]:
    """Look, and return the spans of some kinds, oldest first."""
    watcher.look()
    names = ("number", "tag", "lane", "kind", "begin", "end", "busy", "resumed", "uses", "pid", "devices", "note")
    found = [dict(zip(names, span, strict=True)) for span in watcher.state(None, "", 0, 3600)["state"]["spans"]]
    return sorted((one for one in found if one["kind"] in kinds), key=lambda one: int(one["number"]))


def test_short_uses_are_one_span(namespace: str, new_manager: NewManager) -> None:
    manager, watcher = new_manager(), Watcher()
    for _ in range(20):
        manager.release_model("a", manager.acquire_model("a", Loads()))
    [load] = spans(watcher, "load")
    assert (load["tag"], load["lane"], load["devices"], load["pid"]) == ("a", 1, (0,), os.getpid())
    [hold] = spans(watcher, "hold")
    assert hold["uses"] == 20
    assert 0 < hold["busy"] <= hold["end"] - hold["begin"] + 0.01
    manager.acquire_model("a", Loads())
    uses = spans(watcher, "hold")
    assert sum(one["uses"] for one in uses) == 21
    assert [one["end"] is None for one in uses][-1]


def test_copies_come_back_to_their_lanes(namespace: str, new_manager: NewManager, new_process: NewProcess) -> None:
    manager, other, watcher = new_manager(fallback_memory_mb=200), new_process(), Watcher()
    copy = manager.acquire_model("a", Loads())
    watcher.look()
    other.call(acquire, "a")
    manager.release_model("a", copy)
    assert [(one["tag"], one["lane"]) for one in spans(watcher, "stay")] == [("a", 1), ("a", 2)]
    manager.acquire_model("b", Loads())
    other.call(release)
    manager.acquire_model("c", Loads())
    assert [(one["tag"], one["lane"]) for one in spans(watcher, "unload")] == [("a", 1), ("a", 2)]
    assert "which needs 100 MB" in spans(watcher, "unload")[0]["note"]
    stays = {(one["tag"], one["lane"]): one["end"] for one in spans(watcher, "stay")}
    assert [key for key, end in stays.items() if end is None] == [("b", 1), ("c", 1)]


def test_waiters_hold_what_they_were_given(lively: ModelManager, namespace: str) -> None:
    watcher = Watcher()
    [ticket] = waiting(namespace)
    watcher.look()
    lively.release_model("held", next(c.handle for c in read_snapshot(namespace).instances if c.tag == "held"))
    wait_until(lambda: not waiting(namespace), "the copy is handed over")
    assert [one["pid"] for one in spans(watcher, "hold") if one["tag"] == "held"][-1] == ticket.pid


def test_suspended_copies_keep_their_lanes(namespace: str, new_manager: NewManager, tmp_path: Path) -> None:
    manager, watcher = new_manager(suspend_budget_mb=2000.0, default_estimate_mb=600.0), Watcher()
    for tag in ("a", "b"):
        with manager.model(tag, MakesSleeper(tmp_path)):
            pass
        pretend_load_s(manager, tag, 100.0)
    asleep = spans(watcher, "sleep", "stay")
    assert [(one["tag"], one["kind"], one["end"] is None) for one in asleep] == [
        ("a", "stay", False),
        ("a", "sleep", True),
        ("b", "stay", True),
    ]
    state = watcher.state(None, "", 0, 60)["state"]
    assert state["head"]["host_mb"] == 600.0
    [copy] = [copy for copy in state["copies"]["set"].values() if copy["state"] == "suspended"]
    assert (copy["tag"], copy["mb"]) == ("a", 600.0)
    with manager.model("a", MakesSleeper(tmp_path)):
        kinds = [
            one["kind"] for one in spans(watcher, "load", "hold", "suspend", "sleep", "resume") if one["tag"] == "a"
        ]
        assert kinds == ["load", "hold", "suspend", "sleep", "resume", "hold"]
        assert {one["lane"] for one in spans(watcher, "hold", "sleep")} == {1}


def test_what_was_overwritten_unseen_is_mended(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, watcher = new_manager(fallback_memory_mb=200), Watcher()
    kept = manager.acquire_model("kept", Loads())
    gone = manager.acquire_model("gone", Loads())
    watcher.look()
    manager.release_model("gone", gone)
    manager.release_model("kept", kept)
    manager.acquire_model("kept", Loads())
    manager.acquire_model("new", Loads())
    step = EventReader.step

    def unseen(self: EventReader) -> Step:
        found = step(self)
        return replace(found, events=(), lost=len(found.events))

    with monkeypatch.context() as patched:
        patched.setattr(EventReader, "step", unseen)
        watcher.look()
    lasting = {(one["tag"], one["kind"]) for one in spans(watcher, "stay", "hold") if one["end"] is None}
    assert lasting == {("kept", "stay"), ("kept", "hold"), ("new", "stay"), ("new", "hold")}
    assert watcher.state(None, "", 0, 60)["state"]["lost"] > 0


# ---- much of it --------------------------------------------------------------------------------------------


def test_a_thousand_copies_are_told_once(crowded: None, served: Served) -> None:
    first = served.state()["state"]
    assert len(first["copies"]["set"]) == 1000
    assert len(first["waiters"]) < 1000
    assert first["head"]["waiting"] == 1000
    assert (len(first["findings"]), first["urgent"]) == (FINDINGS_SENT, 1001), "each waits for an unpin, one for long"
    assert {waiter["expected"] for waiter in first["waiters"]} == {None}
    quiet = served.state(epoch=first["epoch"], look=first["look"])["state"]
    # Copies begin at moments that a look finds again to the 0.01 s; here they are made up, so some differ.
    assert len(json.dumps({**quiet, "waiters": [], "copies": []})) < 5000


def test_histories_are_bounded(lively: ModelManager, namespace: str) -> None:
    recorder = Recorder(namespace, None)
    recorder.look()
    for points in (recorder._memory[0], recorder._load):
        for moment in range(SAMPLES_KEPT + 500):
            points.add(1, (1e9 + moment, float(moment % 7), 1.0))
        sent = points.since(0, 0.0)
        assert SAMPLES_KEPT // 2 / 5 < len(sent) <= POINTS_SENT
        assert sent[-1][0] == 1e9 + SAMPLES_KEPT + 499
        assert max(point[1] for point in sent) == 6.0, "peaks stay"


# ---- the command -------------------------------------------------------------------------------------------


def start(*options: str, **environment: str) -> subprocess.Popen[str]:
    """Start the command."""
    command = [sys.executable, "-m", "mpmm.cli", "dashboard", "--port", "0", *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})


def test_the_command_serves_on_this_machine_alone_and_prints_its_address(lively: ModelManager, namespace: str) -> None:
    running = start()
    assert running.stderr is not None
    try:
        line = running.stderr.readline()
        found = re.fullmatch(r"mpmm: dashboard at (http://127\.0\.0\.1:\d+)/\?token=([\w-]{32})\n", line)
        assert found, line
        url, token = found.groups()
        assert ask(f"{url}/?token={token}", token=None).status == 200
        assert ask(f"{url}/api/state", token=token).json["state"]["head"]["namespace"] == namespace
        assert ask(url, token=None).status == 401
        running.send_signal(signal.SIGINT)
        assert running.wait(20) == 0
        assert running.stderr.read() == ""
    finally:
        running.kill()
        running.wait()
        running.stderr.close()


def test_what_is_asked_for_must_be_possible(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def error(*options: str) -> str:
        assert main(["dashboard", *options]) == 2
        return capsys.readouterr().err

    assert "--token: expected at least 8 of the characters" in error("--token", "short")
    assert "--token" in error("--token", "with spaces in it")
    assert "--port 70000: expected a number from 0 to 65535" in error("--port", "70000")
    assert "namespace" in error("--namespace", "a/b")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen at 127.0.0.1 port {port}" in error("--port", port)
    monkeypatch.setenv("MPMM_DASHBOARD_TOKEN", "tiny")
    assert "found 4 characters" in error()


def test_without_the_libraries_it_says_what_to_install(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mpmm.observability.dashboard.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["dashboard"]) == 2
    assert "this needs starlette and uvicorn; install it with: pip install 'mpmm[web]'" in capsys.readouterr().err
