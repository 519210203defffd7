"""What a client does with a server, step by step and in this process: links, proxies, and what it refuses."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import weakref
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import AuthenticationError
from multiprocessing import process as mp_process
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import held_by_a_thread, in_child

from mpmm.errors import (
    InvalidArgumentError,
    ModelServerError,
    NotAcquiredError,
    ServerStartError,
    SharedObjectReleasedError,
)
from mpmm.multi_process_shared import client, hosted, identity, main_import, references, shared, sleeping
from mpmm.multi_process_shared.client import CONNECT_ATTEMPTS, DYING_S, FIRST_RETRY_S, ServerLink
from mpmm.multi_process_shared.context import (
    ServerContext,
    attach_namespace,
    attaching_to,
    namespace_of,
    served_namespaces,
    server_contexts,
    serving_for,
)
from mpmm.multi_process_shared.identity import check_identity, name_of_constructor, names_of_types
from mpmm.multi_process_shared.references import DEEPEST, References, RemoteObject
from mpmm.multi_process_shared.registry import ANSWERS_WITHIN_S, ServerRecord, ServerRegistry, start_time_of
from mpmm.multi_process_shared.rpc import protocol, sockets
from mpmm.multi_process_shared.server_process import ATTACH, OCCUPIED, READY
from mpmm.multi_process_shared.shared import MultiProcessShared, SharedProxy, _AttachedObjects, _LocalUse, _RemoteUse

NOW = 1000.0
RECORD = ServerRecord("it", 17, 1.0, "this one", "it.sock", spawned=True, ready=True)
OTHER = replace(RECORD, incarnation="another")


class Registry:
    """A registry with one server, which says what a test wants at each look."""

    folder = "/root/shared"
    path = Path("/root/shared")
    root = Path("/root")

    def __init__(self, *looks: Any) -> None:
        self.looks = list(looks) or [(True, RECORD)]
        self.done: list[Any] = []
        self.found_within_s: list[float] = []

    def look(self, tag: str) -> Any:
        found = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        if isinstance(found, Exception):
            raise found
        return found

    def find(self, tag: str, timeout_s: float = ANSWERS_WITHIN_S) -> Any:
        self.found_within_s.append(timeout_s)
        return self.look(tag)

    def restore_socket(self, record: ServerRecord) -> None:
        self.done.append(("restore the socket", record.tag))

    def join(self) -> None:
        self.done.append("join")

    def key(self) -> bytes:
        return b"key"

    def forget_handle(self, tag: str) -> None:
        self.done.append(("forget", tag))


class Channel:
    """A channel whose server answers each request with the next answer."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[Any] = []
        self.closed = False

    def send(self, message: Any) -> None:
        self.asked.append(protocol.decode_request(message))

    def receive(self) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException) and not isinstance(answer, ValueError):
            raise answer
        return (
            protocol.encode_error(answer)
            if isinstance(answer, ValueError)
            else protocol.encode_result(answer, "it", "m")
        )

    def close(self) -> None:
        self.closed = True

    hang_up = close


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No links of earlier tests, and a clock that passes by itself; the pauses that were made."""
    pauses: list[float] = []
    now = [NOW]

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(client, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(client, "_known", {})
    monkeypatch.setattr(client, "_links", weakref.WeakSet())
    return pauses


def link_to(registry: Any, channel: Any = None, record: ServerRecord = RECORD) -> Any:
    """Return a link that has a channel."""
    link: Any = ServerLink(registry, record)
    if channel is not None:
        link._channels.channel = channel
    return link


# Links.


def test_a_call_keeps_the_channel_if_it_was_answered_and_drops_it_if_not(links: list[float]) -> None:
    registry = Registry((False, None))
    channel = Channel(5, ValueError("of the method"), KeyboardInterrupt())
    link = link_to(registry, channel)
    assert link.ask(3, "predict", (1,), {"two": 2}) == 5
    assert channel.asked == [(3, "predict", (1,), {"two": 2})]
    with pytest.raises(ValueError, match="of the method"):
        link.ask(3, "predict", (), {})
    assert link._channels.channel is channel
    with pytest.raises(KeyboardInterrupt):
        link.ask(3, "predict", (), {})
    assert (channel.closed, vars(link._channels)) == (True, {})
    for error in (EOFError(), ConnectionResetError()):
        link._channels.channel = channel = Channel(error)
        with pytest.raises(
            ModelServerError, match=r"'it' \(pid 17\) ended before it had answered predict\(\); acquire"
        ):
            link.ask(3, "predict", (), {})
        assert (channel.closed, vars(link._channels)) == (True, {})
    # It is seen to be dead by the time that the caller is told.
    registry.looks = [(True, RECORD), (False, None)]
    link._channels.channel = Channel(EOFError())
    with pytest.raises(ModelServerError):
        link.ask(3, "predict", (), {})
    assert links == [0.001]
    # What cannot be pickled costs no channel.
    link._channels.channel = channel = Channel(5)
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        link.ask(3, "predict", (lambda: 1,), {})
    assert (channel.closed, link._channels.channel) == (False, channel)


def test_a_user_is_told_the_methods_once(links: list[float]) -> None:
    channel = Channel((1, frozenset({"a"})), (2, None), None)
    link = link_to(Registry(), channel)
    assert [link.acquire(), link.acquire()] == [(1, {"a"}), (2, {"a"})]
    link.release(2)
    control = protocol.CONTROL
    assert channel.asked == [
        (control, protocol.ACQUIRE, (False,), {}),
        (control, protocol.ACQUIRE, (True,), {}),
        (control, protocol.RELEASE, (2,), {}),
    ]


def test_what_is_not_wanted_any_more_is_dropped_with_the_next_request(links: list[float]) -> None:
    channel = Channel(None, 5, 6)
    link = link_to(Registry((False, None)), channel)
    drop_now(link, 4, 7)
    assert [link.ask(3, "predict", (), {}) for _ in range(2)] == [5, 6]
    assert channel.asked[0] == (protocol.CONTROL, protocol.DROP, ([4, 7],), {})
    assert len(channel.asked) == 3
    # A server that is gone has dropped them already.
    link._channels.channel = Channel(EOFError())
    drop_now(link, 8)
    link._drop_unwanted()
    assert not link.unwanted
    # If the call that says so is interrupted, the next one says it again.
    drop_now(link, 9)
    link._channels.channel = Channel(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        link.ask(3, "predict", (), {})
    link._channels.channel = channel = Channel(None, 5)
    assert link.ask(3, "predict", (), {}) == 5
    assert channel.asked[0] == (protocol.CONTROL, protocol.DROP, ([9],), {})
    assert (list(link.unwanted), link._stand_ins) == ([], {})


def drop_now(link: Any, *numbers: int) -> None:
    """Make stand-ins for results with these numbers, and drop them."""
    stand_ins = [Quiet() for _ in numbers]
    for number, stand_in in zip(numbers, stand_ins, strict=True):
        link.drop_with(stand_in, number)


def test_a_server_is_called_again_while_it_lives_and_is_the_same(
    links: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "Channel", lambda line: line)
    refused = ConnectionRefusedError("full")
    for looks, failures, expected, pauses in (
        ([(True, RECORD)], [refused, EOFError()], "connected", 2),
        ([(True, None)], [refused], "connected", 1),
        ([(True, RECORD)], [refused] * (CONNECT_ATTEMPTS - 1), "connected", CONNECT_ATTEMPTS - 1),
        (
            [(True, RECORD)],
            [refused] * CONNECT_ATTEMPTS,
            f"lives but could not be reached in {CONNECT_ATTEMPTS} attempts: ConnectionRefusedError('full')",
            CONNECT_ATTEMPTS - 1,
        ),
        ([(False, None)], [refused], "is gone", 0),
        ([(True, OTHER)], [refused], "is gone", 0),
        ([(True, RECORD), (False, None)], [refused] * 2, "is gone", 1),
        ([(True, RECORD)], [AuthenticationError("another key")], "refused this process: another key", 0),
    ):
        links.clear()
        link = link_to(Registry(*looks))
        left = list(failures)

        def connect(left: list[Any] = left) -> str:
            if left:
                raise left.pop(0)
            return "connected"

        link.connect = connect
        found: Any
        try:
            found = link._connected()
        except ModelServerError as error:
            found = f"{error.tag} of {error.server_pid}: {error}"
            expected = f"it of 17: the server of the shared object 'it' (pid 17) {expected}"
        assert found.startswith(expected), expected
        assert links == [FIRST_RETRY_S * 2**number for number in range(pauses)], expected


def test_a_server_without_a_socket_is_asked_to_put_it_back(links: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "Channel", lambda line: line)
    link, failures = link_to(Registry()), [FileNotFoundError("no socket")]

    def connect() -> str:
        if failures:
            raise failures.pop(0)
        return "connected"

    link.connect = connect
    assert link._connected() == "connected"
    assert link.registry.done == [("restore the socket", "it")]


def test_a_connection_is_one_to_the_socket_of_the_server(monkeypatch: pytest.MonkeyPatch, links: list[float]) -> None:
    called: list[Any] = []
    monkeypatch.setattr(sockets, "dial_socket", lambda *arguments: called.append(arguments))
    registry = Registry()
    link_to(registry).connect()
    assert called == [("/root/shared", "it.sock", b"key")]
    assert registry.done == ["join"]


def test_a_server_that_hangs_up_is_waited_for_until_it_is_dead_or_for_a_moment(links: list[float]) -> None:
    for looks, count in (
        ([(False, None)], 0),
        ([(True, OTHER)], 0),
        ([(True, RECORD), (True, None), (True, RECORD), (False, None)], 3),
    ):
        links.clear()
        link_to(Registry(*looks))._await_end()
        assert links == [0.001] * count
    links.clear()
    link_to(Registry((True, RECORD)))._await_end()
    assert sum(links) == pytest.approx(DYING_S, abs=0.002)


def test_links_to_servers_that_have_ended_are_forgotten_at_the_next_new_one(links: list[float]) -> None:
    # One has its lock, and has not said yet who it is.
    lives, gone, refused = Registry((True, None)), Registry((False, None)), Registry(PermissionError())
    first, second, third = (link_to(registry) for registry in (lives, gone, refused))
    other: Any = Registry((True, None))
    client._known[other, "it"] = starting = link_to(other)
    for link in (first, second, third):
        client._known[link.registry, "it"] = link
    client.remember_link(first)
    assert len(client._known) == 4, "it is known already"
    new = link_to(lives, record=OTHER)
    client.remember_link(new)
    nothing: Any = lives
    assert list(client._known.values()) == [starting, new]
    client.forget_link(starting)
    assert client.known_link(nothing, "it") is new
    assert client.known_link(nothing, "another") is None
    # Another link takes nothing away from it.
    client.forget_link(first)
    assert client.known_link(nothing, "it") is new
    assert client.link_to(nothing, OTHER) is new
    assert client.link_to(nothing, RECORD) is not new
    client.forget_link(new)
    assert client._known == {}
    assert client.link_to(nothing, OTHER) is not new


def test_a_forked_child_has_no_connection_and_nothing_to_give_back(links: list[float]) -> None:
    link = link_to(Registry(), Channel())
    drop_now(link, 5)
    kept = [Quiet()]
    link.drop_with(kept[0], 6)

    def after_drop() -> tuple[dict[str, Any], list[Any]]:
        kept.clear()
        return vars(link._channels), list(link.unwanted)

    assert in_child(after_drop) == ({}, [])
    assert [one.number for one in link.unwanted] == [5]
    kept.clear()
    assert [one.number for one in link.unwanted] == [5, 6]


# What stayed in the server.


def test_a_result_is_taken_apart_as_far_as_it_can_be_sent(tmp_path: Path) -> None:
    kept = References(tmp_path, RECORD)
    stays = iter_of_nothing()
    assert kept.portable([1, {"a": (2,)}], None, []) == [1, {"a": (2,)}]
    assert len(kept) == 0
    first, second = kept.portable((stays, 5), None, [])
    assert second == 5
    assert (first._parts[2], first._parts[3]) == (1, "generator")
    assert first._parts[4] == ("__iter__", "__next__")
    assert kept.portable({"a": stays, "b": 1}, None, []).keys() == {"a", "b"}
    # Keys that cannot be sent, or another kind of collection: it stays as a whole.
    for whole in ({stays: 1}, {stays}, Derived([stays])):
        assert type(kept.portable(whole, None, [])).__name__ == "_Ticket"
    assert {"__len__", "__iter__", "__call__"} & {*kept.portable(Derived([stays]), None, [])._parts[4]} == {"__len__"}
    for depth, kind in ((DEEPEST - 1, list), (DEEPEST, references._Ticket)):
        assert type(kept.portable([stays], None, [], depth)) is kind, depth
        assert type(kept.portable({"a": stays}, None, [], depth)) is (dict if kind is list else kind), depth
    assert kept.portable(Quiet(), None, [])._parts[3] == f"{__name__}.Quiet"


def iter_of_nothing() -> Iterator[int]:
    """Be a generator, which cannot be pickled."""
    yield from ()


class Derived(list[Any]):
    """A list of another type, which is no iterable."""

    __iter__ = None  # type: ignore[assignment]  # Python's way to take a method away


class Quiet:
    """Cannot be sent, and has a method, an attribute, and a function of somebody else's."""

    number = 5
    of_another = staticmethod(len)

    def __reduce__(self) -> Any:
        raise TypeError("not this one")

    def double(self, number: int, plus: int = 0) -> int:
        return 2 * number + plus

    def __len__(self) -> int:
        return 3

    def _private(self) -> None:
        """Do nothing."""


def test_only_what_is_public_of_a_result_is_given_away(tmp_path: Path) -> None:
    kept = References(tmp_path, RECORD)
    kept.portable(Quiet(), None, [])
    assert kept.get(1, "number") == (False, 5)
    assert kept.get(1, "double") == (True, None)
    # A function that is no method of it is a value.
    assert kept.get(1, "of_another") == (False, len)
    assert kept.call(1, "double", (4,), {"plus": 1}) == 9
    assert kept.call(1, "__len__", (), {}) == 3
    # Its class can be called, but not the object.
    for name in ("_private", "__reduce__", "__call__"):
        with pytest.raises(AttributeError, match=f"attribute '{name}' of a Quiet is not public"):
            kept.get(1, name)
        with pytest.raises(AttributeError, match=f"method '{name}' of a Quiet is not public"):
            kept.call(1, name, (), {})
    with pytest.raises(SharedObjectReleasedError, match="a result of 'it' that stayed") as caught:
        kept.find(2)
    assert caught.value.tag == "it"


def test_what_a_dead_process_has_borrowed_is_dropped_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = References(tmp_path, RECORD)
    started = {1: 10.0, 2: 20.0, 3: None}
    monkeypatch.setattr(references, "start_time_of", lambda pid: started[pid])
    monkeypatch.setattr(references, "_is_gone", lambda pid, began: False)
    for pid in (1, 1, 2, 3, None):
        kept.portable(iter_of_nothing(), pid, [])
    asked: list[Any] = []
    monkeypatch.setattr(references, "_is_gone", lambda pid, began: asked.append((pid, began)) or pid == 1)  # type: ignore[func-returns-value]  # notes it
    kept.forget_dead()
    assert sorted(asked) == [(1, 10.0), (2, 20.0)]
    assert [lent.pid for lent in kept._lent.values()] == [2, 3, None]
    kept.drop([3, 3, 17])
    assert [lent.pid for lent in kept._lent.values()] == [3, None]


def test_a_client_that_hung_up_is_looked_at_for_a_moment_if_it_has_borrowed_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = References(tmp_path, RECORD)
    pauses: list[float] = []
    now = [NOW]

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(references, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(references, "_is_gone", lambda pid, began: False)
    kept.portable(iter_of_nothing(), os.getpid(), [])
    for pid in (None, os.getpid() + 1):
        kept.client_hung_up(pid)
    assert pauses == []
    kept.client_hung_up(os.getpid())
    assert set(pauses) == {references.DYING_LOOK_S}
    assert sum(pauses) == pytest.approx(references.DYING_S, abs=0.02)
    assert len(kept) == 1


def test_a_process_is_gone_once_it_is_a_zombie_or_another_has_its_pid() -> None:
    started = start_time_of(os.getpid())
    assert started is not None
    assert references._is_gone(os.getpid(), started) is False
    assert references._is_gone(os.getpid(), started - 1.0) is True
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    began = start_time_of(pid)
    assert began is not None
    assert references._is_gone(pid, began) is True
    os.waitpid(pid, 0)
    assert references._is_gone(pid, began) is True


class RemoteLink:
    """A link whose server answers from a table, and which notes what it is asked."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.asked: list[Any] = []
        self.unwanted: list[int] = []
        self.record = RECORD
        self.registry = SimpleNamespace(root=Path("/root"))

    def ask(self, token: int, name: str, args: Any, kwargs: Any) -> Any:
        self.asked.append((token, name, args, kwargs))
        return self.answers.get(args[1])

    def drop_with(self, stand_in: Any, number: int) -> None:
        weakref.finalize(stand_in, self.unwanted.append, number)


def test_a_stand_in_asks_the_server_for_everything_public() -> None:
    link: Any = RemoteLink(name=(False, "text"), double=(True, None), __len__=3, __next__=5, __exit__=True, __enter__=7)
    protocols = ("__len__", "__iter__", "__next__", "__enter__", "__exit__")
    remote: Any = references._class_with(protocols)(link, 4, "some.Kind", protocols)
    assert (type(remote).__name__, type(remote).__module__) == ("RemoteObject", references.__name__)
    assert repr(remote) == "<remote some.Kind of 'it' in pid 17>"
    assert (remote.name, len(remote), next(remote), iter(remote) is remote) == ("text", 3, 5, True)
    remote.double(4, plus=1)
    with pytest.raises(AttributeError, match="'RemoteObject' has no attribute '_private'"):
        _ = remote._private
    error = ValueError()
    with contextlib.suppress(ZeroDivisionError), remote as entered:
        assert entered == 7
        raise error
    control, call = protocol.CONTROL, protocol.CALL
    *first, left = link.asked
    assert first == [
        (control, protocol.GET, (4, "name"), {}),
        (control, call, (4, "__len__", (), {}), {}),
        (control, call, (4, "__next__", (), {}), {}),
        (control, protocol.GET, (4, "double"), {}),
        (control, call, (4, "double", (4,), {"plus": 1}), {}),
        (control, call, (4, "__enter__", (), {}), {}),
    ]
    assert left == (control, call, (4, "__exit__", (ValueError, error, None), {}), {})
    assert type(remote).__len__.__name__ == "__len__"
    # Without a protocol, Python says that there is none.
    plain: Any = references._class_with(())(link, 4, "some.Kind", ())
    assert not callable(plain)
    with pytest.raises(TypeError):
        len(plain)


def test_only_the_stand_in_that_came_with_an_answer_gives_it_back(
    monkeypatch: pytest.MonkeyPatch, links: list[float]
) -> None:
    link: Any = RemoteLink()
    monkeypatch.setattr(client, "link_to", lambda registry, record: link)
    kept = References(Path("/root"), RECORD)
    ticket = kept.portable(iter_of_nothing(), None, [])
    arrive, parts = ticket.__reduce__()
    remote = arrive(*parts)
    copies_arrive, copies_parts = remote.__reduce__()
    copy = copies_arrive(*copies_parts)
    assert (type(remote), type(copy)) == (references._class_with(("__iter__", "__next__")),) * 2
    assert copies_parts == (Path("/root"), RECORD, 1, "generator", ("__iter__", "__next__"), False)
    del copy
    assert link.unwanted == []
    del remote
    assert link.unwanted == [1]
    assert isinstance(arrive(*parts), RemoteObject)


# Proxies.


def proxy_of(link: Any, methods: frozenset[str] = frozenset({"predict", "__call__"})) -> Any:
    """Return a proxy of a use with the token 3."""
    return SharedProxy(_RemoteUse(link, 3, methods))


def test_a_proxy_asks_its_server_and_after_a_release_nobody(
    links: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = Channel(5, 6, frozenset({"predict"}), None)
    link = link_to(Registry(), channel, replace(RECORD, expect_mb=250.0))
    proxy = proxy_of(link)
    assert (proxy.predict(1, two=2), proxy(7)) == (5, 6)
    assert channel.asked == [(3, "predict", (1,), {"two": 2}), (3, "__call__", (7,), {})]
    assert proxy.predict is proxy.__dict__["predict"], "it is made once"
    assert (repr(proxy.predict), proxy.predict.__name__) == ("<remote method predict of 'it'>", "predict")
    assert proxy.expect_mb == 250.0
    assert repr(proxy) == "<proxy of 'it' in pid 17>"
    assert {"predict", "unsafe_hard_delete"} <= set(dir(proxy))
    for name in ("odd__", "__odd"):
        assert getattr(proxy_of(link, frozenset({name})), name).__name__ == name
    _, pickled = proxy.__reduce__()
    assert pickled == ("/root", link.record, 3, proxy._mpmm_use.methods)
    copy = shared._connect_again(*pickled)._mpmm_use
    assert (copy.registry.root, copy.record, copy.token, copy.methods) == (Path("/root"), *pickled[1:])
    assert proxy.get_auto_proxy_object() is proxy
    for name in ("weights", "__len__", "_mpmm_uses"):
        with pytest.raises(AttributeError, match=name):
            getattr(proxy, name)
    with pytest.raises(AttributeError, match="expect_mb"):
        _ = proxy_of(link_to(Registry())).expect_mb
    with pytest.raises(AttributeError, match="_mpmm_use"):
        _ = SharedProxy.__new__(SharedProxy)._mpmm_use
    ended: list[Any] = []
    monkeypatch.setattr(shared, "end_server", lambda *arguments: ended.append(arguments))
    proxy.singletonProxy_unsafe_hard_delete()
    assert ended == [(link.registry, "it", shared.HARD_DELETE_TIMEOUT_S, "this one")]
    assert link.registry.done == [("forget", "it")]
    handle: Any = MultiProcessShared(dict, "it")
    handle.release(proxy)
    assert channel.asked[-1] == (protocol.CONTROL, protocol.RELEASE, (3,), {})
    assert repr(proxy) == "<proxy of 'it' in pid 17 released>"
    for use in (
        lambda: proxy.predict(1),
        lambda: proxy.weights,
        lambda: proxy(7),
        lambda: handle.release(proxy),
        lambda: pickle.dumps(proxy),
        proxy.unsafe_hard_delete,
    ):
        with pytest.raises(SharedObjectReleasedError, match="'it' was released through this proxy"):
            use()
    assert len(ended) == 1


def test_a_proxy_asks_for_the_methods_before_it_says_that_there_is_none(links: list[float]) -> None:
    told = frozenset({"predict", "later"})
    channel = Channel(told, 5, told, (4, None))
    link = link_to(Registry((False, None)), channel)
    link._methods = frozenset({"predict"})
    proxy = proxy_of(link)
    assert proxy.later() == 5
    question: Any = (protocol.CONTROL, protocol.METHODS, (3,), {})
    assert channel.asked == [question, (3, "later", (), {})]
    assert {"predict", "later"} <= set(dir(proxy))
    with pytest.raises(AttributeError, match="no public method 'never'"):
        _ = proxy.never
    assert channel.asked[-1] == question
    assert link.acquire() == (4, told)
    # Those that no server is asked for: what is not public, and what managers look for even as they unload a proxy,
    # which a stopped server must not hold up.
    asked = len(channel.asked)
    for name in ("_private", "expect_mb", "unload_model", "mock_model_unsafe_hard_delete"):
        with pytest.raises(AttributeError, match=f"no public method '{name}'"):
            getattr(proxy, name)
    assert len(channel.asked) == asked
    # A server that is gone has no other.
    link._channels.channel = Channel(EOFError())
    with pytest.raises(AttributeError, match="no public method 'never'"):
        _ = proxy.never


def test_a_release_of_what_is_gone_with_its_server_is_none(links: list[float]) -> None:
    link = link_to(Registry((False, None)), Channel(EOFError()))
    client.remember_link(link)
    proxy = proxy_of(link)
    proxy._mpmm_use.release()
    assert proxy._mpmm_use.released
    assert client._known == {}


class Hosts:
    """A host of an object in this process."""

    def __init__(self) -> None:
        self.registry: Any = Registry()
        self.record = RECORD
        self.methods = frozenset({"get"})
        self.inherited = False
        self.shared = {"a": 1}
        self.released: list[int] = []

    def acquire(self) -> int:
        return 3

    def object_for(self, token: int) -> Any:
        assert token == 3
        return self.shared

    def release(self, token: int) -> None:
        self.released.append(token)
        raise ModelServerError("it has ended", tag="it", server_pid=17)


def test_a_proxy_in_the_process_of_the_object_uses_it_directly_and_in_a_child_through_a_connection(
    links: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    host: Any = Hosts()
    proxy: Any = SharedProxy(_LocalUse(host))
    assert (proxy.get("a"), list(proxy.keys())) == (1, ["a"])
    with pytest.raises(AttributeError, match="__call__"):
        proxy()
    proxy._mpmm_use.release()
    assert host.released == [3]
    for use in (lambda: proxy.get("a"), lambda: proxy._mpmm_use.call("get", ("a",), {}), proxy._mpmm_use.release):
        with pytest.raises(SharedObjectReleasedError):
            use()
    host.inherited = True
    channel = Channel(5, 6, frozenset({"get"}), None)
    made: list[Any] = []

    def link(registry: Any, record: ServerRecord) -> Any:
        made.append((registry, record))
        return link_to(registry, channel)

    monkeypatch.setattr(shared, "link_to", link)
    proxy = SharedProxy(_LocalUse(host))
    assert (proxy.get("a"), proxy._mpmm_use.call("get", ("b",), {})) == (5, 6)
    with pytest.raises(AttributeError, match="keys"):
        proxy.keys()
    proxy._mpmm_use.release()
    assert [asked[:2] for asked in channel.asked] == [
        *((3, "get"), (3, "get")),
        *((protocol.CONTROL, protocol.METHODS), (protocol.CONTROL, protocol.RELEASE)),
    ]
    assert (made, host.released) == ([(host.registry, RECORD)], [3])


def test_attached_objects_are_counted_and_those_of_a_parent_are_kept_but_not_used() -> None:
    objects, registry = _AttachedObjects(), Registry()
    where: Any = registry
    first, other = object(), object()
    assert objects.acquire(where, "it") is None
    assert objects.add(where, "it", first) is first
    found = objects.acquire(where, "it")
    assert found is not None
    assert (found.shared, found.users) == (first, 2)
    assert not objects.release(where, "it", other)
    assert not objects.release(where, "another", first)
    assert [objects.release(where, "it", first) for _ in range(3)] == [True, True, False]
    assert objects.acquire(where, "it") is None
    objects.add(where, "it", first)
    objects.drop(where, "it")
    objects.drop(where, "it")
    assert objects.acquire(where, "it") is None
    objects.add(where, "it", first)
    objects.start_over_in_child()
    assert objects.acquire(where, "it") is None
    assert [one.shared for one in objects._inherited] == [first]
    shared._attached.add(where, "of a parent", first)
    with held_by_a_thread(shared._attached._mutex):
        assert in_child(lambda: shared._attached.acquire(where, "of a parent")) is None
    shared._attached.drop(where, "of a parent")


# Acquiring.


@pytest.fixture
def handle(links: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Returns a handle whose registry is a test's, and which notes what it does, in `done`."""

    def make(*looks: Any, constructor: Any = dict, **options: Any) -> Any:
        handle: Any = MultiProcessShared(constructor, "it", path=str(tmp_path), **options)
        handle.registry, handle.done, handle.host, handle.marker = Registry(*looks), [], None, tmp_path / "it.attach"
        handle.failures = []
        handle.handles = ()
        registry = handle.registry

        @contextlib.contextmanager
        def tag_lock(tag: str) -> Iterator[None]:
            handle.done.append("lock")
            yield
            handle.done.append("unlock")

        registry.tag_lock = tag_lock
        registry.attach_marker = lambda tag: handle.marker
        registry.namespaces_of_handle = lambda tag: handle.handles
        registry.remember_handle = lambda *arguments: handle.done.append(("remember", *arguments))
        registry.take_life = lambda tag: SimpleNamespace(close=lambda: handle.done.append("close"))

        def use_through(link: Any) -> Any:
            handle.done.append(("use", link.record.incarnation))
            if handle.failures:
                raise handle.failures.pop(0)
            return _RemoteUse(link, 3, frozenset())

        def sleep(seconds: float) -> None:
            handle.done.append(seconds)

        monkeypatch.setattr(shared, "registry_for", lambda path: registry)
        monkeypatch.setattr(shared, "find_host", lambda registry, tag: handle.host)
        monkeypatch.setattr(shared, "_use_through", use_through)
        monkeypatch.setattr(shared, "time", SimpleNamespace(sleep=sleep))
        monkeypatch.setattr(shared, "_attached", _AttachedObjects())
        monkeypatch.setattr(shared, "reap_ended_servers", lambda: handle.done.append("reap"))
        monkeypatch.setattr(shared, "expect_real_threads", lambda what: handle.done.append(what))
        monkeypatch.setattr(shared, "refuse_while_importing_main", lambda what, tag: handle.done.append((what, tag)))
        monkeypatch.setattr(shared, "host_object", lambda *arguments: handle.done.append(("host", *arguments)))
        monkeypatch.setattr(shared, "new_record", lambda registry, tag, **options: replace(RECORD, **options))
        return handle

    return make


EXPECTS = "the shared object 'it'"
REFUSES = ("acquire the shared object", "it")
STARTING = replace(RECORD, ready=False)
LOST = ModelServerError("it is gone", tag="it", server_pid=17)


def test_a_server_that_is_ready_is_used_at_once_and_any_other_under_the_lock(handle: Any) -> None:
    pause = shared.STARTING_PAUSE_S
    for looks, failures, expected in (
        ([(True, RECORD)], 0, [EXPECTS, ("use", "this one")]),
        # One that is starting, or has only its lock yet, is waited for.
        (
            [(True, STARTING), (True, STARTING), (True, None), (True, RECORD)],
            0,
            [EXPECTS, REFUSES, "lock", pause, pause, ("use", "this one"), "unlock"],
        ),
        ([(True, None), (True, RECORD)], 0, [EXPECTS, REFUSES, "lock", ("use", "this one"), "unlock"]),
        # One that is gone when it is called is looked for again.
        (
            [(True, RECORD), (True, RECORD), (True, OTHER)],
            2,
            [EXPECTS, ("use", "this one"), REFUSES, "lock", ("use", "this one"), pause, ("use", "another"), "unlock"],
        ),
    ):
        made = handle(*looks)
        made.failures = [LOST] * failures
        assert isinstance(made.acquire(), SharedProxy)
        assert made.done == expected, looks
        # One that makes its object, or is stopped, is waited for without limit.
        assert set(made.registry.found_within_s) == ({math.inf} if "lock" in expected else set())
    made = handle((True, RECORD), spawn_process=True)
    made.acquire()
    assert made.done[-1] == "reap"


def test_the_link_that_was_used_last_is_tried_first_and_forgotten_if_its_server_is_gone(handle: Any) -> None:
    made = handle((True, OTHER))
    link = link_to(made.registry)
    client.remember_link(link)
    made.acquire()
    assert made.done == [("use", "this one")]
    made.done.clear()
    made.failures = [LOST]
    made.acquire()
    assert made.done == [("use", "this one"), EXPECTS, ("use", "another")]
    assert client.known_link(made.registry, "it") is not link


def test_an_object_of_this_process_is_used_directly_unless_a_proxy_is_wanted(handle: Any) -> None:
    for always_proxy, kind in ((None, _LocalUse), (False, _LocalUse), (True, _RemoteUse)):
        made = handle((True, RECORD), always_proxy=always_proxy)
        made.host = Hosts()
        assert type(made.acquire()._mpmm_use) is kind
        assert type(made._use(made.registry, RECORD)._mpmm_use) is kind


def test_a_use_of_something_else_is_given_back(handle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = handle((True, RECORD))
    released: list[Any] = []

    def refuse(record: ServerRecord, constructor: Any) -> None:
        assert (record, constructor) == (RECORD, dict)
        raise InvalidArgumentError("something else")

    monkeypatch.setattr(shared, "check_identity", refuse)
    monkeypatch.setattr(_RemoteUse, "release", lambda use: released.append(use))
    with pytest.raises(InvalidArgumentError, match="something else"):
        made.acquire()
    assert len(released) == 1


class Attaches:
    """An object that each process makes for itself."""

    attach_in_place = True
    resets = 0

    def force_reset(self) -> None:
        type(self).resets += 1


def test_a_server_is_started_where_there_is_none_and_what_it_reports_is_heeded(
    handle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    reports = [READY, OCCUPIED, ATTACH]

    def start_server(registry: Any, tag: str, constructor: Any) -> str:
        started.append((tag, constructor))
        return reports.pop(0)

    monkeypatch.setattr(shared, "start_server", start_server)
    made = handle((False, None), constructor=Attaches, spawn_process=True)
    assert made._start(made.registry) is None
    assert made._start(made.registry) is None
    found = made._start(made.registry)
    assert isinstance(found, Attaches)
    assert started == [("it", Attaches)] * 3
    assert (made.marker.exists(), made.marker.stat().st_mode & 0o777) == (True, 0o600)
    # From now on, none is started for it; and this process has one.
    assert made.acquire() is found
    shared._attached.drop(made.registry, "it")
    assert made.acquire() is not found
    assert len(started) == 3
    # The tag comes to stand for another kind of object.
    other = handle((False, None), spawn_process=True)
    reports.append(READY)
    assert other._start(other.registry) is None
    assert not other.marker.exists()
    assert len(started) == 3
    assert other._start(other.registry) is None
    assert len(started) == 4


def test_an_object_of_this_process_is_hosted_under_its_lock(handle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def constructor() -> Any:
        return SimpleNamespace(place=attach_namespace())

    made = handle((False, None), constructor=constructor)
    made.handles = ("other",)
    with pytest.raises(ModelServerError, match=r"of the handle 'it' \(namespace other\) is gone; release") as caught:
        made._start(made.registry)
    assert (caught.value.tag, caught.value.server_pid) == ("it", None)
    for namespaces in ((), ("ns",)):
        made.done.clear()
        made.handles = ("other",) if namespaces else ()
        with serving_for(*(ServerContext("/lock", namespace=one) for one in namespaces)):
            assert made._start(made.registry) is None
        *remembered, (what, registry, record, used, found, _) = made.done
        assert remembered == ([("remember", "it", ("ns",))] if namespaces else [])
        assert (what, registry, used) == ("host", made.registry, constructor)
        assert found.place == (namespace_of("it"), Path("/root"))
        assert record == replace(
            RECORD,
            spawned=False,
            namespaces=namespaces,
            types=("class types:SimpleNamespace", "class builtins:object"),
        )

    def fail(*_: Any) -> None:
        raise OSError("full")

    monkeypatch.setattr(shared, "host_object", fail)
    made.done.clear()
    made.handles = ()
    with pytest.raises(OSError, match="full"):
        made._start(made.registry)
    assert made.done == ["close"]
    # Another process was faster.
    made.registry.take_life = lambda tag: None
    assert made._start(made.registry) is None
    made = handle((False, None), constructor="no constructor")
    with pytest.raises(InvalidArgumentError, match="constructor 'no constructor' of 'it': expected a callable"):
        made._start(made.registry)


def test_a_hard_delete_ends_the_server_or_resets_what_is_attached(handle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[bool] = []
    outcomes: list[bool] = []

    def end_server(registry: Any, tag: str, timeout_s: float) -> bool:
        assert (tag, timeout_s) == ("it", shared.HARD_DELETE_TIMEOUT_S)
        ended.append(True)
        return outcomes.pop(0) if outcomes else False

    monkeypatch.setattr(shared, "end_server", end_server)
    made = handle((False, None), constructor=Attaches)
    made.unsafe_hard_delete()
    assert (len(ended), made.registry.done) == (1, [("forget", "it")])
    made.registry.done.clear()
    made.acquire()
    assert made.marker.exists()
    resets = Attaches.resets
    made.unsafe_hard_delete()
    assert (made.marker.exists(), Attaches.resets, made.registry.done) == (False, resets + 1, [])
    assert shared._attached.acquire(made.registry, "it") is None
    # A server has the tag by now.
    made.marker.touch()
    outcomes.append(True)
    made.unsafe_hard_delete()
    assert (Attaches.resets, made.registry.done, made.marker.exists()) == (resets + 1, [("forget", "it")], True)


def test_what_is_no_tag_or_no_folder_is_refused_at_once() -> None:
    nothing: Any = 5
    with pytest.raises(InvalidArgumentError, match="tag"):
        MultiProcessShared(dict, nothing)
    with pytest.raises(InvalidArgumentError, match="path"):
        MultiProcessShared(dict, "it", path=nothing)
    for call in (shared.unload, shared.server_pid):
        with pytest.raises(InvalidArgumentError, match="tag"):
            call(nothing)
    with pytest.raises(InvalidArgumentError, match="timeout_seconds"):
        shared.unload("it", timeout_seconds=-1.0)


def test_what_was_not_acquired_cannot_be_released(handle: Any) -> None:
    made = handle((False, None), constructor=Attaches)
    attached = made.acquire()
    with pytest.raises(NotAcquiredError, match="5 was not acquired as 'it' by this process") as caught:
        made.release(5)
    assert caught.value.tag == "it"
    made.release(attached)
    with pytest.raises(NotAcquiredError):
        made.release(attached)


def test_the_pid_of_a_server_is_that_of_a_process_that_runs(handle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    running = [True]
    monkeypatch.setattr(ServerRecord, "is_running", lambda record: running[0])
    for look, runs, pid in (
        ((True, RECORD), True, 17),
        ((True, STARTING), True, 17),
        ((True, RECORD), False, None),
        ((True, None), True, None),
        ((False, None), True, None),
    ):
        handle(look)
        running[0] = runs
        assert shared.server_pid("it") == pid, (look, runs)
    ended: list[Any] = []

    def end_server(*arguments: Any, **options: Any) -> bool:
        ended.append((*arguments[1:], options))
        return True

    monkeypatch.setattr(shared, "end_server", end_server)
    made = handle((True, RECORD))
    assert shared.unload("it") is True
    assert shared.unload("it", timeout_seconds=2, pid=17) is True
    assert ended == [("it", 10.0, {"pid": None}), ("it", 2.0, {"pid": 17})]
    assert made.done == ["reap", "reap"]
    for pid in (0, -1):
        with pytest.raises(InvalidArgumentError):
            shared.unload("it", pid=pid)


def test_the_link_of_a_new_use_is_remembered(links: list[float]) -> None:
    link = link_to(Registry(), Channel((3, frozenset({"a"}))))
    use = shared._use_through(link)
    assert use.link is link
    assert (use.token, use.methods) == (3, frozenset({"a"}))
    assert client.known_link(link.registry, "it") is link


# What a tag stands for.


class Kind:
    """A class that makes an object."""

    @classmethod
    def make(cls) -> Kind:
        return cls()


def function() -> None:
    """Make nothing."""


def test_constructors_with_a_name_of_their_own_have_one() -> None:
    def inner() -> None:
        """Make nothing."""

    without_module: Any = SimpleNamespace(__module__=None)
    assert name_of_constructor(Kind) == f"class {__name__}:Kind"
    assert name_of_constructor(function) == f"function {__name__}:function"
    assert name_of_constructor(len) == "function builtins:len"
    constructor: Any
    for constructor in (lambda: None, inner, Kind.make, [].append, Kind(), without_module):
        assert name_of_constructor(constructor) == "", constructor
    nameless = type("Nameless", (), {})
    nameless.__module__ = ""
    assert name_of_constructor(nameless) == ""
    assert names_of_types(Kind()) == (f"class {__name__}:Kind", "class builtins:object")


def test_a_tag_that_is_known_to_stand_for_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, make, other = "class m:One", "class m:Two", "function m:make", "function m:other"
    main, spawned, of_module = "class __main__:One", "class __mp_main__:One", "class program:One"
    wanted = [""]
    monkeypatch.setattr(identity, "name_of_constructor", lambda constructor: wanted[0])
    for made_by, types, wants, fits in (
        (one, (), one, True),
        (one, (), two, False),
        (make, (), other, False),
        (make, (), make, True),
        # A class and a function may make the same, unless it is known not to be of that class.
        (make, (), one, True),
        (make, (one,), one, True),
        (make, (two,), one, False),
        (one, (one,), make, True),
        (one, (one, two), two, True),
        ("", (two,), one, True),
        (one, (), "", True),
        # The main module has other names elsewhere.
        (main, (), spawned, True),
        (of_module, (), main, True),
        (spawned, (), of_module, True),
        (of_module, (), "class another:One", False),
        (main, (), "class __mp_main__:Two", False),
        ("function __main__:One", (), "function __mp_main__:One", True),
        ("class __main__:One", ("class __main__:One",), "function __mp_main__:One", True),
    ):
        wanted[0] = wants
        record = replace(RECORD, constructor=made_by, types=types)
        if fits:
            check_identity(record, None)
        else:
            with pytest.raises(
                InvalidArgumentError, match=f"the tag 'it' stands for an object that {made_by} has made"
            ):
                check_identity(record, None)
    wanted[0] = ""
    for theirs, ours, fits in (
        ((), ("a",), True),
        (("a",), (), True),
        (("a", "b"), ("b", "c"), True),
        (("a",), ("b",), False),
    ):
        record = replace(RECORD, namespaces=theirs)
        with serving_for(*(ServerContext("/lock", namespace=one) for one in ours)):
            if fits:
                check_identity(record, None)
            else:
                with pytest.raises(InvalidArgumentError, match=r"belongs to a model server of namespace a \(pid 17"):
                    check_identity(record, None)


def test_contexts_add_up_and_end_with_their_block() -> None:
    first, second = ServerContext("/a", namespace="one"), ServerContext("/b")
    with pytest.raises(ValueError, match="failed"), serving_for(first):
        with serving_for(second, replace(second, namespace="two")):
            assert [context.alive_lock for context in server_contexts()] == ["/a", "/b", "/b"]
            assert served_namespaces() == ("one", "two")
        assert server_contexts() == (first,)
        raise ValueError("failed")
    assert server_contexts() == ()
    with pytest.raises(ValueError, match="failed"), attaching_to("it", Path("/root")):
        assert attach_namespace() == ("mps.it", Path("/root"))
        raise ValueError("failed")
    assert attach_namespace() is None


def test_a_namespace_has_the_name_of_its_tag_if_that_fits() -> None:
    for tag in ("it", "a.b_c-D9", "x" * 60):
        assert namespace_of(tag) == f"mps.{tag}"
    odd = [namespace_of(tag) for tag in ("x" * 61, "a/b", "a_b/", "ä", "\ud800", "a" * 61, "")]
    assert odd.pop() == "mps."
    assert len(set(odd)) == len(odd)
    for name in odd:
        assert len(name) <= 64
        assert name.startswith("mps.")
        assert name[-13] == "."
    assert namespace_of("x" * 61)[:-13] == "mps." + "x" * 47


# What is refused while a server imports the main module.


def test_only_a_server_that_is_importing_the_main_module_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    this_process: Any = mp_process.current_process()
    for is_server, inheriting in ((False, False), (False, True), (True, False), (True, True)):
        monkeypatch.setattr(main_import, "is_server_process", lambda is_server=is_server: is_server)
        monkeypatch.setattr(this_process, "_inheriting", inheriting, raising=False)
        assert main_import.is_importing_main() is inheriting
        if is_server and inheriting:
            with pytest.raises(ServerStartError, match="An attempt has been made to load 'it' before") as caught:
                main_import.refuse_while_importing_main("load", "it")
            assert caught.value.tag == "it"
        else:
            main_import.refuse_while_importing_main("load", "it")
    monkeypatch.delattr(this_process, "_inheriting")
    assert main_import.is_importing_main() is False


# Sleep.


def test_a_server_is_asked_to_sleep_if_it_is_the_one_that_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry((True, RECORD))
    channels: list[Any] = []
    host: list[Any] = [None]
    called: list[str] = []

    def channel(line: Any) -> Any:
        channels.append(Channel("done"))
        return channels[-1]

    monkeypatch.setattr(sleeping, "registry_for", lambda path: registry)
    monkeypatch.setattr(sleeping, "find_host", lambda registry, tag: host[0])
    monkeypatch.setattr(sleeping, "Channel", channel)
    monkeypatch.setattr(sockets, "dial_socket", lambda *arguments: None)
    for pid in (None, 17):
        assert sleeping.ask_to(protocol.SLEEP, "it", pid) == "done"
        assert channels[-1].asked == [(protocol.CONTROL, protocol.SLEEP, (), {})]
        assert channels[-1].closed
    assert registry.done == ["join", ("restore the socket", "it")] * 2
    assert sleeping.record_of("it") == RECORD
    for look, pid in (((True, RECORD), 18), ((True, None), None), ((False, None), 17)):
        registry.looks = [look]
        with pytest.raises(ModelServerError, match="there is no server of 'it' to ask to wake up") as caught:
            sleeping.ask_to(protocol.WAKE_UP, "it", pid)
        assert (caught.value.tag, caught.value.server_pid) == ("it", pid)
    registry.looks = [(False, None)]
    assert sleeping.record_of("it") is None
    registry.looks = [(True, RECORD)]

    def refuse(*_: Any) -> None:
        raise ConnectionRefusedError("gone")

    monkeypatch.setattr(sockets, "dial_socket", refuse)
    with pytest.raises(ModelServerError, match=r"'it' \(pid 17\) ended before it had answered sleep") as caught:
        sleeping.ask_to(protocol.SLEEP, "it")
    assert (caught.value.tag, caught.value.server_pid) == ("it", 17)
    host[0] = SimpleNamespace(sleep=lambda: called.append("sleep"), wake_up=lambda: called.append("wake up"))
    for request in (protocol.SLEEP, protocol.WAKE_UP):
        sleeping.ask_to(request, "it")
    assert called == ["sleep", "wake up"]


def test_the_hosts_of_a_process_are_known_by_registry_and_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosted, "_hosts", {})
    registry: Any = ServerRegistry("/nowhere")
    one: Any = SimpleNamespace(registry=registry, tag="it")
    other: Any = SimpleNamespace(registry=registry, tag="other")
    for host in (one, other):
        hosted.add(host)
    assert (hosted.find_host(registry, "it"), hosted.find_host(registry, "none")) == (one, None)
    assert hosted.every_host() == [one, other]
    hosted.remove(one)
    hosted.remove(one)
    assert hosted.every_host() == [other]
