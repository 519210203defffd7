"""The check `suspend` of `gpu_check.py`: the driver's checkpoints move models to host memory and back.

Everything goes through mpmm, and uses at most 80 % of the device. With a driver that may hang the host when a resumed
process ends, the check is skipped, since a process may end at any time.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from devices.gpu_check_models import CONTEXT_MB, CheckedModel, Loader, WrongWeightsError
from devices.gpu_check_table import CONTEXT_AT_MOST_MB, PATIENCE_S, PAUSE_S, Check, at_work, settled_mb
from devices.simulated_gpu import SimulatedGpus
from mpmm import ModelManager
from mpmm.policy.out_of_memory import is_out_of_memory
from mpmm.policy.suspension import limit_s
from mpmm.shared_state.runtime_dir import RUNTIME_DIR_VARIABLE
from mpmm.shared_state.snapshot import InstanceInfo, read_snapshot
from mpmm.sources.host_memory import host_memory_left_mb
from mpmm.suspend.driver import HAZARDOUS_BRANCHES, driver_branch

__all__ = ["check_suspend"]

MIB = 2**20
# The shares of the device, and of the free host memory, that the check may use.
DEVICE_SHARE, HOST_SHARE = 0.8, 0.8
# On the host, a process grows by more than it had on the device.
HOST_GROWTH = 1.3
SIZES_MB, SIZES_SIMULATED_MB, SIZES_QUICK_MB = (1024.0, 8192.0, 32768.0), (1024.0, 4096.0, 8192.0), (1024.0,)
ROUNDS = 3
# Rates of a checkpoint and of a restore on a simulated GPU.
RATES_MB_S, RATES_QUICK_MB_S, RATES_KILL_MB_S = (2300.0, 6000.0), (8000.0, 16000.0), (1500.0, 1500.0)
# How far the figures of a device, and those of host memory, may differ.
NEAR_MB, NEAR = 50.0, 0.02
HOST_NEAR_MB, HOST_NEAR = 1024.0, 0.1
BOOKS_S = 3.0
# The number of models that are used in turn, and how many of them fit together.
CROWD, FITTING = 6, 3.5
CROWD_QUICK, FITTING_QUICK, TURNS_QUICK, USERS, USERS_QUICK = 4, 2.5, 8, 4, 2
TURN_MB, TURN_QUICK_MB = 512.0, 256.0
# Loads take long, as those of real weights do: at least TURN_LOADS times as long as a suspension and a resume, where
# those are known, since otherwise suspending does not pay.
TURN_LOADS = 6.0
TURN_LOAD_S, TURN_LOAD_QUICK_S = 6.0, 1.5
# The share of the evicted copies that must be suspended.
SUSPENDED_SHARE = 0.8
# How often the helper is killed in each direction, and how many tries each kill has.
KILLS, KILLS_QUICK, KILL_TRIES = 3, 1, 3
KILL_MB, KILL_QUICK_MB = 3072.0, 256.0


def check_suspend(check: Check) -> None:
    """Run the parts of this check one after another."""
    branch = driver_branch()
    if check.gpus is None and branch in HAZARDOUS_BRANCHES:
        check.say("suspend", "not run", f"driver {branch} may hang the host when a resumed process ends")
        return
    rates = RATES_QUICK_MB_S if check.options.quick else RATES_MB_S
    empty_mb = settled_mb(check)
    with checkpoints(check):
        set_rates(check, rates)
        context_mb, moved_s = check_rounds(check, empty_mb)
        check_turns(check, awaited_mb(check, empty_mb), context_mb, moved_s)
        set_rates(check, RATES_KILL_MB_S)
        check_kills(check, awaited_mb(check, empty_mb))


def set_rates(check: Check, rates_mb_s: tuple[float, float]) -> None:
    """Set the rates at which the simulated driver suspends and resumes."""
    if check.gpus is not None:
        check.gpus.checkpoints.set_rates(*rates_mb_s)


@contextmanager
def checkpoints(check: Check) -> Iterator[None]:
    """Let processes that start in this block find the simulated driver's checkpoint calls; other checks do without."""
    if check.gpus is None or check.built is None:
        yield
        return
    before = os.environ.get("LD_LIBRARY_PATH", "")
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(check.built.cuda.parent), before]))
    try:
        yield
    finally:
        os.environ["LD_LIBRARY_PATH"] = before


def new_manager(namespace: str, budget_mb: float, slack: float = 1.0 - DEVICE_SHARE) -> ModelManager:
    """Return a manager that suspends by checkpoints with any driver."""
    return ModelManager(
        namespace=namespace,
        memory_source="nvml",
        slack_percentage=slack,
        wait_timeout_seconds=120.0,
        max_model_copies=1,
        suspend="checkpoint",
        suspend_budget_mb=budget_mb,
    )


def host_budget_mb() -> float:
    """Return the host memory that suspended copies may take together."""
    return HOST_SHARE * host_memory_left_mb() / HOST_GROWTH


def whole_mb(check: Check, mb: float) -> float:
    """Return what a process with weights of `mb` MB takes at most."""
    return mb + (CONTEXT_AT_MOST_MB if check.gpus is None else CONTEXT_MB)


def fits(check: Check, mb: float) -> bool:
    """Tell whether a model fits on the device, and into the host's memory."""
    need_mb = whole_mb(check, mb)
    on_device = need_mb < DEVICE_SHARE * check.device.total_mb - check.used_mb()
    # Nothing of a simulated GPU takes memory of the host.
    return on_device and (check.gpus is not None or need_mb < host_budget_mb())


def copy_of(namespace: str, tag: str) -> InstanceInfo:
    """Return the only copy of a model. Raises LookupError if there is none."""
    for copy in read_snapshot(namespace).instances:
        if copy.tag == tag and copy.seat_of is None:
            return copy
    raise LookupError(f"there is no copy of {tag}")


def host_mb_of(check: Check, pid: int) -> float:
    """Return the host memory of a process; on a simulated GPU, including what it has moved there."""
    moved_mb = 0.0 if check.gpus is None else check.gpus.checkpoints.host_mb_of(pid)
    return float(psutil.Process(pid).memory_info().rss) / MIB + moved_mb


# ---- rounds: what one model takes, and how long ------------------------------------------------------------------


@dataclass
class Rounds:
    """The results of the rounds of one model. Figures in MB are from the last round."""

    suspends_s: list[float] = field(default_factory=list)
    resumes_s: list[float] = field(default_factory=list)
    uses_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    rest_mb: list[float] = field(default_factory=list)
    listed: int = 0
    first_rss_mb: float = 0.0
    grown_mb: float = 0.0
    booked_host_mb: float = 0.0
    suspended_mb: float = 0.0


def check_rounds(check: Check, empty_mb: float) -> tuple[float, float]:
    """Suspend and resume a model of each size by hand; compare the accounts, NVML and the process's own memory.

    Return what a process takes of the device besides its weights, and the seconds that a small one takes to host memory
    and back, where they are known.
    """
    sizes_mb = SIZES_MB if check.gpus is None else SIZES_QUICK_MB if check.options.quick else SIZES_SIMULATED_MB
    contexts_mb, moved_s = [], []
    for mb in sizes_mb:
        if not fits(check, mb):
            check.say("suspend", f"{mb:.0f} MB", "does not fit here")
            continue
        with new_manager("suspend", max(host_budget_mb(), 2 * mb)) as manager:
            context_mb, there_and_back_s = report_rounds(check, manager, mb, empty_mb)
            contexts_mb.append(context_mb)
            moved_s.append(there_and_back_s)
        awaited_mb(check, empty_mb)
    return min(contexts_mb, default=whole_mb(check, 0.0)), min(moved_s, default=0.0)


def report_rounds(check: Check, manager: ModelManager, mb: float, empty_mb: float) -> tuple[float, float]:
    """Do and report the rounds of one size; return what `check_rounds` does, for this size."""
    tag, loader = "model", Loader(mb, check.gpus, seed=round(mb))
    handle = manager.acquire_model(tag, loader, expect_mb=whole_mb(check, mb))
    model = loader.served(handle)
    model.capture()
    model.replay()
    began = time.monotonic()
    pid = model.infer()
    warm_s = time.monotonic() - began
    manager.release_model(tag, handle)
    before = device_books(check, tag, pid)
    context_mb = (check.used_mb() - empty_mb if before[1] is None else before[1]) - mb
    found = Rounds(first_rss_mb=host_mb_of(check, pid))
    for _ in range(ROUNDS):
        if not one_round(check, manager, loader, model, pid, empty_mb, found):
            break
    moved_s = sum(statistics.median(seconds) for seconds in (found.suspends_s, found.resumes_s) if seconds)
    what = f"{mb:.0f} MB"
    for name, seconds in (("suspended", found.suspends_s), ("resumed", found.resumes_s)):
        check.say("suspend", f"{what} {name}", as_seconds(seconds))
    check.say("suspend", f"{what} used after it", f"{as_seconds(found.uses_s)}, before {1000 * warm_s:.0f} ms")
    done = len(found.uses_s)
    rounds = f"{done} of {ROUNDS} rounds" + "".join(f"; {wrong}" for wrong in found.wrong[:3])
    check.say("suspend", f"{what} intact, same process", rounds, "all", done == ROUNDS and not found.wrong)
    if not found.rest_mb or done != ROUNDS:
        return context_mb, moved_s
    rest_mb = max(found.rest_mb)
    listed = f"{rest_mb:+.0f} MB, in {found.listed} rounds listed"
    is_empty = rest_mb <= NEAR_MB and not found.listed
    check.say("suspend", f"{what} device, less empty", listed, f"≤ {NEAR_MB:.0f} MB, 0", is_empty)
    resumed_mb = host_mb_of(check, pid) - found.first_rss_mb
    host = f"{found.first_rss_mb:.0f} MB, suspended {found.grown_mb:+.0f}, resumed {resumed_mb:+.0f}"
    check.say("suspend", f"{what} host memory of it", host)
    difference = found.grown_mb - found.booked_host_mb
    text = f"{found.booked_host_mb:.0f} MB, {difference:+.0f} MB in truth"
    near_mb = HOST_NEAR_MB + HOST_NEAR * found.booked_host_mb
    check.say("suspend", f"{what} accounted, host", text, f"±{near_mb:.0f} MB", abs(difference) <= near_mb)
    report_device_books(check, what, before, device_books(check, tag, pid), found.suspended_mb)
    return context_mb, moved_s


def one_round(
    check: Check, manager: ModelManager, loader: Loader, model: CheckedModel, pid: int, empty_mb: float, found: Rounds
) -> bool:
    """Suspend, compare, resume, use; return False if the model could not be suspended or resumed."""
    tag = "model"
    began = time.monotonic()
    suspended = manager.suspend(tag)
    found.suspends_s.append(time.monotonic() - began)
    if suspended != 1:
        reason = next(model.unsuspendable for model in read_snapshot("suspend").models if model.tag == tag)
        found.wrong.append(f"not suspended ({reason})")
        return False
    # Polled, because the figure may be late.
    deadline = time.monotonic() + 1.0
    while check.used_mb() > empty_mb + NEAR_MB and time.monotonic() < deadline:
        time.sleep(PAUSE_S)
    copy, sample = copy_of("suspend", tag), check.sample([pid])
    assert sample.used_mb is not None
    found.rest_mb.append(sample.used_mb - empty_mb)
    found.listed += bool(sample.process_mb.get(pid))
    found.grown_mb = host_mb_of(check, pid) - found.first_rss_mb
    found.booked_host_mb, found.suspended_mb = copy.host_mb, copy.mb
    began = time.monotonic()
    resumed = manager.resume(tag)
    found.resumes_s.append(time.monotonic() - began)
    if resumed != 1:
        found.wrong.append("not resumed")
        return False
    handle = manager.acquire_model(tag, loader)
    began = time.monotonic()
    try:
        now = loader.served(handle).infer()
    except WrongWeightsError as error:
        found.wrong.append(str(error))
        now = pid
    found.uses_s.append(time.monotonic() - began)
    if now != pid:
        found.wrong.append("another process")
    elif not model.replay():
        found.wrong.append("the graph yields something else")
    manager.release_model(tag, handle)
    return True


def device_books(check: Check, tag: str, pid: int) -> tuple[float, float | None]:
    """Return the accounted memory of a copy on the device and NVML's, once they agree or BOOKS_S have passed."""
    deadline = time.monotonic() + BOOKS_S
    while True:
        booked_mb, taken_mb = copy_of("suspend", tag).mb, check.sample([pid]).process_mb.get(pid)
        is_near = taken_mb is None or abs(booked_mb - taken_mb) <= NEAR * taken_mb
        if is_near or time.monotonic() > deadline:
            return booked_mb, taken_mb
        time.sleep(PAUSE_S)


def report_device_books(
    check: Check,
    what: str,
    before: tuple[float, float | None],
    after: tuple[float, float | None],
    suspended_mb: float,
) -> None:
    """Report a copy's memory on the device: (accounted, by NVML) before and after, and accounted while suspended."""
    if before[1] is None or after[1] is None:
        check.say("suspend", f"{what} accounted, device", "NVML does not list single processes here")
        return
    off = max(abs(before[0] / before[1] - 1), abs(after[0] / after[1] - 1))
    text = f"{before[0]:.0f}, {suspended_mb:.0f}, {after[0]:.0f} MB: {off:.2%} off"
    is_right = off <= NEAR and suspended_mb <= NEAR_MB
    check.say("suspend", f"{what} accounted, device", text, f"≤ {NEAR:.0%}, 0 between", is_right)


def as_seconds(seconds: Sequence[float]) -> str:
    """Return the median as text, and the first one, which may include the helper's start."""
    if not seconds:
        return "never"
    return f"{statistics.median(seconds):.3f} s, the first time {seconds[0]:.3f} s"


# ---- turns: models that are suspended for each other -----------------------------------------------------------------


@dataclass(frozen=True)
class Crowd:
    """Models that do not fit together, and how their users attach."""

    models: int
    mb: float
    whole_mb: float
    load_s: float
    budget_mb: float
    slack: float
    gpus: SimulatedGpus | None

    def loader(self, number: int) -> Loader:
        """Return the loader of a model."""
        return Loader(self.mb, self.gpus, seed=number, load_s=self.load_s)

    def manager(self) -> ModelManager:
        """Return a manager of the turns' namespace."""
        return new_manager("suspend-turns", self.budget_mb, self.slack)


@dataclass
class Uses:
    """What one of the processes that use models in turn has done."""

    waits_s: list[float] = field(default_factory=list)
    out_of_memory: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)


def use_in_turn(connection: Connection, crowd: Crowd, seed: int) -> None:
    """Use one model after another, until told to stop; in a process of its own."""
    done = Uses()
    chance = random.Random(seed)
    number = -1
    with crowd.manager() as manager:
        connection.send("attached")
        while not connection.poll(0):
            number = chance.choice([other for other in range(crowd.models) if other != number])
            loader, began = crowd.loader(number), time.monotonic()
            try:
                with manager.model(f"model-{number}", loader, expect_mb=crowd.whole_mb) as handle:
                    done.waits_s.append(time.monotonic() - began)
                    loader.served(handle).infer()
            except WrongWeightsError as error:
                done.wrong += 1
                done.errors.append(str(error))
            except Exception as error:
                done.out_of_memory += is_out_of_memory(error)
                done.errors.append("".join(traceback.format_exception_only(error)).strip())
        connection.send(done)
        connection.recv()


def crowd_of(check: Check, empty_mb: float, context_mb: float, moved_s: float) -> Crowd:
    """Return models of which some fit into the namespace's share of the device, and all into host memory."""
    quick = check.options.quick
    mb, load_s = (TURN_QUICK_MB, TURN_LOAD_QUICK_S) if quick else (TURN_MB, TURN_LOAD_S)
    models, fitting = (CROWD_QUICK, FITTING_QUICK) if quick else (CROWD, FITTING)
    load_s = max(load_s, TURN_LOADS * moved_s)
    taken_mb = mb + context_mb
    limit_mb = empty_mb + fitting * taken_mb
    slack = min(0.99, max(1.0 - limit_mb / check.device.total_mb, 1.0 - DEVICE_SHARE))
    budget_mb = 2 * models * taken_mb
    if check.gpus is None:
        budget_mb = min(host_budget_mb(), budget_mb)
    return Crowd(models, mb, taken_mb, load_s, budget_mb, slack, check.gpus)


def check_turns(check: Check, empty_mb: float, context_mb: float, moved_s: float) -> None:
    """Let several processes use, in turn, models that are suspended for each other."""
    options, crowd = check.options, crowd_of(check, empty_mb, context_mb, moved_s)
    if crowd.budget_mb < crowd.models * crowd.whole_mb:
        check.say("suspend", "in turn", "not possible: too little host memory")
        return
    turns = min(options.suspend_turns, TURNS_QUICK) if options.quick else options.suspend_turns
    arguments = [(crowd, options.seed + number) for number in range(USERS_QUICK if options.quick else USERS)]
    with at_work(use_in_turn, *arguments) as connections:
        highest_mb, began = 0.0, time.monotonic()
        while time.monotonic() - began < 60 * options.suspend_minutes:
            highest_mb = max(highest_mb, check.used_mb())
            if read_snapshot("suspend-turns").resumes >= turns:
                break
            time.sleep(10 * PAUSE_S)
        for connection in connections:
            connection.send("stop")
        done: list[Uses] = [connection.recv() for connection in connections]
        took_s = time.monotonic() - began
        snapshot = read_snapshot("suspend-turns")
    waits_s = sorted(wait for uses in done for wait in uses.waits_s)
    errors = [error for uses in done for error in uses.errors]
    limit_mb = snapshot.devices[0].limit_mb
    what = f"{crowd.models} models of {crowd.models * crowd.whole_mb:.0f} MB in {limit_mb:.0f}, {took_s:.0f} s"
    check.say("suspend", "in turn", what)
    counts = f"{len(waits_s)}, {snapshot.evictions}, {snapshot.suspends}, {snapshot.resumes}"
    check.say("suspend", "uses, evicted, suspended, resumed", counts, "some", snapshot.resumes > 0)
    # Suspensions that still run are not counted yet.
    moving = sum(copy.state == "suspending" for copy in snapshot.instances)
    unloaded = snapshot.evictions - snapshot.suspends - moving
    few = snapshot.evictions > 0 and unloaded <= (1 - SUSPENDED_SHARE) * snapshot.evictions
    check.say("suspend", "evicted, but not suspended", str(unloaded), f"≤ {1 - SUSPENDED_SHARE:.0%} of them", few)
    allowed = crowd.models + max(0, unloaded)
    check.say("suspend", "loads", str(snapshot.loads), f"≤ {allowed}", snapshot.loads <= allowed)
    middle, longest = (waits_s[len(waits_s) // 2], waits_s[-1]) if waits_s else (0.0, 0.0)
    check.say("suspend", "wait for a model", f"{middle * 1000:.1f} ms, longest {longest:.2f} s")
    wrong = sum(uses.wrong for uses in done)
    check.say("suspend", "uses with wrong weights", str(wrong), "0", wrong == 0)
    short = snapshot.out_of_memory + sum(uses.out_of_memory for uses in done)
    check.say("suspend", "out of memory", str(short), "0", short == 0)
    failures = len(errors) + snapshot.suspend_failures
    check.say("suspend", "other failures", str(failures), "0", failures == 0)
    for error in errors[:3]:
        check.say("suspend", "failure", error)
    share = f"{highest_mb:.0f} MB, {highest_mb / limit_mb:.1%} of the limit"
    check.say("suspend", "highest use", share, "≤ 101 %", highest_mb <= 1.01 * limit_mb)


# ---- kills ----------------------------------------------------------------------------------------------------------


@dataclass
class Kills:
    """The fate of the copies whose helper was killed."""

    kills: int = 0
    same: int = 0
    anew: int = 0
    wrong: list[str] = field(default_factory=list)
    longest_s: float = 0.0


def check_kills(check: Check, empty_mb: float) -> None:
    """Kill the helper while it suspends and while it resumes; kill a server that is suspended."""
    mb = KILL_QUICK_MB if check.options.quick else KILL_MB
    if not fits(check, mb):
        check.say("suspend", "kills", "not possible: the model does not fit here")
        return
    chance, found = random.Random(check.options.seed), Kills()
    with new_manager("suspend-kills", max(host_budget_mb(), 4 * mb)) as manager:
        tag, loader = "model", Loader(mb, check.gpus, seed=7)
        kills = KILLS_QUICK if check.options.quick else KILLS
        typical_s = typical_times(check, manager, tag, loader)
        for what in ("suspend", "resume"):
            goal = found.kills + kills
            for number in range(KILL_TRIES * kills):
                if any(model.unsuspendable for model in read_snapshot("suspend-kills").models if model.tag == tag):
                    manager.unload(tag)
                    tag = f"model-{what}-{number}"
                kill_helper(check, manager, tag, loader, what, chance.uniform(0.0, 0.8) * typical_s[what], found)
                if found.kills >= goal:
                    break
        text = f"{found.kills}: {found.same} served on, {found.anew} loaded anew"
        check.say("suspend", "helper killed while it moves", text, str(2 * kills), found.kills == 2 * kills)
        check.say("suspend", "longest time to recover", f"{found.longest_s:.2f} s")
        check.say("suspend", "wrong after that", str(len(found.wrong)), "0", not found.wrong)
        for wrong in found.wrong[:3]:
            check.say("suspend", "wrong", wrong)
        manager.unload(tag)
        kill_suspended(check, manager, "last", loader, empty_mb)
    after_mb = awaited_mb(check, empty_mb)
    rest = f"{after_mb - empty_mb:+.0f} MB"
    check.say("suspend", "left on the device", rest, f"≤ {NEAR_MB:.0f} MB", after_mb <= empty_mb + NEAR_MB)


def typical_times(check: Check, manager: ModelManager, tag: str, loader: Loader) -> dict[str, float]:
    """Return the seconds that a suspension and a resume of a model take when the helper already runs."""
    use(check, manager, tag, loader)
    manager.suspend(tag)
    found = {}
    calls: dict[str, Callable[[str], int]] = {"resume": manager.resume, "suspend": manager.suspend}
    for what, call in calls.items():
        began = time.monotonic()
        call(tag)
        found[what] = time.monotonic() - began
    return found


def kill_helper(
    check: Check, manager: ModelManager, tag: str, loader: Loader, what: str, killed_at_s: float, found: Kills
) -> None:
    """Have a model suspended or resumed, kill the helper in the middle, and check the model afterwards."""
    pid = use(check, manager, tag, loader)
    if what == "resume" and manager.suspend(tag) != 1:
        found.wrong.append(f"{tag} could not be suspended")
        return
    worker = threading.Thread(target=quietly, args=(manager.suspend if what == "suspend" else manager.resume, tag))
    worker.start()
    state = "suspending" if what == "suspend" else "resuming"
    if not await_state(tag, state, worker):
        worker.join()
        return
    began = time.monotonic()
    time.sleep(killed_at_s)
    helper = helper_pid()
    killed = helper is not None and state_of(tag) == state
    if helper is not None and killed:
        with suppress(ProcessLookupError):
            os.kill(helper, signal.SIGKILL)
        found.kills += 1
    worker.join(3 * limit_s(loader.mb) + PATIENCE_S)
    found.longest_s = max(found.longest_s, time.monotonic() - began)
    if worker.is_alive():
        found.wrong.append(f"{what} has not ended")
        return
    try:
        now = use(check, manager, tag, loader)
    except Exception as error:
        found.wrong.append(f"{what}: " + "".join(traceback.format_exception_only(error)).strip())
        return
    found.same += killed and now == pid
    found.anew += killed and now != pid
    if now != pid and psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        found.wrong.append(f"{what}: the server from before still runs")


def kill_suspended(check: Check, manager: ModelManager, tag: str, loader: Loader, empty_mb: float) -> None:
    """Kill a suspended server; none of its memory may be left, on the device or the host."""
    pid = use(check, manager, tag, loader)
    before_mb = host_memory_left_mb()
    if manager.suspend(tag) != 1:
        check.say("suspend", "killed while suspended", "could not be suspended", "", False)
        return
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_S
    while state_of(tag) is not None and time.monotonic() < deadline:
        time.sleep(PAUSE_S)
    booked_mb = sum(copy.host_mb for copy in read_snapshot("suspend-kills").instances)
    device_mb = awaited_mb(check, empty_mb) - empty_mb
    text = f"{device_mb:+.0f} MB on the device, {booked_mb:.0f} accounted"
    gone = state_of(tag) is None and device_mb <= NEAR_MB and booked_mb == 0.0
    check.say("suspend", "killed while suspended", text, f"≤ {NEAR_MB:.0f} MB, 0", gone)
    left_mb = before_mb - host_memory_left_mb() if check.gpus is None else check.gpus.checkpoints.host_mb()
    near_mb = loader.mb / 4
    check.say("suspend", "host memory not given back", f"{left_mb:+.0f} MB", f"≤ {near_mb:.0f} MB", left_mb <= near_mb)
    now = use(check, manager, tag, loader)
    check.say("suspend", "loaded anew after that", "yes" if now != pid else "no", "yes", now != pid)


def use(check: Check, manager: ModelManager, tag: str, loader: Loader) -> int:
    """Use a model; return the pid of its server. Errors of the use propagate."""
    with manager.model(tag, loader, expect_mb=whole_mb(check, loader.mb)) as handle:
        return loader.served(handle).infer()


def quietly(call: Callable[[str], int], tag: str) -> None:
    """Suspend or resume, ignoring errors: the model's later state shows them."""
    with suppress(Exception):
        call(tag)


def state_of(tag: str) -> str | None:
    """Return the state of a model's copy; None if there is none."""
    try:
        return copy_of("suspend-kills", tag).state
    except LookupError:
        return None


def await_state(tag: str, state: str, worker: threading.Thread) -> bool:
    """Wait until a copy is in a state; return False if the thread that moves it ends before that."""
    while worker.is_alive():
        if state_of(tag) == state:
            return True
        time.sleep(0.001)
    return False


def awaited_mb(check: Check, empty_mb: float) -> float:
    """Return the MB used on the device once they are at most NEAR_MB above `empty_mb`, or after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while (used_mb := check.used_mb()) > empty_mb + NEAR_MB and time.monotonic() < deadline:
        time.sleep(PAUSE_S)
    return used_mb


def helper_pid() -> int | None:
    """Return the pid of the namespace's helper; None if none runs."""
    folder = str(Path(os.environ[RUNTIME_DIR_VARIABLE]) / "suspend-kills")
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "mpmm.suspend.helper" in command and folder in command:
            return int(process.pid)
    return None
