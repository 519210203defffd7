"""Share one object between processes: `MultiProcessShared`, as in Apache Beam, on Unix sockets and kernel locks.

    handle = MultiProcessShared(load_model, tag="resnet", spawn_process=True)
    model = handle.acquire()
    model.predict(batch)          # runs in the process that has the model
    handle.release(model)

    with handle.using() as model:     # the same for the length of a block
        model.predict(batch)

The first process that acquires the tag makes the object: in its own process or, with `spawn_process`, in a new one that
outlives it. Other processes find the object's process through the registry below `path`.

The object stays until each use of it was released. As in Beam, a proxy that is garbage-collected, or whose process
ends, does not give its use back. A loader that returns a handle relies on that: it acquires the object and never
releases it, so that the object stays until the manager ends its server. Code that borrows the handle releases what it
acquires, or the server keeps a note of each use.
"""

from __future__ import annotations

import itertools
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TypeVar, cast

import filelock  # noqa: F401  # `LockFile` needs it; its 10 ms are better spent at import than in the first acquire

from mpmm.errors import InvalidArgumentError, ModelServerError, NotAcquiredError, SharedObjectReleasedError
from mpmm.interpreter.fork_hooks import in_forked_child
from mpmm.interpreter.green_threads import expect_real_threads
from mpmm.interpreter.thread_frames import is_on_stack
from mpmm.interpreter.thread_locks import new_rlock
from mpmm.multi_process_shared.client import ServerLink, forget_link, known_link, link_to, remember_link
from mpmm.multi_process_shared.context import attaching_to, served_namespaces
from mpmm.multi_process_shared.host import Host, host_object, in_own_acquire, new_record
from mpmm.multi_process_shared.hosted import find_host
from mpmm.multi_process_shared.identity import check_identity, name_of_constructor, names_of_types
from mpmm.multi_process_shared.main_import import refuse_while_importing_main
from mpmm.multi_process_shared.registry import ServerRecord, ServerRegistry, registry_at, registry_for
from mpmm.multi_process_shared.server_process import ATTACH, wants_to_attach
from mpmm.multi_process_shared.start_server import reap_ended_servers, start_server
from mpmm.multi_process_shared.stop_server import end_server
from mpmm.text.arguments import LARGEST_PID, checked_timeout, checked_whole, encoded_text, in_brief

__all__ = ["MultiProcessShared", "SharedProxy", "server_pid", "unload"]

T = TypeVar("T")

HARD_DELETE_TIMEOUT_S = 10.0
# Servers that start and die before this process is their client: something kills them, and will kill the next.
START_ATTEMPTS = 5
STARTING_PAUSE_S = 0.005
# What managers look for in a proxy that a loader has returned. They do so even as they unload it, and a server that is
# stopped must not hold that up.
_NEVER_ASKED_FOR = frozenset({"expect_mb", "unload_model", "mock_model_unsafe_hard_delete"})


class MultiProcessShared(Generic[T]):
    """A handle on the shared object of a tag. Cheap: nothing happens before `acquire`."""

    def __init__(
        self,
        constructor: Callable[[], T],
        tag: Any,
        *,
        path: str | None = None,
        always_proxy: bool | None = None,
        spawn_process: bool = False,
    ) -> None:
        """Describe the shared object.

        constructor: called without arguments to make the object; ignored if the tag has an object already. To run in
            another process it is pickled, with cloudpickle if pickle refuses.
        tag: a string; equal tags below one `path` mean the same object.
        path: folder with the registry by which processes find each other; the default, and the folder of
            `tempfile.gettempdir()`, which is Beam's default, mean the user's runtime directory.
        always_proxy: go through a connection even in the process that has the object.
        spawn_process: make the object in a process of its own.
        Raises InvalidArgumentError.
        """
        encoded_text("tag", tag)
        registry_for(path)
        self._constructor = constructor
        self._tag = tag
        self._path = path
        self._always_proxy = bool(always_proxy)
        self._spawn_process = spawn_process

    def acquire(self) -> T:
        """Return a new proxy of the object; if there is none, make it, which takes as long as its constructor.

        The use lasts until `release`, even if the proxy is collected, as in Beam; `using` releases it by itself.
        An object whose type sets `attach_in_place` is returned itself, and each process makes its own.
        Raises what the constructor raises if it runs in this process; ServerStartError with the traceback if it runs
        in another one, and at once in a server that is still importing the main module; ModelServerError if servers
        die faster than they can be reached, or if the tag is a manager's handle whose server is gone;
        InvalidArgumentError if the tag is known to stand for something else, see `identity`; ReentrantCallError if a
        signal handler, finalizer or constructor calls this in the middle of an acquire of the same tag and thread.
        """
        shared = self._acquire(registry_for(self._path))
        if self._spawn_process:
            # Deleted servers that this process started are its zombies until it reaps them.
            reap_ended_servers()
        return cast(T, shared)

    def release(self, obj: Any) -> None:
        """Give back what `acquire` returned. The last user's release drops the object.

        Raises SharedObjectReleasedError for a second release, NotAcquiredError for anything that `acquire` did not
        return. It is no error if the server is gone: the object is gone with it.
        """
        if isinstance(obj, SharedProxy):
            obj._mpmm_use.release()
        elif not _attached.release(registry_for(self._path), self._tag, obj):
            raise NotAcquiredError(f"{obj!r} was not acquired as {self._tag!r} by this process", tag=self._tag)

    @contextmanager
    def using(self) -> Iterator[T]:
        """Acquire the object for the length of a `with` block. Raises what `acquire` raises."""
        shared = self.acquire()
        try:
            yield shared
        finally:
            self.release(shared)

    def unsafe_hard_delete(self) -> None:
        """Delete the object even while it is in use; its users' proxies raise from now on. A server of its own ends.

        Returns when the server is gone; one that does not end by itself is killed. Does nothing if there is no object.
        For an attached object, its `force_reset` is called instead, if it has one.
        Raises ModelServerError if the process that serves the object is not a server of its own and does not answer.
        """
        registry = registry_for(self._path)
        if registry.attach_marker(self._tag).exists() and not end_server(registry, self._tag, HARD_DELETE_TIMEOUT_S):
            shared = self._acquire(registry)
            if not isinstance(shared, SharedProxy):
                registry.attach_marker(self._tag).unlink(missing_ok=True)
                _attached.drop(registry, self._tag)
                if hasattr(shared, "force_reset"):
                    shared.force_reset()
                return
        end_server(registry, self._tag, HARD_DELETE_TIMEOUT_S)
        registry.forget_handle(self._tag)

    def _acquire(self, registry: ServerRegistry) -> Any:
        attached = _attached.acquire(registry, self._tag)
        if attached is not None:
            return attached.shared
        try:
            if not self._always_proxy and (host := find_host(registry, self._tag)) is not None:
                return self._proxy(_LocalUse(host))
            if (link := known_link(registry, self._tag)) is not None:
                return self._proxy(_use_through(link))
        except ModelServerError:
            # The server has ended since this process last used it; look for another one.
            if link := known_link(registry, self._tag):
                forget_link(link)
        expect_real_threads(f"the shared object {self._tag!r}")
        # Usually a server is ready; then there is no need to wait for the lock behind others that only look for it.
        _, record = registry.look(self._tag)
        if record is not None and record.ready:
            with suppress(ModelServerError):
                return self._use(registry, record)
        refuse_while_importing_main("acquire the shared object", self._tag)
        with _only_once_in_thread(registry, self._tag, sys._getframe()), registry.tag_lock(self._tag):
            failures = itertools.count(1)
            while True:
                lives, record = registry.find(self._tag, math.inf)
                if lives and (record is None or not record.ready):
                    # Its starter has died, or this process would not have the lock; it still comes up or fails.
                    time.sleep(STARTING_PAUSE_S)
                elif record is not None:
                    try:
                        return self._use(registry, record)
                    except ModelServerError:
                        if next(failures) >= START_ATTEMPTS:
                            raise
                        time.sleep(STARTING_PAUSE_S)
                else:
                    shared = self._start(registry)
                    if shared is not None:
                        return shared

    def _use(self, registry: ServerRegistry, record: ServerRecord) -> SharedProxy:
        """Become a user of a live server. Raises ModelServerError, InvalidArgumentError."""
        host = find_host(registry, self._tag)
        if host is not None and not self._always_proxy:
            return self._proxy(_LocalUse(host))
        return self._proxy(_use_through(link_to(registry, record)))

    def _proxy(self, use: _Use) -> SharedProxy:
        """Return a proxy for `use`; release it and raise InvalidArgumentError if its server has something else."""
        try:
            check_identity(use.record, self._constructor)
        except BaseException:
            use.release()
            raise
        return SharedProxy(use)

    def _start(self, registry: ServerRegistry) -> Any:
        """Start a server, or attach the object. Hold the tag's lock, under which no server was found.

        Returns the object if it is attached, else None: the caller looks again. Raises ModelServerError for a manager's
        handle, unless a loader runs here: only a loader may make a handle's object.
        """
        if not callable(self._constructor):
            raise InvalidArgumentError(
                f"constructor {in_brief(self._constructor)} of {self._tag!r}: expected a callable, as there is "
                "no such object yet"
            )
        ours = served_namespaces()
        if not ours and (theirs := registry.namespaces_of_handle(self._tag)):
            raise ModelServerError(
                f"the model server of the handle {self._tag!r} (namespace {', '.join(theirs)}) is gone; release the "
                "handle and acquire the model again",
                tag=self._tag,
                server_pid=None,
            )
        marker = registry.attach_marker(self._tag)
        if (
            self._spawn_process
            and not marker.exists()
            and start_server(registry, self._tag, self._constructor) != ATTACH
        ):
            return None
        with attaching_to(self._tag, registry.root):
            shared = self._constructor()
        if wants_to_attach(shared):
            marker.touch(mode=0o600)
            return _attached.add(registry, self._tag, shared)
        # The tag used to stand for another kind of object.
        marker.unlink(missing_ok=True)
        if not self._spawn_process and (life := registry.take_life(self._tag)) is not None:
            try:
                if ours:
                    registry.remember_handle(self._tag, ours)
                record = replace(
                    new_record(registry, self._tag, spawned=False, ready=True),
                    namespaces=ours,
                    constructor=name_of_constructor(self._constructor),
                    types=names_of_types(shared),
                )
                host_object(registry, record, self._constructor, shared, life)
            except BaseException:
                life.close()
                raise
        return None


def unload(tag: str, *, path: str | None = None, timeout_seconds: float = 10.0, pid: int | None = None) -> bool:
    """End the server of `tag` and return True once it is gone; False if there was none.

    pid: if given, end only a server with this pid; the tag may have a new server meanwhile.

    A server that does not end within `timeout_seconds`, or is still making its object, is killed.
    Raises ModelServerError if it survives that, or if the process that serves the tag is not a server of its own
    and does not answer; InvalidArgumentError.
    """
    encoded_text("tag", tag)
    timeout_seconds = checked_timeout("timeout_seconds", timeout_seconds)
    if pid is not None:
        pid = checked_whole("pid", pid, 1, LARGEST_PID)
    gone = end_server(registry_for(path), tag, timeout_seconds, pid=pid)
    reap_ended_servers()
    return gone


def server_pid(tag: str, *, path: str | None = None) -> int | None:
    """Return the pid of the live process that serves `tag`, even while the object is still being made; else None.

    Raises InvalidArgumentError.
    """
    encoded_text("tag", tag)
    _, record = registry_for(path).find(tag)
    return record.pid if record is not None and record.is_running() else None


class _Use:
    """One acquire: which server has the object, this use's token there, and whether it has been released."""

    def __init__(self, registry: ServerRegistry, record: ServerRecord, token: int, methods: frozenset[str]) -> None:
        self.registry = registry
        self.record = record
        self.token = token
        self.methods = methods
        self.released = False

    def attribute(self, name: str) -> Any:
        """Return the value of a proxy's attribute `name`."""
        raise NotImplementedError

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method of the object."""
        raise NotImplementedError

    def release(self) -> None:
        """Give the token back. Raises SharedObjectReleasedError."""
        raise NotImplementedError

    def hard_delete(self) -> None:
        """Delete the object and a server of its own. Does nothing if the server is gone already."""
        self.check()
        end_server(self.registry, self.record.tag, HARD_DELETE_TIMEOUT_S, self.record.incarnation)
        self.registry.forget_handle(self.record.tag)

    def check(self) -> None:
        """Raise SharedObjectReleasedError after a release."""
        if self.released:
            raise SharedObjectReleasedError(
                f"the shared object {self.record.tag!r} was released through this proxy; acquire it again",
                tag=self.record.tag,
            )


class _RemoteUse(_Use):
    """A use through connections to the server."""

    def __init__(self, link: ServerLink, token: int, methods: frozenset[str]) -> None:
        super().__init__(link.registry, link.record, token, methods)
        self.link = link

    def attribute(self, name: str) -> Any:
        self.check()
        if name in self.methods or self._has_gained(name):
            return _RemoteMethod(self, name)
        if name == "expect_mb" and self.record.expect_mb is not None:
            # A manager that has loaded the proxy asks it how large the object is.
            return self.record.expect_mb
        raise AttributeError(
            f"the shared object {self.record.tag!r} has no public method {name!r} (plain attributes are not shared)"
        )

    def _has_gained(self, name: str) -> bool:
        """Ask the server whether the object has a method that it had not when this process was told its methods."""
        if name.startswith("_") or name in _NEVER_ASKED_FOR:
            return False
        # A server that is gone has no other methods.
        with suppress(ModelServerError):
            self.methods = self.link.current_methods(self.token)
        return name in self.methods

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.check()
        return self.link.ask(self.token, name, args, kwargs)

    def release(self) -> None:
        self.check()
        self.released = True
        try:
            self.link.release(self.token)
        except ModelServerError:
            forget_link(self.link)


class _LocalUse(_Use):
    """A use in the process that has the object; children that it forks go through connections."""

    def __init__(self, host: Host) -> None:
        super().__init__(host.registry, host.record, host.acquire(), host.methods)
        self.host = host
        self._remote: _RemoteUse | None = None

    def attribute(self, name: str) -> Any:
        self.check()
        if self.host.inherited:
            return self._from_child().attribute(name)
        return getattr(self.host.object_for(self.token), name)

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.check()
        if self.host.inherited:
            return self._from_child().call(name, args, kwargs)
        return getattr(self.host.object_for(self.token), name)(*args, **kwargs)

    def release(self) -> None:
        self.check()
        self.released = True
        if self.host.inherited:
            self._from_child().release()
        else:
            with suppress(ModelServerError):
                self.host.release(self.token)

    def _from_child(self) -> _RemoteUse:
        if self._remote is None:
            self._remote = _RemoteUse(link_to(self.registry, self.record), self.token, self.methods)
        return self._remote


def _use_through(link: ServerLink) -> _RemoteUse:
    token, methods = link.acquire()
    remember_link(link)
    return _RemoteUse(link, token, methods)


class _RemoteMethod:
    """A method of a shared object; kept by the proxy after the first look-up."""

    __slots__ = ("__name__", "_use")

    def __init__(self, use: _RemoteUse, name: str) -> None:
        self._use = use
        self.__name__ = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._use.call(self.__name__, args, kwargs)

    def __repr__(self) -> str:
        return f"<remote method {self.__name__} of {self._use.record.tag!r}>"


class SharedProxy:
    """Stand-in for a shared object: public methods run where the object is; the only plain attribute is `expect_mb`.

    Exceptions arrive as they were raised, with the remote traceback as `__cause__`. Results that cannot be pickled,
    such as generators, stay in the server, and the caller gets stand-ins (see `references`). A proxy can be pickled:
    the copy connects to the same server and shares this proxy's acquire, so releasing either ends both. In the process
    that has the object, and without `always_proxy`, all attributes are those of the object itself.
    """

    # The proxy's own state, under a name that should not hide a method of the object.
    _mpmm_use: _Use

    def __init__(self, use: _Use) -> None:
        self._mpmm_use = use

    def __getattr__(self, name: str) -> Any:
        # The object is not asked: a copy being unpickled has no `_mpmm_use` yet, and protocols probe for dunders.
        if name == "_mpmm_use" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        attribute = self._mpmm_use.attribute(name)
        if isinstance(attribute, _RemoteMethod):
            self.__dict__[name] = attribute
        return attribute

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._mpmm_use.call("__call__", args, kwargs)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._mpmm_use.methods})

    def __repr__(self) -> str:
        use = self._mpmm_use
        state = " released" if use.released else ""
        return f"<proxy of {use.record.tag!r} in pid {use.record.pid}{state}>"

    def __reduce__(self) -> tuple[Any, ...]:
        use = self._mpmm_use
        use.check()
        return _connect_again, (str(use.registry.root), use.record, use.token, use.methods)

    def get_auto_proxy_object(self) -> SharedProxy:
        """Return the proxy itself; Beam has a proxy inside another one."""
        return self

    def unsafe_hard_delete(self) -> None:
        """Delete the object even while it is in use; see `MultiProcessShared.unsafe_hard_delete`."""
        self._mpmm_use.hard_delete()

    # Beam's name for it.
    singletonProxy_unsafe_hard_delete = unsafe_hard_delete


def _connect_again(root: str, record: ServerRecord, token: int, methods: frozenset[str]) -> SharedProxy:
    return SharedProxy(_RemoteUse(link_to(registry_at(Path(root)), record), token, methods))


# The acquires in progress that look for a server or start one, by registry, tag and thread: where each runs.
_looking: dict[tuple[ServerRegistry, str, int], FrameType] = {}
in_forked_child(_looking.clear)


@contextmanager
def _only_once_in_thread(registry: ServerRegistry, tag: str, frame: FrameType) -> Iterator[None]:
    """Raise ReentrantCallError if this thread is in such a block of the tag: it would wait for itself for ever.

    frame: of the block.
    """
    looking = registry, tag, threading.get_ident()
    before = _looking.get(looking)
    # A signal handler's exception may have ended that acquire before its block began.
    if before is not None and is_on_stack(before, frame):
        raise in_own_acquire(tag)
    try:
        _looking[looking] = frame
        yield
    finally:
        _looking.pop(looking, None)


class _Attached:
    """One object that this process has attached, with the number of its acquires."""

    def __init__(self, shared: Any) -> None:
        self.shared = shared
        # One None for each, because a list grows and shrinks in a single step.
        self._users = [None]

    @property
    def users(self) -> int:
        return len(self._users)

    def add_user(self) -> None:
        self._users.append(None)

    def remove_user(self) -> None:
        self._users.pop()


class _AttachedObjects:
    """The attached objects of this process, by registry and tag. Thread-safe, and for signal handlers, too."""

    def __init__(self) -> None:
        self._mutex = new_rlock()
        self._by_tag: dict[tuple[ServerRegistry, str], _Attached] = {}
        self._inherited: list[_Attached] = []

    def acquire(self, registry: ServerRegistry, tag: str) -> _Attached | None:
        """Add a user of the object, if there is one."""
        with self._mutex:
            while (attached := self._by_tag.get((registry, tag))) is not None:
                attached.add_user()
                if self._by_tag.get((registry, tag)) is attached:
                    break
                # In between, a signal handler has released it as its last user.
            return attached

    def add(self, registry: ServerRegistry, tag: str, shared: Any) -> Any:
        """Keep an object with its first user, and return it."""
        with self._mutex:
            self._by_tag[registry, tag] = _Attached(shared)
        return shared

    def release(self, registry: ServerRegistry, tag: str, shared: object) -> bool:
        """Remove a user, and the object with the last one; False if it is not the tag's object."""
        with self._mutex:
            attached = self._by_tag.get((registry, tag))
            if attached is None or attached.shared is not shared or not attached.users:
                return False
            attached.remove_user()
            if not attached.users:
                self._by_tag.pop((registry, tag), None)
                if attached.users:
                    # A signal handler has acquired it in between.
                    self._by_tag.setdefault((registry, tag), attached)
            return True

    def drop(self, registry: ServerRegistry, tag: str) -> None:
        """Forget the tag's object, though it may be in use."""
        with self._mutex:
            self._by_tag.pop((registry, tag), None)

    def start_over_in_child(self) -> None:
        """Forget all objects but keep the copies referenced: finalizing them here would end what the parent uses."""
        self._mutex = new_rlock()
        self._inherited.extend(self._by_tag.values())
        self._by_tag.clear()


_attached = _AttachedObjects()
in_forked_child(_attached.start_over_in_child)
