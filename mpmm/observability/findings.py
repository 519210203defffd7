"""Findings: sentences about problems that a namespace has now, and notes about what has happened in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mpmm.observability.formatting import age, waiters, whys, with_names
from mpmm.policy.suspension import limit_s
from mpmm.policy.view import Reason
from mpmm.shared_state.invariants import check_invariants
from mpmm.shared_state.snapshot import Snapshot, TicketInfo

__all__ = ["Finding", "attention_texts", "findings", "longest_wait_s", "oldest_waiter"]

# The leader polls every `poll_interval`; 0.6 s later another process does it instead, and the poll takes time, too.
STALE_AFTER_S = 2.0
# A wait of this length is worth a look; so is a load, or a hold that others wait for.
LONG_WAIT_S = 30.0
LONG_LOAD_S = 60.0
LONG_HOLD_S = 60.0
# A load may take this many times as long as the model's loads usually do.
SLOW_LOAD = 10.0
PIDS_NAMED = 5


@dataclass(frozen=True)
class Finding:
    """One sentence. urgent: it is about a problem that exists now; else it is only worth knowing."""

    urgent: bool
    text: str


def findings(snapshot: Snapshot, decided: Mapping[int, float] | None = None) -> list[Finding]:
    """Return the findings about a namespace, the urgent ones first.

    decided: when waiters were told why they wait, see `formatting.decided_at`; None takes the times from the snapshot's
    events. If all processes of the namespace are dead, return that, and what happened before.
    """
    ended = _ended(snapshot)
    if ended and snapshot.members:
        return [Finding(True, ended), *_past(snapshot)]
    before = (_lock, _files, _leader, _samples, _dead)
    after = (_holds, _loads, _unloads, _suspensions, _past)
    found = [finding for check in before for finding in check(snapshot)]
    found += _waits(snapshot, decided)
    found += [finding for check in after for finding in check(snapshot)]
    return sorted(found, key=lambda finding: not finding.urgent)


def attention_texts(snapshot: Snapshot) -> list[str]:
    """Return what a probe should fail for: urgent findings and broken invariants; empty for a healthy namespace."""
    found = [f"invariant broken: {problem}" for problem in check_invariants(snapshot)]
    ended = _ended(snapshot)
    if ended:
        return [*found, ended]
    return found + [f"ATTENTION: {finding.text}" for finding in findings(with_names(snapshot)) if finding.urgent]


def _ended(snapshot: Snapshot) -> str:
    """Return a sentence if a namespace has no living process, otherwise an empty text."""
    if any(member.alive is not False for member in snapshot.members):
        return ""
    return (
        f"dead: none of its {len(snapshot.members)} processes is alive; the next process to attach starts afresh, and "
        "`mpmm prune` removes what they left"
    )


def oldest_waiter(snapshot: Snapshot) -> TicketInfo | None:
    """Return the ticket that has waited longest, None if none waits."""
    return max(waiters(snapshot), key=lambda ticket: ticket.waited_s, default=None)


def longest_wait_s(snapshot: Snapshot) -> float:
    """Return how long the oldest waiter has waited, in seconds; 0 if none waits."""
    oldest = oldest_waiter(snapshot)
    return 0.0 if oldest is None else oldest.waited_s


def _lock(snapshot: Snapshot) -> Iterator[Finding]:
    lock = snapshot.lock
    if lock.holder_stopped:
        yield Finding(
            True,
            f"process {lock.last_holder_pid} is stopped and has held the lock for {lock.taken_ago_s:.1f} s: no process "
            "can acquire or release anything until it continues or is killed",
        )
    if snapshot.torn_words:
        yield Finding(
            False, f"process {lock.last_holder_pid} is in the middle of a transaction; this is the state before it"
        )


def _files(snapshot: Snapshot) -> Iterator[Finding]:
    if snapshot.missing_files:
        shown = ", ".join(snapshot.missing_files[:PIDS_NAMED])
        rest = len(snapshot.missing_files) - PIDS_NAMED
        yield Finding(
            True,
            f"something has removed {shown}{f' and {rest} more' if rest > 0 else ''} under living processes: they put "
            "files back within seconds, unless they are stopped; keep cleaners away from the runtime directory, or set "
            "MPMM_RUNTIME_DIR to a folder that no cleaner touches",
        )


def _leader(snapshot: Snapshot) -> Iterator[Finding]:
    leader = next((member for member in snapshot.members if member.slot == snapshot.leader), None)
    if leader is None and snapshot.members:
        yield Finding(True, "no leader: memory is not polled, and dead processes are not cleaned up")
    elif leader is not None and leader.alive is False:
        yield Finding(True, f"the leader, pid {leader.pid}, is dead, and no other process has taken over yet")


def _samples(snapshot: Snapshot) -> Iterator[Finding]:
    stale_after_s = snapshot.settings.poll_interval + STALE_AFTER_S
    if snapshot.leader is not None and snapshot.polled_ago_s > stale_after_s:
        yield Finding(
            True,
            f"memory has not been polled for {age(snapshot.polled_ago_s)}, poll_interval is "
            f"{snapshot.settings.poll_interval:g} s: are the leader and all other processes stopped?",
        )
    if snapshot.accounting_only and any(device.measured for device in snapshot.devices):
        pid = next((str(member.pid) for member in snapshot.members if member.slot == snapshot.leader), "?")
        yield Finding(
            True,
            f"memory is no longer measured: the leader, pid {pid}, has no source that can, and uses its own "
            "accounting; the devices' figures are the last ones of a process that is gone or stuck",
        )
    for device in snapshot.devices:
        if device.sample_age_s is None:
            if not snapshot.accounting_only:
                yield Finding(True, f"device {device.row} ({device.name}) has not been measured yet")
        elif device.sample_age_s > stale_after_s:
            yield Finding(
                True,
                f"the last sample of device {device.row} ({device.name}) is {age(device.sample_age_s)} old, "
                f"poll_interval is {snapshot.settings.poll_interval:g} s: its source does not answer, or no "
                "process polls",
            )


def _dead(snapshot: Snapshot) -> Iterator[Finding]:
    dead = [str(member.pid) for member in snapshot.members if member.alive is False]
    if dead:
        rest = f" and {len(dead) - PIDS_NAMED} more" if len(dead) > PIDS_NAMED else ""
        yield Finding(True, f"dead, but not cleaned up yet: pid {', '.join(dead[:PIDS_NAMED])}{rest}")


def _waits(snapshot: Snapshot, decided: Mapping[int, float] | None) -> Iterator[Finding]:
    said_of = whys(snapshot, decided)
    for ticket in waiters(snapshot):
        if ticket.reason in (Reason.EXTERNAL, Reason.PINNED):
            yield Finding(
                True, f"mpmm can unload nothing that would help pid {ticket.pid}: {ticket.tag} {said_of(ticket)}"
            )
    oldest = oldest_waiter(snapshot)
    if oldest is not None and oldest.waited_s > LONG_WAIT_S:
        yield Finding(
            True, f"pid {oldest.pid} has waited for {oldest.tag} for {age(oldest.waited_s)}: {said_of(oldest)}"
        )


def _holds(snapshot: Snapshot) -> Iterator[Finding]:
    queue = waiters(snapshot)
    if not queue:
        return
    pids = {member.slot: member.pid for member in snapshot.members}
    wanted = {ticket.model for ticket in queue}
    held = [copy for copy in snapshot.copies if copy.state == "active" and copy.for_s > LONG_HOLD_S]
    longest = max(held, key=lambda copy: (copy.model in wanted, copy.for_s), default=None)
    if longest is not None:
        pid = "?" if longest.holder is None else pids.get(longest.holder, "?")
        yield Finding(
            True,
            f"pid {pid} has held {longest.tag} for {age(longest.for_s)} while {len(queue)} "
            + ("request waits" if len(queue) == 1 else "requests wait")
            + ("" if len(held) == 1 else f"; {len(held)} copies are held for more than {LONG_HOLD_S:.0f} s"),
        )


def _loads(snapshot: Snapshot) -> Iterator[Finding]:
    usual = {model.row: model.load_s for model in snapshot.models}
    pids = {member.slot: member.pid for member in snapshot.members}
    for copy in snapshot.copies:
        expected = usual.get(copy.model, 0.0)
        if copy.state == "loading" and copy.for_s > max(LONG_LOAD_S, SLOW_LOAD * expected):
            compared = f", usually {age(expected)}" if expected else ""
            pid = "?" if copy.holder is None else pids.get(copy.holder, "?")
            yield Finding(True, f"pid {pid} has been loading {copy.tag} for {age(copy.for_s)}{compared}")


def _unloads(snapshot: Snapshot) -> Iterator[Finding]:
    pids = {member.slot: member.pid for member in snapshot.members}
    for copy in snapshot.copies:
        if copy.state == "unloading" and copy.unload_late:
            pid = "?" if copy.holder is None else pids.get(copy.holder, "?")
            rest = (
                "no other process can do it, so other copies are evicted instead; is that process stopped, or its "
                "unload method stuck?"
                if copy.owner is not None
                else "other processes try it, too, and evict other copies meanwhile"
            )
            yield Finding(
                True, f"pid {pid} has been unloading {copy.tag} ({copy.mb:.0f} MB) for {age(copy.for_s)}: {rest}"
            )


def _suspensions(snapshot: Snapshot) -> Iterator[Finding]:
    pids = {member.slot: member.pid for member in snapshot.members}
    for copy in snapshot.copies:
        if copy.state == "suspending" and copy.device in snapshot.steady_devices:
            # It waits for a steady load or lease on its device; its time limit begins after that.
            continue
        if copy.state in ("suspending", "resuming") and copy.for_s > limit_s(copy.device_mb):
            pid = "?" if copy.holder is None else pids.get(copy.holder, "?")
            yield Finding(
                True,
                f"pid {pid} has been {copy.state} {copy.tag} ({copy.device_mb:.0f} MB) for {age(copy.for_s)}: if it is "
                "stuck, the copy is unloaded soon, and the model is loaded again",
            )
    for model in snapshot.models:
        if model.unsuspendable:
            why = model.why_unsuspendable
            yield Finding(False, f"{model.tag} is unloaded instead of suspended, because {why}")


def _past(snapshot: Snapshot) -> Iterator[Finding]:
    if snapshot.written_off_mb > 0:
        yield Finding(
            False,
            f"{snapshot.written_off_mb:.0f} MB that were unloaded never came back; memory_return_seconds is how long "
            "mpmm waits for that",
        )
    for count, text in (
        (snapshot.rollbacks, "transactions rolled back because their process died"),
        (snapshot.reaps, "processes that died and were cleaned up"),
        (snapshot.out_of_memory, "loads or uses that ran out of memory"),
        (snapshot.failed_loads, "loads that failed"),
        (snapshot.timeouts, "waits that timed out"),
        (snapshot.files_put_back, "files put back that something had removed under living processes"),
    ):
        if count:
            yield Finding(False, f"since the namespace was created: {text}: {count}")
