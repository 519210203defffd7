"""A worker of the stress run: threads that acquire, use and release, and report what they find wrong.

A worker reports possible violations to the conductor as a *claim*, because only the conductor knows which processes it
has stopped and killed.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import gc
import json
import logging
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import util
from typing import Any, NoReturn

from mpmm.errors import (
    AcquireTimeoutError,
    LockTimeoutError,
    ModelServerError,
    NotAcquiredError,
    ServerStartError,
    TableFullError,
)
from mpmm.interpreter.thread_frames import innermost_frame
from mpmm.model_manager import ModelManager
from mpmm.multi_process_shared import MultiProcessShared, server_pid
from mpmm.shared_state.layout import Capacities
from stressing.models import (
    Allocation,
    DoubleUseError,
    OutOfMemoryError,
    OwnedModel,
    Plan,
    ServedModel,
    size_mb,
    using,
)

# Phases of a run. Work begins when all workers are attached, since their starts keep the processors busy.
START, RUN, QUIET, LEAVE = range(4)
TIMEOUTS_S = (0.2, 1.0, 3.0)
LATE_S = 0.5
BEAT_S = 0.02
REPORT_INTERVAL_S = 0.5
CHILD_TIMEOUT_S = 20.0
# Small, so that copying the segment takes little time from the processes under test.
CAPACITIES = Capacities(
    members=512, models=128, instances=512, tickets=1024, devices=2, observations=64, events=2048, undo=8192
)
_PR_SET_PDEATHSIG = 1
# The workers that cannot join, because of a stopped process or a full table, are replaced like those that are killed.
CANNOT_JOIN = 4


def capacities(plan: Plan) -> Capacities:
    """Return how many rows the tables have: more than the run needs, or with `full_tables` fewer."""
    if not plan.full_tables:
        return CAPACITIES
    return Capacities(
        # All workers can attach, but their forked children and the model servers compete for what is left.
        members=plan.processes + 2,
        # Fewer than there are usual models and leases at a time.
        models=9,
        instances=max(4, plan.processes),
        tickets=max(2, plan.processes // 2),
        pins=2,
        devices=2,
        observations=4,
        events=CAPACITIES.events,
    )


def full_table(error: BaseException) -> str | None:
    """Return which table was full if that is what an error says, of this process or of a model server that it began."""
    if isinstance(error, TableFullError):
        return error.table
    if isinstance(error, ServerStartError) and "the members table of namespace" in str(error):
        return "members"
    return None


class LoaderFailedError(Exception):
    """A loader failed on purpose."""


class Interrupted(Exception):
    """Raised by a signal handler in the middle of a call."""


class ServerGoneError(Exception):
    """There is no server behind a handle."""


def no_server(handle: str) -> Any:
    """Stand in for the constructor of a model that must exist already."""
    raise ServerGoneError(f"no server of {handle!r}")


class Heart:
    """Knows when this process did not run (stopped, or without a processor), and where late calls are."""

    def __init__(self) -> None:
        self._gaps: collections.deque[tuple[float, float]] = collections.deque(maxlen=2000)
        self._deadlines: dict[int, float] = {}
        self._stacks: dict[int, str] = {}
        self._last_beat = time.monotonic()
        threading.Thread(target=self._beat, name="stress-heart", daemon=True).start()

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT_S)
            now = time.monotonic()
            if now - self._last_beat > 2 * BEAT_S:
                self._gaps.append((self._last_beat, now))
            self._last_beat = now
            for thread, deadline in list(self._deadlines.items()):
                frame = innermost_frame(thread)
                if now > deadline and thread not in self._stacks and frame is not None:
                    self._stacks[thread] = "".join(traceback.format_stack(frame)[-7:])

    @contextlib.contextmanager
    def watching(self, deadline: float) -> Iterator[None]:
        """Note where this thread is if the block is not done at the deadline."""
        thread = threading.get_ident()
        self._stacks.pop(thread, None)
        self._deadlines[thread] = deadline
        try:
            yield
        finally:
            self._deadlines.pop(thread, None)

    def forgive(self) -> None:
        """Allow this thread's block to take long from now on."""
        self._deadlines.pop(threading.get_ident(), None)

    def stack(self) -> str:
        """Return where this thread was when its deadline passed."""
        return self._stacks.get(threading.get_ident(), "")

    def lost_s(self, began: float, ended: float) -> float:
        """Return how long this process did not run between two moments, give or take a beat."""
        gaps = list(self._gaps)
        if ended - self._last_beat > 2 * BEAT_S:
            # The caller may run again before the thread that beats.
            gaps.append((self._last_beat, ended))
        return sum(max(0.0, min(ended, there) - max(began, here)) for here, there in gaps)


class Loader:
    """The loader of one acquire, which may be slow or fail."""

    def __init__(self, plan: Plan, kind: str, mb: int, rng: random.Random, heart: Heart) -> None:
        self.plan = plan
        self.heart = heart
        self.kind = kind
        self.mb = mb
        self.seconds = rng.uniform(0.2, 0.6) if rng.random() < 0.1 else rng.uniform(0.0, 0.02)
        self.fails = rng.random() < 0.06
        self.fails_late = rng.random() < 0.03
        self.handle = f"{kind}-{os.getpid()}-{rng.getrandbits(40):x}"
        self.began: float | None = None
        self.memory: Allocation | None = None

    def __call__(self) -> Any:
        self.began = time.monotonic()
        self.heart.forgive()
        device = self.plan.device()
        if self.kind == "server":
            constructor = functools.partial(ServedModel, device, self.mb, self.seconds, self.fails)
            MultiProcessShared(constructor, tag=self.handle, always_proxy=True, spawn_process=True).acquire()
            if self.fails_late:
                raise LoaderFailedError("after its server was started")
            return self.handle
        time.sleep(self.seconds)
        if self.fails:
            raise LoaderFailedError("before it had anything")
        self.memory = device.allocate(self.kind, self.mb)
        if self.fails_late:
            self.memory.free()
            raise LoaderFailedError("after it had its memory")
        return OwnedModel(self.memory) if self.kind == "object" else self.memory.name

    def done(self) -> None:
        """Disown `file` memory, which mpmm now accounts for or has never taken over."""
        if self.memory is not None and self.kind == "file":
            self.memory.disown()


class Reporter:
    """Sends messages to the conductor, each as one line in one write."""

    def __init__(self, fd: int, index: int) -> None:
        self._fd = fd
        self._index = index
        self._mutex = threading.Lock()
        self._counts: collections.Counter[str] = collections.Counter()
        self._sent_at = time.monotonic()

    def count(self, what: str, amount: int = 1) -> None:
        """Count something; the sums are sent every REPORT_INTERVAL_S at most."""
        with self._mutex:
            self._counts[what] += amount
            if time.monotonic() - self._sent_at < REPORT_INTERVAL_S:
                return
        self.flush()

    def flush(self) -> None:
        """Send the sums."""
        with self._mutex:
            counts, self._counts = self._counts, collections.Counter()
            self._sent_at = time.monotonic()
        if counts:
            self.send("counts", counts=counts)

    def send(self, what: str, **facts: Any) -> None:
        """Send a message; if the conductor has ended, end this process."""
        line = json.dumps({"what": what, "pid": os.getpid(), "index": self._index, **facts})
        try:
            os.write(self._fd, line[:4000].encode() + b"\n")
        except OSError:
            os._exit(3)

    def claim(self, kind: str, began: float, lost_s: float, text: str, **facts: Any) -> None:
        """Send a possible violation. began: when the call that went wrong began."""
        text = text if len(text) < 2500 else text[:400] + " … " + text[-2000:]
        self.send("claim", kind=kind, began=began, ended=time.monotonic(), lost_s=lost_s, text=text, **facts)


class _LogWatch(logging.Handler):
    """Claims errors that mpmm logs, which no other check finds: its background threads must not fail."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__(logging.ERROR)
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        kind, error, trace = record.exc_info or (None, None, None)
        text = record.getMessage() + "".join(traceback.format_exception(kind, error, trace) if kind else ())
        name = "lock_timeout" if isinstance(error, LockTimeoutError) else "logged"
        holder = getattr(error, "holder_pid", None)
        self._reporter.claim(name, time.monotonic() - 2.0, 0.0, text, holder=holder)


class WorkerProcess:
    """One process with its threads, or a short-lived child that it forks."""

    def __init__(self, plan: Plan, index: int, incarnation: str, report_fd: int, phases: memoryview) -> None:
        """phases: byte 0 is the phase of the run, byte 1 + index a request to fork."""
        self.plan = plan
        self.index = index
        self.incarnation = incarnation
        self.phases = phases
        self.report = Reporter(report_fd, index)
        self.heart = Heart()
        # Whether a signal raises: only during a call in the main thread.
        self._armed = False
        self.managers = [self._manager(timeout_s) for timeout_s in TIMEOUTS_S]

    def _manager(self, timeout_s: float) -> ModelManager:
        return ModelManager(
            namespace=self.plan.namespace,
            wait_timeout_seconds=timeout_s,
            lock_timeout_seconds=self.plan.lock_timeout_s,
            poll_interval=self.plan.poll_interval_s,
            eviction_cooldown_seconds=0.5,
            max_overtake_seconds=0.5,
            memory_return_seconds=0.25,
            capacities=capacities(self.plan),
            **self.plan.manager_options(),
        )

    def run(self) -> None:
        """Work until the run is over, then leave cleanly."""
        threads = [
            threading.Thread(target=self._work, args=(f"{self.incarnation}.{number}",), name=f"stress-{number}")
            for number in range(self.plan.threads)
        ]
        for thread in threads:
            thread.start()
        if self.plan.interrupt_rate:
            self._be_interrupted(random.Random(f"{self.plan.seed}.{self.incarnation}.main"))
        for thread in threads:
            thread.join()
        self.report.flush()
        self.report.send("quiet")
        while self.phases[0] != LEAVE:
            time.sleep(0.02)
        if self.index % 2:
            for manager in self.managers:
                manager.shutdown()

    def _work(self, name: str) -> None:
        rng = random.Random(f"{self.plan.seed}.{name}")
        while self.phases[0] == START:
            time.sleep(0.02)
        try:
            while self.phases[0] == RUN:
                if self.phases[1 + self.index]:
                    self.phases[1 + self.index] = 0
                    self._fork(rng)
                rng.choices((self.use_one, self.lease_one, self.preload_one, self.pin_one), (90, 5, 3, 2))[0](rng)
                time.sleep(rng.expovariate(self.plan.pace / (self.plan.processes * self.plan.threads)))
        except BaseException:
            self.report.claim("unexpected", time.monotonic(), 0.0, traceback.format_exc())

    # ---- exceptions in the middle of calls -----------------------------------------------------------------

    def _be_interrupted(self, rng: random.Random) -> None:
        """Call the manager repeatedly in the main thread, where signal handlers run, until the run is over."""
        signal.signal(signal.SIGUSR1, self._on_interrupt)
        while self.phases[0] == START:
            time.sleep(0.02)
        while self.phases[0] == RUN:
            tag = f"file-{rng.randrange(4)}"
            loader = Loader(self.plan, "file", size_mb(tag), rng, self.heart)
            began = time.monotonic()
            try:
                self._armed = True
                with self.managers[0].model(tag, functools.partial(self._load_unarmed, loader)):
                    pass
                self._armed = False
            except Interrupted:
                self.report.count("interrupted")
            except BaseException as error:
                self._armed = False
                self._judge_error(error, tag, began, loader)
            finally:
                loader.done()
            time.sleep(rng.expovariate(self.plan.pace / self.plan.processes))

    def _on_interrupt(self, number: int, frame: Any) -> None:
        # Once per call, and never in this tool's own code.
        if self._armed:
            self._armed = False
            raise Interrupted

    def _load_unarmed(self, loader: Loader) -> Any:
        armed, self._armed = self._armed, False
        try:
            return loader()
        finally:
            self._armed = armed

    # ---- one use of one copy -------------------------------------------------------------------------------

    def choose(self, rng: random.Random) -> tuple[str, str]:
        """Return the kind and tag of a random model."""
        if rng.random() < 0.002:
            kind = rng.choice(("file", "object"))
            return kind, f"new-{kind}-{rng.randrange(40, 160)}-{rng.getrandbits(40):x}"
        draw = rng.random()
        kind = "server" if draw < 0.08 and self.plan.servers else ("file" if draw < 0.6 else "object")
        return kind, f"{kind}-{rng.randrange(self.plan.servers if kind == 'server' else 4)}"

    def use_one(self, rng: random.Random) -> None:
        """Acquire, use and release one copy."""
        kind, tag = self.choose(rng)
        number = rng.randrange(len(TIMEOUTS_S))
        manager = self.managers[number]
        loader = Loader(self.plan, kind, size_mb(tag), rng, self.heart)
        hold_s = rng.choice((0.0, 0.0, 0.0, rng.uniform(0.0, 0.01), rng.uniform(0.0, 0.1), rng.uniform(0.1, 0.6)))
        began = time.monotonic()
        try:
            with self.heart.watching(began + TIMEOUTS_S[number] + LATE_S / 2):
                copy = manager.acquire_model(tag, loader)
        except BaseException as error:
            self._judge_error(error, tag, began, loader)
            return
        else:
            acquired = time.monotonic()
        finally:
            self._judge_wait(began, loader.began or time.monotonic(), TIMEOUTS_S[number], tag)
            loader.done()
        self.report.count("operations")
        self.report.count("loads" if loader.began else "hits")
        if acquired - began > 0.01 and not loader.began:
            self.report.count("waits")
        self._use(kind, copy, hold_s, began, acquired, fresh=loader.began is not None)
        self._release(manager, tag, copy)

    # ---- leases, preloads, pins ----------------------------------------------------------------------------

    def lease_one(self, rng: random.Random) -> None:
        """Take a lease, use its memory for a while, and give it back."""
        number = rng.randrange(len(TIMEOUTS_S))
        mb = rng.randrange(20, 100)
        hold_s = rng.uniform(0.0, 0.2)
        began = time.monotonic()
        try:
            with self.managers[number].reserve(mb, name="lease"):
                self._judge_wait(began, time.monotonic(), TIMEOUTS_S[number], "a lease")
                memory = self.plan.device().allocate("lease", mb)
                time.sleep(hold_s)
                memory.free()
        except BaseException as error:
            self._judge_error(error, "lease", began, None)
        else:
            self.report.count("leases")

    def preload_one(self, rng: random.Random) -> None:
        """Preload a model."""
        kind, tag = self.choose(rng)
        number = rng.randrange(len(TIMEOUTS_S))
        loader = Loader(self.plan, kind, size_mb(tag), rng, self.heart)
        began = time.monotonic()
        try:
            self.report.count("preloads", self.managers[number].preload(tag, loader))
        except BaseException as error:
            self._judge_error(error, tag, began, loader)
        finally:
            self._judge_wait(began, loader.began or time.monotonic(), TIMEOUTS_S[number], tag)
            loader.done()

    def pin_one(self, rng: random.Random) -> None:
        """Use a model that is pinned meanwhile, perhaps by several threads."""
        tag = "file-0"
        manager = self.managers[0]
        loader = Loader(self.plan, "file", size_mb(tag), rng, self.heart)
        began = time.monotonic()
        try:
            manager.pin(tag)
            try:
                self._release(manager, tag, manager.acquire_model(tag, loader))
            finally:
                # Another thread's unpin may have ended this pin, too.
                with contextlib.suppress(NotAcquiredError):
                    manager.unpin(tag)
        except BaseException as error:
            self._judge_error(error, tag, began, loader)
        else:
            self.report.count("pins")
        finally:
            loader.done()

    def _use(self, kind: str, copy: Any, hold_s: float, began: float, acquired: float, fresh: bool) -> None:
        name = copy.memory.name if kind == "object" else copy
        try:
            with using(self.plan.witness(name)):
                if kind == "server":
                    self._call_server(copy, hold_s, began, acquired, fresh)
                    return
                time.sleep(hold_s)
                gone = copy.unloaded if kind == "object" else not os.path.exists(f"{self.plan.folder}/device/{copy}")
                if gone:
                    self.report.claim("unloaded_in_use", began, 0.0, f"{name} was unloaded while it was in use")
        except DoubleUseError as error:
            self.report.claim("double_use", began, 0.0, str(error))

    def _call_server(self, handle: str, hold_s: float, began: float, acquired: float, fresh: bool) -> None:
        try:
            alive = server_pid(handle) is not None
            if not alive and not fresh:
                lost_s = self.heart.lost_s(began, time.monotonic())
                self.report.claim("dead_handle", began, lost_s, handle, handle=handle, acquired=acquired)
            shared = MultiProcessShared(functools.partial(no_server, handle), tag=handle, always_proxy=True)
            model = shared.acquire()
            try:
                model.work(hold_s)
            finally:
                shared.release(model)
        except (ServerGoneError, ModelServerError) as error:
            self.report.count("server_errors")
            self.report.claim("server_error", began, 0.0, repr(error), handle=handle)

    def _release(self, manager: ModelManager, tag: str, copy: Any) -> None:
        while True:
            began = time.monotonic()
            try:
                manager.release_model(tag, copy)
                return
            except LockTimeoutError as error:
                self._judge_error(error, tag, began, None)
            except BaseException:
                self.report.claim("unexpected", began, 0.0, f"release of {tag}: {traceback.format_exc()}")
                return

    def _judge_wait(self, began: float, ended: float, timeout_s: float, tag: str) -> None:
        late_s = ended - began - timeout_s
        if late_s > LATE_S:
            lost_s = self.heart.lost_s(began, ended)
            if late_s - lost_s > LATE_S:
                text = f"the wait for {tag} took {ended - began:.2f} s, its time-out was {timeout_s} s"
                self.report.claim("late", began, lost_s, f"{text}; {lost_s:.2f} s were lost\n{self.heart.stack()}")

    def _judge_error(self, error: BaseException, tag: str, began: float, loader: Loader | None) -> None:
        lost_s = self.heart.lost_s(began, time.monotonic())

        def claim(kind: str, **more: Any) -> None:
            # Formatted only here: a run has a thousand timeouts, and a trace takes a millisecond.
            self.report.claim(kind, began, lost_s, f"{tag}: " + "".join(traceback.format_exception(error)), **more)

        if isinstance(error, AcquireTimeoutError):
            self.report.count("timeouts")
        elif self.plan.full_tables and (table := full_table(error)) not in (None, "undo"):
            self.report.count(f"full {table}")
        elif isinstance(error, LoaderFailedError) or (
            isinstance(error, ServerStartError) and loader is not None and loader.fails
        ):
            self.report.count("failed_loads")
        elif isinstance(error, LockTimeoutError):
            self.report.count("lock_timeouts")
            claim("lock_timeout", holder=error.holder_pid)
        elif isinstance(error, ServerStartError) and "cannot join its namespace: the lock" in str(error):
            claim("lock_timeout")
        elif isinstance(error, (ServerStartError, ModelServerError)) and loader is not None:
            claim("server_error", handle=loader.handle)
        elif isinstance(error, OutOfMemoryError) or (
            isinstance(error, ServerStartError) and OutOfMemoryError.__name__ in str(error)
        ):
            claim("out_of_memory")
        else:
            claim("unexpected")

    # ---- forks ---------------------------------------------------------------------------------------------

    def _fork(self, rng: random.Random) -> None:
        """Fork from this thread while the others continue, and wait for the child's end."""
        seed = f"{self.plan.seed}.{self.incarnation}.{rng.getrandbits(40):x}"
        self.report.count("forks")
        pid = os.fork()
        if not pid:
            self._be_child(random.Random(seed))
        deadline = time.monotonic() + CHILD_TIMEOUT_S
        while os.waitpid(pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                self.report.claim("hung_child", time.monotonic(), 0.0, f"the forked child {pid} does not end")
                deadline += CHILD_TIMEOUT_S
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)

    def _be_child(self, rng: random.Random) -> NoReturn:
        self.report = Reporter(self.report._fd, self.index)
        self.report.send("child")
        watch_log(self.report)
        self.heart = Heart()
        try:
            for _ in range(rng.randrange(1, 6)):
                self.use_one(rng)
            if rng.random() < 0.3 and self.phases[0] == RUN:
                loader = Loader(self.plan, "object", size_mb("object-0"), rng, self.heart)
                self.managers[0].acquire_model("object-0", loader)
                self.report.flush()
                self.report.send("suicide")
                os.kill(os.getpid(), signal.SIGKILL)
        except BaseException as error:
            self._judge_error(error, "forked child", time.monotonic(), None)
        self.report.flush()
        for manager in self.managers:
            manager.shutdown()
        leave_process(0)


def watch_log(reporter: Reporter) -> None:
    """Report errors that mpmm logs, and drop its warnings."""
    logger = logging.getLogger("mpmm")
    logger.handlers[:] = [_LogWatch(reporter)]
    logger.propagate = False


def leave_process(code: int) -> NoReturn:
    """End this process as `multiprocessing` ends its children: run its finalizers, not the parent's exit handlers."""
    run_finalizers: Callable[[], None] = util._exit_function  # type: ignore[attr-defined]  # not in typeshed
    try:
        run_finalizers()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def be_worker(plan: Plan, index: int, incarnation: str, report_fd: int, phases: memoryview) -> NoReturn:
    """Run as a worker, in a process that the conductor has forked."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    # Imported objects are not garbage; without this, each unload of an object would scan them.
    gc.freeze()
    reporter = Reporter(report_fd, index)
    watch_log(reporter)
    code = 0
    began = time.monotonic()
    try:
        WorkerProcess(plan, index, incarnation, report_fd, phases).run()
    except LockTimeoutError as error:
        reporter.claim("lock_timeout", began, 0.0, traceback.format_exc(), holder=error.holder_pid)
        code = CANNOT_JOIN
    except BaseException as error:
        if plan.full_tables and full_table(error) == "members":
            reporter.count("full members")
            reporter.flush()
            code = CANNOT_JOIN
        else:
            reporter.claim("unexpected", began, 0.0, traceback.format_exc())
            code = 1
    leave_process(code)
