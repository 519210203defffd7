"""The keeper: one background thread in every attached process.

It sleeps on the member's bell, and does three things:

- it has the copies unloaded that its process has been told to unload, as their owner or on behalf of a waiter; in
  threads of their own, because an unload may hang;
- it tries to become the leader, whenever nobody is. The leader lock is a kernel file lock, so a dead leader's
  place is free at once. The leader polls memory, takes back what dead members had, records observations and
  solves for the estimates, and finds unloads that take too long, which others take over or do without;
- if the leader lives but its last poll is too long ago (it is stopped, or stuck in a native call), it polls and
  takes back in the leader's place, unless another has just set out to. To solve is left to the leader: SciPy takes a
  second of a processor to import, and where processors are so scarce that the leader is late, a crowd that imports it,
  and is late for that, would keep it so. Decisions do without the newest solution, but not without fresh figures.

It asks for samples, but another thread takes them (`mpmm.memory.sampler`): a source that hangs must not keep the dead
from being reaped. What comes after `POLL_WAIT_S` is learnt from when it comes.

Who can measure more leads: a process whose source knows single processes comes before one that sees whole devices only,
and that before one that goes by the books. A leader hands over to a better one that joins, and leaves a free lead to
it for a second. If only processes are left that can measure nothing, one of them takes back what the dead had, and the
books decide; it does not replace the devices while they are in use, whose last figures stand and age.

The leader and its deputies, the workers in the lowest slots of those that measure most, look around four times a
second. Everybody else only does so every four seconds, in case all of those die together; a new leader wakes who is a
deputy now. So 32 processes that just wait cost a sixth of what they would cost if all looked as often.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

from mpmm.errors import ClosedError, LockTimeoutError
from mpmm.memory.beam_metrics import report_estimate
from mpmm.memory.estimator import smooth
from mpmm.policy.view import Reason
from mpmm.shared_state.durations import to_ns
from mpmm.shared_state.events import Cause
from mpmm.shared_state.futex import wait_for_change, wake_all
from mpmm.shared_state.layout import Device, Header, Instance, Member, Model
from mpmm.shared_state.lock_file import LockFile
from mpmm.shared_state.transaction import Transaction
from mpmm.shared_state.transitions import ESTIMATE_TOLERANCE
from mpmm.sources import Measures, process_knowledge, what_it_measures
from mpmm.text.printable import printable_logger

if TYPE_CHECKING:
    from mpmm.model_manager.session import Worker

__all__ = ["Keeper"]

_LOG = printable_logger("mpmm")
# A dead leader is replaced, and a stuck one stood in for, within a second whatever the poll interval is.
LONGEST_TICK_S = 0.25
RESERVE_TICK_S = 4.0
# While calls are in progress, what an exception may have left of them is looked for so often; a transaction that was
# left takes two looks.
RECONCILE_S = 0.3
DEPUTIES = 2
# Between two attempts to wake a thread that may just be about to sleep.
REPEAT_S = 0.01
# So long a poll waits for its figures. Those that come later are learnt from when they come: the
# dead are reaped, and everything else goes on, whatever the source does.
POLL_WAIT_S = 0.1
# Who leads from the start waits somewhat longer, so that devices are known before anybody asks.
FIRST_SAMPLE_WAIT_S = 1.0
STALE_AFTER_S = 0.6
# Who has set out to poll in the leader's place may be stopped or killed on the way; then it is the next one's turn.
STANDING_IN_NS = 1_000_000_000
# The lead that is free is left to those who can measure more for so long.
BETTER_LEADS_WITHIN_S = 1.0
LONGEST_OFFER_PAUSE_S = 60.0


class Keeper:
    """The thread, and the duties of the leader. One a `Worker`."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._namespace = worker.namespace
        self._bell = self._namespace.tables.member(self._namespace.slot) + Member.BELL
        self._bell_address = self._namespace.segment.address + 8 * self._bell
        self._lock_file = LockFile(worker.namespace.runtime.file("leader.lock"))
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._failing = False
        # What was seen of each device (row) when its last reading was taken: a reading of the same says nothing new.
        self._seen: dict[int, tuple[int, int]] = {}
        self._poll_due = 0.0
        # The estimates of models with measured servers that were reported as metrics last.
        self._reported: dict[str, float] = {}
        # How many samples this process has published; and how many it had when a poll did not wait for its own, None if
        # it did. Counted here, because the thread that takes them counts one as ended only after it has told us.
        self._published = 0
        self._late_since: int | None = None
        # Since when the lead has been seen to be free, while it was left to a process that can measure more.
        self._free_since: float | None = None
        # To whom the lead was offered last, when it will be again, and how long after the last time that is.
        self._offered_to: set[tuple[int, int]] = set()
        self._offer_due = 0.0
        self._offer_pause_s = 0.0
        self.leading = False
        # It sleeps for longer than `RECONCILE_S`, because no call was in progress: who begins one wakes it.
        self.dozing = False

    def start(self) -> None:
        """Lead if nobody does, so that devices are known before anybody asks; then go on in the background."""
        self._lead_if_free(FIRST_SAMPLE_WAIT_S)
        self._thread = threading.Thread(target=self._run, name=f"mpmm-keeper-{self._namespace.name}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and give up the leadership, without the lock, whose holder may be stopped.

        Not to be called by the thread itself.
        """
        self._stopping.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            while self._thread.is_alive():
                # Again and again, because one that has looked at `_stopping` and does not sleep yet misses it.
                self.wake()
                self._thread.join(REPEAT_S)
        self._lock_file.close()
        self.leading = False

    def note_sample(self) -> None:
        """Have the figures learnt from that a poll did not wait for; called by the thread that has published some."""
        self._published += 1
        if self._late_since is not None:
            self.wake()

    def wake(self) -> None:
        """End the thread's sleep; without the lock, and so without a ring that would be remembered."""
        wake_all(self._bell_address)

    def forget_after_fork(self) -> None:
        """In a forked child: the parent keeps the leadership."""
        self._lock_file.forget_after_fork()
        self.leading = False

    def _run(self) -> None:
        namespace = self._namespace
        bell = self._bell
        words = namespace.segment.words
        due = time.monotonic() + self._interval()
        answered = None
        reconcile_due = 0.0
        while not self._stopping.is_set():
            try:
                seen = words[bell]
                namespace.follow_settings()
                self._worker.deferred.run()
                if self._worker.reconciler.has_abandoned or time.monotonic() >= reconcile_due:
                    self._worker.reconciler.reconcile()
                    reconcile_due = time.monotonic() + RECONCILE_S
                if seen != answered:
                    # The rows are looked through only after a ring: that takes a tenth of a millisecond.
                    self._worker.unloads.unload_in_thread()
                    answered = seen
                if time.monotonic() >= due:
                    self.tick()
                    due = time.monotonic() + self._interval()
                self._learn_from_late_sample()
                # What was left to us during the tick, nobody wakes us for any more.
                if not self._worker.deferred:
                    self.dozing = True
                    until = due
                    if self._worker.operations or namespace.lock.may_be_abandoned:
                        self.dozing = False
                        until = min(due, reconcile_due)
                    wait_for_change(lambda: int(words[bell]), self._bell_address, seen, until - time.monotonic())
                    self.dozing = False
                    # Who was woken may have become a deputy, or be offered the lead.
                    due = min(due, time.monotonic() + self._interval())
                self._failing = False
            except (ClosedError, ValueError):
                # ValueError: the segment was unmapped under us by `leave`.
                if not namespace.is_usable:
                    return
                self._report_trouble()
            except LockTimeoutError as error:
                self._report_crowd(error)
            except Exception:
                self._report_trouble()

    def _interval(self) -> float:
        """Return how long to sleep until the next tick."""
        interval = min(self._namespace.settings.poll_interval, LONGEST_TICK_S)
        if self.leading:
            return interval
        return interval if self._namespace.slot in self._first_in_line() else max(interval, RESERVE_TICK_S)

    def _first_in_line(self) -> list[int]:
        """Return the slots of the deputies, and one more, because the leader is mostly one of them.

        Those that can measure most come first.
        """
        words, tables, layout = self._namespace.segment.words, self._namespace.tables, self._namespace.segment.layout
        workers = tables.rows_where(layout.members, Member.STATE, Member.WORKER)
        return sorted(workers, key=lambda slot: (-words[tables.member(slot) + Member.MEASURES], slot))[: DEPUTIES + 1]

    def _report_trouble(self) -> None:
        # Whatever went wrong must neither end the thread nor fill the log twice a second.
        if not self._failing:
            _LOG.exception(
                "mpmm %s: the background thread of pid %d goes on after an error",
                self._namespace.name,
                self._namespace.pid,
            )
        self._failing = True
        self._stopping.wait(LONGEST_TICK_S)

    def _report_crowd(self, error: LockTimeoutError) -> None:
        """Say that the lock was not to be had, which is no fault of this thread: it tries again at once."""
        if not self._failing:
            _LOG.warning(
                "mpmm %s: the background thread of pid %d tries again: %s",
                self._namespace.name,
                self._namespace.pid,
                error,
            )
        self._failing = True

    def tick(self) -> None:
        """Do what is due now, as leader or in its place."""
        self.leading = self._namespace.look_after_files(self._lock_file, self.leading)
        if self._worker.held.has_taken_tickets:
            with self._namespace.transaction() as t:
                self._worker.held.free_taken_tickets(t)
        if self._worker.unloads.has_failed:
            self._worker.unloads.has_failed = False
            self._worker.unloads.unload_in_thread()
        self._say_what_it_measures()
        if self.leading:
            self._hand_over_to_better()
        else:
            self._lead_if_free(POLL_WAIT_S)
        if self.leading or self._stands_in():
            if self._namespace.reap_dead_members():
                with self._namespace.transaction() as t:
                    self._worker.scheduler.advance(t)
            self._expire_returns()
            self._worker.late_unloads.hand_over()
            self._worker.suspender.end_overdue()
            if time.monotonic() >= self._poll_due:
                self._poll_due = time.monotonic() + self._namespace.settings.poll_interval
                self._poll()
                self._worker.suspender.heed_host_memory()

    def _expire_returns(self) -> None:
        """Let the books decide about unloaded memory that no sample has told about for a while."""
        namespace = self._namespace
        words, tables = namespace.segment.words, namespace.tables
        rows = tables.used_rows(namespace.segment.layout.devices)
        if any(words[tables.device(row) + Device.RETURN_COUNT] for row in rows):
            with namespace.transaction() as t:
                namespace.transitions.ledgers.expire(t)
                self._worker.scheduler.advance(t)

    def _say_what_it_measures(self) -> None:
        """Tell the others if this process's source has turned out to measure more, or less, than it said."""
        namespace = self._namespace
        measures = what_it_measures(self._worker.source)
        if namespace.segment.words[namespace.tables.member(namespace.slot) + Member.MEASURES] != measures:
            with namespace.transaction() as t:
                namespace.transitions.members.note_source(t, namespace.slot, measures)

    def _better_members(self) -> set[tuple[int, int]]:
        """Return the living workers that can measure more than this one."""
        return self._worker.samples.better_members(what_it_measures(self._worker.source))

    def _hand_over_to_better(self) -> None:
        """Leave the lead to a process that can measure more, and wake it.

        If none takes it, because they are stopped, this one takes it back. It offers it again after 2 s, then 4 s and
        so on up to a minute, and at once to a newcomer.
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
            wake_all(self._namespace.segment.address + 8 * (self._namespace.tables.member(slot) + Member.BELL))

    def _is_left_to_better(self) -> bool:
        """Tell whether to leave the free lead to a process that can measure more: for a second, as it may be stuck."""
        if not self._better_members():
            return False
        now = time.monotonic()
        if self._free_since is None:
            self._free_since = now
        return now - self._free_since < BETTER_LEADS_WITHIN_S

    def _lead_if_free(self, sample_wait_s: float) -> None:
        # A manager inside a model server does not: its server ends without notice, and may be busy with one long call.
        if self._namespace.kind == Member.GUEST or not self._lock_file.try_exclusive():
            self._free_since = None
            return
        if self._is_left_to_better():
            self._lock_file.unlock()
            return
        self._free_since = None
        worker = self._worker
        source = worker.source
        try:
            worker.samples.describe(source, worker.monitor.devices(), self._first_in_line())
            worker.figures.sample_source(sample_wait_s)
        except BaseException:
            self._lock_file.unlock()
            raise
        self.leading = True
        _LOG.info(
            "mpmm %s: pid %d is the leader, memory source %s", self._namespace.name, self._namespace.pid, source.name
        )

    def _stands_in(self) -> bool:
        """Tell whether to poll in the leader's place, and if so, tell the others that this process does.

        That is if the last poll, or the last look at a device that this process sees, is too long ago: nobody else who
        polls may see it.
        """
        words, tables = self._namespace.segment.words, self._namespace.tables
        places = [(Header.POLLED, Header.POLL_CLAIMED)]
        # Without a source that measures, a claim on devices would only keep those from it that have one.
        if not words[Header.SOURCE_BOOKS_ONLY] and what_it_measures(self._worker.source) > Measures.NOTHING:
            devices = (tables.device(row) for row in self._worker.samples.rows())
            places += [(at + Device.TRIED, at + Device.CLAIMED) for at in devices]
        now = time.monotonic_ns()
        late = now - to_ns(self._namespace.settings.poll_interval + STALE_AFTER_S)
        if not any(
            words[tried] < late and not now - STANDING_IN_NS < words[claimed] <= now for tried, claimed in places
        ):
            return False
        for _, claimed in places:
            words[claimed] = now
        return True

    def _poll(self) -> None:
        source = self._worker.source
        published = self._published
        # What a sample in progress has taken so far comes off the wait: a source that hangs is not waited for again.
        came = self._worker.figures.sample_source(POLL_WAIT_S)
        self._late_since = None if came else published
        knowledge = process_knowledge(source) if self.leading else None
        with self._namespace.transaction() as t:
            self._namespace.transitions.members.note_poll(t, knowledge)
            self._give_up_slow_loads(t)
            self._unload_expired(t)
            self._worker.scheduler.count_requests(t)
            # Time alone changes plans, too.
            self._worker.scheduler.advance(t)
            estimates = self._learn(t)
        self._report(estimates)

    def _learn_from_late_sample(self) -> None:
        """Learn from the sample that a poll has asked for, once it is there."""
        late_since = self._late_since
        if late_since is None or self._published == late_since:
            return
        self._late_since = None
        with self._namespace.transaction() as t:
            estimates = self._learn(t)
        self._report(estimates)

    def _report(self, estimates: dict[str, float]) -> None:
        for tag, mb in estimates.items():
            report_estimate(tag, mb)
        if self.leading:
            self._worker.samples.forget_stated_devices()
            self._worker.estimator.solve()
            self._worker.keep_estimates()

    def _give_up_slow_loads(self, t: Transaction) -> None:
        namespace = self._namespace
        limit = namespace.settings.load_timeout_seconds
        if math.isinf(limit) or not namespace.segment.words[Header.LOADING]:
            return
        tables, layout = namespace.tables, namespace.segment.layout
        for row in tables.rows_where(layout.instances, Instance.STATE, Instance.LOADING):
            taken = (time.monotonic_ns() - namespace.segment.words[tables.instance(row) + Instance.SINCE]) / 1e9
            if taken > limit:
                namespace.transitions.models.note_failure(
                    t, namespace.segment.words[tables.instance(row) + Instance.MODEL]
                )
                namespace.transitions.loads.give_up(t, row)
                t.after.append(
                    partial(
                        _LOG.warning,
                        "mpmm %s: abandoned a load after %.1f s (load_timeout_seconds)",
                        namespace.name,
                        taken,
                    )
                )

    def _unload_expired(self, t: Transaction) -> None:
        """Have copies unloaded that nobody has used for as long as they are kept: by their owner, or by this process.

        That is `keep_alive_seconds` of their model, else `idle_ttl_seconds`.
        """
        namespace = self._namespace
        words, tables, layout = namespace.segment.words, namespace.tables, namespace.segment.layout
        ttl_s = namespace.settings.idle_ttl_seconds
        if math.isinf(ttl_s) and not tables.view(layout.models)[:, Model.KEEP_ALIVE].any():
            return
        rows = tables.rows_where(layout.instances, Instance.STATE, Instance.IDLE)
        # These have been idle before; in the host they are kept for as long again.
        rows += tables.rows_where(layout.instances, Instance.STATE, Instance.SUSPENDED)
        for row in rows:
            at = tables.instance(row)
            model, kept_ns = words[at + Instance.MODEL], tables.kept_ns(words[at + Instance.MODEL], ttl_s)
            if t.is_long:
                # The next poll unloads the rest.
                return
            if words[tables.model(model) + Model.PINS] or t.now - words[at + Instance.SINCE] <= kept_ns:
                continue
            cause = Cause(Reason.EXPIRED, seconds=kept_ns / 1e9)
            if words[at] == Instance.IDLE:
                namespace.transitions.unloads.begin(t, row, namespace.slot, evicted=False, cause=cause)
            else:
                namespace.transitions.suspensions.drop(t, row, namespace.slot, cause)

    def _learn(self, t: Transaction) -> dict[str, float]:
        """Take the figures of the last sample into the estimates, or into the observations for NNLS."""
        namespace = self._namespace
        words = namespace.segment.words
        if words[Header.SOURCE_BOOKS_ONLY]:
            return {}
        for device in namespace.tables.used_rows(namespace.segment.layout.devices):
            self._observe(t, device)
        return self._take_over_measurements(t) if words[Header.SOURCE_MEASURES_PROCESSES] else {}

    def _observe(self, t: Transaction, device: int) -> None:
        """Record the peak of a configuration that nothing has changed since before the last sample of a device.

        What is measured by itself is no riddle: it comes off the reading, and what remains is that of the other copies.
        """
        namespace = self._namespace
        words, floats, tables = namespace.segment.words, namespace.segment.floats, namespace.tables
        at = tables.device(device)
        if words[at + Device.SAMPLED] < words[at + Device.CONFIGURED_AT] or words[at + Device.ISOLATED]:
            return
        copies: Counter[int] = Counter()
        measured_mb, uses = floats[at + Device.FOREIGN_MB], 0
        for row in tables.on_device(device):
            copy = tables.instance(row)
            if words[copy] not in (Instance.ACTIVE, Instance.IDLE) or words[copy + Instance.DEVICES] != 1 << device:
                # What loads or unloads, and what a lease's program takes, goes up and down; and of a copy that spans
                # several devices nobody knows how much is here.
                return
            uses += words[copy + Instance.USES]
            if words[copy + Instance.SERVER] and words[Header.SOURCE_MEASURES_PROCESSES]:
                measured_mb += floats[copy + Instance.MB]
            else:
                copies[words[tables.model(words[copy + Instance.MODEL]) + Model.GENERATION]] += 1
        seen = (words[at + Device.CONFIGURED_AT], uses)
        if not copies or self._seen.get(device) == seen:
            return
        self._seen[device] = seen
        # The figures of single processes are those of the last sample, not those of the peak.
        whole_mb = (
            floats[at + Device.USED_MB]
            if measured_mb
            else namespace.transitions.devices.peak_since(device, words[at + Device.CONFIGURED_AT])
        )
        namespace.transitions.estimates.observe(t, list(copies.items()), max(0.0, whole_mb - measured_mb), device)

    def _take_over_measurements(self, t: Transaction) -> dict[str, float]:
        """Let a model's estimate follow what its servers were seen to take at most; return those to be reported.

        Up at once, because the next copy will take as much (`Measurements.measure` does so with each sample); down
        slowly, because a copy that has not worked yet takes less than one that has.
        """
        namespace = self._namespace
        words, floats, tables = namespace.segment.words, namespace.segment.floats, namespace.tables
        highest: dict[int, float] = {}
        for slot in tables.rows_where(namespace.segment.layout.members, Member.STATE, Member.SERVER):
            at = tables.member(slot)
            row = words[at + Member.INSTANCE]
            if not row or words[tables.instance(row - 1) + Instance.SERVER] != slot + 1:
                continue
            copy = tables.instance(row - 1)
            if words[copy] in (Instance.ACTIVE, Instance.IDLE) and floats[at + Member.PEAK_MB] > 0:
                # Of what spans several devices each has to have room for the largest share.
                span = words[copy + Instance.DEVICES].bit_count()
                largest_mb = max(floats[at + Member.SHARES : at + Member.SHARES + span]) if span > 1 else 0.0
                model = words[copy + Instance.MODEL]
                highest[model] = max(highest.get(model, 0.0), floats[at + Member.PEAK_MB], largest_mb * span)
        changed = {}
        for model, mb in highest.items():
            at = tables.model(model)
            if not words[at + Model.KNOWN]:
                continue
            old = floats[at + Model.ESTIMATE_MB]
            new = mb if mb > old else smooth(old, mb, namespace.settings.smoothing_factor)
            if abs(new - old) > ESTIMATE_TOLERANCE * old or floats[at + Model.SD_MB]:
                namespace.transitions.estimates.estimate(t, model, new, measured=True)
            tag, mb = tables.tag_of(model), floats[at + Model.ESTIMATE_MB]
            if abs(mb - self._reported.get(tag, 0.0)) > ESTIMATE_TOLERANCE * mb:
                self._reported[tag] = changed[tag] = mb
        return changed
