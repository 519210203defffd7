"""A template: a fork of the zygote that imports what servers of one kind need, and forks them."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

from mpmm.interpreter.fork_hooks import close_in_children
from mpmm.multi_process_shared.forkserver.fork_parent import ForkParent
from mpmm.multi_process_shared.forkserver.leftovers import FIRST, Watch
from mpmm.multi_process_shared.forkserver.orders import (
    BACK,
    IDLE,
    IMPORT,
    IMPORTED,
    READ,
    READY,
    REFUSED,
    RETIRE,
    UNFORKABLE,
    Kind,
    hand_over,
    take_over,
)

__all__ = ["Template"]

# pyarrow's allocator starts this thread. It takes all of its own locks before a fork, and restarts the thread after it.
HARMLESS_THREADS = frozenset({"jemalloc_bg_thd"})
PROBE_FORK_TIMEOUT_S = 2.0
THREADS_END_S = 0.1
# The kernel ends a trial whose import takes longer, or never ends.
TRIAL_TIMEOUT_S = 60
# The exit code of a trial that has passed: not 0, with which the module itself may end the process.
PASSED = 87
# A template that has spent so long on trials of modules that it then refused imports nothing more.
REFUSALS_S = 60.0


class Template(ForkParent):
    """A fork of the zygote that imports what servers of one kind need, and forks them."""

    def __init__(
        self, kind: Kind, environment: dict[str, str], zygote: Connection, modules: list[str], careful: bool = False
    ) -> None:
        """careful: try each import in a fork first, and leave out the modules after which no server can be forked."""
        super().__init__()
        self.kind = kind
        self.careful = careful
        self.refusals_s = 0.0
        self.zygote = close_in_children(zygote)
        self.modules = _in_order(modules)
        self.environment = environment
        self.unforkable = False
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
        for preload_hook in self.kind.preload_hooks:
            self.make_ready(preload_hook)
        self.tell(READY)
        working = True
        while True:
            if working and not self.modules:
                working = False
                gc.collect()
                # Otherwise the collector's marks would copy every page that servers share with this process.
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
                if self.refusals_s < REFUSALS_S:
                    self.modules += _in_order(value)
                return True
            if what == RETIRE:
                self.retired = True
                self.modules.clear()
                return False
            order = take_over(self.zygote, value)
            if self.unforkable:
                hand_over(self.zygote, BACK, order)
            else:
                self.fork_server(order, self.kind)
        except (EOFError, OSError):
            os._exit(0)
        return False

    def renewal(self) -> Callable[[dict[str, str]], None]:
        changes = self.watch.changes()
        return lambda environment: self.watch.renew(environment.items(), changes)

    def make_ready(self, name: str) -> None:
        """Import a module, or run a preload hook; tell the zygote if no server can be forked after that."""
        module, _, function = name.partition(":")
        if self.unforkable or (module in sys.modules and not function):
            return
        if self.careful and not function and not self.passes_trial(module):
            self.modules = [other for other in self.modules if not other.startswith(f"{module}.")]
            self.tell(REFUSED, module)
            return
        self.do(module, function)
        # Undo handlers of imports: SIGTERM must end this process, and a server that has not installed its own handler.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # What a hook's own module reads makes no difference: all servers of this kind call the hook, and no others do.
        reads = self.watch.reads(but_by=module if function else "") - {pinned for pinned, _ in self.kind.pinned}
        if not self.may_fork():
            self.give_up(UNFORKABLE, name)
        elif reads:
            self.give_up(READ, sorted(reads))
        elif name in FIRST:
            self.watch.known(name)

    def do(self, module: str, function: str) -> None:
        """Import a module and call its function, if one is named, while `watch` looks on."""
        self.watch.begin()
        try:
            imported = importlib.import_module(module)
            if function:
                getattr(imported, function)()
        except BaseException:
            # The server will do this itself, and fail where the error is seen.
            pass
        finally:
            self.watch.end()

    def may_fork(self) -> bool:
        """Tell whether servers can be forked after what was done last."""
        return _may_fork() and self.watch.problem() is None

    def passes_trial(self, module: str) -> bool:
        """Import a module in a fork; return whether servers could be forked after that."""
        began = time.monotonic()
        try:
            trial = os.fork()
        except OSError:
            # Too many processes: that says nothing about the module.
            return True
        if trial == 0:
            try:
                # The template may be killed meanwhile, and would then end no import that hangs.
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(TRIAL_TIMEOUT_S)
                self.do(module, "")
                os._exit(PASSED if self.may_fork() else 1)
            finally:
                os._exit(1)
        _, status = os.waitpid(trial, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == PASSED:
            return True
        self.refusals_s += time.monotonic() - began
        if self.refusals_s >= REFUSALS_S:
            self.modules.clear()
        return False

    def give_up(self, what: str, value: Any) -> None:
        """Fork no more servers, and tell the zygote why."""
        self.unforkable = True
        self.modules.clear()
        self.tell(what, value)

    def note_imports(self, kind: Kind, modules: list[str]) -> None:
        self.tell(IMPORTED, modules)

    def tell(self, what: str, value: Any = None) -> None:
        """Send a message to the zygote."""
        try:
            self.zygote.send((what, value))
        except OSError:
            os._exit(0)


def _in_order(modules: Iterable[str]) -> list[str]:
    """Return modules with those of FIRST at the beginning."""
    return sorted(modules, key=lambda name: name not in FIRST)


def _may_fork() -> bool:
    """Tell whether this process can be forked safely: one thread, and no accelerator in use."""
    if threading.active_count() > 1 or _uses_accelerator():
        return False
    if _native_threads() == 1:
        return True
    # Some libraries end their threads before each fork and start them again when needed: fork to see if these do.
    probe = os.fork()
    if probe == 0:
        os._exit(0)
    if not _within(PROBE_FORK_TIMEOUT_S, lambda: os.waitpid(probe, os.WNOHANG) != (0, 0)):
        os.kill(probe, signal.SIGKILL)
        os.waitpid(probe, 0)
        return False
    return _within(THREADS_END_S, lambda: _native_threads() == 1)


def _native_threads() -> int:
    """Count the threads of this process, including those of libraries, except for the harmless ones."""
    names = []
    for thread in os.listdir("/proc/self/task"):
        # The thread may have ended meanwhile.
        with contextlib.suppress(OSError):
            names.append(Path(f"/proc/self/task/{thread}/comm").read_text(encoding="utf-8", errors="replace").strip())
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
