"""The zygote: a warm process from which model servers are forked, so that they need not import everything again.

    start_server --(order, descriptors)--> zygote --fork--> server              a kind of order seen for the first time
                                             |
                                             +--fork--> template --fork--> server   later ones of the same kind

There is one zygote for each registry and interpreter. The first process that needs it starts it; like a server, it
lives while clients hold the registry's alive lock, and keeps no other process alive. A new server tells its parent
which modules it had to import. The zygote has a *template*, a fork of itself, import them, and has the next server of
that kind forked from the template. So the zygote itself stays small, and answers at once whatever a template is doing.
Orders are of one kind if modules imported for one serve the other: equal `sys.path`, equal environment except for
PER_PROCESS_VARIABLES, equal preload hooks (see `client.add_preload_hook`), equal working directory and arguments.
`CUDA_VISIBLE_DEVICES` is one of those variables: servers of all devices are of one kind, and CUDA reads it when a
device is first used, which a template must not do. If an import reads such a variable, the servers of each value get a
template of their own.

No process forks while another of its threads runs, or in the middle of an import: zygote and template have one thread,
and do one thing at a time. A module whose import leaves a thread behind, opens an accelerator, or leaves anything else
that servers cannot share (see `leftovers`) makes the template that imported it *unforkable*: another template is made
without that module. From the third template of a kind on, the template first tries each import in a fork of its own,
and leaves out the modules that it must not import. State that can be renewed in each server is renewed, above all
random generators. Threads that their library ends before every fork, as OpenBLAS does, are allowed. By the same rule,
importing torch, TensorFlow or JAX is fine: only the first use of the device must not happen before a fork.

A dead server stays a zombie until the process that ordered it has asked for its exit code, or is gone: the connection
of the order stays open for that. If zygote or template die, servers live on, but their exit codes are lost.

A server has the environment, the working directory, `__main__`, standard output and error of the process that ordered
it. It inherits everything else (limits, priority, umask, control group) from the process that started the zygote.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Generator, Iterable
from dataclasses import replace
from multiprocessing import Pipe
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
    REFUSED,
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
# A socket takes this much even while the other side does not read: the zygote never waits for a template that imports.
MOST_UNREAD_BYTES = 65_536
# The most that a message takes of it beyond its length.
MESSAGE_BYTES = 1024
# Each failed template has imported in vain everything up to the module that made it unforkable, or that ended it.
MOST_FAILURES = 5
# From then on templates try each import in a fork first: it costs twice the time, once, and finds all such modules.
CAREFUL_AFTER_FAILURES = 2


class _TemplateHandle:
    """A template as the zygote sees it."""

    def __init__(self, kind: Kind, pid: int, link: Connection) -> None:
        self.kind = kind
        self.pid = pid
        self.link = link
        self.waiting: list[Order] = []
        # Ready: it has run its preload hooks. Built: it has, at least once, imported everything that it was told to.
        self.ready = False
        self.built = False
        self.retired = False
        self.busy = True
        # Of the messages that it was sent while it was busy.
        self.unread_bytes = 0
        self.used = time.monotonic()

    def accepts(self, order: Order) -> bool:
        """Tell whether to give an order to this template and not to the zygote, which can fork the server at once."""
        if self.retired or (self.ready and not self.has_room_for(len(order.message))):
            return False
        # Hooks take no longer here than in the server itself, and the other orders of a burst wait for the same hooks.
        return self.built or bool(self.kind.preload_hooks)

    def has_room_for(self, size: int) -> bool:
        """Tell whether its socket takes a message of `size` bytes at once."""
        return not self.busy or self.unread_bytes + size + MESSAGE_BYTES <= MOST_UNREAD_BYTES

    def note_told(self, size: int) -> None:
        """Note that it was sent a message of `size` bytes."""
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
        # Requesters that have not sent their whole order yet: the steps that read it, and their deadline.
        self.requesters: dict[Connection, tuple[Generator[None, None, None], float]] = {}
        self.templates: list[_TemplateHandle] = []
        self.modules: dict[Kind, list[str]] = {}
        self.unforkable: dict[Kind, set[str]] = {}
        self.failures: dict[Kind, int] = {}
        # By the kind without anything pinned: the variables that its imports read. By kind: the environment they found.
        self.read: dict[Kind, set[str]] = {}
        self.environments: dict[Kind, dict[str, str]] = {}

    def run(self) -> NoReturn:
        """Take orders until no process is left that could send one."""
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
                if self.alive.is_free() or self.is_forgotten():
                    self.leave()
                self.keep_alive()

    def is_forgotten(self) -> bool:
        """Tell whether no process finds this one any more, because its lock was removed, and it has no work left."""
        return not (self.life.is_current() or self.children or self.templates or self.requesters)

    def meet_requester(self) -> None:
        """Start reading a requester's order. A requester that is stopped in the middle of it holds up no other."""
        requester = sockets.accept(self.listener)
        if requester is not None:
            self.requesters[requester] = self.take_order(requester), time.monotonic() + sockets.HANDSHAKE_TIMEOUT_S
            self.hear(requester)

    def hear(self, requester: Connection) -> None:
        """Read what a requester has sent meanwhile."""
        steps, _ = self.requesters[requester]
        try:
            next(steps)
        except StopIteration:
            del self.requesters[requester]

    def hang_up_on_silent(self) -> None:
        """Hang up on requesters that have not sent their whole order in time."""
        now = time.monotonic()
        for requester in [requester for requester, (_, until) in self.requesters.items() if until <= now]:
            steps, _ = self.requesters.pop(requester)
            steps.close()
            requester.close()

    def take_order(self, requester: Connection) -> Generator[None, None, None]:
        """Read a requester's order and have its server forked; `hear` resumes this each time there is more to read."""
        descriptors: list[Descriptor] = []
        try:
            sockets.set_timeouts(requester, CONVERSATION_TIMEOUT_S)
            yield from sockets.handshake(requester, self.registry.key())
            message = yield from sockets.message_in_steps(requester)
            yield
            descriptors = receive_descriptors(requester, 3)
            self.place(Order(message, requester, descriptors))
        # An order of another version of mpmm, which was installed meanwhile, may raise anything as it is unpickled or
        # looked at. Its requester spawns the server instead, and the others keep this process.
        except Exception:
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
        """Return the kind of an order, applying what is known from orders with other values of the variables."""
        return self.pin(order.kind, order.environment)

    def pin(self, kind: Kind, environment: dict[str, str]) -> Kind:
        """Return a kind with the values of the variables that its servers' imports read."""
        names = self.read.get(replace(kind, pinned=()))
        if not names:
            return kind
        pinned = replace(kind, pinned=tuple((name, environment.get(name)) for name in sorted(names)))
        if pinned not in self.modules:
            self.modules[pinned] = list(self.modules.get(kind, []))
            self.unforkable[pinned] = set(self.unforkable.get(kind, set()))
        return pinned

    def template_of(self, kind: Kind) -> _TemplateHandle | None:
        """Return the template that serves a kind now, None if there is none."""
        return next((one for one in self.templates if one.kind == kind and not one.retired), None)

    def make_template(self, kind: Kind) -> _TemplateHandle | None:
        """Fork a template, which starts importing; None if its kind failed too often, or too many others are in use."""
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
                environment = self.environments.get(kind, dict(kind.environment))
                careful = self.failures.get(kind, 0) >= CAREFUL_AFTER_FAILURES
                Template(kind, environment, theirs, modules, careful).run()
            finally:
                os._exit(1)
        theirs.close()
        sockets.set_timeouts(ours, CONVERSATION_TIMEOUT_S)
        template = _TemplateHandle(kind, pid, ours)
        self.templates.append(template)
        return template

    def clean(self, kind: Kind, modules: Iterable[str]) -> list[str]:
        """Return the modules without those that have made a template unforkable."""
        unforkable = self.unforkable.get(kind, set())
        return [name for name in modules if not any(f"{name}.".startswith(f"{bad}.") for bad in unforkable)]

    def note_imports(self, kind: Kind, modules: list[str]) -> None:
        known = self.modules.setdefault(kind, [])
        new = [name for name in modules if name not in set(known)]
        known += new
        template = self.template_of(kind)
        names = self.read.get(replace(kind, pinned=()), set())
        if not new or names - {name for name, _ in kind.pinned}:
            # In the second case the server was forked before it was known which variables its imports read.
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
        """Read a template's message and act on it."""
        try:
            what, value = template.link.recv()
            if what == BACK:
                self.fork_server(take_over(template.link, value), template.kind)
        except (EOFError, OSError):
            # It has ended, or it is stopped in the middle of a message.
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
        elif what == REFUSED:
            self.unforkable.setdefault(template.kind, set()).add(value)
        elif what == UNFORKABLE:
            self.unforkable.setdefault(template.kind, set()).add(value)
            self.failures[template.kind] = self.failures.get(template.kind, 0) + 1
            self.retire(template)
            if self.clean(template.kind, self.modules.get(template.kind, [])):
                self.make_template(template.kind)
        elif what == READ:
            # Its imports depend on this one value; the next order with each other value has a template made.
            self.read.setdefault(replace(template.kind, pinned=()), set()).update(value)
            self.retire(template)
            environment = self.environments.get(template.kind, {})
            kind = self.pin(template.kind, environment)
            self.environments[kind] = environment
            self.make_template(kind)

    def give_up(self, template: _TemplateHandle) -> None:
        """End a template that does not read its messages: after half a message it would understand no other."""
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
        """Place the orders that waited for a template, which is ready now or never will be."""
        waiting, template.waiting = template.waiting, []
        for order in waiting:
            if template.ready and not template.retired:
                self.place(order)
            else:
                self.fork_server(order, template.kind)

    def keep_alive(self) -> None:
        """Tell requesters whose orders wait for a template that they are not forgotten."""
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
                # A template whose imports never end would not notice that the zygote is gone.
                self.kill(template)
            # After a crash of workers without a model server, no other process would clean up. Imported here, because
            # it imports numpy, and this process should stay small.
            from mpmm.shared_state.removal import remove_all_deserted

            remove_all_deserted(self.registry.root)
        finally:
            os._exit(0)


def main(root: str, life_path: str) -> None:
    """Be the zygote of the registry below `root`, in a process that was just started for it.

    The started process exits once a fork of it takes orders, or because another zygote holds the life lock.
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
    # mpmm's fork hooks would close lock and listener in the child, so it gets duplicates, which keep the lock.
    lock_fd, listener_fd = os.dup(life.fd), os.dup(listener.fileno())
    if os.fork() != 0:
        # The lock is the child's from now on, so this process must not unlock it.
        life.forget_after_fork()
        # Wait until the child has written its pid and socket into the life file.
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
    # If the starter ignored it, this process would, too, and its children would be reaped before it asks for them.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Pages that a collection does not touch stay shared.
    gc.collect()
    gc.freeze()
    zygote = _Zygote(registry.root, life, copy)
    try:
        zygote.run()
    finally:
        os._exit(1)
