"""What a zygote decides, step by step and in this process: without templates, and without servers."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import pickle
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import in_child, open_descriptors

from mpmm.multi_process_shared.forkserver import zygote as module
from mpmm.multi_process_shared.forkserver.orders import (
    BACK,
    CONVERSATION_TIMEOUT_S,
    FORK,
    IDLE,
    IMPORT,
    IMPORTED,
    READ,
    READY,
    REFUSED,
    RETIRE,
    UNFORKABLE,
    WAIT,
    ForkOrder,
    Kind,
    Order,
)
from mpmm.multi_process_shared.forkserver.zygote import (
    CAREFUL_AFTER_FAILURES,
    MESSAGE_BYTES,
    MOST_FAILURES,
    MOST_TEMPLATES,
    MOST_UNREAD_BYTES,
    PRELOAD_HOOK_TIMEOUT_S,
    TEMPLATE_USED_S,
    _TemplateHandle,
    _Zygote,
)
from mpmm.multi_process_shared.rpc import sockets
from mpmm.multi_process_shared.server_process import AliveLock, ServerPlan
from mpmm.shared_state.lock_file import LockFile

NOW = 1000.0


class Link:
    """A connection that notes what is sent, and has something to receive."""

    def __init__(self, *received: Any) -> None:
        self.sent: list[Any] = []
        self.received = list(received)
        self.broken = self.closed = False

    def send(self, message: Any) -> None:
        if self.broken:
            raise BrokenPipeError
        self.sent.append(message)

    def send_bytes(self, message: bytes) -> None:
        self.send(json.loads(message))

    def recv(self) -> Any:
        if not self.received:
            raise EOFError
        return self.received.pop(0)

    def close(self) -> None:
        self.closed = True


class Steps(_Zygote):
    """A zygote that notes what it would do to processes, in `done`, with names for templates and orders."""

    def __init__(self) -> None:
        self.templates, self.requesters = [], {}
        self.modules, self.unforkable, self.failures, self.read, self.environments = {}, {}, {}, {}, {}
        self.children = set()
        self.life: Any = SimpleNamespace(is_current=lambda: True)
        self.done: list[Any] = []

    def fork_server(self, order: Order, kind: Kind) -> None:
        self.done.append(("fork a server", order, kind))

    def kill(self, template: _TemplateHandle) -> None:  # type: ignore[override]  # a static method, here it notes
        self.done.append(("kill", template))

    def have_template(self, kind: Kind, **state: Any) -> Any:
        """Return a template of a kind, which is idle and has imported everything, but for the given state."""
        template: Any = _TemplateHandle(kind, 4711, Link())  # type: ignore[arg-type]  # it sends like a connection
        template.ready = template.built = True
        template.busy = False
        for name, value in state.items():
            setattr(template, name, value)
        self.templates.append(template)
        return template


@pytest.fixture
def zygote(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """A zygote whose forks are numbers, at a time that stands still."""
    zygote = Steps()
    pids = itertools.count(1)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: NOW))
    monkeypatch.setattr(module, "Pipe", lambda: (Link(), Link()))
    monkeypatch.setattr(
        sockets, "set_timeouts", lambda link, seconds: zygote.done.append(("time limit", link, seconds))
    )
    monkeypatch.setattr(module, "hand_over", lambda link, what, order: link.send((what, order)))
    monkeypatch.setattr(os, "fork", lambda: next(pids))
    return zygote


def kind_of(*hooks: str, **variables: str) -> Kind:
    """Return the kind of orders with these preload hooks and environment variables."""
    return Kind((), tuple(sorted(variables.items())), hooks, "/", ())


def order_of(*hooks: str, size: int = 0, **variables: str) -> Any:
    """Return an order with these preload hooks and environment variables; size: of its message, 0: as it is."""
    plan = ServerPlan("/", "it", (), (1, None), (), b"", b"")
    preparation: dict[str, Any] = {"dir": "/", "sys_path": [], "sys_argv": []}
    order: Any = Order(pickle.dumps(ForkOrder(plan, preparation, variables, hooks)), Link(), [])  # type: ignore[arg-type]  # it sends like a connection
    if size:
        order.message = bytes(size)
    return order


# Templates as the zygote sees them.


def test_a_template_accepts_what_it_can_serve_soon() -> None:
    cases: list[tuple[dict[str, Any], tuple[str, ...], bool]] = [
        ({}, (), True),
        ({"retired": True}, (), False),
        ({"retired": True, "ready": False}, ("a:b",), False),
        # Without hooks it is not worth waiting for.
        ({"built": False}, (), False),
        ({"built": False}, ("a:b",), True),
        ({"built": False, "ready": False}, ("a:b",), True),
        # Not ready: the order waits in the zygote, however full the socket is.
        ({"ready": False, "busy": True, "unread_bytes": MOST_UNREAD_BYTES}, ("a:b",), True),
        ({"busy": True, "unread_bytes": MOST_UNREAD_BYTES}, ("a:b",), False),
        ({"busy": True, "unread_bytes": MOST_UNREAD_BYTES}, (), False),
        ({"busy": False, "unread_bytes": MOST_UNREAD_BYTES}, (), True),
    ]
    for state, hooks, accepts in cases:
        template = Steps().have_template(kind_of(*hooks), **state)
        assert template.accepts(order_of()) is accepts, (state, hooks)


def test_a_template_that_is_busy_is_sent_what_its_socket_takes_to_the_last_byte(zygote: Steps) -> None:
    template = zygote.have_template(kind_of(), busy=True)
    for size in (100, 200):
        template.note_told(size)
    left = MOST_UNREAD_BYTES - 300 - 3 * MESSAGE_BYTES
    assert [template.has_room_for(size) for size in (left, left + 1)] == [True, False]
    template.busy = False
    assert template.has_room_for(left + 1)
    template.note_told(5)
    template.busy = True
    assert template.has_room_for(left), "what an idle template is sent, it reads at once"


def test_a_new_template_is_busy_with_its_preload_hooks(zygote: Steps) -> None:
    template = _TemplateHandle(kind_of("a:b"), 7, Link())  # type: ignore[arg-type]  # it sends like a connection
    assert (template.ready, template.built, template.retired, template.busy) == (False, False, False, True)
    assert (template.unread_bytes, template.waiting, template.used) == (0, [], NOW)


# Orders.


def test_an_order_of_a_new_kind_is_served_by_the_zygote_itself(zygote: Steps) -> None:
    order = order_of(A="1")
    zygote.place(order)
    assert zygote.done == [("fork a server", order, kind_of(A="1"))]
    assert (zygote.templates, zygote.environments) == ([], {kind_of(A="1"): {"A": "1"}})
    assert zygote.modules == {kind_of(A="1"): []}


def test_modules_that_an_order_names_are_imported_by_a_template_and_this_server_does_not_wait(zygote: Steps) -> None:
    order = order_of(MPMM_PRELOAD=" one, ,two,")
    zygote.place(order)
    (template,) = zygote.templates
    assert zygote.modules == {template.kind: ["one", "two"]}
    assert zygote.done[-1] == ("fork a server", order, template.kind)
    # A second order of the kind neither makes another template nor forgets what is known.
    zygote.modules[template.kind].append("three")
    zygote.place(order_of(MPMM_PRELOAD=" one, ,two,"))
    assert zygote.templates == [template]
    assert zygote.modules == {template.kind: ["one", "two", "three"]}


def test_an_order_with_preload_hooks_waits_for_its_template(zygote: Steps) -> None:
    orders = [order_of("a:b"), order_of("a:b")]
    for order in orders:
        zygote.place(order)
    (template,) = zygote.templates
    assert template.waiting == orders
    assert [what for what, *_ in zygote.done] == ["time limit"]
    zygote.done.clear()
    template.ready = True
    zygote.release_waiting(template)
    assert [(what, order) for what, order in template.link.sent] == [(FORK, order) for order in orders]  # type: ignore[attr-defined]  # a `Link`
    assert (template.waiting, zygote.done) == ([], [])


def test_an_order_that_waited_in_vain_is_served_by_the_zygote_itself() -> None:
    for state in ({"ready": False}, {"retired": True}, {"ready": False, "retired": True}):
        zygote, order = Steps(), order_of("a:b")
        template = zygote.have_template(kind_of("a:b"), waiting=[order], **state)
        zygote.release_waiting(template)
        assert zygote.done == [("fork a server", order, template.kind)], state
        assert (template.waiting, template.link.sent) == ([], [])


def test_an_order_that_a_template_can_serve_is_handed_over_and_counts_as_a_use(zygote: Steps) -> None:
    order = order_of(size=500)
    template = zygote.have_template(kind_of(), used=NOW - 100, busy=True)
    zygote.place(order)
    assert template.link.sent == [(FORK, order)]
    assert (template.used, template.unread_bytes, zygote.done) == (NOW, 500 + MESSAGE_BYTES, [])


def test_an_order_that_a_template_does_not_accept_is_served_by_the_zygote_itself(zygote: Steps) -> None:
    order = order_of()
    template = zygote.have_template(kind_of(), used=NOW - 100, built=False)
    zygote.place(order)
    assert zygote.done == [("fork a server", order, template.kind)]
    assert (template.link.sent, template.used) == ([], NOW - 100)


def test_a_template_that_cannot_be_reached_is_given_up_and_the_zygote_serves_the_order(zygote: Steps) -> None:
    order = order_of()
    template = zygote.have_template(kind_of())
    template.link.broken = True
    zygote.place(order)
    assert zygote.done == [("kill", template), ("fork a server", order, template.kind)]
    assert (template.retired, template.unread_bytes) == (True, 0)


# Kinds.


def test_a_kind_is_pinned_to_the_values_of_what_its_imports_read(zygote: Steps) -> None:
    kind, read = kind_of(A="1"), ("CUDA_VISIBLE_DEVICES", "MPMM_DEVICES")
    assert zygote.pin(kind, {"MPMM_DEVICES": "3"}) == kind
    zygote.modules[kind], zygote.unforkable[kind] = ["one"], {"two"}
    zygote.read[kind] = set(read)
    pinned = zygote.pin(kind, {"MPMM_DEVICES": "3", "OTHER": "4"})
    assert pinned == replace(kind, pinned=(("CUDA_VISIBLE_DEVICES", None), ("MPMM_DEVICES", "3")))
    # It begins with what is known of the kind, and goes its own way from there.
    zygote.modules[pinned].append("three")
    zygote.unforkable[pinned].add("four")
    assert (zygote.modules[kind], zygote.unforkable[kind]) == (["one"], {"two"})
    assert zygote.pin(pinned, {"MPMM_DEVICES": "3"}) == pinned
    assert (zygote.modules[pinned], zygote.unforkable[pinned]) == (["one", "three"], {"two", "four"})
    assert zygote.kind_of(order_of(A="1", MPMM_DEVICES="5")).pinned == (
        ("CUDA_VISIBLE_DEVICES", None),
        ("MPMM_DEVICES", "5"),
    )


def test_modules_that_keep_servers_from_being_forked_are_left_out_with_all_that_is_in_them(zygote: Steps) -> None:
    zygote.unforkable[kind_of()] = {"bad", "good.bad"}
    names = ["bad", "bad.inner", "badly", "good", "good.bad", "good.bad.inner", "good.badly", "inner.bad"]
    assert zygote.clean(kind_of(), names) == ["badly", "good", "good.badly", "inner.bad"]
    assert zygote.clean(kind_of("other:kind"), names) == names


# Making templates.


def test_a_new_template_is_a_fork_that_is_not_waited_for_without_limit(zygote: Steps) -> None:
    template: Any = zygote.make_template(kind_of())
    assert zygote.templates == [template]
    assert (template.pid, template.kind, template.link.sent) == (1, kind_of(), [])
    assert zygote.done == [("time limit", template.link, CONVERSATION_TIMEOUT_S)]


def test_the_zygote_keeps_its_own_end_of_a_templates_connection_only(
    zygote: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = Link(), Link()
    monkeypatch.setattr(module, "Pipe", lambda: (ours, theirs))
    template = zygote.make_template(kind_of())
    assert template is not None
    assert template.link is ours  # type: ignore[comparison-overlap]  # a `Link`
    assert (ours.closed, theirs.closed) == (False, True)


@pytest.mark.usefixtures("zygote")
def test_no_template_is_made_for_a_kind_that_has_failed_too_often_or_whose_hook_has() -> None:
    cases: list[tuple[int, set[str], bool]] = [
        (0, set(), True),
        (MOST_FAILURES - 1, set(), True),
        (MOST_FAILURES, set(), False),
        (0, {"some_module"}, True),
        (0, {"a:b"}, False),
    ]
    for failures, unforkable, made in cases:
        zygote, kind = Steps(), kind_of("a:b")
        if failures:
            zygote.failures[kind] = failures
        zygote.unforkable[kind] = unforkable
        assert (zygote.make_template(kind) is not None) is made, (failures, unforkable)
        assert len(zygote.templates) == made


@pytest.mark.usefixtures("zygote")
def test_a_template_gives_way_to_one_of_another_kind_once_it_was_idle_for_long() -> None:
    for others, retired, idle_s, made in (
        (MOST_TEMPLATES - 1, 0, 0.0, True),
        (MOST_TEMPLATES, 0, 0.0, False),
        (MOST_TEMPLATES, 1, 0.0, True),
        (MOST_TEMPLATES, 0, TEMPLATE_USED_S - 0.5, False),
        (MOST_TEMPLATES, 0, TEMPLATE_USED_S, True),
    ):
        zygote = Steps()
        for number in range(others):
            zygote.have_template(kind_of(A=str(number)), used=NOW - (number == 2) * idle_s, retired=number < retired)
        assert (zygote.make_template(kind_of()) is not None) is made, (others, retired, idle_s)
        gone = [template for template in zygote.templates if template.retired][retired:]
        assert [template.kind for template in gone] == ([kind_of(A="2")] if idle_s and made else [])


class _Ended(BaseException):
    """Stands for the end of a process."""


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes with which this process would have ended."""
    found: list[int] = []

    def exit_now(code: int) -> None:
        found.append(code)
        raise _Ended

    monkeypatch.setattr(os, "_exit", exit_now)
    return found


@pytest.mark.parametrize(("known", "failures"), [(True, CAREFUL_AFTER_FAILURES - 1), (False, CAREFUL_AFTER_FAILURES)])
def test_the_fork_becomes_a_template_with_what_is_known_of_its_kind(
    zygote: Steps, monkeypatch: pytest.MonkeyPatch, exits: list[int], known: bool, failures: int
) -> None:
    made: list[Any] = []

    def template(*arguments: Any) -> Any:
        made.append(arguments)
        return SimpleNamespace(run=lambda: made.append("run"))

    ours, theirs = Link(), Link()
    monkeypatch.setattr(module, "Pipe", lambda: (ours, theirs))
    monkeypatch.setattr(module, "Template", template)
    monkeypatch.setattr(os, "fork", lambda: 0)
    kind = kind_of(A="1")
    zygote.failures[kind] = failures
    if known:
        zygote.environments[kind] = {"A": "1", "CUDA_VISIBLE_DEVICES": "2"}
        zygote.modules[kind], zygote.unforkable[kind] = ["one", "two"], {"two"}
    with pytest.raises(_Ended):
        zygote.make_template(kind)
    environment = {"A": "1", "CUDA_VISIBLE_DEVICES": "2"} if known else {"A": "1"}
    careful = failures >= CAREFUL_AFTER_FAILURES
    assert made == [(kind, environment, theirs, ["one"] if known else [], careful), "run"]
    assert exits == [1], "a template ends by itself, and never goes on as a zygote"


# What servers have imported.


def test_what_a_server_had_to_import_is_imported_by_a_new_template(zygote: Steps) -> None:
    zygote.note_imports(kind_of(), ["one"])
    assert [template.kind for template in zygote.templates] == [kind_of()]
    assert zygote.modules == {kind_of(): ["one"]}


def test_a_template_is_told_what_it_does_not_know_yet_and_is_busy_then(zygote: Steps) -> None:
    template = zygote.have_template(kind_of())
    zygote.modules[kind_of()], zygote.unforkable[kind_of()] = ["one"], {"bad"}
    zygote.note_imports(kind_of(), ["one", "two", "bad.inner"])
    assert template.link.sent == [(IMPORT, ["two"])]
    assert (template.busy, template.unread_bytes) == (True, len("twobad.inner") + MESSAGE_BYTES)
    assert zygote.modules == {kind_of(): ["one", "two", "bad.inner"]}
    zygote.note_imports(kind_of(), ["two", "one"])
    assert len(template.link.sent) == 1, "it knows all that"
    assert zygote.templates == [template]


def test_a_template_whose_socket_is_full_is_told_nothing_and_the_next_one_is() -> None:
    for beyond in (0, 1):
        zygote = Steps()
        unread = MOST_UNREAD_BYTES - MESSAGE_BYTES - len("twothree") + beyond
        template = zygote.have_template(kind_of(), busy=True, unread_bytes=unread)
        zygote.note_imports(kind_of(), ["two", "three"])
        assert len(template.link.sent) == 1 - beyond
        assert zygote.modules == {kind_of(): ["two", "three"]}


def test_a_template_that_does_not_take_what_it_is_told_is_given_up(zygote: Steps) -> None:
    template = zygote.have_template(kind_of())
    template.link.broken = True
    zygote.note_imports(kind_of(), ["one"])
    assert (zygote.done, template.retired) == ([("kill", template)], True)


def test_a_server_of_before_it_was_known_what_imports_read_has_no_template_made(zygote: Steps) -> None:
    zygote.read[kind_of()] = {"CUDA_VISIBLE_DEVICES"}
    zygote.note_imports(kind_of(), ["one"])
    assert zygote.templates == []
    pinned = replace(kind_of(), pinned=(("CUDA_VISIBLE_DEVICES", "1"),))
    zygote.note_imports(pinned, ["one"])
    assert [template.kind for template in zygote.templates] == [pinned]


# What templates say.


def test_a_template_that_is_ready_gets_the_orders_that_waited_for_it(zygote: Steps) -> None:
    order = order_of("a:b")
    template = zygote.have_template(kind_of("a:b"), ready=False, built=False, busy=True, waiting=[order])
    template.link.received = [(READY, None)]
    zygote.listen_to(template)
    assert template.link.sent == [(FORK, order)]
    assert (template.ready, template.built, template.busy, zygote.templates) == (True, False, True, [template])


def test_a_template_that_is_idle_is_built_and_has_read_everything(zygote: Steps) -> None:
    template = zygote.have_template(kind_of(), built=False, busy=True, unread_bytes=5)
    template.link.received = [(IDLE, None)]
    zygote.listen_to(template)
    assert (template.built, template.busy, template.unread_bytes, template.retired) == (True, False, 0, False)
    assert zygote.done == []


def test_an_order_that_a_template_gives_back_is_served_by_the_zygote_itself(
    zygote: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = zygote.have_template(kind_of())
    template.link.received = [(BACK, b"message")]
    monkeypatch.setattr(module, "take_over", lambda link, message: (link, message))
    zygote.listen_to(template)
    assert zygote.done == [("fork a server", (template.link, b"message"), template.kind)]
    assert zygote.templates == [template]


def test_what_a_templates_servers_had_to_import_is_noted(zygote: Steps) -> None:
    template = zygote.have_template(kind_of())
    template.link.received = [(IMPORTED, ["one"])]
    zygote.listen_to(template)
    assert zygote.modules == {kind_of(): ["one"]}
    assert template.link.sent == [(IMPORT, ["one"])]


@pytest.mark.usefixtures("zygote")
def test_a_template_that_has_become_unforkable_is_followed_by_one_without_that_module() -> None:
    for known, before, made in ((["good", "bad"], 0, 1), (["bad", "bad.inner"], 1, 0), ([], 1, 0)):
        zygote = Steps()
        template = zygote.have_template(kind_of())
        zygote.modules[kind_of()] = known
        if before:
            zygote.failures[kind_of()] = before
        template.link.received = [(UNFORKABLE, "bad")]
        zygote.listen_to(template)
        assert template.retired
        assert template.link.sent == [(RETIRE, None)]
        assert (zygote.unforkable, zygote.failures) == ({kind_of(): {"bad"}}, {kind_of(): before + 1})
        assert [other.kind for other in zygote.templates] == [kind_of()] * (1 + made), known


def test_a_template_that_has_refused_a_module_goes_on_and_no_other_is_told_of_the_module(zygote: Steps) -> None:
    template = zygote.have_template(kind_of())
    template.link.received = [(REFUSED, "bad")]
    zygote.listen_to(template)
    zygote.note_imports(kind_of(), ["bad", "bad.inner", "good"])
    assert (template.retired, template.link.sent) == (False, [(IMPORT, ["good"])])
    assert zygote.failures == {}


def test_a_template_whose_imports_read_a_variable_is_followed_by_one_for_this_value(zygote: Steps) -> None:
    template = zygote.have_template(kind_of())
    zygote.environments[kind_of()] = {"CUDA_VISIBLE_DEVICES": "1"}
    template.link.received = [(READ, ["CUDA_VISIBLE_DEVICES"])]
    zygote.listen_to(template)
    pinned = replace(kind_of(), pinned=(("CUDA_VISIBLE_DEVICES", "1"),))
    assert template.retired
    assert [other.kind for other in zygote.templates] == [kind_of(), pinned]
    assert zygote.environments[pinned] == {"CUDA_VISIBLE_DEVICES": "1"}
    # A later import reads another one.
    zygote.templates[1].link.received = [(READ, ["MPMM_DEVICES"])]  # type: ignore[attr-defined]  # a `Link`
    zygote.listen_to(zygote.templates[1])
    assert zygote.read == {kind_of(): {"CUDA_VISIBLE_DEVICES", "MPMM_DEVICES"}}
    assert zygote.templates[2].kind.pinned == (("CUDA_VISIBLE_DEVICES", "1"), ("MPMM_DEVICES", None))
    assert zygote.failures == {}, "this is no failure"


def test_a_template_that_has_ended_is_reaped_and_counts_as_a_failure_unless_it_was_to_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for retired, before, after in ((False, {}, 1), (False, {kind_of("a:b"): 1}, 2), (True, {kind_of("a:b"): 1}, 1)):
        zygote, order = Steps(), order_of("a:b")
        zygote.failures = dict(before)
        template = zygote.have_template(kind_of("a:b"), ready=False, retired=retired, waiting=[order])
        reaped: list[tuple[int, int]] = []
        monkeypatch.setattr(os, "waitpid", lambda pid, flags, reaped=reaped: reaped.append((pid, flags)))
        zygote.listen_to(template)
        assert zygote.done == [("kill", template), ("fork a server", order, template.kind)]
        assert (zygote.templates, zygote.failures, reaped) == ([], {template.kind: after}, [(4711, 0)])
        assert (template.link.closed, template.retired) == (True, True)


# Time.


def test_orders_that_wait_hear_of_it_and_a_template_whose_hook_takes_too_long_is_killed(zygote: Steps) -> None:
    templates = []
    for age_s in (PRELOAD_HOOK_TIMEOUT_S, PRELOAD_HOOK_TIMEOUT_S + 1):
        orders = [order_of("a:b"), order_of("a:b")]
        for order, since in zip(orders, (NOW - age_s, NOW), strict=True):
            order.since = since
        templates.append(zygote.have_template(kind_of("a:b"), ready=False, waiting=orders))
    zygote.have_template(kind_of())
    # One that is gone.
    templates[0].waiting[0].requester.broken = True
    zygote.keep_alive()
    said = [[order.requester.sent for order in template.waiting] for template in templates]
    assert said == [[[], [[WAIT, 0]]], [[[WAIT, 0]], [[WAIT, 0]]]]
    assert zygote.done == [("kill", templates[1])]


def test_only_requesters_whose_time_is_over_are_hung_up_on(zygote: Steps) -> None:
    links, ended = [Link() for _ in range(3)], []

    def steps(number: int) -> Iterator[None]:
        try:
            yield
        finally:
            ended.append(number)

    for number, (link, until) in enumerate(zip(links, (NOW - 1, NOW, NOW + 1), strict=True)):
        next(taking := steps(number))
        zygote.requesters[link] = (taking, until)  # type: ignore[index, assignment]  # it closes like a connection
    zygote.hang_up_on_silent()
    assert [link.closed for link in links] == [True, True, False]
    assert list(zygote.requesters) == [links[2]]  # type: ignore[comparison-overlap]  # a `Link`
    assert ended == [0, 1]


@pytest.mark.parametrize("is_free", [False, True, None])
def test_a_zygote_looks_once_a_second_for_its_clients_and_acts_on_what_it_hears_at_once(
    zygote: Steps, monkeypatch: pytest.MonkeyPatch, exits: list[int], is_free: bool | None
) -> None:
    """is_free: whether it has no client; None: it has, but they do not find it any more."""
    now, waits = [NOW], list[tuple[int, float]]()
    done: list[Any] = zygote.done
    listener, requester, child = Link(), Link(), Link()
    template = zygote.have_template(kind_of())
    zygote.have_template(kind_of("quiet:one"))

    def look() -> bool:
        done.append("look")
        return bool(is_free)

    alive: Any = SimpleNamespace(is_free=look)
    zygote.alive, zygote.listener = alive, listener  # type: ignore[assignment]  # a `Link`
    nothing: Any = None
    zygote.requesters = {requester: nothing, Link(): nothing}  # type: ignore[dict-item]  # a `Link`
    ready = iter([[], [template.link, requester, listener, child], [], []])
    passes = iter([0.25, 0.5, 0.25, 2.0])

    def wait(things: list[Any], timeout_s: float) -> list[Any]:
        if len(waits) == 4:
            raise _Ended
        waits.append((len(things), timeout_s))
        now[0] += next(passes)
        return next(ready)

    for name in ("listen_to", "hear", "meet_requester", "hang_up_on_silent", "keep_alive", "leave"):

        def note(*arguments: Any, name: str = name) -> None:
            done.append((name, *arguments))
            if name == "leave":
                raise _Ended

        monkeypatch.setattr(zygote, name, note)
    monkeypatch.setattr(zygote, "look_after_children", lambda ready: done.append(("children", len(ready))))
    monkeypatch.setattr(zygote, "watched", lambda: [child])
    monkeypatch.setattr(zygote, "is_forgotten", lambda: is_free is None)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(module, "wait", wait)
    with pytest.raises(_Ended):
        zygote.run()
    looked = [("hang_up_on_silent",), "look", ("keep_alive",) if is_free is False else ("leave",)]
    heard = [("children", 4), ("listen_to", template), ("hear", requester), ("meet_requester",)]
    first = [("children", 0), *heard, ("children", 0), *looked]
    assert done == ([*first, ("children", 0), *looked] if is_free is False else first)
    # The listener, the requesters, the templates and what is watched.
    assert waits == [(6, 1.0), (6, 0.75), (6, 0.25), *([(6, 1.0)] if is_free is False else [])]


@pytest.mark.parametrize("current", [True, False])
@pytest.mark.parametrize("held", [True, False])
def test_a_zygote_that_leaves_removes_what_is_its_own_and_ends_its_templates(
    zygote: Steps, monkeypatch: pytest.MonkeyPatch, exits: list[int], tmp_path: Path, current: bool, held: bool
) -> None:
    done: list[Any] = zygote.done
    zygote.life = LockFile(tmp_path / "a.life")
    assert zygote.life.try_exclusive()
    if not current:
        (tmp_path / "a.life").unlink()
        (tmp_path / "a.life").touch()
    zygote.socket_path = tmp_path / "a.socket"
    zygote.socket_path.touch()
    alive: Any = SimpleNamespace(held=held)
    registry: Any = SimpleNamespace(root=tmp_path, remove_if_unused=lambda: done.append("remove"))
    zygote.alive, zygote.registry = alive, registry
    templates = [zygote.have_template(kind_of()) for _ in range(2)]
    monkeypatch.setattr("mpmm.shared_state.removal.remove_all_deserted", lambda root: done.append(("deserted", root)))
    with pytest.raises(_Ended):
        zygote.leave()
    zygote.life.close()
    assert done == [*(["remove"] if held else []), *(("kill", one) for one in templates), ("deserted", tmp_path)]
    assert exits == [0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ([] if current else ["a.life", "a.socket"])


# The process.


def test_a_zygote_begins_with_nothing_but_its_socket_and_the_lock_of_its_clients(tmp_path: Path) -> None:
    life = LockFile(tmp_path / "a.life")
    os.pwrite(life.fd, json.dumps({"pid": 1, "socket": "/some/where"}).encode(), 0)
    with contextlib.closing(life), socket.socket() as listener:
        zygote = _Zygote(tmp_path, life, listener)
        assert (zygote.socket_path, zygote.life, zygote.listener) == (Path("/some/where"), life, listener)
        assert isinstance(zygote.alive, AliveLock)
        assert zygote.alive.path == str(zygote.registry.alive_path)
        assert (zygote.registry.root, zygote.children, zygote.templates) == (tmp_path, set(), [])


def test_a_template_is_killed_and_one_that_is_gone_is_none_to_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[tuple[int, int]] = []

    def kill(pid: int, number: int) -> None:
        killed.append((pid, number))
        raise ProcessLookupError

    monkeypatch.setattr(os, "kill", kill)
    _Zygote.kill(_TemplateHandle(kind_of(), 4711, Link()))  # type: ignore[arg-type]  # it sends like a connection
    assert killed == [(4711, signal.SIGKILL)]


def test_a_second_zygote_for_the_same_lock_does_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    def be_held(lock: LockFile, timeout_seconds: float) -> None:
        waits.append(timeout_seconds)
        raise TimeoutError

    monkeypatch.setattr(LockFile, "exclusive", be_held)
    before = open_descriptors()
    for path in (tmp_path / "a.life", tmp_path / "nowhere" / "a.life"):
        with pytest.raises(SystemExit) as ended:
            module.main(str(tmp_path), str(path))
        assert ended.value.code == 1
        del ended
    assert waits == [1.0]
    assert not open_descriptors() - before


def begin_as(fork: int, tmp_path: Path) -> dict[str, Any]:
    """Begin as a zygote with the given outcome of the fork; return how that ends, and how the process is then."""
    found: dict[str, Any] = {}
    folder = tmp_path / "zygote"
    life_path = folder / "a.life"
    if not fork:
        life_path.write_text(1000 * "x")
        for name in ("a-earlier.socket", "b-another.socket"):
            (folder / name).touch()
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_IGN)
    pipes: list[tuple[int, int]] = []
    pipe = os.pipe

    def pipe_and_note() -> tuple[int, int]:
        pipes.append(pipe())
        if fork == 1:
            os.write(pipes[-1][1], b"!")
        return pipes[-1]

    def run(zygote: _Zygote) -> None:
        text = json.loads(life_path.read_text())
        found["socket"], found["life"] = Path(text["socket"]).parent, text["pid"] == os.getpid()
        found["files"] = sorted(path.name.partition("-")[0] for path in folder.iterdir())
        found["there"] = os.path.samefile(text["socket"], zygote.socket_path)
        found["name"] = Path("/proc/self/comm").read_text()
        found["folder"] = os.getcwd()
        found["signals"] = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGCHLD)]
        found["frozen"] = gc.get_freeze_count() > 0
        found["registry"] = str(zygote.registry.root)
        found["waits"] = os.get_blocking(zygote.listener.fileno())
        found["pipe"] = [os.path.exists(f"/proc/self/fd/{fd}") for fd in pipes[0]]
        # The lock and the listener are copies, which are closed in templates and servers.
        found["held"] = zygote.life.is_current() and not LockFile(life_path).try_exclusive()
        fds = [zygote.life.fd, zygote.listener.fileno()]
        patched._exit = exit_now
        found["children"] = in_child(lambda: [os.path.exists(f"/proc/self/fd/{fd}") for fd in fds])
        patched._exit = exit_as

    patched: Any = os
    exit_now = os._exit
    patched.pipe, patched._exit = pipe_and_note, exit_as
    real_fork = os.fork

    def fork_once() -> int:
        patched.fork = real_fork
        return fork

    patched.fork = fork_once
    changed: Any = _Zygote
    changed.run = run
    wrote: list[bytes] = []
    write = os.write

    def write_and_note(fd: int, data: bytes) -> int:
        wrote.append(data)
        return write(fd, data)

    patched.write = write_and_note
    try:
        module.main(str(tmp_path), str(life_path))
    except (SystemExit, _Ended) as ended:
        found["end"] = ended.args
    found["said"] = b"!" in wrote
    return found


def exit_as(code: int) -> None:
    """Stand for `os._exit`."""
    raise _Ended(code)


def test_a_zygote_begins_as_a_fork_that_says_where_it_is_and_has_no_tie_to_its_starter(tmp_path: Path) -> None:
    (tmp_path / "zygote").mkdir(mode=0o700)
    found = in_child(lambda: begin_as(0, tmp_path))
    assert found == {
        "socket": tmp_path / "zygote",
        "life": True,
        # The lock, the socket, and that of another kind of zygote: what an earlier one has left is gone.
        "files": ["a", "a.life", "b"],
        "there": True,
        "name": "mpmm-zygote\n",
        "folder": "/",
        "signals": [signal.SIG_DFL, signal.SIG_DFL],
        "frozen": True,
        "registry": str(tmp_path),
        "waits": False,
        "pipe": [False, False],
        "held": True,
        "children": [False, False],
        "said": True,
        # A zygote ends by itself: if it comes back, that is a failure.
        "end": (1,),
    }


def test_the_process_that_starts_a_zygote_ends_once_the_fork_takes_orders_or_has_failed(tmp_path: Path) -> None:
    (tmp_path / "zygote").mkdir(mode=0o700)
    for fork, code in ((1, 0), (2, 1)):
        # In the second case, the fork has died and has said nothing.
        assert in_child(lambda fork=fork: begin_as(fork, tmp_path)) == {"end": (code,), "said": fork == 1}  # type: ignore[misc]  # the default has no type


def test_a_zygote_reads_an_order_step_by_step_and_places_it(
    zygote: Steps, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limits: list[float] = []
    monkeypatch.setattr(sockets, "set_timeouts", lambda link, seconds: limits.append(seconds))
    ours, theirs = Pipe()
    sockets_of: list[Any] = [ours, None]
    monkeypatch.setattr(sockets, "accept", lambda listener: sockets_of.pop(0))
    monkeypatch.setattr(sockets, "handshake", lambda requester, key: iter([None]))

    def receive_descriptors(requester: Any, count: int) -> list[Any]:
        zygote.done.append(count)
        return []

    monkeypatch.setattr(module, "receive_descriptors", receive_descriptors)
    registry: Any = SimpleNamespace(key=lambda: b"key")
    nothing: Any = None
    zygote.registry, zygote.listener = registry, nothing
    zygote.meet_requester()
    # It has the time that a handshake may take.
    assert zygote.requesters[ours][1] == NOW + sockets.HANDSHAKE_TIMEOUT_S
    theirs.send_bytes(order_of(A="1").message)
    steps = 0
    while zygote.requesters:
        zygote.hear(ours)
        steps += 1
    # The size of the message, the message, and the descriptors.
    assert steps == 4
    count, (what, order, kind) = zygote.done
    assert (count, what, order.requester, kind) == (3, "fork a server", ours, kind_of(A="1"))
    assert limits == [CONVERSATION_TIMEOUT_S]
    # One that has gone before it was met.
    zygote.meet_requester()
    assert zygote.requesters == {}
    ours.close()
    theirs.close()
