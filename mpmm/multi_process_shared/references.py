"""Results that cannot be pickled: they stay in the server, and a `RemoteObject` in the client stands for each.

    model.get_inputs()[0].name         a list of one object that cannot be pickled arrives as a list of one
                                       `RemoteObject`, whose attributes are looked up in the server
    for token in model.stream(text)    a generator arrives as a `RemoteObject` that requests one item after another

A result that can be pickled is sent unchanged. Of other lists, tuples and dicts, each part is sent or stays; any other
object stays as a whole. Attributes and results of a `RemoteObject` are treated in the same way. As an argument of a
call to the same server, a `RemoteObject` becomes the object itself.

A server keeps a lent object until its `RemoteObject` is garbage-collected, which the client's next request reports, or
until the client's process is gone. Copies of a `RemoteObject`, in forked children or unpickled elsewhere, are valid for
as long.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from mpmm.errors import SharedObjectReleasedError
from mpmm.multi_process_shared.hosted import find_host
from mpmm.multi_process_shared.registry import registry_at, start_time_of
from mpmm.multi_process_shared.rpc import pickling, protocol

if TYPE_CHECKING:
    from mpmm.multi_process_shared.client import ServerLink
    from mpmm.multi_process_shared.registry import ServerRecord

__all__ = ["References", "RemoteObject"]

# How deep nested lists, tuples and dicts are taken apart; a deeper one stays in the server as a whole.
DEEPEST = 20
# The kernel closes a dying process's connections one by one, and only then counts it as dead.
DYING_S = 0.5
DYING_LOOK_S = 0.01
# Methods that Python's statements and functions look up in a type; a client's class has those that the object's has.
PROTOCOLS = (
    *("__iter__", "__next__", "__len__", "__getitem__", "__setitem__", "__delitem__", "__contains__", "__reversed__"),
    *("__call__", "__enter__", "__exit__", "__bool__", "__int__", "__float__", "__index__"),
)


class _Lent(NamedTuple):
    """An object kept for a client's process: its pid and start time, None if unknown."""

    thing: Any
    pid: int | None
    started: float | None


class References:
    """The objects that a server has lent, by number. Thread-safe, and for finalizers, too, which may drop some."""

    def __init__(self, root: Path, record: ServerRecord) -> None:
        self._place = root, record
        # Read and changed by single steps only, which need no lock: a finalizer might wait for it in its own thread.
        self._lent: dict[int, _Lent] = {}
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        return len(self._lent)

    def portable(self, value: Any, pid: int | None, lent: list[int], depth: int = 0) -> Any:
        """Return what to pickle as a result for the process `pid`: the value, with tickets for parts that stay here.

        lent: gets their numbers.
        """
        if _can_pickle(value):
            return value
        kind = type(value)
        if depth < DEEPEST and kind in (list, tuple):
            return kind(self.portable(part, pid, lent, depth + 1) for part in value)
        if depth < DEEPEST and kind is dict and _can_pickle(list(value)):
            return {key: self.portable(part, pid, lent, depth + 1) for key, part in value.items()}
        return self._lend(value, pid, lent)

    def _lend(self, thing: Any, pid: int | None, lent: list[int]) -> _Ticket:
        self.forget_dead()
        number = next(self._numbers)
        started = None
        # Unknown without a free descriptor. The object is lent all the same, until the client gives it back.
        with suppress(OSError):
            started = None if pid is None else start_time_of(pid)
        self._lent[number] = _Lent(thing, pid, started)
        lent.append(number)
        kind = f"{type(thing).__module__}.{type(thing).__qualname__}".removeprefix("builtins.")
        protocols = tuple(name for name in PROTOCOLS if _follows(type(thing), name))
        return _Ticket((*self._place, number, kind, protocols))

    def find(self, number: int) -> Any:
        """Return the object lent under a number. Raises SharedObjectReleasedError."""
        lent = self._lent.get(number)
        if lent is None:
            tag = self._place[1].tag
            raise SharedObjectReleasedError(f"a result of {tag!r} that stayed in its server is no longer kept", tag=tag)
        return lent.thing

    def get(self, number: int, name: str) -> tuple[bool, Any]:
        """Return whether a public attribute is a method, and its value if it is not. Raises AttributeError."""
        thing = self.find(number)
        if name.startswith("_"):
            raise AttributeError(f"attribute {name!r} of a {type(thing).__name__} is not public")
        value = getattr(thing, name)
        is_method = callable(value) and getattr(value, "__self__", None) is thing
        return is_method, None if is_method else value

    def call(self, number: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a public method, or one of PROTOCOLS. Raises AttributeError, and what the method raises."""
        thing = self.find(number)
        if name in PROTOCOLS and _follows(type(thing), name):
            return getattr(type(thing), name)(thing, *args, **kwargs)
        if name.startswith("_"):
            raise AttributeError(f"method {name!r} of a {type(thing).__name__} is not public")
        return getattr(thing, name)(*args, **kwargs)

    def drop(self, numbers: Collection[int]) -> None:
        """Stop keeping these objects."""
        for number in numbers:
            self._lent.pop(number, None)

    def forget_dead(self) -> None:
        """Drop the objects kept for processes that are gone."""
        clients = {(lent.pid, lent.started) for lent in self._lent.copy().values() if lent.pid and lent.started}
        dead = {(pid, started) for pid, started in clients if _is_gone(pid, started)}
        if dead:
            self.drop([number for number, lent in self._lent.copy().items() if (lent.pid, lent.started) in dead])

    def client_hung_up(self, pid: int | None) -> None:
        """Drop a client's objects if its connection ended because it is dying; wait a moment until it is seen dead."""
        deadline = time.monotonic() + DYING_S
        while pid is not None and time.monotonic() < deadline:
            if all(lent.pid != pid for lent in self._lent.copy().values()):
                return
            self.forget_dead()
            time.sleep(DYING_LOOK_S)


def _is_gone(pid: int, started: float) -> bool:
    try:
        return start_time_of(pid) != started or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except OSError:
        # Unknown for now: this process is out of descriptors, say.
        return False


def _follows(kind: type, name: str) -> bool:
    """Tell whether objects of a type have a method of PROTOCOLS."""
    # `getattr` would find the `__call__` of the type's own type, too, which makes another object.
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None) is not None


def _can_pickle(value: object) -> bool:
    try:
        pickling.dump(value)
    except Exception:
        return False
    return True


class _Ticket:
    """Pickled in place of an object that stays here; arrives as a `RemoteObject` that the client gives back."""

    def __init__(self, parts: tuple[Any, ...]) -> None:
        self._parts = parts

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (*self._parts, True)


class RemoteObject:
    """Stand-in for a result that stayed in the server, with its public attributes and methods and its PROTOCOLS."""

    __slots__ = ("__weakref__", "_mpmm_kind", "_mpmm_link", "_mpmm_number", "_mpmm_protocols")

    def __init__(self, link: ServerLink, number: int, kind: str, protocols: tuple[str, ...]) -> None:
        self._mpmm_link = link
        self._mpmm_number = number
        self._mpmm_kind = kind
        self._mpmm_protocols = protocols

    def __getattr__(self, name: str) -> Any:
        # A copy that is being unpickled has no state yet, and protocols probe for names that are not public.
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        is_method, value = self._mpmm_link.ask(protocol.CONTROL, protocol.GET, (self._mpmm_number, name), {})
        return functools.partial(_call, self, name) if is_method else value

    def __repr__(self) -> str:
        record = self._mpmm_link.record
        return f"<remote {self._mpmm_kind} of {record.tag!r} in pid {record.pid}>"

    def __reduce__(self) -> tuple[Any, ...]:
        link = self._mpmm_link
        parts = self._mpmm_number, self._mpmm_kind, self._mpmm_protocols
        return _arrive, (link.registry.root, link.record, *parts, False)


def _call(remote: RemoteObject, name: str, *args: Any, **kwargs: Any) -> Any:
    link = remote._mpmm_link
    return link.ask(protocol.CONTROL, protocol.CALL, (remote._mpmm_number, name, args, kwargs), {})


def _asked_of_server(name: str) -> Callable[..., Any]:
    def method(self: RemoteObject, *args: Any) -> Any:
        return _call(self, name, *args)

    method.__name__ = name
    return method


def _itself(self: RemoteObject) -> RemoteObject:
    return self


@functools.cache
def _class_with(protocols: tuple[str, ...]) -> type[RemoteObject]:
    """Return a class with the methods of these protocols, because Python looks for them in the type."""
    methods: dict[str, Any] = {name: _asked_of_server(name) for name in protocols}
    if "__next__" in methods:
        methods["__iter__"] = _itself
    if "__exit__" in methods:
        # The traceback stays in the client.
        methods["__exit__"] = lambda self, kind, error, trace: _call(self, "__exit__", kind, error, None)
    return type("RemoteObject", (RemoteObject,), {"__slots__": (), "__module__": __name__, **methods})


def _arrive(
    root: Path, record: ServerRecord, number: int, kind: str, protocols: tuple[str, ...], answers_for_it: bool
) -> Any:
    """Return what was pickled: in the server the object itself, elsewhere a `RemoteObject`."""
    from mpmm.multi_process_shared.client import link_to

    registry = registry_at(root)
    host = find_host(registry, record.tag)
    if host is not None and host.record.incarnation == record.incarnation:
        thing = host.references.find(number)
        if answers_for_it:
            # The client is in the server's own process: it now has the object itself and needs no stand-in.
            host.references.drop([number])
        return thing
    link = link_to(registry, record)
    remote = _class_with(protocols)(link, number, kind, protocols)
    if answers_for_it:
        link.drop_with(remote, number)
    return remote
