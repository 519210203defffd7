"""What a waiter is told is still true at that time: the rest of its wait, and what it waits behind."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import replace

import pytest
from harness import NewDevice, NewGate, NewManager, NewProcess, Seat, acquire, learn, release, wait_until, waiting
from loaders import Loads, LoadsObject

from mpmm import AcquireTimeoutError, ModelManager
from mpmm.cli import main
from mpmm.model_manager.waits import WaitWarning
from mpmm.observability import findings as findings_module
from mpmm.observability.findings import findings
from mpmm.observability.formatting import whys
from mpmm.observability.inspect_screen import render
from mpmm.observability.json_text import snapshot_json
from mpmm.policy.behind import Before, Behind, Obstacle, obstacle
from mpmm.policy.reasons import SENTENCES, explain, explain_behind, time_left_s
from mpmm.policy.view import Reason
from mpmm.shared_state.snapshot import EventChoice, Snapshot, read_snapshot

Capture = pytest.CaptureFixture[str]
# Holds are so short here that the time in a waiter's reason has passed by then.
LATE_S = 0.2
UNKNOWN = "is in use, for an unknown time"
A_TIME = re.compile(r"about \d+\.\d\d s")


@pytest.fixture
def late(namespace: str, new_manager: NewManager, new_process: NewProcess) -> ModelManager:
    """A namespace where b waits for a, which is held for longer than ever before, and c stands behind b."""
    manager, waiter, later = new_manager(fallback_memory_mb=100.0), new_process(), new_process()
    learn(Seat(manager), a=80.0, b=80.0, c=80.0)
    for _ in range(5):
        with manager.model("a", Loads("a")):
            pass
    manager.acquire_model("a", Loads("a"))
    waiter.send(acquire, "b")
    wait_until(lambda: waiting(namespace, "b"), "one waits")
    later.send(acquire, "c")
    wait_until(lambda: waiting(namespace, "c"), "another one waits behind it")
    wait_until(lambda: waiting(namespace, "b")[0].waited_s > LATE_S, "its time is over")
    [told] = waiting(namespace, "b")
    assert (told.reason, told.seconds < LATE_S) == (Reason.IN_USE, True)
    return manager


# ---- times ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", [Reason.IN_USE, Reason.DRAINING, Reason.SHARING, Reason.SUSPENDING])
def test_what_is_said_of_a_wait_is_what_is_left_of_it(reason: Reason) -> None:
    assert time_left_s(reason, 7.5, 5.0) == 2.5
    assert time_left_s(reason, 7.5, 7.5) == math.inf
    assert "about 2.50 s" in explain(reason, seconds=time_left_s(reason, 7.5, 5.0))
    assert "for an unknown time" in explain(reason, seconds=time_left_s(reason, 7.5, 120.0))


def test_screens_findings_probes_and_json_promise_no_time_that_has_passed(
    late: ModelManager, namespace: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(findings_module, "LONG_WAIT_S", LATE_S / 2)
    snapshot = read_snapshot(namespace)
    [attention] = [one.text for one in findings(snapshot) if "has waited for b" in one.text]
    assert attention.endswith(UNKNOWN)
    assert main(["check", "--health", namespace]) == 1
    assert UNKNOWN in capsys.readouterr().out
    before_decisions = render(snapshot).split("\nlast decisions:")[0]
    assert UNKNOWN in before_decisions
    assert not A_TIME.search(before_decisions)
    shown = json.loads(snapshot_json(snapshot))
    [ticket] = [one for one in shown["tickets"] if one["tag"] == "b"]
    assert ticket["why"].endswith(UNKNOWN)
    assert ticket["seconds_left"] is None
    assert any(one["text"].endswith(UNKNOWN) for one in shown["findings"])


def test_the_log_and_the_error_promise_no_time_that_has_passed(
    late: ModelManager, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    session = late._connected()
    [ticket] = waiting(namespace, "b")
    WaitWarning(session.namespace, session.scheduler, (), ticket.row).say()
    [warned] = [record.getMessage() for record in caplog.records if "has waited" in record.getMessage()]
    assert UNKNOWN in warned
    # The text of the timeout error.
    with session.namespace.transaction():
        assert session.scheduler.why(ticket.row).endswith(UNKNOWN)


def test_json_says_what_is_left_of_a_time_that_has_not_passed(late: ModelManager, namespace: str) -> None:
    snapshot = read_snapshot(namespace)
    tickets = tuple(replace(one, seconds=3600.0) if one.tag == "b" else one for one in snapshot.tickets)
    shown = json.loads(snapshot_json(replace(snapshot, tickets=tickets)))
    left_s = {one["tag"]: one["seconds_left"] for one in shown["tickets"]}
    assert 3600.0 - 60.0 < left_s["b"] < 3600.0
    # It has no time of its own.
    assert left_s["c"] is None


def test_a_look_that_takes_few_events_knows_since_when_present_waiters_wait_for_that(
    late: ModelManager, namespace: str
) -> None:
    choice = EventChoice(newest_of_each=0)
    [event] = [one for one in read_snapshot(namespace, choice=choice).events if one.tag == "b"]
    assert (event.kind, event.reason) == ("waits", Reason.IN_USE)


def test_a_waiter_of_which_no_event_tells_may_have_been_told_from_the_first(late: ModelManager, namespace: str) -> None:
    snapshot = read_snapshot(namespace, events=False)
    [ticket] = [one for one in snapshot.tickets if one.tag == "b"]
    assert whys(snapshot)(ticket).endswith(UNKNOWN)
    assert "for about" in whys(snapshot)(replace(ticket, seconds=ticket.waited_s + 9.0))


# ---- behind what -----------------------------------------------------------------------------------------------------

HEAD = Before("head", Reason.IN_USE)
ALONE = Before("new", Reason.DRAINING)
LEASED = Before("lease", Reason.LEASED)
SHARES = Before("first", Reason.SHARING)


@pytest.mark.parametrize(
    ("devices", "loadable_on", "span", "lease", "alone", "before", "found"),
    [
        ([0], [], 1, False, {}, [HEAD], Obstacle(Behind.HEAD, "head")),
        ([0], [], 1, False, {}, [SHARES, HEAD], Obstacle(Behind.HEAD, "head")),
        ([0], [], 1, False, {}, [SHARES], Obstacle(Behind.QUEUE, "first")),
        ([0], [], 1, False, {}, [], None),
        ([0], [], 1, False, {0: "x"}, [HEAD], Obstacle(Behind.RUNS_ALONE, "x")),
        ([0], [], 1, False, {}, [ALONE], Obstacle(Behind.IS_TO_RUN_ALONE, "new")),
        ([0], [], 1, True, {}, [LEASED], Obstacle(Behind.LEASE, "lease")),
        ([0], [], 1, False, {}, [LEASED], Obstacle(Behind.QUEUE, "lease")),
        ([0, 1], [], 1, False, {0: "x"}, [HEAD], Obstacle(Behind.HEAD, "head")),
        ([0, 1], [], 2, False, {0: "x"}, [HEAD], Obstacle(Behind.RUNS_ALONE, "x", (0,))),
        ([0, 1], [1], 1, False, {1: "x"}, [HEAD], Obstacle(Behind.RUNS_ALONE, "x", (1,))),
        ([0, 1], [], 1, False, {0: "x"}, [replace(ALONE, on=(1,))], Obstacle(Behind.IS_TO_RUN_ALONE, "new", (1,))),
        ([0, 1], [0], 1, False, {}, [replace(ALONE, on=(1,)), HEAD], Obstacle(Behind.HEAD, "head")),
    ],
)
def test_it_is_found_behind_what_a_waiter_stands(
    devices: list[int],
    loadable_on: list[int],
    span: int,
    lease: bool,
    alone: dict[int, str],
    before: Iterable[Before],
    found: Obstacle | None,
) -> None:
    assert obstacle(devices, loadable_on, span, lease, alone, before) == found


def test_each_has_its_sentence() -> None:
    assert [explain_behind(Obstacle(what, "b", (0, 2))) for what in Behind] == [
        "waits: b runs alone on devices 0 and 2 until it has been measured",
        "waits behind b, which is to run alone on devices 0 and 2 and be measured",
        "waits behind b, which waits for leases to end",
        "waits behind b, which waits for memory and must not be delayed",
        "waits behind b, which is first in the queue",
    ]
    assert explain_behind(None) == SENTENCES[Reason.BEHIND]


def test_a_waiter_behind_the_head_of_the_line_is_told_whose_request_that_is(
    late: ModelManager, namespace: str, new_manager: NewManager
) -> None:
    behind_b = "waits behind b, which waits for memory and must not be delayed"
    assert said(read_snapshot(namespace), "c") == behind_b
    shown = json.loads(snapshot_json(read_snapshot(namespace)))
    assert [one["why"] for one in shown["tickets"] if one["tag"] == "c"] == [behind_b]
    with pytest.raises(AcquireTimeoutError, match=f"behind: {behind_b}"):
        new_manager(wait_timeout_seconds=0.05).acquire_model("d", Loads("d"))


def said(snapshot: Snapshot, tag: str) -> str:
    [ticket] = [one for one in snapshot.tickets if one.tag == tag]
    return whys(snapshot)(ticket)


def test_a_waiter_beside_a_model_that_runs_alone_is_told_which_one_that_is(
    namespace: str, new_process: NewProcess, new_manager: NewManager, new_device: NewDevice, new_gate: NewGate
) -> None:
    device = new_device(1000)
    holder, known, unknown = (new_process(memory_source=device) for _ in range(3))
    last = new_manager(memory_source=device, wait_timeout_seconds=0.05)
    holder.call(learn, held=900, known=200, third=100)
    holder.call(acquire, "held", LoadsObject("held", device=device, mb=900))
    began, go = new_gate(), new_gate()
    unknown.send(acquire, "unknown", LoadsObject("unknown", began, go, device, 300))
    wait_until(lambda: waiting(namespace, "unknown"), "it waits to run alone")
    known.send(acquire, "known", LoadsObject("known", device=device, mb=200))
    wait_until(lambda: waiting(namespace, "known"), "another one waits behind it")
    assert said(read_snapshot(namespace), "known") == "waits behind unknown, which is to run alone and be measured"
    holder.call(release)
    began.wait()
    alone = "waits: unknown runs alone until it has been measured"
    assert said(read_snapshot(namespace), "known") == alone
    with pytest.raises(AcquireTimeoutError, match=f"behind: {alone}"):
        last.acquire_model("third", LoadsObject("third", device=device, mb=100))
    go.open()
    unknown.result()
    unknown.call(release)
    known.result()
    known.call(release)
