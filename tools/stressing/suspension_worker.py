"""A worker of the suspension run: it acquires, suspends and resumes, one call after another, and reports its findings.

It sends a possible violation to the conductor as a claim, because only the conductor knows which processes it killed.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import logging
import os
import random
import signal
import time
import traceback
from dataclasses import dataclass
from typing import Any, NoReturn

from mpmm.errors import AcquireTimeoutError, LockTimeoutError, ModelServerError, ServerStartError
from mpmm.model_manager import ModelManager
from mpmm.multi_process_shared import MultiProcessShared, server_pid
from mpmm.shared_state.layout import Capacities, Model
from stressing.suspended import SuspendedModel, mb_of, tags
from stressing.worker import LEAVE, RUN, Reporter, ServerGoneError, die_with_parent, leave_process, no_server, watch_log

__all__ = ["NAMESPACE", "Crew", "be_worker"]

NAMESPACE = "suspensions"
MODELS = 6
BUDGET_MB = 400.0
TIMEOUT_S = 30.0
# The load time entered in the tables, so that copies are suspended rather than unloaded although their loads are quick.
LOAD_S = 60.0
RUNNING = 0
CAPACITIES = Capacities(
    members=256, models=32, instances=64, tickets=128, devices=2, observations=64, events=1024, undo=8192
)


@dataclass(frozen=True)
class Crew:
    """What the workers of a namespace need to know. gpus: the folder of its simulated GPU."""

    seed: int
    gpus: str
    report_fd: int
    phases: memoryview


class _Loader:
    """The loader of one call: it starts a server with a handle of its own, and reports the server's pid."""

    def __init__(self, crew: Crew, reporter: Reporter, tag: str, rng: random.Random) -> None:
        self._crew = crew
        self._reporter = reporter
        self._tag = tag
        self.handle = f"{tag}-{os.getpid()}-{rng.getrandbits(32):x}"
        self.ran = False

    def __call__(self) -> str:
        self.ran = True
        make = functools.partial(SuspendedModel, self._crew.gpus, mb_of(self._tag))
        MultiProcessShared(make, tag=self.handle, always_proxy=True, spawn_process=True).acquire()
        self._reporter.send("loaded", tag=self._tag, handle=self.handle, server=server_pid(self.handle))
        return self.handle


class _Warnings(logging.Handler):
    """Passes warnings on, because they may explain a later violation."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__(logging.WARNING)
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        """Send a warning."""
        self._reporter.send("warned", text=record.getMessage()[:600])


class _Worker:
    def __init__(self, crew: Crew, index: int, incarnation: int) -> None:
        self._crew = crew
        self._index = index
        self._rng = random.Random(f"{crew.seed}.{incarnation}")
        self._reporter = Reporter(crew.report_fd, index)
        self._tags = tags(MODELS)
        self._manager = ModelManager(
            namespace=NAMESPACE,
            memory_source="nvml",
            suspend="checkpoint",
            suspend_budget_mb=BUDGET_MB,
            slack_percentage=0.0,
            wait_timeout_seconds=TIMEOUT_S,
            lock_timeout_seconds=TIMEOUT_S,
            poll_interval=0.25,
            eviction_cooldown_seconds=0.0,
            max_overtake_seconds=0.2,
            capacities=CAPACITIES,
        )

    def run(self) -> None:
        """Work while the phase is RUN. Before each call, mark this worker as busy, and then check the phase again."""
        phases, mine = self._crew.phases, 1 + self._index
        calls = (self._use, self._suspend, self._resume)
        while phases[0] != LEAVE:
            phases[mine] = 1
            if phases[0] != RUN:
                phases[mine] = 0
                self._reporter.flush()
                time.sleep(0.005)
                continue
            tag = self._rng.choice(self._tags)
            began = time.monotonic()
            try:
                self._rng.choices(calls, (60, 25, 15))[0](tag)
            except AcquireTimeoutError as error:
                self._claim("timeout", tag, began, error)
            except LockTimeoutError as error:
                self._claim("lock_timeout", tag, began, error)
            except BaseException as error:
                self._claim("unexpected", tag, began, error)
            phases[mine] = 0
            time.sleep(self._rng.uniform(0.0, 0.05))
        self._manager.shutdown()

    def _claim(self, kind: str, tag: str, began: float, error: BaseException, **facts: Any) -> None:
        text = f"{tag}: " + "".join(traceback.format_exception(error))
        self._reporter.claim(kind, began, 0.0, text, **facts)

    # ---- the calls -----------------------------------------------------------------------------------------

    def _use(self, tag: str) -> None:
        loader, began = _Loader(self._crew, self._reporter, tag, self._rng), time.monotonic()
        try:
            handle = self._manager.acquire_model(tag, loader, expect_mb=float(mb_of(tag)))
        except (ServerStartError, ModelServerError) as error:
            self._claim("server_error", tag, began, error, handle=loader.handle)
            return
        self._reporter.count("loads" if loader.ran else "served")
        if loader.ran:
            self._let_loads_take_long(tag)
        self._look(tag, handle, began)
        time.sleep(self._rng.choice((0.0, 0.0, self._rng.uniform(0.0, 0.05))))
        self._manager.release_model(tag, handle)

    def _look(self, tag: str, handle: str, began: float) -> None:
        """Check that the acquired copy is complete, and in the process that has loaded it."""
        shared = MultiProcessShared(functools.partial(no_server, handle), tag=handle, always_proxy=True)
        try:
            model = shared.acquire()
            try:
                pid, mb, state = model.look()
            finally:
                shared.release(model)
        except (ServerGoneError, ModelServerError) as error:
            self._claim("server_error", tag, began, error, handle=handle)
            return
        self._reporter.send("used", tag=tag, handle=handle, server=pid)
        if mb != mb_of(tag) or state != RUNNING:
            text = f"{tag} is in use by pid {os.getpid()} with {mb:g} of {mb_of(tag)} MB on the device, state {state}"
            self._reporter.claim("not_whole", began, 0.0, text)

    def _suspend(self, tag: str) -> None:
        self._reporter.count("suspended by hand", self._manager.suspend(tag))

    def _resume(self, tag: str) -> None:
        self._reporter.count("resumed by hand", self._manager.resume(tag))

    def _let_loads_take_long(self, tag: str) -> None:
        namespace = self._manager._connected().namespace
        with namespace.transaction() as t:
            row = namespace.tables.model_row(tag)
            if row is not None:
                t.set_float(namespace.tables.model(row) + Model.LOAD_S, LOAD_S)


def be_worker(crew: Crew, index: int, incarnation: int) -> NoReturn:
    """Run as a worker, in a process that the conductor has forked."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR2)
    die_with_parent()
    gc.freeze()
    reporter = Reporter(crew.report_fd, index)
    watch_log(reporter)
    logging.getLogger("mpmm").addHandler(_Warnings(reporter))
    code = 0
    try:
        _Worker(crew, index, incarnation).run()
    except BaseException:
        reporter.claim("unexpected", time.monotonic(), 0.0, traceback.format_exc())
        code = 1
    leave_process(code)
