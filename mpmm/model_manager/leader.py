"""The leader: one process of a namespace, which works for all of them.

It polls memory, reaps dead members, records observations and solves for the estimates, unloads copies that have been
idle for too long, and finds loads and unloads that take too long. The leader lock is a kernel file lock, so it is free
as soon as the leader dies. No process has to announce that: each has a `Leader`, which tries to take the lock whenever
it is free.

If the leader is alive, but its last poll is too long ago (it is stopped, or stuck in a native call), another process
polls and reaps in its place, unless one has just begun to. It leaves solving to the leader: importing SciPy takes a
second of processor time, and if processors are so scarce that the leader is late, many processes that import it, and
are late because of that, would keep them scarce. Decisions can do without the newest solution, but not without fresh
figures.

The leader asks for samples, but another thread takes them (`mpmm.memory.sampler`), because a source that hangs must not
keep dead members from being reaped. The leader learns from figures that come after `POLL_WAIT_S` when they arrive.

The process that can measure most leads: one whose source measures single processes comes before one that sees only
whole devices, and that one before one that only does accounting. A leader hands over to a better one that joins, and
leaves a free lead to it for a second. If only processes remain that can measure nothing, one of them reaps the dead,
and the accounts decide; it does not replace devices that are in use, whose last figures stand and age.

The leader looks for dead members four times a second. Two deputies, the workers in the lowest slots among those that
measure most, check as often whether it leads and polls. All other processes check every four seconds, in case these
three die together; a new leader wakes its deputies. A process that stands in for the leader while the deputies are
stopped, or that has left the lead to others, checks as often as a deputy. The cost is how often a process that has
slept runs Python: each time takes between a third of a millisecond and a whole one, although the same code takes 11 µs
when it runs over and over. So the compiled core checks (`Core.keep_watch` for the leader, `Core.doze` for the others),
and Python runs only if something may be wrong, and for the other jobs: twice a second in the leader, every few seconds
elsewhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence, Sized
from functools import partial

from mpmm.memory.beam_metrics import report_estimate
from mpmm.memory.learning import Learning
from mpmm.memory.samples import SharedSamples
from mpmm.memory.shared_estimator import SharedResourceEstimator
from mpmm.model_manager.doorbell import Doorbell
from mpmm.model_manager.fresh_figures import FreshFigures
from mpmm.model_manager.late_unloads import LateUnloads
from mpmm.model_manager.operations import Operation
from mpmm.policy.view import Reason
from mpmm.scheduling import Scheduler
from mpmm.shared_state.durations import to_ns
from mpmm.shared_state.events import Cause
from mpmm.shared_state.layout import Header, Instance, Member
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.poll_claims import claim_late_polls, times_of_polls
from mpmm.shared_state.transaction import Transaction
from mpmm.sources import Measures, process_knowledge, what_it_measures
from mpmm.suspend.suspender import Suspender
from mpmm.text.printable import printable_logger

__all__ = ["FIRST_SAMPLE_WAIT_S", "LONGEST_TICK_S", "POLL_WAIT_S", "Leader"]

_LOG = printable_logger("mpmm")
# The longest pause between two looks for dead members, whatever the poll interval is.
LONGEST_TICK_S = 0.25
# Together with STALE_AFTER_S, the longest delay of a poll if the leader is stuck. A dead leader is replaced earlier.
DEPUTY_TICK_S = 0.25
# How often processes do their other jobs at least, where the compiled core looks for dead members, or checks on the
# leader: for each look of Python's, a processor that slept runs cold code for a millisecond.
LEADER_REST_S = 0.5
DEPUTY_REST_S = 4.0
RESERVE_REST_S = 12.0
RESERVE_TICK_S = 4.0
# When a process without the compiled core first checks for a wake-up that came just before it slept; with it,
# `Core.doze` does the same.
FIRST_REST_S = 0.25
DEPUTIES = 2
# How long a poll waits for its figures. The leader learns from later ones when they arrive: members are reaped, and
# everything else continues, whatever the source does.
POLL_WAIT_S = 0.1
# The process that leads from the start waits somewhat longer, so that devices are known before the first request.
FIRST_SAMPLE_WAIT_S = 1.0
STALE_AFTER_S = 0.6
# A process that has begun to poll in the leader's place may be stopped or killed; after this long the next one may.
STANDING_IN_NS = 1_000_000_000
# How long a free lead is left to processes that can measure more.
BETTER_LEADS_WITHIN_S = 1.0
LONGEST_OFFER_PAUSE_S = 60.0


class Leader:
    """One process as the leader, or as one that may take the leader's place. leading: it is the leader.

    For the background thread alone, except for `note_sample`.
    """

    def __init__(
        self,
        namespace: Namespace,
        scheduler: Scheduler,
        samples: SharedSamples,
        estimator: SharedResourceEstimator,
        figures: FreshFigures,
        late_unloads: LateUnloads,
        suspender: Suspender,
        keep_estimates: Callable[[], object],
        doorbell: Doorbell,
    ) -> None:
        """keep_estimates: writes the estimates to their file, if it is time for that. doorbell: of this process."""
        self._namespace = namespace
        self._scheduler = scheduler
        self._samples = samples
        self._estimator = estimator
        self._figures = figures
        self._late_unloads = late_unloads
        self._suspender = suspender
        self._keep_estimates = keep_estimates
        self._doorbell = doorbell
        self._learning = Learning(namespace)
        self._lock_file = namespace.open_lock_file("leader.lock")
        self._poll_due = 0.0
        # How many reaps the plans of this process have taken into account.
        self._reaps_seen = -1
        # How many samples this process has published, and how many it had before a poll that did not get its own in
        # time; None if the last poll did. Counted here, because the sampling thread counts a sample as ended only after
        # it has called `note_sample`.
        self._published = 0
        self._late_since: int | None = None
        # Since when the lead has been seen to be free, while it was left to a process that can measure more.
        self._free_since: float | None = None
        # When this process polled in the leader's place; the header has this time until another process polls.
        self._stood_in: int | None = None
        # The processes to which this one last offered the lead, when it offers it again, and the pause until then.
        self._offered_to: set[tuple[int, int]] = set()
        self._offer_due = 0.0
        self._offer_pause_s = 0.0
        self.leading = False
        # The slots of the deputies at this leader's last look.
        self._deputies: set[int] = set()

    def close(self) -> None:
        """Give up the leadership; takes no segment lock, whose holder may be stopped."""
        self._lock_file.close()
        self.leading = False

    def forget_after_fork(self) -> None:
        """In a forked child: the parent keeps the leadership."""
        self._lock_file.forget_after_fork()
        self.leading = False

    def look_after_files(self) -> None:
        """Recreate the namespace's files if they were removed; the leader lock may be a new file then."""
        self.leading = self._namespace.look_after_files(self._lock_file, self.leading)

    def elect(self) -> None:
        """Lead if no process does, or hand over to a process that can measure more."""
        if self.leading:
            self._hand_over_to_better()
        else:
            self.lead_if_free()

    def do_for_everybody(self) -> None:
        """Do what is due as the leader, or in its place."""
        if not (self.leading or self._stands_in()):
            return
        self._reap()
        self._expire_returns()
        if self.leading:
            self._tell_deputies()
        self._late_unloads.hand_over()
        self._suspender.end_overdue()
        if time.monotonic() >= self._poll_due:
            self._poll_due = time.monotonic() + self._namespace.settings.poll_interval
            # Done before the poll, which may have to wait for the lock.
            self._namespace.tables.wake_all_with_news()
            self._poll()
            self._suspender.heed_host_memory()

    def _tell_deputies(self) -> None:
        """Wake processes that have become deputies, because others died, left or joined: they now look more often."""
        deputies = set(self._first_in_line())
        for slot in deputies - self._deputies:
            self._namespace.tables.bell(slot).wake()
        self._deputies = deputies

    def _reap(self) -> None:
        """Reap dead members, and have the policy decide about what they held."""
        namespace = self._namespace
        reaped = namespace.reap_dead_members()
        reaps = namespace.segment.words[Header.REAPS]
        # A process that joins reaps them, too, but without a plan.
        if reaped or reaps != self._reaps_seen:
            with namespace.transaction() as t:
                self._scheduler.advance(t)
            self._reaps_seen = reaps

    def note_sample(self) -> None:
        """Wake this thread to learn from figures that a poll did not wait for; the sampling thread calls this."""
        self._published += 1
        if self._late_since is not None:
            self._doorbell.ring()

    def interval(self) -> float:
        """Return how long to sleep until the next look around; in that sleep, the core checks on others every tick."""
        if self._namespace.lock.core is None:
            return self._tick_s()
        if self.leading:
            return min(self._namespace.settings.poll_interval, LEADER_REST_S)
        return DEPUTY_REST_S if self._is_deputy() else RESERVE_REST_S

    def _is_deputy(self) -> bool:
        """Tell whether this process checks on the leader often.

        One that is not next in line does, too, while those that are fail to: while it stands in for the leader, or has
        left the lead to others.
        """
        stands_in = self._namespace.segment.words[Header.POLLED] == self._stood_in
        return stands_in or self._free_since is not None or self._namespace.slot in self._first_in_line()

    def _tick_s(self) -> float:
        """Return how often the leader looks for dead members, or another process checks on the leader."""
        if self.leading:
            return min(self._namespace.settings.poll_interval, LONGEST_TICK_S)
        return DEPUTY_TICK_S if self._is_deputy() else RESERVE_TICK_S

    def doze(self, rung: int, until: float, unrest: tuple[set[Operation], Sized] | None) -> bool:
        """Sleep on the doorbell until a time (monotonic, s); return whether this process is to look around at once.

        rung: see `Doorbell.wait`. unrest: the calls in progress and the deferred changes, if the sleep is to end once a
        call does not sleep in the compiled core, one has left a transaction, or there is a change; else None.
        """
        namespace = self._namespace
        core = namespace.lock.core
        if core is None:
            if unrest is None or self._has_rested(rung, until, *unrest):
                self._doorbell.wait(rung, until - time.monotonic())
            return False
        operations, deferred = unrest or (None, None)
        sleep = self._doorbell.word, rung, to_ns(until), to_ns(self._tick_s())
        if self.leading:
            return core.keep_watch(*sleep, namespace.folder_fd, namespace.slot, operations, namespace.lock, deferred)
        times = times_of_polls(namespace.tables, self._devices_to_poll())
        return core.doze(*sleep, self._lock_file.fd, self._late_ns(), times, operations, namespace.lock, deferred)

    def _has_rested(self, rung: int, until: float, operations: set[Operation], changes: Sized) -> bool:
        """Sleep for a moment first; return whether the bell did not ring, and there is nothing that it would ring for.

        A ring that changes no word has no effect if it comes just before this thread sleeps.
        """
        rest_until = min(until, time.monotonic() + FIRST_REST_S)
        self._doorbell.wait(rung, rest_until - time.monotonic())
        rang = time.monotonic() < rest_until
        return not (rang or operations or changes or self._namespace.lock.may_be_abandoned)

    def _first_in_line(self) -> list[int]:
        """Return the slots of the deputies, and one more, because the leader is usually one of them.

        Processes that can measure most come first.
        """
        workers = self._namespace.tables.measures_of_workers()
        return sorted(workers, key=workers.__getitem__, reverse=True)[: DEPUTIES + 1]

    def _better_members(self) -> set[tuple[int, int]]:
        """Return the living workers that can measure more than this one."""
        return self._samples.better_members(what_it_measures(self._figures.source))

    def _hand_over_to_better(self) -> None:
        """Leave the lead to a process that can measure more, and wake it.

        If none takes it, because they are stopped, this process takes it back. It offers it again after 2 s, then 4 s
        and so on up to a minute, and at once to a process that joins.
        """
        better = self._better_members()
        now = time.monotonic()
        if not better or (better <= self._offered_to and now < self._offer_due):
            return
        self._offer_pause_s = min(2 * self._offer_pause_s, LONGEST_OFFER_PAUSE_S) if better <= self._offered_to else 2.0
        self._offered_to, self._offer_due = better, now + self._offer_pause_s
        self._free_since = now
        self.leading = False
        self._lock_file.unlock()
        for slot, _ in better:
            self._namespace.tables.bell(slot).wake()

    def _is_left_to_better(self) -> bool:
        """Tell whether to leave the free lead to a process that can measure more: for a second, as it may be stuck."""
        if not self._better_members():
            return False
        now = time.monotonic()
        if self._free_since is None:
            self._free_since = now
        return now - self._free_since < BETTER_LEADS_WITHIN_S

    def lead_if_free(self, sample_wait_s: float = POLL_WAIT_S) -> None:
        """Become the leader if there is none, and wait for a first sample."""
        # A manager in a model server never leads: the server ends without notice, and may be busy with one long call.
        if self._namespace.kind == Member.GUEST or not self._lock_file.try_exclusive():
            self._free_since = None
            return
        if self._lock_file.is_replaced():
            # The file was removed, and the leader has made a new one, and has given up this one. `look_after_files`
            # opens the new one.
            self._lock_file.unlock()
            return
        if self._is_left_to_better():
            self._lock_file.unlock()
            return
        self._free_since = None
        source = self._figures.source
        try:
            self._samples.describe(source, self._figures.devices(), self._first_in_line())
            self._figures.sample_source(sample_wait_s)
        except BaseException:
            self._lock_file.unlock()
            raise
        self.leading = True
        _LOG.info(
            "mpmm %s: pid %d is the leader, memory source %s", self._namespace.name, self._namespace.pid, source.name
        )

    def _stands_in(self) -> bool:
        """Tell whether to poll in the leader's place, and if so, tell the others that this process does.

        It is to poll if the last poll is too long ago, or the last sample of a device that this process sees, because
        the processes that poll may not see that device.
        """
        tables = self._namespace.tables
        return claim_late_polls(tables, self._devices_to_poll(), self._late_ns(), STANDING_IN_NS)

    def _devices_to_poll(self) -> Sequence[int]:
        """Return the devices (rows) that this process may sample in others' place."""
        # Without a source that measures, its claim would only keep away the processes that have one.
        sees = what_it_measures(self._figures.source) > Measures.NOTHING
        return self._samples.rows() if sees and not self._namespace.tables.header.source_accounting_only else ()

    def _late_ns(self) -> int:
        """Return after how long without a poll another process polls."""
        return to_ns(self._namespace.settings.poll_interval + STALE_AFTER_S)

    def say_what_it_measures(self) -> None:
        """Publish what this process's source measures, if that has turned out to be more, or less, than was said."""
        namespace = self._namespace
        measures = what_it_measures(self._figures.source)
        if namespace.tables.members[namespace.slot].measures != measures:
            with namespace.transaction() as t:
                namespace.transitions.members.note_source(t, namespace.slot, measures)

    def _expire_returns(self) -> None:
        """Count unloaded memory as free once no sample has shown its return for a while."""
        namespace = self._namespace
        tables = namespace.tables
        rows = tables.used_rows(namespace.segment.layout.devices)
        if any(tables.devices[row].return_count for row in rows):
            with namespace.transaction() as t:
                namespace.transitions.ledgers.expire(t)
                self._scheduler.advance(t)

    def _poll(self) -> None:
        source = self._figures.source
        published = self._published
        # The time that a sample in progress has taken is subtracted, so that a source that hangs causes only one wait.
        came = self._figures.sample_source(POLL_WAIT_S)
        self._late_since = None if came else published
        knowledge = process_knowledge(source) if self.leading else None
        with self._namespace.transaction() as t:
            self._namespace.transitions.members.note_poll(t, knowledge)
            self._give_up_slow_loads(t)
            self._unload_expired(t)
            self._scheduler.count_requests(t)
            # Plans change with time, too.
            self._scheduler.advance(t)
            estimates = self._learning.learn(t)
            self._stood_in = None if self.leading else t.now
        self._report(estimates)

    def learn_from_late_sample(self) -> None:
        """Learn from the sample that a poll has asked for, once it has arrived."""
        late_since = self._late_since
        if late_since is None or self._published == late_since:
            return
        self._late_since = None
        with self._namespace.transaction() as t:
            estimates = self._learning.learn(t)
        self._report(estimates)

    def _report(self, estimates: dict[str, float]) -> None:
        for tag, mb in estimates.items():
            report_estimate(tag, mb)
        if self.leading:
            self._samples.forget_stated_devices()
            self._estimator.solve()
            self._keep_estimates()

    def _give_up_slow_loads(self, t: Transaction) -> None:
        namespace = self._namespace
        limit = namespace.settings.load_timeout_seconds
        if math.isinf(limit) or not namespace.tables.header.loading:
            return
        tables, layout = namespace.tables, namespace.segment.layout
        for row in tables.rows_where(layout.instances, Instance.STATE, Instance.LOADING):
            if t.is_long:
                # The next poll gives up the rest.
                return
            taken = (time.monotonic_ns() - tables.instances[row].since) / 1e9
            if taken > limit:
                namespace.transitions.models.note_failure(t, tables.instances[row].model)
                namespace.transitions.loads.give_up(t, row)
                text = "mpmm %s: abandoned a load after %.1f s (load_timeout_seconds)"
                t.after.append(partial(_LOG.warning, text, namespace.name, taken))

    def _unload_expired(self, t: Transaction) -> None:
        """Have copies unloaded that have been idle for longer than they are kept: by their owner, or by this process.

        They are kept for their model's `keep_alive_seconds`, else for `idle_ttl_seconds`, and for requests that wait.
        """
        namespace = self._namespace
        tables, layout = namespace.tables, namespace.segment.layout
        ttl_s = namespace.settings.idle_ttl_seconds
        if math.isinf(ttl_s) and not tables.model_columns().keep_alive.any():
            return
        rows = tables.idle_copies()
        # These were idle before they were suspended; suspended, they are kept for as long again.
        rows += tables.rows_where(layout.instances, Instance.STATE, Instance.SUSPENDED)
        for row in rows:
            copy = tables.instances[row]
            kept_ns = tables.kept_ns(copy.model, ttl_s)
            if t.is_long:
                # The next poll unloads the rest.
                return
            if tables.models[copy.model].pins or t.now - tables.idle_since(row) <= kept_ns:
                continue
            if namespace.reads.queue.wants(row):
                # A copy that is kept for a process, or is suspended, and that a request is about to get.
                continue
            cause = Cause(Reason.EXPIRED, seconds=kept_ns / 1e9)
            if copy.state == Instance.IDLE:
                namespace.transitions.unloads.begin(t, row, namespace.slot, evicted=False, cause=cause)
            else:
                namespace.transitions.suspensions.drop(t, row, namespace.slot, cause)
