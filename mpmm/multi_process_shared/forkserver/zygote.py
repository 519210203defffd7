"""The zygote: a warm process from which model servers are forked, so that they need not import the world again.

    launcher --(order, descriptors)--> zygote --fork--> server                a kind of order seen for the first time
                                         |
                                         +--fork--> template --fork--> server     later ones of the same kind

There is one zygote for a room and an interpreter. The first who needs it starts it; it lives by the room's alive lock
as a server does, and keeps nobody alive. A server that comes up tells its parent which modules it had to import. The
zygote has a *template*, a fork of its own, import them, and has the next server of that kind forked from there. So
the zygote itself stays small, and answers at once whatever a template is doing. Orders are of one kind when modules
imported for one serve the other: equal `sys.path`, equal environment but for PER_PROCESS_VARIABLES, equal preludes
(see `prelude`), equal working directory and arguments. `CUDA_VISIBLE_DEVICES` is one of those: every device has servers
of the same kind, and CUDA reads it when a device is first used, which a template must not do. If an import looks at
such a variable, the servers of each value get a template of their own.

Nobody forks while another thread runs, or in the middle of an import: both processes have one thread, and do one
thing at a time. A module whose import leaves a thread behind, opens an accelerator, or leaves anything else that
servers cannot have in common (see `leftovers`), costs the template that imported it: another one is made which does
without. What can be made anew in each server is: random generators, above all. Threads that their library ends before
every fork, as OpenBLAS does with its own, do no harm. Importing torch, TensorFlow or JAX is fine by the same rule: what
must not happen before a fork is the first use of the device.

A dead server stays a zombie until who ordered it has asked for its exit code, or is gone: the connection of the order
stays open for that. When zygote or template die, servers live on; their exit codes are lost.

A server has the environment, the working directory, `__main__`, standard output and error of who ordered it. What else
a process inherits (limits, priority, umask, control group) it has from the first who needed the zygote.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import json
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from multiprocessing import AuthenticationError, Pipe, util
from multiprocessing import process as mp_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

from mpmm.fork_hooks import close_in_children, fork_guard
from mpmm.multi_process_shared.forkserver.leftovers import FIRST, PER_PROCESS_VARIABLES, Watch
from mpmm.multi_process_shared.registry import open_lock, room_at
from mpmm.multi_process_shared.rpc import sockets
from mpmm.multi_process_shared.server_process import AliveLock, ServerPlan, run_server
from mpmm.multi_process_shared.spawned_server import call_this_process
from mpmm.shared_state.lock_file import LockFile

__all__ = ["BORN", "ENDED", "WAIT", "ForkOrder", "receive", "send"]

# What is said on the connection of an order, each with a number: the server's pid, its exit code, nothing yet.
BORN, ENDED, WAIT = "born", "ended", "wait"
# What a template is told and says.
IMPORT, FORK, RETIRE = "import", "fork", "retire"
READY, IDLE, POISON, READ, LEARNED, BACK = "ready", "idle", "poison", "read", "learned", "back"

PRELOAD_VARIABLE = "MPMM_PRELOAD"
PROCESS_NAME = "mpmm-zygote"
# What these names stand for differs from process to process.
NOT_TO_IMPORT = frozenset({"__main__", "__mp_main__"})
# pyarrow's allocator starts it. It takes all of its own locks before a fork, and starts the thread anew after it.
HARMLESS_THREADS = frozenset({"jemalloc_bg_thd"})
PROBE_INTERVAL_S = 1.0
CONVERSATION_TIMEOUT_S = 5.0
PROBE_FORK_TIMEOUT_S = 2.0
THREADS_END_S = 0.1
PRELUDE_TIMEOUT_S = 60.0
MOST_TEMPLATES = 8
TEMPLATE_USED_S = 60.0
# A socket takes that much even while nobody reads: the zygote never waits for a template that imports.
LONGEST_WAITING_BYTES = 65_536
MOST_FAILURES = 5


@dataclass(frozen=True)
class ForkOrder:
    """What a requester wants: a server, in surroundings like its own.

    preparation: of `multiprocessing.spawn`, for `__main__` and the like. preludes: "module:function" each.
    With it come three descriptors: where the server reports, its standard output and standard error.
    """

    plan: ServerPlan
    preparation: dict[str, Any]
    environment: dict[str, str]
    preludes: tuple[str, ...]


@dataclass(frozen=True)
class _Kind:
    """What orders have in common that one template can serve."""

    sys_path: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    preludes: tuple[str, ...]
    directory: str
    arguments: tuple[str, ...]
    # Of PER_PROCESS_VARIABLES those, with their values, that an import has looked at.
    pinned: tuple[tuple[str, str | None], ...] = ()


class _Descriptor:
    """A descriptor that is closed in forked children."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        close_in_children(self)

    def fileno(self) -> int:
        return self.fd

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


@dataclass
class _Order:
    """An order on its way: as it came, with its connection and descriptors."""

    message: bytes
    requester: Connection
    descriptors: list[_Descriptor]
    since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.order: ForkOrder = pickle.loads(self.message)

    @property
    def environment(self) -> dict[str, str]:
        """What the server's imports find."""
        return {**self.order.environment, **dict(self.order.plan.environment)}

    @property
    def kind(self) -> _Kind:
        """The kind of order, as long as no import has looked at what differs from server to server."""
        relevant = sorted(item for item in self.environment.items() if not PER_PROCESS_VARIABLES.fullmatch(item[0]))
        preparation = self.order.preparation
        directory = preparation["dir"] or "/"
        sys_path = tuple(os.path.join(directory, entry) for entry in preparation["sys_path"])
        return _Kind(
            sys_path, tuple(relevant), self.order.preludes, directory, tuple(map(str, preparation["sys_argv"]))
        )

    def close(self) -> None:
        self.requester.close()
        for descriptor in self.descriptors:
            descriptor.close()


@dataclass(eq=False)
class _Child:
    """A server that this process has forked."""

    pid: int
    kind: _Kind
    end: _Descriptor
    requester: Connection | None
    learning: Connection | None
    exit_code: int | None = None


class _Nursery:
    """What zygote and template have in common: they fork servers, and know what became of them."""

    def __init__(self) -> None:
        self.children: set[_Child] = set()

    def fork_server(self, order: _Order, kind: _Kind) -> None:
        """Fork the server, and tell who wants it."""
        renewal = self.renewal()
        with fork_guard:
            learning, learned = Pipe(duplex=False)
            close_in_children(learning)
        # Copies for the child: the originals are closed in it, as are those of all other orders.
        kept = [os.dup(descriptor.fd) for descriptor in order.descriptors]
        try:
            pid = os.fork()
            if pid == 0:
                _become_server(order.order, kept, learned, renewal)
        except OSError:
            # Too many processes, say: let the requester find that out by itself.
            order.requester.close()
            learning.close()
            return
        finally:
            for fd in kept:
                os.close(fd)
            learned.close()
            for descriptor in order.descriptors:
                descriptor.close()
        self.children.add(_Child(pid, kind, _Descriptor(os.pidfd_open(pid)), order.requester, learning))
        with contextlib.suppress(OSError):
            send(order.requester, BORN, pid)

    def watched(self) -> list[Any]:
        """Return what to wait for."""
        return [
            thing
            for child in self.children
            for thing in (child.requester, child.learning, child.end if child.exit_code is None else None)
            if thing is not None
        ]

    def look_after_children(self, ready: list[Any]) -> None:
        """Hear what children have learned, pass on their ends, and reap those that nobody asks about any more."""
        for child in list(self.children):
            if child.learning in ready and child.learning is not None:
                with contextlib.suppress(EOFError, OSError, ValueError):
                    self.learned(child.kind, json.loads(child.learning.recv_bytes()))
                child.learning.close()
                child.learning = None
            if child.end in ready:
                # Not reaped yet: its pid must not be given to another process while somebody may use it.
                ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
                assert ended is not None
                child.exit_code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
                if child.requester is not None:
                    with contextlib.suppress(OSError):
                        send(child.requester, ENDED, child.exit_code)
            elif child.requester in ready and child.requester is not None:
                # Nothing is ever said there: this is the end of it.
                child.requester.close()
                child.requester = None
            if child.exit_code is not None and child.requester is None:
                os.waitpid(child.pid, 0)
                child.end.close()
                if child.learning is not None:
                    child.learning.close()
                self.children.discard(child)

    def renewal(self) -> Callable[[dict[str, str]], None]:
        """Return what a server does first, given its environment."""
        return _set_environment

    def learned(self, kind: _Kind, modules: list[str]) -> None:
        """Note what a server of the kind had to import."""
        raise NotImplementedError


class _Template(_Nursery):
    """A fork of the zygote that imports what servers of one kind need, and forks them."""

    def __init__(self, kind: _Kind, environment: dict[str, str], zygote: Connection, modules: list[str]) -> None:
        super().__init__()
        self.kind = kind
        self.zygote = close_in_children(zygote)
        self.modules = _in_order(modules)
        self.environment = environment
        self.poisoned = False
        self.retired = False

    def run(self) -> NoReturn:
        """Work until the zygote is gone."""
        try:
            os.chdir(self.kind.directory)
        except OSError:
            os._exit(1)
        self.watch = Watch(self.environment)
        sys.path[:] = self.kind.sys_path
        sys.argv[:] = self.kind.arguments
        for prelude in self.kind.preludes:
            self.make_ready(prelude)
        self.tell(READY)
        working = True
        while True:
            if working and not self.modules:
                working = False
                gc.collect()
                # The collector's marks would copy every page that servers share with us.
                gc.freeze()
                self.tell(IDLE)
            if self.retired and not self.children:
                os._exit(0)
            ready = wait([self.zygote, *self.watched()], 0 if self.modules else None)
            self.look_after_children(ready)
            if self.zygote in ready:
                working |= self.obey()
            elif self.modules and not ready:
                self.make_ready(self.modules.pop(0))

    def obey(self) -> bool:
        """Do what the zygote says; return whether there is something to import."""
        try:
            what, value = self.zygote.recv()
            if what == IMPORT:
                self.modules += _in_order(value)
                return True
            if what == RETIRE:
                self.retired = True
                self.modules.clear()
                return False
            order = _take_over(self.zygote, value)
            if self.poisoned:
                _hand_over(self.zygote, BACK, order)
            else:
                self.fork_server(order, self.kind)
        except (EOFError, OSError):
            os._exit(0)
        return False

    def renewal(self) -> Callable[[dict[str, str]], None]:
        changes = self.watch.changes()
        return lambda environment: self.watch.renew(environment.items(), changes)

    def make_ready(self, name: str) -> None:
        """Import a module, or do a prelude; say so if no server can be forked after that."""
        module, _, function = name.partition(":")
        if self.poisoned or (module in sys.modules and not function):
            return
        self.watch.begin()
        try:
            imported = importlib.import_module(module)
            if function:
                getattr(imported, function)()
        except BaseException:
            # Then the server will do it by itself, and fail where it can be seen.
            pass
        # Who ends this process, or a server that has not got so far, means it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # What a prelude's module finds there makes no difference: it is done by all of this kind, and by no others.
        reads = self.watch.reads(but_by=module if function else "") - {pinned for pinned, _ in self.kind.pinned}
        if not _may_fork() or self.watch.problem() is not None:
            self.give_up(POISON, name)
        elif reads:
            self.give_up(READ, sorted(reads))
        elif name in FIRST:
            self.watch.known(name)

    def give_up(self, what: str, value: Any) -> None:
        """Fork no more servers, and say why."""
        self.poisoned = True
        self.modules.clear()
        self.tell(what, value)

    def learned(self, kind: _Kind, modules: list[str]) -> None:
        self.tell(LEARNED, modules)

    def tell(self, what: str, value: Any = None) -> None:
        """Say something to the zygote."""
        try:
            self.zygote.send((what, value))
        except OSError:
            os._exit(0)


class _TemplateHandle:
    """A template as the zygote sees it."""

    def __init__(self, kind: _Kind, pid: int, link: Connection) -> None:
        self.kind = kind
        self.pid = pid
        self.link = link
        self.waiting: list[_Order] = []
        # It has done its preludes; it has once done all that it was told to.
        self.ready = False
        self.built = False
        self.retired = False
        self.busy = True
        self.used = time.monotonic()

    def accepts(self, order: _Order) -> bool:
        """Tell whether an order is better off here than with the zygote, which can fork it at once."""
        if self.retired or (self.ready and self.busy and len(order.message) > LONGEST_WAITING_BYTES):
            return False
        # Preludes take no longer here than in the server itself, and the other orders of a burst wait for the same.
        return self.built or bool(self.kind.preludes)


class _Zygote(_Nursery):
    """The process that takes orders."""

    def __init__(self, root: Path, life: LockFile, listener: socket.socket) -> None:
        super().__init__()
        self.room = room_at(root)
        self.life = life
        self.listener = listener
        self.socket_path = Path(json.loads(os.pread(life.fd, 4096, 0))["socket"])
        self.alive = AliveLock(str(self.room.alive_path))
        self.templates: list[_TemplateHandle] = []
        self.modules: dict[_Kind, list[str]] = {}
        self.poisoned: dict[_Kind, set[str]] = {}
        self.failures: dict[_Kind, int] = {}
        # By the kind without anything pinned: what its imports look at; and by kind, what they found the last time.
        self.read: dict[_Kind, set[str]] = {}
        self.environments: dict[_Kind, dict[str, str]] = {}

    def run(self) -> NoReturn:
        """Take orders until nobody is left who could give one."""
        next_probe = time.monotonic() + PROBE_INTERVAL_S
        while True:
            links = [template.link for template in self.templates]
            ready = wait([self.listener, *links, *self.watched()], max(0.0, next_probe - time.monotonic()))
            self.look_after_children(ready)
            for template in [template for template in self.templates if template.link in ready]:
                self.listen_to(template)
            if self.listener in ready:
                self.take_order()
            if time.monotonic() >= next_probe:
                next_probe = time.monotonic() + PROBE_INTERVAL_S
                if self.alive.is_free():
                    self.leave()
                self.calm_waiting()

    def take_order(self) -> None:
        """Hear a requester, and have its server forked."""
        requester = sockets.accept(self.listener)
        if requester is None:
            return
        try:
            sockets.set_timeouts(requester, CONVERSATION_TIMEOUT_S)
            sockets.authenticate_client(requester, self.room.key())
            message = requester.recv_bytes()
            order = _Order(message, requester, _receive_descriptors(requester, 3))
            self.place(order)
        except (EOFError, OSError, AuthenticationError, ValueError, pickle.UnpicklingError):
            requester.close()

    def place(self, order: _Order) -> None:
        """Give the order to a template, or fork the server here."""
        kind = self.kind_of(order)
        template = self.template_of(kind)
        if template is None:
            self.environments[kind] = order.environment
            wanted = order.order.environment.get(PRELOAD_VARIABLE, "").split(",")
            modules = self.modules.setdefault(kind, [name.strip() for name in wanted if name.strip()])
            if modules or kind.preludes:
                template = self.make_template(kind)
        if template is not None and template.accepts(order):
            template.used = time.monotonic()
            if not template.ready:
                template.waiting.append(order)
                return
            try:
                _hand_over(template.link, FORK, order)
                return
            except OSError:
                # Stuck, or gone. What comes of half a message is no order, so let it go altogether.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(template.pid, signal.SIGKILL)
                self.retire(template)
        self.fork_server(order, kind)

    def kind_of(self, order: _Order) -> _Kind:
        """Return the kind of an order, to which applies what is known of orders with other values of the variables."""
        return self.pin(order.kind, order.environment)

    def pin(self, kind: _Kind, environment: dict[str, str]) -> _Kind:
        """Return a kind with the values of those variables that the imports of its servers look at."""
        names = self.read.get(replace(kind, pinned=()))
        if not names:
            return kind
        pinned = replace(kind, pinned=tuple((name, environment.get(name)) for name in sorted(names)))
        if pinned not in self.modules:
            self.modules[pinned] = list(self.modules.get(kind, []))
            self.poisoned[pinned] = set(self.poisoned.get(kind, set()))
        return pinned

    def template_of(self, kind: _Kind) -> _TemplateHandle | None:
        """Return the template that serves a kind now."""
        return next((one for one in self.templates if one.kind == kind and not one.retired), None)

    def make_template(self, kind: _Kind) -> _TemplateHandle | None:
        """Fork a template, which begins to import; None for a kind with which that has gone wrong too often."""
        poisoned = self.poisoned.setdefault(kind, set())
        if self.failures.get(kind, 0) >= MOST_FAILURES or poisoned & set(kind.preludes):
            return None
        current = [template for template in self.templates if not template.retired]
        if len(current) >= MOST_TEMPLATES:
            oldest = min(current, key=lambda template: template.used)
            if time.monotonic() - oldest.used < TEMPLATE_USED_S:
                # Otherwise many kinds in turn would cost more than they save.
                return None
            self.retire(oldest)
        with fork_guard:
            ours, theirs = Pipe()
            close_in_children(ours)
        pid = os.fork()
        if pid == 0:
            try:
                modules = self.clean(kind, self.modules.get(kind, []))
                _Template(kind, self.environments.get(kind, dict(kind.environment)), theirs, modules).run()
            finally:
                os._exit(1)
        theirs.close()
        sockets.set_timeouts(ours, CONVERSATION_TIMEOUT_S)
        template = _TemplateHandle(kind, pid, ours)
        self.templates.append(template)
        return template

    def clean(self, kind: _Kind, modules: Iterable[str]) -> list[str]:
        """Return the modules without those that have cost a template its life."""
        poisoned = self.poisoned.get(kind, set())
        return [name for name in modules if not any(f"{name}.".startswith(f"{bad}.") for bad in poisoned)]

    def learned(self, kind: _Kind, modules: list[str]) -> None:
        known = self.modules.setdefault(kind, [])
        new = [name for name in modules if name not in NOT_TO_IMPORT and name not in set(known)]
        known += new
        template = self.template_of(kind)
        names = self.read.get(replace(kind, pinned=()), set())
        if not new or names - {name for name, _ in kind.pinned}:
            # In the second case its server was forked before it was known what imports look at.
            return
        if template is None:
            self.make_template(kind)
        else:
            with contextlib.suppress(OSError):
                template.link.send((IMPORT, self.clean(kind, new)))
                template.busy = True

    def listen_to(self, template: _TemplateHandle) -> None:
        """Hear what a template has to say."""
        try:
            what, value = template.link.recv()
            if what == BACK:
                self.fork_server(_take_over(template.link, value), template.kind)
        except (EOFError, OSError):
            template.link.close()
            self.templates.remove(template)
            os.waitpid(template.pid, 0)
            if not template.retired:
                self.failures[template.kind] = self.failures.get(template.kind, 0) + 1
            self.retire(template)
            return
        if what == READY:
            template.ready = True
            self.release_waiting(template)
        elif what == IDLE:
            template.built = True
            template.busy = False
        elif what == LEARNED:
            self.learned(template.kind, value)
        elif what == POISON:
            self.poisoned.setdefault(template.kind, set()).add(value)
            self.failures[template.kind] = self.failures.get(template.kind, 0) + 1
            self.retire(template)
            if self.clean(template.kind, self.modules.get(template.kind, [])):
                self.make_template(template.kind)
        elif what == READ:
            # Its imports hold what this one value made of them; the next order of each value has a template made.
            self.read.setdefault(replace(template.kind, pinned=()), set()).update(value)
            self.retire(template)
            environment = self.environments.get(template.kind, {})
            kind = self.pin(template.kind, environment)
            self.environments[kind] = environment
            self.make_template(kind)

    def retire(self, template: _TemplateHandle) -> None:
        """Give a template no more orders. It stays for the exit codes of its servers."""
        template.retired = True
        with contextlib.suppress(OSError):
            template.link.send((RETIRE, None))
        self.release_waiting(template)

    def release_waiting(self, template: _TemplateHandle) -> None:
        """Place the orders that waited for a template, which is ready or will never be."""
        waiting, template.waiting = template.waiting, []
        for order in waiting:
            if template.ready and not template.retired:
                self.place(order)
            else:
                self.fork_server(order, template.kind)

    def calm_waiting(self) -> None:
        """Tell those who wait that they have not been forgotten."""
        for template in self.templates:
            for order in template.waiting:
                with contextlib.suppress(OSError):
                    send(order.requester, WAIT, 0)
            if template.waiting and time.monotonic() - template.waiting[0].since > PRELUDE_TIMEOUT_S:
                os.kill(template.pid, signal.SIGKILL)

    def leave(self) -> NoReturn:
        """Clean up and end; the alive lock is held exclusively, or its room is gone."""
        try:
            if self.life.is_current():
                self.socket_path.unlink(missing_ok=True)
                self.life.path.unlink(missing_ok=True)
            if self.alive.held:
                self.room.remove_if_unused()
            for template in self.templates:
                # One whose imports never end would not see that we are gone.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(template.pid, signal.SIGKILL)
            # Workers that crashed without a model server have nobody else to clean up after them. Imported here,
            # because numpy comes with it, and this process is to stay small.
            from mpmm.shared_state.namespace import remove_all_deserted

            remove_all_deserted(self.room.root)
        finally:
            os._exit(0)


def main(root: str, life_path: str) -> None:
    """Be the zygote of the room below `root`; for a process that has just been started for that.

    Returns, in the process that was started, when a fork of it takes orders, or somebody else does.
    """
    try:
        life = open_lock(Path(life_path))
        life.exclusive(1.0)
    except (OSError, TimeoutError):
        sys.exit(1)
    room = room_at(Path(root))
    folder = Path(life_path).parent
    incarnation = os.urandom(4).hex()
    for leftover in folder.glob(f"{life.path.stem}-*.socket"):
        leftover.unlink(missing_ok=True)
    name = f"{life.path.stem}-{incarnation}.socket"
    listener = sockets.listen(folder, name)
    reader, writer = os.pipe()
    # The hooks of our fork would close lock and listener, so the child gets copies; the kernel keeps lock with them.
    lock_fd, listener_fd = os.dup(life.fd), os.dup(listener.fileno())
    if os.fork() != 0:
        # The lock is the child's from now on, so this process must not give it up.
        life.forget_after_fork()
        # Until the child has written who it is.
        os.close(writer)
        sys.exit(0 if os.read(reader, 1) else 1)
    life.fd = lock_fd
    with fork_guard:
        close_in_children(life)
        copy = close_in_children(socket.socket(fileno=listener_fd))
    copy.setblocking(False)
    text = json.dumps({"pid": os.getpid(), "socket": str(folder / name)}).encode()
    os.ftruncate(life.fd, 0)
    os.pwrite(life.fd, text, 0)
    call_this_process(PROCESS_NAME)
    os.write(writer, b"!")
    os.close(reader)
    os.close(writer)
    os.chdir("/")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Pages that a collection does not touch stay shared.
    gc.collect()
    gc.freeze()
    zygote = _Zygote(room.root, life, copy)
    try:
        zygote.run()
    finally:
        os._exit(1)


def send(connection: Connection, what: str, number: int) -> None:
    """Send a word and a number. Raises OSError."""
    connection.send_bytes(json.dumps([what, number]).encode())


def receive(connection: Connection) -> tuple[str, int]:
    """Receive a word and a number. Raises EOFError, OSError."""
    what, number = json.loads(connection.recv_bytes())
    return what, number


def _hand_over(link: Connection, what: str, order: _Order) -> None:
    """Give away an order, from zygote to template or back. Raises OSError; then it is still ours."""
    link.send((what, order.message))
    with sockets.duplicate(link.fileno()) as ours:
        fds = [order.requester.fileno(), *(descriptor.fd for descriptor in order.descriptors)]
        socket.send_fds(ours, [b"!"], fds)
    order.close()


def _take_over(link: Connection, message: bytes) -> _Order:
    """Receive the rest of an order that is given away. Raises EOFError, OSError."""
    with fork_guard:
        first, *descriptors = _receive_descriptors(link, 4)
        requester = close_in_children(Connection(os.dup(first.fd)))
        first.close()
    return _Order(message, requester, descriptors)


def _receive_descriptors(connection: Connection, count: int) -> list[_Descriptor]:
    with sockets.duplicate(connection.fileno()) as ours, fork_guard:
        _, fds, _, _ = socket.recv_fds(ours, 1, count)
        descriptors = [_Descriptor(fd) for fd in fds]
    if len(descriptors) != count:
        raise EOFError
    return descriptors


def _in_order(modules: Iterable[str]) -> list[str]:
    """Return modules with those of FIRST at the beginning."""
    return sorted(modules, key=lambda name: name not in FIRST)


def _set_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()


def _become_server(
    order: ForkOrder, descriptors: list[int], learned: Connection, renew: Callable[[dict[str, str]], None]
) -> NoReturn:
    """Turn a fresh fork into what `multiprocessing.spawn` would have made, and be the server."""
    try:
        report, out, err = descriptors
        null = os.open(os.devnull, os.O_RDONLY)
        for number, fd in enumerate((null, out, err)):
            os.dup2(fd, number)
            os.close(fd)
        for stream in (sys.stdout, sys.stderr):
            # Mypy takes both for `TextIO`, which has no such method.
            stream.reconfigure(line_buffering=stream is sys.stderr or stream.isatty())  # type: ignore[union-attr]  # typeshed's TextIO has no reconfigure
        _reset_signals()
        renew({**order.environment, **dict(order.plan.environment)})
        call_this_process("mpmm-server")
        importlib.invalidate_caches()
        util._finalizer_registry.clear()  # type: ignore[attr-defined]  # not in typeshed
        util._run_after_forkers()  # type: ignore[attr-defined]  # not in typeshed
        mp_process._children.clear()  # type: ignore[attr-defined]  # not in typeshed
        mp_process._process_counter = itertools.count(1)  # type: ignore[attr-defined]  # not in typeshed
        before = set(sys.modules)
        run_server(order.plan, Connection(report), order.preparation, on_made=lambda: _report_imports(before, learned))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _report_imports(before: set[str], learned: Connection) -> None:
    """Name the modules that came in since `before`, as far as an import by name would bring them."""
    new = []
    for name, module in list(sys.modules.items()):
        # Others are aliases, or were put there by hand.
        if name not in before and getattr(getattr(module, "__spec__", None), "name", None) == name:
            new.append(name)
    with contextlib.suppress(OSError), learned:
        learned.send_bytes(json.dumps(new).encode())


def _reset_signals() -> None:
    """Make sure that what ends a server does; other signals are what imported modules have made of them."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _may_fork() -> bool:
    """Tell whether this process can be forked safely: one thread, and no accelerator in use."""
    if threading.active_count() > 1 or _uses_accelerator():
        return False
    if _native_threads() == 1:
        return True
    # Some libraries end their threads before each fork and start them again when needed; see whether these are such.
    probe = os.fork()
    if probe == 0:
        os._exit(0)
    if not _within(PROBE_FORK_TIMEOUT_S, lambda: os.waitpid(probe, os.WNOHANG) != (0, 0)):
        os.kill(probe, signal.SIGKILL)
        os.waitpid(probe, 0)
        return False
    return _within(THREADS_END_S, lambda: _native_threads() == 1)


def _native_threads() -> int:
    """Count the threads of this process, whoever made them, but for the harmless ones."""
    names = []
    for thread in os.listdir("/proc/self/task"):
        # It may end before we can look.
        with contextlib.suppress(OSError):
            names.append(Path(f"/proc/self/task/{thread}/comm").read_text().strip())
    return sum(name not in HARMLESS_THREADS for name in names)


def _uses_accelerator() -> bool:
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{fd}").startswith("/dev/nvidia"):
                return True
    return False


def _within(timeout_s: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.001)
    return True
