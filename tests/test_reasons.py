"""Every decision says why: each reason, what leads to it, and its sentence."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from harness import NewManager, NewProcess, acquire, learn, release, wait_until, waiting
from loaders import LoadsObject
from policy_views import OTHER, A, B, C, at_most, busy, device, held_for_long, idle, model, ticket, view

from mpmm.policy.plan import make_plan
from mpmm.policy.reasons import SENTENCES, explain
from mpmm.policy.view import BusyInstance, Decision, ModelView, Reason, Satisfied, SuspendedInstance, View
from mpmm.shared_state.layout import Capacities
from mpmm.shared_state.snapshot import read_snapshot


def timed(row: int, need: float, **more: object) -> ModelView:
    """A model with one copy whose loads take 2 s, that is held for 0.1 s and wanted once a second."""
    # Any field of the model view.
    return replace(model(row, need, shared=1), **{"load_s": 2.0, "hold_s": 0.1, "rate": 1.0, **more})  # type: ignore[arg-type]  # mypy takes all of `**more` for floats


def in_use(row: int, of: int, mb: float, free_in_s: float = 0.5) -> BusyInstance:
    return BusyInstance(row, of, 0, mb, free_in_s)


def first(state: View) -> Decision:
    return make_plan(state).decisions[0]


def last(state: View) -> Decision:
    return make_plan(state).decisions[-1]


PASSED = ticket(1, A, waited=1.0, head_for=1.0)
FULL = device(used=900)

#: reason: (a state, the decision in its plan that has the reason, and what that says)
TABLE: dict[Reason, tuple[View, Callable[[View], Decision], str]] = {
    Reason.DRAINING: (
        view([model(A, known=False)], [ticket(1, A, priority=0)], busy=(in_use(5, B, 100),)),
        first,
        "waits to run alone and be measured: copies are still in use, for about 0.50 s",
    ),
    Reason.MEMORY: (
        view([model(A, 800)], [ticket(1, A)], devices=[device(used=400)], in_use=1),
        first,
        "waits: needs 800 MB, 500 free, and unloading every idle copy would not free enough",
    ),
    Reason.UNLOADING: (
        view([model(A, 800)], [ticket(1, A)], devices=[device(used=400, unloading_mb=300)], unloading=1),
        first,
        "waits: needs 800 MB, 500 free, 300 coming from the unload of b",
    ),
    Reason.RETURNING: (
        view([model(A, 800)], [ticket(1, A)], devices=[device(used=400, returning_mb=300)]),
        first,
        "waits: needs 800 MB, 500 free, 300 returning from the unload of b",
    ),
    Reason.NO_DEVICE: (view([model(A)], [ticket(1, A)], devices=[]), first, "waits: no device is known yet"),
    Reason.SHARING: (
        view([busy()], [ticket(1, A)]),
        first,
        "waits for a copy that is in use or being loaded: about 0.10 s, sooner than another load",
    ),
    Reason.IN_USE: (
        view([model(A, 800), model(B, shared=1)], [ticket(1, A)], devices=[FULL], busy=(in_use(5, B, 900),)),
        first,
        "waits: needs 800 MB, 0 free, 900 kept for it where b is in use, for about 0.50 s",
    ),
    Reason.IDLE_COPY: (
        view([model(A, shared=1)], [ticket(1, A)], copies=[idle(7, A)]),
        first,
        "gets an idle copy",
    ),
    Reason.OVERTAKES: (
        view(
            [model(A, 800), model(B, shared=1), model(C, shared=1)],
            [PASSED, ticket(2, C)],
            copies=[idle(7, C, mb=10)],
            devices=[FULL],
            busy=(in_use(5, B, 890),),
        ),
        last,
        "gets an idle copy ahead of b, which waits for memory and is not delayed by that",
    ),
    Reason.SUSPENDING: (
        view([replace(model(A), load_s=9.0, resume_s=0.5, suspending=1)], [ticket(1, A)]),
        first,
        "waits for its copy to be suspended and then resumed: about 0.50 s, sooner than another load",
    ),
    Reason.RESUMES: (
        replace(
            view([replace(model(A), load_s=9.0)], [ticket(1, A)]),
            suspended=(SuspendedInstance(7, A, 0, 100.0, since_s=1.0, resume_s=0.5),),
        ),
        first,
        "gets a suspended copy, which takes about 0.50 s to resume: needs 100 MB, 900 free",
    ),
    Reason.FITS: (view([model(A)], [ticket(1, A)]), first, "loads: needs 100 MB, 900 free"),
    Reason.ALONE: (
        view([model(A, known=False)], [ticket(1, A, priority=0)]),
        first,
        "loads alone to be measured: assumed to need 100 MB, 900 free",
    ),
    Reason.BACKFILL: (
        view(
            [model(A, 800), model(B, shared=1), model(C, 50)],
            [ticket(1, A), ticket(2, C)],
            devices=[device(used=300)],
            busy=(in_use(5, B, 300),),
        ),
        last,
        "loads in addition to what is reserved for b: needs 50 MB, 600 free",
    ),
    Reason.ANOTHER_COPY: (
        view([held_for_long(model(A, shared=1))], [ticket(1, A)]),
        first,
        "loads another copy, which is quicker than waiting for one in use: needs 100 MB, 900 free",
    ),
    Reason.LOWEST_SCORE: (
        view([model(A, 800), model(B, shared=1)], [ticket(1, A)], copies=[idle(7, B, mb=900)], devices=[FULL]),
        first,
        "is evicted for b, which needs 800 MB, 0 free: lowest score, frees 900 MB",
    ),
    Reason.CHEAPEST_RELOAD: (
        view([model(A, 800), timed(B, 900)], [ticket(1, A)], copies=[idle(7, B, mb=900)], devices=[FULL]),
        first,
        "is evicted for b, which needs 800 MB, 0 free: cheapest to reload (2.000 s of loading per second), frees "
        "900 MB",
    ),
    Reason.FLUSHED: (
        view([model(A, known=False), model(B, shared=1)], [ticket(1, A, priority=0)], copies=[idle(7, B)]),
        first,
        "is evicted so that b can run alone and be measured",
    ),
    Reason.PINNED: (
        view(
            [model(A, 800), model(B, shared=1)],
            [ticket(1, A)],
            copies=[idle(7, B, mb=900, pinned=True)],
            devices=[FULL],
        ),
        first,
        "waits: needs 800 MB, 0 free, and unloading every idle copy that is not pinned would not free enough",
    ),
    Reason.COPIES: (
        view([model(A, shared=1)], [ticket(1, A)], rules=at_most(1)),
        first,
        "waits for a copy that is in use: max_model_copies allows no more of them",
    ),
    Reason.ONLY_COPY: (
        view([held_for_long(model(A, 901, shared=1))], [ticket(1, A)], devices=[device(used=100)], in_use=1),
        first,
        # The sentence gives the device's limit, not its free memory.
        "waits for a copy that is in use: another one would need 901 MB, but the largest device takes only 900",
    ),
    Reason.LEASED: (
        view([model(A, 800)], [ticket(1, A)], devices=[device(used=0, reserved_mb=500, leased_mb=500)]),
        first,
        "waits: needs 800 MB, 400 free, and the leases that are held leave too little room",
    ),
    Reason.EXTERNAL: (
        view([model(A, 800)], [ticket(1, A)], devices=[device(used=300, external_mb=300, external_least_mb=300)]),
        first,
        "waits: needs 800 MB, 600 free; the driver and other programs take 300 MB, which leaves too little room",
    ),
    Reason.OUTRANKED: (
        view(
            [model(A, 800), model(B, 700)],
            [ticket(1, A), replace(ticket(2, B), rank=-1)],
            devices=[device(used=400)],
            in_use=1,
        ),
        last,
        "waits behind b, which came later but has a higher priority",
    ),
    Reason.QUIET: (
        view([model(A, 80)], [ticket(1, A)], devices=[device(steady=B)]),
        first,
        "waits: b is starting, and until it has, nothing else may be loaded or unloaded there",
    ),
    Reason.RESTLESS: (
        view(
            [model(A, 80)],
            [replace(ticket(1, A), steady=True)],
            devices=[device(unloading_mb=5, used=5)],
            unloading=1,
        ),
        first,
        "waits to start undisturbed: something is being loaded or unloaded there",
    ),
    Reason.BACKING_OFF: (
        view(
            [replace(model(A, 800), failures=2, failed_ago_s=0.5), timed(B, 500)],
            [ticket(1, A)],
            copies=[idle(5, B, mb=500)],
            devices=[device(used=500)],
        ),
        first,
        "waits: its loads have failed, so nothing is evicted for another attempt for about 1.50 s",
    ),
    Reason.LEAST_FULL: (
        view([model(A)], [ticket(1, A)], devices=[device(0, used=500), device(1)]),
        first,
        "loads on device 1, the least full with enough room: needs 100 MB, 900 free",
    ),
    Reason.TIGHTEST: (
        view([model(A)], [ticket(1, A)], devices=[device(0), device(1, used=1)]),
        first,
        "loads on device 1, the tightest fit among equally full ones: needs 100 MB, 899 free",
    ),
    Reason.ONLY_ONE: (
        view([model(A)], [ticket(1, A)], devices=[device(0, used=850), device(1)]),
        first,
        "loads on device 1, the only place with enough room: needs 100 MB, 900 free",
    ),
    Reason.EXCHANGED: (
        view([model(A, owned={OTHER: 1})], [ticket(1, A)], copies=[idle(7, A, owner=OTHER)], rules=at_most(1)),
        first,
        "is evicted for another copy of its model: max_model_copies allows no more of them",
    ),
    Reason.TOO_LARGE: (
        view([model(A, 901)], [ticket(1, A)]),
        first,
        "is refused: needs 901 MB, but the largest device takes only 900",
    ),
}
#: Sentences of no plan: those for a ticket without a decision, and for a full table.
ELSEWHERE = {
    Reason.BEHIND: "waits: a request before it must not be delayed, or a model runs alone",
    Reason.NO_ROW: "is evicted for b, because the table of copies, or of models, is full",
    Reason.TABLE_FULL: "waits for a row in the table of copies, which is full",
    Reason.EXPIRED: "is unloaded: it has not been used for 0 s, the time for which idle copies of its model are kept",
    Reason.RESET: "is unloaded because `mpmm reset` or `force_reset` unloads everything",
    Reason.OUT_OF_MEMORY: "is evicted because a load or a use ran out of memory there, so that all idle copies make "
    "room",
    Reason.HOST_SHORT: "is dropped from host memory: the host has only 0 MB left",
    Reason.BY_HAND: "is suspended because `suspend` asked for it",
    Reason.HOST_FULL: "is dropped from host memory so that b, which needs 0 MB there, can be suspended: 0 free",
    Reason.NOT_FREE: "gets nothing: idle copies of b would have to be evicted for it, and nothing is evicted for a "
    "request that does not wait",
    Reason.ASKED: "is unloaded, now or when it is released, because `unload` or `update_settings` asked for it",
}


@pytest.mark.parametrize("reason", TABLE, ids=lambda reason: reason.name.lower())
def test_a_decision_has_its_reason_and_the_reason_its_sentence(reason: Reason) -> None:
    state, pick, sentence = TABLE[reason]
    decision = pick(state)
    assert not isinstance(decision, Satisfied)
    why = decision.why
    assert why.reason == reason
    # With another model it is about copies of that model, and has a sentence of its own.
    other = None if reason is Reason.PINNED else "b"
    assert explain(why.reason, why.need_mb, why.free_mb, why.coming_mb, why.seconds, other, why.devices) == sentence


@pytest.mark.parametrize("reason", ELSEWHERE, ids=lambda reason: reason.name.lower())
def test_what_no_plan_says_has_a_sentence_too(reason: Reason) -> None:
    assert explain(reason, other="b") == ELSEWHERE[reason]


def test_no_reason_is_left_out() -> None:
    assert set(SENTENCES) == set(Reason) == set(TABLE) | set(ELSEWHERE)


def test_where_there_are_several_devices_a_decision_names_those_it_is_about() -> None:
    state = view([model(A, 1000)], [replace(ticket(1, A), span=2)], devices=[device(0), device(1), device(2, used=900)])
    why = make_plan(state).decisions[0].why  # type: ignore[union-attr]  # all but Satisfied have one
    sentence = explain(why.reason, why.need_mb, why.free_mb, devices=why.devices)
    assert sentence == "loads on devices 0 and 1, the only place with enough room: needs 1000 MB, 1800 free"
    spans_two = view(
        [model(A, 800), model(B, shared=1)],
        [ticket(1, A)],
        copies=[idle(7, B, mb=900, on=1)],
        devices=[device(0, used=900), device(1, used=900)],
    )
    why = make_plan(spans_two).decisions[0].why  # type: ignore[union-attr]  # all but Satisfied have one
    assert explain(why.reason, why.need_mb, 0.0, 900.0, other="b", devices=why.devices) == (
        "is evicted for b, which needs 800 MB on device 1, 0 free: lowest score, frees 900 MB"
    )


def test_a_reason_of_a_later_version_and_an_unknown_time_are_said_to_be_so() -> None:
    assert explain(99) == "reason 99"
    assert "for an unknown time" in explain(Reason.DRAINING, seconds=math.inf)
    assert "for less than 0.01 s" in explain(Reason.DRAINING, seconds=0.004)


def test_what_is_promised_beyond_what_there_is_is_not_shown_as_free() -> None:
    assert "needs 10 MB, 0 free" in explain(Reason.IN_USE, need_mb=10.0, free_mb=-2291.0)


def test_the_ring_of_events_tells_the_whole_story(namespace: str, new_process: NewProcess) -> None:
    holder, waiter = new_process(fallback_memory_mb=100), new_process(fallback_memory_mb=100)
    holder.call(learn, a=80, b=60)
    holder.call(acquire, "a")
    waiter.send(acquire, "b")
    wait_until(lambda: waiting(namespace, "b"), "b waits for room")
    holder.call(release)
    waiter.result()
    events = read_snapshot(namespace).events
    told = [
        (
            event.kind,
            event.tag,
            explain(event.reason, event.need_mb or 0, event.free_mb or 0, event.coming_mb or 0, math.inf, event.other),
        )
        for event in events
        if event.reason is not None
    ]
    # On a busy machine a load takes longer than 0.05 s, and then it has a cost.
    chosen_by = next(event.reason for event in events if event.kind == "unload_began")
    assert chosen_by in (Reason.LOWEST_SCORE, Reason.CHEAPEST_RELOAD)
    assert told == [
        ("load_began", "a", "loads: needs 80 MB, 100 free"),
        ("waits", "b", "waits: needs 60 MB, 20 free, 80 kept for it where a is in use, for an unknown time"),
        ("unload_began", "a", explain(chosen_by, 60, 20, 80, math.inf, "b")),
        ("waits", "b", "waits: needs 60 MB, 20 free, 80 coming from the unload of a"),
        ("load_began", "b", "loads: needs 60 MB, 100 free"),
    ]


def test_a_copy_that_goes_for_want_of_a_row_says_so(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(capacities=Capacities(instances=1))
    for tag in "ab":
        manager.release_model(tag, manager.acquire_model(tag, LoadsObject(tag)))
    [event] = [event for event in read_snapshot(namespace).events if event.reason == Reason.NO_ROW]
    assert (event.kind, event.tag, event.other) == ("unload_began", "a", "b")


def test_a_ticket_keeps_the_figures_of_its_reason(namespace: str, new_process: NewProcess) -> None:
    holder, waiter = new_process(fallback_memory_mb=100), new_process(fallback_memory_mb=100)
    holder.call(learn, a=80, b=60)
    holder.call(acquire, "a")
    waiter.send(acquire, "b")
    wait_until(lambda: waiting(namespace, "b"), "b waits for room")
    [found] = waiting(namespace, "b")
    assert (found.reason, found.need_mb, found.free_mb, found.coming_mb, found.other) == (
        Reason.IN_USE,
        60,
        20,
        80,
        "a",
    )
    assert found.head_of_line_for_s is not None
    holder.call(release)
    waiter.result()


def test_figures_that_are_not_told_are_shown_as_nothing() -> None:
    for reason in Reason:
        assert set(re.findall(r"[\d.]+(?= MB)", explain(reason))) <= {"0"}, reason


def test_sentences_name_figures_that_exist() -> None:
    for sentence in SENTENCES.values():
        assert set(re.findall(r"{(\w+)", sentence)) <= {*("need", "free", "coming", "seconds", "time", "other", "on")}
