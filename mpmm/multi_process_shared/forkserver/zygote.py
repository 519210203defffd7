"""The zygote: a warm process from which model servers are forked, so that they need not import everything again.

    start_server --(order, descriptors)--> zygote --fork--> server              a kind of order seen for the first time
                                             |
                                             +--fork--> template --fork--> server   later ones of the same kind

There is one zygote for a registry and an interpreter. The first process that needs it starts it; it lives by the
registry's alive lock as a server does, and keeps no other process alive. A server that comes up tells its parent which
modules it had to import. The zygote has a *template*, a fork of its own, import them, and has the next server of that
kind forked from there. So the zygote itself stays small, and answers at once whatever a template is doing. Orders are
of one kind when modules imported for one serve the other: equal `sys.path`, equal environment but for
PER_PROCESS_VARIABLES, equal preload hooks (see `client.add_preload_hook`), equal working directory and arguments.
`CUDA_VISIBLE_DEVICES` is one of those variables: every device has servers of the same kind, and CUDA reads it when a
device is first used, which a template must not do. If an import looks at such a variable, the servers of each value get
a template of their own.

No process forks while another of its threads runs, or in the middle of an import: zygote and template have one thread,
and do one thing at a time. A module whose import leaves a thread behind, opens an accelerator, or leaves anything else
that servers cannot have in common (see `leftovers`) makes the template that imported it *unforkable*: another one is
made which does without. What can be made anew in each server is: random generators, above all. Threads that their
library ends before every fork, as OpenBLAS does with its own, are allowed. Importing torch, TensorFlow or JAX is fine
by the same rule: what must not happen before a fork is the first use of the device.

A dead server stays a zombie until the process that ordered it has asked for its exit code, or is gone: the connection
of the order stays open for that. When zygote or template die, servers live on; their exit codes are lost.

A server has the environment, the working directory, `__main__`, standard output and error of the process that ordered
it. What else a process inherits (limits, priority, umask, control group) it has from the one that started the zygote.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Generator, Iterable
from dataclasses import replace
from multiprocessing import AuthenticationError, Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NoReturn

from mpmm.interpreter.fork_hooks import close_in_children, fork_guard
from mpmm.multi_process_shared.forkserver.fork_parent import ForkParent
from mpmm.multi_process_shared.forkserver.orders import (
    BACK,
    CONVERSATION_TIMEOUT_S,
    FORK,
    IDLE,
    IMPORT,
    IMPORTED,
    READ,
    READY,
    RETIRE,
    UNFORKABLE,
    WAIT,
    Descriptor,
    Kind,
    Order,
    hand_over,
    receive_descriptors,
    send,
    take_over,
)
from mpmm.multi_process_shared.forkserver.template import Template
from mpmm.multi_process_shared.registry import open_lock, registry_at
from mpmm.multi_process_shared.rpc import sockets
from mpmm.multi_process_shared.server_process import AliveLock
from mpmm.multi_process_shared.spawned_server import call_this_process
from mpmm.shared_state.lock_file import LockFile

__all__ = ["PROCESS_NAME", "main"]

PRELOAD_VARIABLE = "MPMM_PRELOAD"
PROCESS_NAME = "mpmm-zygote"
PROBE_INTERVAL_S = 1.0
PRELOAD_HOOK_TIMEOUT_S = 60.0
MOST_TEMPLATES = 8
TEMPLATE_USED_S = 60.0
# A socket takes that much even while the other side does not read: the zygote never waits for a template that imports.
MOST_UNREAD_BYTES = 65_536
# What a message takes of that beyond its length, at most.
MESSAGE_BYTES = 1024
MOST_FAILURES = 5


class _TemplateHandle:
    """A template as the zygote sees it."""

    def __init__(self, kind: Kind, pid: int, link: Connection) -> None:
        self.kind = kind
        self.pid = pid
        self.link = link
        self.waiting: list[Order] = []
        # It has done its preload hooks; it has once done all that it was told to.
        self.ready = False
        self.built = False
        self.retired = False
        self.busy = True
        # Of what it was told while it was busy.
        self.unread_bytes = 0
        self.used = time.monotonic()

    def accepts(self, order: Order) -> bool:
        """Tell whether an order is better off here than with the zygote, which can fork it at once."""
        if self.retired or (self.ready and not self.has_room_for(len(order.message))):
            return False
        # They take no longer here than in the server itself, and the other orders of a burst wait for the same ones.
        return self.built or bool(self.kind.preload_hooks)

    def has_room_for(self, size: int) -> bool:
        """Tell whether its socket takes a message of so many bytes at once."""
        return not self.busy or self.unread_bytes + size + MESSAGE_BYTES <= MOST_UNREAD_BYTES

    def note_told(self, size: int) -> None:
        """Note that it was told so many bytes."""
        if self.busy:
            self.unread_bytes += size + MESSAGE_BYTES


class _Zygote(ForkParent):
    """The process that takes orders."""

    def __init__(self, root: Path, life: LockFile, listener: socket.socket) -> None:
        super().__init__()
        self.registry = registry_at(root)
        self.life = life
        self.listener = listener
        self.socket_path = Path(json.loads(os.pread(life.fd, 4096, 0))["socket"])
        self.alive = AliveLock(str(self.registry.alive_path))
        # Requesters that have not said all yet: how they are heard, and until when.
        self.requesters: dict[Connection, tuple[Generator[None, None, None], float]] = {}
        self.templates: list[_TemplateHandle] = []
        self.modules: dict[Kind, list[str]] = {}
        self.unforkable: dict[Kind, set[str]] = {}
        self.failures: dict[Kind, int] = {}
        # By the kind without anything pinned: what its imports look at; and by kind, what they found the last time.
        self.read: dict[Kind, set[str]] = {}
        self.environments: dict[Kind, dict[str, str]] = {}

    def run(self) -> NoReturn:
        """Take orders until no process is left that could give one."""
        next_probe = time.monotonic() + PROBE_INTERVAL_S
        while True:
            links = [template.link for template in self.templates]
            heard = [self.listener, *self.requesters, *links, *self.watched()]
            ready = wait(heard, max(0.0, next_probe - time.monotonic()))
            self.look_after_children(ready)
            for template in [template for template in self.templates if template.link in ready]:
                self.listen_to(template)
            for requester in [requester for requester in self.requesters if requester in ready]:
                self.hear(requester)
            if self.listener in ready:
                self.meet_requester()
            if time.monotonic() >= next_probe:
                next_probe = time.monotonic() + PROBE_INTERVAL_S
                self.hang_up_on_silent()
                if self.alive.is_free():
                    self.leave()
                self.keep_alive()

    def meet_requester(self) -> None:
        """Begin to hear a requester. One that is stopped in the middle of what it says holds up no other."""
        requester = sockets.accept(self.listener)
        if requester is not None:
            self.requesters[requester] = self.take_order(requester), time.monotonic() + sockets.HANDSHAKE_TIMEOUT_S
            self.hear(requester)

    def hear(self, requester: Connection) -> None:
        """Hear what a requester has said meanwhile."""
        steps, _ = self.requesters[requester]
        try:
            next(steps)
        except StopIteration:
            del self.requesters[requester]

    def hang_up_on_silent(self) -> None:
        """Hear those no longer that have not said all in time."""
        now = time.monotonic()
        for requester in [requester for requester, (_, until) in self.requesters.items() if until <= now]:
            steps, _ = self.requesters.pop(requester)
            steps.close()
            requester.close()

    def take_order(self, requester: Connection) -> Generator[None, None, None]:
        """Hear a requester, and have its server forked; go on each time that it has said something."""
        descriptors: list[Descriptor] = []
        try:
            sockets.set_timeouts(requester, CONVERSATION_TIMEOUT_S)
            yield from sockets.handshake(requester, self.registry.key())
            yield
            message = requester.recv_bytes()
            yield
            descriptors = receive_descriptors(requester, 3)
            self.place(Order(message, requester, descriptors))
        except (EOFError, OSError, AuthenticationError, ValueError, pickle.UnpicklingError):
            requester.close()
            for descriptor in descriptors:
                descriptor.close()

    def place(self, order: Order) -> None:
        """Give the order to a template, or fork the server here."""
        kind = self.kind_of(order)
        template = self.template_of(kind)
        if template is None:
            self.environments[kind] = order.environment
            wanted = order.order.environment.get(PRELOAD_VARIABLE, "").split(",")
            modules = self.modules.setdefault(kind, [name.strip() for name in wanted if name.strip()])
            if modules or kind.preload_hooks:
                template = self.make_template(kind)
        if template is not None and template.accepts(order):
            template.used = time.monotonic()
            if not template.ready:
                template.waiting.append(order)
                return
            try:
                hand_over(template.link, FORK, order)
                template.note_told(len(order.message))
                return
            except OSError:
                self.give_up(template)
        self.fork_server(order, kind)

    def kind_of(self, order: Order) -> Kind:
        """Return the kind of an order, to which applies what is known of orders with other values of the variables."""
        return self.pin(order.kind, order.environment)

    def pin(self, kind: Kind, environment: dict[str, str]) -> Kind:
        """Return a kind with the values of those variables that the imports of its servers look at."""
        names = self.read.get(replace(kind, pinned=()))
        if not names:
            return kind
        pinned = replace(kind, pinned=tuple((name, environment.get(name)) for name in sorted(names)))
        if pinned not in self.modules:
            self.modules[pinned] = list(self.modules.get(kind, []))
            self.unforkable[pinned] = set(self.unforkable.get(kind, set()))
        return pinned

    def template_of(self, kind: Kind) -> _TemplateHandle | None:
        """Return the template that serves a kind now."""
        return next((one for one in self.templates if one.kind == kind and not one.retired), None)

    def make_template(self, kind: Kind) -> _TemplateHandle | None:
        """Fork a template, which begins to import; None for a kind with which that has gone wrong too often."""
        unforkable = self.unforkable.setdefault(kind, set())
        if self.failures.get(kind, 0) >= MOST_FAILURES or unforkable & set(kind.preload_hooks):
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
                Template(kind, self.environments.get(kind, dict(kind.environment)), theirs, modules).run()
            finally:
                os._exit(1)
        theirs.close()
        sockets.set_timeouts(ours, CONVERSATION_TIMEOUT_S)
        template = _TemplateHandle(kind, pid, ours)
        self.templates.append(template)
        return template

    def clean(self, kind: Kind, modules: Iterable[str]) -> list[str]:
        """Return the modules without those that have cost a template its life."""
        unforkable = self.unforkable.get(kind, set())
        return [name for name in modules if not any(f"{name}.".startswith(f"{bad}.") for bad in unforkable)]

    def note_imports(self, kind: Kind, modules: list[str]) -> None:
        known = self.modules.setdefault(kind, [])
        new = [name for name in modules if name not in set(known)]
        known += new
        template = self.template_of(kind)
        names = self.read.get(replace(kind, pinned=()), set())
        if not new or names - {name for name, _ in kind.pinned}:
            # In the second case its server was forked before it was known what imports look at.
            return
        if template is None:
            self.make_template(kind)
        else:
            size = sum(map(len, new))
            if not template.has_room_for(size):
                # The next template imports them.
                return
            try:
                template.link.send((IMPORT, self.clean(kind, new)))
                template.busy = True
                template.note_told(size)
            except OSError:
                self.give_up(template)

    def listen_to(self, template: _TemplateHandle) -> None:
        """Hear what a template has to say."""
        try:
            what, value = template.link.recv()
            if what == BACK:
                self.fork_server(take_over(template.link, value), template.kind)
        except (EOFError, OSError):
            # It has ended, or it is stopped in the middle of what it says.
            self.kill(template)
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
            template.busy, template.unread_bytes = False, 0
        elif what == IMPORTED:
            self.note_imports(template.kind, value)
        elif what == UNFORKABLE:
            self.unforkable.setdefault(template.kind, set()).add(value)
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

    def give_up(self, template: _TemplateHandle) -> None:
        """End a template that does not take what it is told: after half a message it would understand none."""
        self.kill(template)
        self.retire(template)

    @staticmethod
    def kill(template: _TemplateHandle) -> None:
        """Kill a template. Its servers live on, but their exit codes are lost."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(template.pid, signal.SIGKILL)

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

    def keep_alive(self) -> None:
        """Tell requesters that wait for a template that their orders have not been forgotten."""
        for template in self.templates:
            for order in template.waiting:
                with contextlib.suppress(OSError):
                    send(order.requester, WAIT, 0)
            if template.waiting and time.monotonic() - template.waiting[0].since > PRELOAD_HOOK_TIMEOUT_S:
                self.kill(template)

    def leave(self) -> NoReturn:
        """Clean up and end; the alive lock is held exclusively, or its registry is gone."""
        try:
            if self.life.is_current():
                self.socket_path.unlink(missing_ok=True)
                self.life.path.unlink(missing_ok=True)
            if self.alive.held:
                self.registry.remove_if_unused()
            for template in self.templates:
                # One whose imports never end would not see that we are gone.
                self.kill(template)
            # Workers that crashed without a model server leave no other process that cleans up after them. Imported
            # here, because numpy comes with it, and this process is to stay small.
            from mpmm.shared_state.removal import remove_all_deserted

            remove_all_deserted(self.registry.root)
        finally:
            os._exit(0)


def main(root: str, life_path: str) -> None:
    """Be the zygote of the registry below `root`; for a process that has just been started for that.

    Returns, in the process that was started, when a fork of it takes orders, or another zygote does.
    """
    try:
        life = open_lock(Path(life_path))
        life.exclusive(1.0)
    except (OSError, TimeoutError):
        sys.exit(1)
    registry = registry_at(Path(root))
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
        # Until the child has written its pid and socket into the life file.
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
    # Where the starter ignores it, so would this process, and its children would be gone before it asks for them.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Pages that a collection does not touch stay shared.
    gc.collect()
    gc.freeze()
    zygote = _Zygote(registry.root, life, copy)
    try:
        zygote.run()
    finally:
        os._exit(1)
