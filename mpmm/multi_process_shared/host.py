"""The process that has the object: the object's users, and the threads that answer them.

A host serves one tag. It keeps the object while it has users (tokens, one for each acquire), and the constructor to
make the object again for later users. `Host._lock` guards object and tokens; calls run outside of it. It is reentrant,
because a signal handler or finalizer may acquire or release in the middle of an acquire or release of its thread.
A hard delete ends the host: a spawned server's process ends with it, any other process just stops serving the tag.

The threads are a leader-follower pool: the leader waits for the next connection, lets the follower lead, and answers
the client itself. So no client's first request waits for a thread to start, which would take a quarter of a millisecond
of the two for the first acquire of a process. The next follower is started once a client is quiet.
"""

from __future__ import annotations

import inspect
import itertools
import math
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any

from mpmm.errors import ModelServerError, ReentrantCallError, RemoteCallError, SharedObjectReleasedError
from mpmm.interpreter.fork_hooks import call_once_at_exit, end_forked_child
from mpmm.interpreter.thread_locks import new_lock, new_rlock
from mpmm.interpreter.thread_starts import start_thread
from mpmm.multi_process_shared import hosted
from mpmm.multi_process_shared.context import attaching_to
from mpmm.multi_process_shared.life import LifeLock
from mpmm.multi_process_shared.references import References
from mpmm.multi_process_shared.registry import (
    LEAVE_PRIORITY,
    ServerRecord,
    ServerRegistry,
    start_time_of,
    text_of,
    write_record,
)
from mpmm.multi_process_shared.rpc import pickling, protocol, sockets
from mpmm.multi_process_shared.rpc.channel import Channel, Message
from mpmm.shared_state.liveness import pid_namespace
from mpmm.text.arguments import checked_number
from mpmm.text.printable import printable_logger

__all__ = ["Host", "can_sleep", "declared_mb", "host_object", "in_own_acquire", "public_methods"]

logger = printable_logger(__name__)
# How long a client must be quiet before a follower is started; between two quick requests, that would cost some 50 µs.
QUIET_MS = 5
END_HOSTS_PRIORITY = LEAVE_PRIORITY + 10
# How often a host checks that its files are in place, by five system calls.
LOOK_S = 2.0


class Host:
    """One shared object in this process. Thread-safe."""

    def __init__(
        self,
        registry: ServerRegistry,
        record: ServerRecord,
        constructor: Callable[[], Any],
        shared: Any,
        life: LifeLock,
        at_hard_delete: Callable[[], None] | None,
    ) -> None:
        """Take over `life`, the tag's life lock held by this process, and `shared`, just made by `constructor`."""
        self.registry = registry
        self.record = record
        self.tag = record.tag
        self.methods = public_methods(shared)
        self.references = References(registry.root, record)
        self.inherited = False
        self._constructor = constructor
        self._life = life
        # Reentrant, because a signal handler may end the process while its main thread has it.
        self._files_lock = new_rlock()
        self._watches_files = True
        self._look_due = time.monotonic() + LOOK_S
        self._has_complained = False
        self._at_hard_delete = at_hard_delete
        self._lock = new_rlock()
        self._shared: Any = shared
        self._has_object = True
        self._is_making = False
        self._sleep_lock = new_lock()
        self._asleep = False
        self._users: dict[int, Any] = {}
        self._tokens = itertools.count(1)
        self._ended = False
        self._connections: set[Connection | Channel] = set()
        self._connections_lock = new_rlock()
        self._leads_next = threading.Semaphore(0)
        self._has_follower = False
        self._follower_lock = new_lock()
        # Something may have removed the folder while the object was made.
        registry.directory.ensure()
        self._listener = sockets.listen(registry.path, record.socket_name)
        self._waker, self._wakes = sockets.pair()

    def start(self) -> None:
        """Start answering clients, in daemon threads."""
        self._start_thread(leads=True)

    def publish(self) -> None:
        """Tell clients, in the life file, how they find this host."""
        # Its thread may be putting that file back, which closes the descriptor.
        with self._files_lock:
            write_record(self._life, self.record)

    def acquire(self) -> int:
        """Add a user and return its token; make the object again if it was dropped. Raises what the constructor raises.

        Raises ModelServerError after a hard delete; ReentrantCallError while the same thread makes the object.
        """
        with self._lock:
            if self._ended or self.inherited:
                raise self._gone()
            if self._is_making:
                raise in_own_acquire(self.tag)
            token = next(self._tokens)
            # A user from now on: otherwise a signal handler that releases might drop the object meanwhile.
            self._users[token] = None
            try:
                if not self._has_object:
                    self._make()
                self._users[token] = self._shared
                if self._ended:
                    # A signal handler has deleted the object.
                    raise self._gone()
            except BaseException:
                self._remove_user(token)
                raise
            return token

    def _make(self) -> None:
        """Make the object again. Hold the lock. Raises what the constructor raises."""
        try:
            self._is_making = True
            with attaching_to(self.tag, self.registry.root):
                shared = self._constructor()
            self.methods = public_methods(shared)
            self._shared = shared
            self._has_object = True
        finally:
            self._is_making = False

    def release(self, token: int) -> None:
        """Remove a user, and the object with the last one. Raises SharedObjectReleasedError."""
        # Bound here so that the object is destroyed after the lock is free: its destructor may take long.
        with self._lock:
            self.object_for(token)
            last = self._remove_user(token)
        del last

    def _remove_user(self, token: int) -> Any:
        """Remove a user, and the object with the last one; return what is to be destroyed. Hold the lock."""
        self._users.pop(token, None)
        if self._users or not self._has_object:
            return None
        last, self._has_object = self._shared, False
        self._shared = None
        if self._users:
            # A signal handler has acquired in between, this object or, as it found none, another.
            self._shared, self._has_object = next(iter(self._users.values())), True
        else:
            # The next object is awake.
            self._asleep = False
        return last

    def object_for(self, token: int) -> Any:
        """Return the object for a user. Raises SharedObjectReleasedError; ModelServerError once the host has ended."""
        try:
            return self._users[token]
        except KeyError:
            if self._ended:
                raise self._gone() from None
            raise SharedObjectReleasedError(
                f"the shared object {self.tag!r} was released through this proxy; acquire it again", tag=self.tag
            ) from None

    def sleep(self) -> None:
        """Have the object give up its device memory, unless it is asleep. Raises what its `sleep()` raises."""
        with self._sleep_lock:
            shared = self._shared
            if not self._asleep and shared is not None:
                shared.sleep()
                self._asleep = True

    def wake_up(self) -> None:
        """Have the object take its device memory again if it is asleep. Raises what its `wake_up()` raises."""
        with self._sleep_lock:
            if self._asleep:
                self._shared.wake_up()
                self._asleep = False

    def hard_delete(self) -> None:
        """End the host even while it has users; in a spawned server this does not return."""
        with self._lock:
            if self._ended or self.inherited:
                return
            self._ended = True
            self._users.clear()
            self._has_object = False
        try:
            self._unpublish()
            if self._at_hard_delete is not None:
                self._at_hard_delete()
        finally:
            # Even if a signal handler raises: otherwise the tag would be locked for as long as this process lives.
            self._close()
        # Last, because the object's destructor may take long or fail.
        self._shared = None

    def end(self) -> None:
        """Stop serving the tag because this process ends.

        Waits for no thread, not even for a running constructor; only for a look at the files, which takes milliseconds.
        """
        if self._ended or self.inherited:
            return
        self._ended = True
        try:
            self._unpublish()
        finally:
            self._close()

    def lives_by(self, life: LifeLock | None) -> bool:
        """Tell whether `life` is the lock of this host."""
        return self._life is life

    def leave_files(self) -> None:
        """Put none of the files back from now on, because the process ends, or stops serving the tag."""
        with self._files_lock:
            self._watches_files = False

    def look_after_files(self) -> None:
        """Put back what something has removed of the files by which clients find this host, and log it.

        Otherwise the next client would take the object for lost, and have a second server make it, and the last of the
        clients that know this one would take it along. Only for the thread that accepts connections.
        """
        with self._files_lock:
            if not self._watches_files:
                return
            try:
                found = self._put_back()
                self._has_complained = False
            except Exception as error:
                if not self._has_complained:
                    self._has_complained = True
                    self._complain("mpmm: pid %d cannot put back what was removed of the files of %r: %s", error)
                return
        if found:
            text = (
                "mpmm: pid %d has put back %s of the shared object %r: something has removed that from %s; keep "
                "cleaners away from this folder, or set MPMM_RUNTIME_DIR to one that no cleaner touches"
            )
            with suppress(Exception):
                logger.warning(text, os.getpid(), " and ".join(found), self.tag, self.registry.folder)

    def _put_back(self) -> list[str]:
        """Put back what is missing, the life lock last, by which clients see that there is the rest; return what."""
        found = []
        has_life = self._life.is_current()
        if not os.path.lexists(self.registry.path / self.record.socket_name):
            self.registry.directory.ensure()
            before, self._listener = self._listener, sockets.listen(self.registry.path, self.record.socket_name)
            before.close()
            found.append("the socket")
        if self.record.namespaces and not self.registry.namespaces_of_handle(self.tag):
            self.registry.directory.ensure()
            self.registry.remember_handle(self.tag, self.record.namespaces)
        if not has_life:
            made = self._life.put_back(text=text_of(self.record))
            if made is None:
                raise FileExistsError("another process serves this tag by now")
            self._life.become(made)
            # It may be a file that another process has made.
            write_record(self._life, self.record)
            found.append("the life lock")
        return found

    def _unpublish(self) -> None:
        self.leave_files()
        hosted.remove(self)
        with suppress(FileNotFoundError):
            os.unlink(self.registry.path / self.record.socket_name)

    def _close(self) -> None:
        # While this process holds the lock, no other server's file can be at this path.
        if self._life.fd >= 0 and self._life.is_current():
            self._life.path.unlink(missing_ok=True)
        self._life.close()
        self._wakes.close()
        with self._connections_lock:
            for connection in self._connections:
                # Closing alone would not wake the thread that reads from it.
                with suppress(OSError), sockets.duplicate(connection.fileno()) as shared_socket:
                    shared_socket.shutdown(socket.SHUT_RDWR)

    def _gone(self) -> ModelServerError:
        return ModelServerError(
            f"the shared object {self.tag!r} was deleted; acquire it again", tag=self.tag, server_pid=self.record.pid
        )

    def _start_thread(self, leads: bool) -> None:
        start_thread(threading.Thread(target=self._serve, args=(leads,), name=f"mpmm-host-{self.tag}", daemon=True))

    def _serve(self, leads: bool) -> None:
        """Run a thread: follow until it may lead, accept a client, let another thread lead, answer; then start over."""
        while True:
            if not leads:
                self._leads_next.acquire()
            connection = self._accept()
            if connection is None:
                # Let the follower end, too.
                self._leads_next.release()
                return
            leads = not self._let_follower_lead()
            if leads:
                connection.close()
                continue
            self._serve_connection(connection)
            if not self._follow_from_now():
                return

    def _accept(self) -> Connection | None:
        """Return the next connection, None once the host has ended."""
        if self._listener.fileno() < 0:
            # The thread that led before has closed it.
            return None
        while True:
            missed = self._life.listeners
            try:
                ready = wait([self._listener, self._waker, *missed], max(0.0, self._look_due - time.monotonic()))
            except ValueError:
                # The end of the host has closed the life lock in between.
                continue
            if self._waker in ready:
                break
            is_missed = any(listener in ready for listener in missed)
            try:
                if is_missed or time.monotonic() >= self._look_due:
                    self._look_due = time.monotonic() + LOOK_S
                    with self._life.answering():
                        self.look_after_files()
                if self._listener not in ready:
                    continue
                connection = sockets.accept(self._listener)
            except OSError as error:
                self._complain("mpmm: pid %d cannot accept a connection for %r: %s", error)
                # Most likely out of descriptors: do not spin until one is closed.
                wait([self._waker], timeout=0.1)
                continue
            if connection is not None:
                return connection
        self._listener.close()
        self._waker.close()
        return None

    def _let_follower_lead(self) -> bool:
        """Have another thread accept the next client; return False if none can be started."""
        with self._follower_lock:
            has_follower, self._has_follower = self._has_follower, False
        if has_follower:
            self._leads_next.release()
            return True
        try:
            self._start_thread(leads=True)
        except RuntimeError as error:
            self._complain("mpmm: pid %d has no thread to serve %r: %s", error)
            return False
        return True

    def _complain(self, text: str, error: Exception) -> None:
        # If the program's log handler raises, the leading thread must not end.
        with suppress(Exception):
            logger.warning(text, os.getpid(), self.tag, error)

    def _follow_from_now(self) -> bool:
        """Claim the follower's place for a thread if it is free; return whether it was."""
        with self._follower_lock:
            if self._has_follower:
                return False
            self._has_follower = True
            return True

    def _start_follower(self) -> None:
        """Start a follower if there is none; if that fails, the next client has to wait for one to be started."""
        if self._follow_from_now():
            try:
                self._start_thread(leads=False)
            except RuntimeError:
                self._has_follower = False

    def _serve_connection(self, connection: Connection) -> None:
        """Answer one client thread until it hangs up."""
        # What `_close` has to cut: the connection first, then the channel that takes it over.
        line: Connection | Channel = connection
        client: int | None = None
        # What the last answer has lent: the client has received it once its next message begins to arrive.
        lent: list[int] = []
        with self._connections_lock:
            self._connections.add(line)
        try:
            sockets.authenticate_client(connection, self.registry.key())
            with self._connections_lock:
                self._connections.discard(line)
                line = channel = Channel(connection)
                self._connections.add(line)
            client = sockets.peer_pid(channel.fileno())
            while not self._ended:
                channel.give_back_when_idle()
                if not self._has_follower and not channel.is_readable(QUIET_MS):
                    self._start_follower()
                request = channel.receive()
                lent.clear()
                answer = self._answer(request, client, lent)
                if answer is None:
                    break
                channel.send(answer)
                # Not kept until the next request, which may take long to arrive.
                del request, answer
        except (EOFError, OSError):
            pass
        except Exception as error:
            logger.warning("mpmm: pid %d refused a connection for %r: %s", os.getpid(), self.tag, error)
        finally:
            with self._connections_lock:
                self._connections.discard(line)
                line.close()
            if isinstance(line, Channel) and not line.has_heard:
                # The client has died, or its call was interrupted, before it had received the last answer.
                self.references.drop(lent)
            self.references.client_hung_up(client)

    def _answer(self, message: Message, client: int | None, lent: list[int]) -> Message | None:
        """Return the answer to a request, None to hang up. lent: gets the numbers of the results that it lends."""
        name = "?"
        try:
            token, name, args, kwargs = protocol.decode_request(message)
            if token == protocol.CONTROL:
                answer = self._control(client, lent, name, *args)
                self._end_if_forked(None)
                return answer
            shared = self.object_for(token)
            if name not in self.methods and name not in self._methods_by_now(token):
                raise AttributeError(f"the shared object {self.tag!r} has no public method {name!r}")
            result = getattr(shared, name)(*args, **kwargs)
        except BaseException as error:
            self._end_if_forked(error)
            return protocol.encode_error(error)
        self._end_if_forked(None)
        try:
            return self._result(result, name, client, lent)
        except Exception as error:
            # The server is out of memory or descriptors, say. To hang up would look as if it had ended.
            self.references.drop(lent)
            return protocol.encode_error(error)

    def _methods_by_now(self, token: int) -> frozenset[str]:
        """Return the methods of a user's object, which may gain some after it was made, as when it loads lazily."""
        methods = self.methods = public_methods(self.object_for(token))
        return methods

    def _end_if_forked(self, error: BaseException | None) -> None:
        """End this process if it is a child that the call has forked and in which the call has ended, too."""
        if self.inherited:
            end_forked_child(error)

    def _result(self, value: object, name: str, client: int | None, lent: list[int]) -> Message:
        """Return the answer with a result; parts that cannot be pickled stay here, under the numbers added to `lent`.

        client: its pid, if known.
        """
        try:
            return pickling.dump((protocol.RETURNED, value))
        except Exception:
            portable = self.references.portable(value, client, lent)
            return protocol.encode_result(portable, self.tag, name, protocol.LENT)

    def _control(self, client: int | None, lent: list[int], name: str, *args: Any) -> Message | None:
        """Answer a request to the server itself; None: the end of the connection is the answer."""
        if name == protocol.ACQUIRE:
            (knows_methods,) = args
            token = self.acquire()
            return protocol.encode_result((token, None if knows_methods else self.methods), self.tag, name)
        if name == protocol.METHODS:
            return protocol.encode_result(self._methods_by_now(*args), self.tag, name)
        if name == protocol.RELEASE:
            # None is the answer.
            return protocol.encode_result(self.release(*args), self.tag, name)  # type: ignore[func-returns-value]  # a None is encoded, too
        if name == protocol.HARD_DELETE:
            self.hard_delete()
            return None
        if name in (protocol.SLEEP, protocol.WAKE_UP):
            move = self.sleep if name == protocol.SLEEP else self.wake_up
            move()
            return protocol.encode_result(None, self.tag, name)
        if name == protocol.GET:
            return self._result(self.references.get(*args), name, client, lent)
        if name == protocol.CALL:
            number, method, arguments, keywords = args
            return self._result(self.references.call(number, method, arguments, keywords), method, client, lent)
        if name == protocol.DROP:
            self.references.drop(*args)
            return protocol.encode_result(None, self.tag, name)
        if name == protocol.FAREWELL:
            return None
        raise RemoteCallError(f"unknown request {name!r}", tag=self.tag, method=name)

    def forget_after_fork(self) -> None:
        """Stop serving in a forked child, which has a mere copy of the parent's host; descriptors have been closed.

        The object's copy stays referenced, because destroying it may touch what it shares with the parent's object.
        """
        self.inherited = True
        self._lock = new_rlock()
        self._is_making = False
        self._sleep_lock = new_lock()
        self._files_lock = new_rlock()
        self._connections_lock = new_rlock()
        self._connections = set()


def in_own_acquire(tag: str) -> ReentrantCallError:
    """Return the error of an acquire in the middle of one of the same tag and thread, for which it cannot wait."""
    return ReentrantCallError(
        f"a finalizer, signal handler or constructor asked for the shared object {tag!r} while its own thread makes it "
        "or looks for its server; it may only release what it has: let it set a flag, or leave the rest to a thread"
    )


def public_methods(shared: Any) -> frozenset[str]:
    """Return the names of the methods that clients may call, with `__call__` for a callable object.

    Attributes that raise when they are read are left out, and properties are not even read.
    """
    names = set()
    for name in dir(shared):
        if name.startswith("_"):
            continue
        if isinstance(inspect.getattr_static(type(shared), name, None), property):
            continue
        try:
            is_method = callable(getattr(shared, name))
        except Exception as error:
            logger.info("mpmm: %s.%s is not shared: reading it raises %r", type(shared).__name__, name, error)
            continue
        if is_method:
            names.add(name)
    if callable(shared):
        names.add("__call__")
    return frozenset(names)


def can_sleep(shared: object) -> bool:
    """Tell whether an object can give up its device memory and take it again: it has `sleep()` and `wake_up()`.

    Coroutine functions do not count: called without an event loop they would do nothing, and memory that is still in
    use would count as free.
    """
    methods = [getattr(type(shared), name, None) for name in ("sleep", "wake_up")]
    if any(map(inspect.iscoroutinefunction, methods)):
        logger.warning(
            "mpmm: %s is not suspended cooperatively: its sleep() or wake_up() is a coroutine function, and mpmm calls "
            "plain methods; wrap it in a class that has such methods",
            type(shared).__name__,
        )
        return False
    return all(map(callable, methods))


def declared_mb(shared: object) -> float | None:
    """Return the MB that an object's attribute `expect_mb` says it takes; None if that is no usable figure.

    The attribute may be a property, so this runs code of the object's class.
    """
    try:
        # A value that is no size raises InvalidArgumentError; reading the attribute may raise anything.
        mb = getattr(shared, "expect_mb", None)
        return None if mb is None else checked_number("expect_mb", mb, 0.0, math.inf, "MB", above=True, finite=True)
    except Exception as error:
        logger.info("mpmm: %s.expect_mb gives no usable figure: %s", type(shared).__name__, error)
        return None


def new_record(registry: ServerRegistry, tag: str, *, spawned: bool, ready: bool) -> ServerRecord:
    """Return the record of a server that this process is about to become."""
    incarnation = os.urandom(16).hex()
    return ServerRecord(
        tag=tag,
        pid=os.getpid(),
        start_time=start_time_of(os.getpid()) or 0.0,
        incarnation=incarnation,
        socket_name=registry.socket_name(tag, incarnation),
        spawned=spawned,
        ready=ready,
        pids_of=pid_namespace(),
    )


def host_object(
    registry: ServerRegistry,
    record: ServerRecord,
    constructor: Callable[[], Any],
    shared: Any,
    life: LifeLock,
    at_hard_delete: Callable[[], None] | None = None,
) -> None:
    """Serve `shared` from this process, which holds the tag's life lock `life`; `record` becomes its text.

    at_hard_delete: called when a client hard-deletes the object, after its files are removed; need not return.
    """
    registry.remove_sockets(record.tag)
    record = replace(record, sleeps=can_sleep(shared), expect_mb=declared_mb(shared))
    host = Host(registry, record, constructor, shared, life, at_hard_delete)
    call_once_at_exit(end_all_hosts, END_HOSTS_PRIORITY)
    hosted.add(host)
    try:
        host.start()
        host.publish()
    except BaseException:
        # Otherwise this process would go on with an object that no other process knows of.
        host.end()
        raise


def end_all_hosts(but: LifeLock | None = None) -> None:
    """End every host of this process except the one that holds the life lock `but`; for the end of the process."""
    for host in hosted.every_host():
        if not host.lives_by(but):
            with suppress(OSError):
                host.end()
