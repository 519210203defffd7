"""The client's side of a server: each thread keeps one connection, with a channel on it, between calls.

A call takes the channel out of its thread's cache and puts it back after unpickling the answer. So a call that a signal
handler or destructor makes in the middle of another one gets a connection of its own, and the channel of an interrupted
call, which would deliver the old answer to the next request, is dropped.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from contextlib import suppress
from multiprocessing import AuthenticationError
from typing import Any

from mpmm.errors import ModelServerError
from mpmm.interpreter.fork_hooks import in_forked_child
from mpmm.multi_process_shared.registry import ServerRecord, ServerRegistry
from mpmm.multi_process_shared.rpc import protocol, sockets
from mpmm.multi_process_shared.rpc.channel import Channel, Message

__all__ = ["ServerLink", "StandIn", "forget_link", "known_link", "remember_link"]

CONNECT_ATTEMPTS = 6
FIRST_RETRY_S = 0.01
DYING_S = 0.5
_FAREWELL = protocol.farewell()


class StandIn(weakref.ref[Any]):
    """A weak reference to what stands in this process for a result that stayed in the server, under this number."""

    __slots__ = ("number",)
    number: int


class ServerLink:
    """A link to one incarnation of one server. Thread-safe; usable in forked children."""

    def __init__(self, registry: ServerRegistry, record: ServerRecord) -> None:
        self.registry = registry
        self.record = record
        self.tag = record.tag
        self._methods: frozenset[str] | None = None
        self._channels = threading.local()
        # Results in the server whose stand-ins here are gone; the next call has the server drop them.
        self.unwanted: deque[StandIn] = deque()
        # By number; a weak reference that is dropped itself would not say that its object is gone.
        self._stand_ins: dict[int, StandIn] = {}
        _links.add(self)

    def connect(self) -> sockets.ForkSafeSocket:
        """Open another connection, without retrying. Raises AuthenticationError, OSError or EOFError."""
        self.registry.join()
        return sockets.dial_socket(self.registry.folder, self.record.socket_name, self.registry.key())

    def acquire(self) -> tuple[int, frozenset[str]]:
        """Become a user of the object; return the token and the names of its methods.

        Raises ModelServerError, and what the constructor raises if the object has to be made again.
        """
        request = protocol.acquire_request(self._methods is not None)
        token, methods = self._answer_to(request, protocol.ACQUIRE)
        if methods is not None:
            self._methods = methods
        assert self._methods is not None
        return token, self._methods

    def current_methods(self, token: int) -> frozenset[str]:
        """Ask which methods the object has by now. Raises SharedObjectReleasedError, ModelServerError."""
        methods: frozenset[str] = self.ask(protocol.CONTROL, protocol.METHODS, (token,), {})
        self._methods = methods
        return methods

    def release(self, token: int) -> None:
        """Stop being a user. Raises SharedObjectReleasedError, ModelServerError."""
        self.ask(protocol.CONTROL, protocol.RELEASE, (token,), {})

    def ask(self, token: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method of the object (of the server if the token is CONTROL) and wait for the answer.

        Raises what the method raises; RemoteCallError if its outcome cannot be sent; ModelServerError if the server is
        gone or ends before it has answered (the method may have run by then); what pickle raises for the arguments.
        """
        if self.unwanted:
            self._drop_unwanted()
        return self._answer_to(protocol.encode_request(token, name, args, kwargs), name)

    def _answer_to(self, message: Message, name: str) -> Any:
        """Send the request for a method and wait for the answer. Raises what `ask` does."""
        channel: Channel = self._channels.__dict__.pop("channel", None) or self._connected()
        try:
            channel.send(message)
            answer = channel.receive()
        except (EOFError, OSError) as error:
            channel.close()
            self._await_end()
            raise self._lost(f"ended before it had answered {name}()") from error
        except BaseException:
            channel.hang_up()
            raise
        try:
            kind, value = protocol.load_answer(answer, self.tag, name)
        except BaseException:
            # Without a farewell: the server drops what this answer has lent.
            channel.close()
            raise
        if kind == protocol.LENT:
            channel.farewell = _FAREWELL
        # Only now: a small answer lies in the channel's memory until it is unpickled.
        self._channels.channel = channel
        return protocol.outcome(kind, value, self.tag, name)

    def drop_with(self, stand_in: object, number: int) -> None:
        """Have the server drop a result once `stand_in` is gone, at the next call: a finalizer should not wait."""
        # A method written in C, because no signal handler can interrupt one: the exception would end the finalizer.
        one = StandIn(stand_in, self.unwanted.append)
        one.number = number
        self._stand_ins[number] = one

    def _drop_unwanted(self) -> None:
        """Tell the server which results to drop; a server that is gone has dropped them already."""
        unwanted = list(self.unwanted)
        numbers = [one.number for one in unwanted]
        with suppress(ModelServerError):
            self._answer_to(protocol.encode_request(protocol.CONTROL, protocol.DROP, (numbers,), {}), protocol.DROP)
        # Only now: if this call is interrupted, the next one tells the server again, which then ignores it.
        for one in unwanted:
            self._stand_ins.pop(one.number, None)
            # Another thread may have been faster.
            with suppress(ValueError):
                self.unwanted.remove(one)

    def forget_after_fork(self) -> None:
        """Start without connections in a forked child; the inherited ones have been closed."""
        self._channels = threading.local()
        # The parent tells the server about its own.
        self.unwanted = deque()
        self._stand_ins = {}

    def _connected(self) -> Channel:
        """Return a channel to the server, retrying while it lives but cannot be reached. Raises ModelServerError."""
        pause = FIRST_RETRY_S
        for attempt in range(1, CONNECT_ATTEMPTS + 1):
            try:
                return Channel(self.connect())
            except AuthenticationError as error:
                raise self._lost(f"refused this process: {error}") from error
            except (OSError, EOFError) as error:
                self.registry.restore_socket(self.record)
                lives, record = self.registry.find(self.tag)
                if not lives or (record is not None and record.incarnation != self.record.incarnation):
                    raise self._lost("is gone") from error
                if attempt == CONNECT_ATTEMPTS:
                    raise self._lost(f"lives but could not be reached in {attempt} attempts: {error!r}") from error
            time.sleep(pause)
            pause *= 2
        raise AssertionError("unreachable")

    def _await_end(self) -> None:
        """Wait a moment until a server whose connection broke is seen to be dead.

        The kernel closes a dying process's descriptors one by one; a caller that is told of the death should not find
        the life lock still held and the server apparently alive.
        """
        deadline = time.monotonic() + DYING_S
        while time.monotonic() < deadline:
            lives, record = self.registry.look(self.tag)
            if not lives or (record is not None and record.incarnation != self.record.incarnation):
                return
            time.sleep(0.001)

    def _lost(self, what: str) -> ModelServerError:
        return ModelServerError(
            f"the server of the shared object {self.tag!r} (pid {self.record.pid}) {what}; acquire it again",
            tag=self.tag,
            server_pid=self.record.pid,
        )


_links: weakref.WeakSet[ServerLink] = weakref.WeakSet()
_known: dict[tuple[ServerRegistry, str], ServerLink] = {}


def known_link(registry: ServerRegistry, tag: str) -> ServerLink | None:
    """Return the link that this process last used for the tag; its server may be gone."""
    return _known.get((registry, tag))


def remember_link(link: ServerLink) -> None:
    """Make this process try `link` first for its tag.

    A new server is the occasion to drop links to servers that have ended meanwhile, with their connections: a tag
    that names one copy of a model is never used again.
    """
    if _known.get((link.registry, link.tag)) is not link:
        for known in list(_known.values()):
            if not _lives(known):
                forget_link(known)
    _known[link.registry, link.tag] = link


def _lives(link: ServerLink) -> bool:
    try:
        return link.registry.look(link.tag)[0]
    except OSError:
        # The registry is, say, that of the user before a `setuid`. A link of another tag is no reason to fail.
        return False


def link_to(registry: ServerRegistry, record: ServerRecord) -> ServerLink:
    """Return a link to the server, the remembered one if it leads to the same incarnation."""
    known = _known.get((registry, record.tag))
    if known is not None and known.record.incarnation == record.incarnation:
        return known
    return ServerLink(registry, record)


def forget_link(link: ServerLink) -> None:
    """Stop trying `link` first for its tag."""
    if _known.get((link.registry, link.tag)) is link:
        _known.pop((link.registry, link.tag), None)


def _forget_connections_after_fork() -> None:
    for link in list(_links):
        link.forget_after_fork()


in_forked_child(_forget_connections_after_fork)
