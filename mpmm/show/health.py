"""What is wrong with a namespace, in sentences; what merely happened, too, but told apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mpmm.policy.suspension import Unsuspendable, limit_s
from mpmm.policy.view import Reason
from mpmm.shared_state.invariants import check_invariants
from mpmm.shared_state.snapshot import Snapshot, TicketInfo
from mpmm.show.words import age, needs, waiters, why

__all__ = ["Finding", "findings", "longest_wait_s", "oldest_waiter", "what_ails"]

# A leader polls every `poll_interval`, and others do in its place after 0.6 s more; then comes the poll itself.
STALE_AFTER_S = 2.0
# Somebody who waits for so long is worth a look; a load, or a hold that others wait for, likewise.
LONG_WAIT_S = 30.0
LONG_LOAD_S = 60.0
LONG_HOLD_S = 60.0
# A load may take so many times as long as the model's loads usually do.
SLOW_LOAD = 10.0
PIDS_NAMED = 5


_UNSUSPENDABLE: dict[int, str] = {
    Unsuspendable.SUSPEND_FAILED: "it could not be suspended when that was tried",
    Unsuspendable.RESUME_FAILED: "it could not be resumed when that was tried",
    Unsuspendable.TIMED_OUT: "to suspend or to resume it did not come to an end",
}


@dataclass(frozen=True)
class Finding:
    """One sentence. urgent: something is wrong now; else it is worth to know."""

    urgent: bool
    text: str


def findings(snapshot: Snapshot) -> list[Finding]:
    """Return what is to be said about a namespace, the urgent first."""
    checks = (_lock, _files, _leader, _samples, _dead, _waits, _holds, _loads, _unloads, _suspensions, _past)
    found = [finding for check in checks for finding in check(snapshot)]
    return sorted(found, key=lambda finding: not finding.urgent)


def what_ails(snapshot: Snapshot) -> list[str]:
    """Return what a probe should fail for, empty for a healthy namespace: all that is urgent, and broken invariants."""
    found = [f"invariant broken: {problem}" for problem in check_invariants(snapshot)]
    if not any(member.alive is not False for member in snapshot.members):
        # What the findings say of the dead says no more.
        return [
            *found,
            f"dead: none of its {len(snapshot.members)} processes is alive; the next process to attach starts anew, "
            "and `mpmm prune` removes what is left",
        ]
    return found + [f"ATTENTION: {finding.text}" for finding in findings(snapshot) if finding.urgent]


def oldest_waiter(snapshot: Snapshot) -> TicketInfo | None:
    """Return who has waited longest."""
    return max(waiters(snapshot), key=lambda ticket: ticket.waited_s, default=None)


def longest_wait_s(snapshot: Snapshot) -> float:
    """Return for how long the one who waits longest has done so, 0 if nobody waits."""
    oldest = oldest_waiter(snapshot)
    return 0.0 if oldest is None else oldest.waited_s


def _lock(snapshot: Snapshot) -> Iterator[Finding]:
    lock = snapshot.lock
    if lock.holder_stopped:
        yield Finding(
            True,
            f"process {lock.last_holder_pid} is stopped and has held the lock for {lock.taken_ago_s:.1f} s: nobody "
            "gets or releases anything until it continues or is killed",
        )
    if snapshot.torn_words:
        yield Finding(False, f"a transaction of process {lock.last_holder_pid} is open; shown is the state before it")


def _files(snapshot: Snapshot) -> Iterator[Finding]:
    if snapshot.missing_files:
        shown = ", ".join(snapshot.missing_files[:PIDS_NAMED])
        rest = len(snapshot.missing_files) - PIDS_NAMED
        yield Finding(
            True,
            f"something has removed {shown}{f' and {rest} more' if rest > 0 else ''} under living processes: they put "
            "files back within seconds, unless they are stopped; keep cleaners away from the runtime directory, or set "
            "MPMM_RUNTIME_DIR to one that nobody cleans",
        )


def _leader(snapshot: Snapshot) -> Iterator[Finding]:
    leader = next((member for member in snapshot.members if member.slot == snapshot.leader), None)
    if leader is None and snapshot.members:
        yield Finding(True, "no leader: memory is not polled, and dead processes are not cleaned up")
    elif leader is not None and leader.alive is False:
        yield Finding(True, f"the leader, pid {leader.pid}, is dead, and nobody has taken its place yet")


def _samples(snapshot: Snapshot) -> Iterator[Finding]:
    patience_s = snapshot.settings.poll_interval + STALE_AFTER_S
    if snapshot.leader is not None and snapshot.polled_ago_s > patience_s:
        yield Finding(
            True,
            f"nobody has polled for {age(snapshot.polled_ago_s)}, poll_interval is "
            f"{snapshot.settings.poll_interval:g} s: is the leader stopped, and everybody else?",
        )
    if snapshot.books_only and any(device.measured for device in snapshot.devices):
        pid = next((str(member.pid) for member in snapshot.members if member.slot == snapshot.leader), "?")
        yield Finding(
            True,
            f"nothing is measured any more: pid {pid}, which leads, has no source that can, and goes by the books; the "
            "devices' figures are the last ones of a process that is gone or stuck",
        )
    for device in snapshot.devices:
        if device.sample_age_s is None:
            if not snapshot.books_only:
                yield Finding(True, f"device {device.row} ({device.name}) has not been measured yet")
        elif device.sample_age_s > patience_s:
            yield Finding(
                True,
                f"the last sample of device {device.row} ({device.name}) is {age(device.sample_age_s)} old, "
                f"poll_interval is {snapshot.settings.poll_interval:g} s: its source does not answer, or nobody polls",
            )


def _dead(snapshot: Snapshot) -> Iterator[Finding]:
    dead = [str(member.pid) for member in snapshot.members if member.alive is False]
    if dead:
        rest = f" and {len(dead) - PIDS_NAMED} more" if len(dead) > PIDS_NAMED else ""
        yield Finding(True, f"dead, but what they had is not taken back yet: pid {', '.join(dead[:PIDS_NAMED])}{rest}")


def _waits(snapshot: Snapshot) -> Iterator[Finding]:
    for ticket in waiters(snapshot):
        if ticket.reason in (Reason.FOREIGN, Reason.PINNED):
            said = why(ticket, needs(snapshot)(ticket))
            yield Finding(True, f"nothing that mpmm can unload would serve pid {ticket.pid}: {ticket.tag} {said}")
    oldest = oldest_waiter(snapshot)
    if oldest is not None and oldest.waited_s > LONG_WAIT_S:
        said = why(oldest, needs(snapshot)(oldest))
        yield Finding(True, f"pid {oldest.pid} has waited for {oldest.tag} for {age(oldest.waited_s)}: {said}")


def _holds(snapshot: Snapshot) -> Iterator[Finding]:
    queue = waiters(snapshot)
    if not queue:
        return
    pids = {member.slot: member.pid for member in snapshot.members}
    wanted = {ticket.model for ticket in queue}
    held = [copy for copy in snapshot.instances if copy.state == "active" and copy.for_s > LONG_HOLD_S]
    longest = max(held, key=lambda copy: (copy.model in wanted, copy.for_s), default=None)
    if longest is not None:
        pid = "?" if longest.holder is None else pids.get(longest.holder, "?")
        yield Finding(
            True,
            f"pid {pid} has held {longest.tag} for {age(longest.for_s)} while {len(queue)} "
            + ("waits" if len(queue) == 1 else "wait")
            + ("" if len(held) == 1 else f"; {len(held)} copies are held for more than {LONG_HOLD_S:.0f} s"),
        )


def _loads(snapshot: Snapshot) -> Iterator[Finding]:
    usual = {model.row: model.load_s for model in snapshot.models}
    pids = {member.slot: member.pid for member in snapshot.members}
    for copy in snapshot.instances:
        expected = usual.get(copy.model, 0.0)
        if copy.state == "loading" and copy.for_s > max(LONG_LOAD_S, SLOW_LOAD * expected):
            compared = f", usually {age(expected)}" if expected else ""
            pid = "?" if copy.holder is None else pids.get(copy.holder, "?")
            yield Finding(True, f"pid {pid} has been loading {copy.tag} for {age(copy.for_s)}{compared}")


def _unloads(snapshot: Snapshot) -> Iterator[Finding]:
    pids = {member.slot: member.pid for member in snapshot.members}
    for copy in snapshot.instances:
        if copy.state == "unloading" and copy.unload_late:
            pid = "?" if copy.holder is None else pids.get(copy.holder, "?")
            rest = (
                "only that process can, so others are evicted instead; is it stopped, or is the unload method stuck?"
                if copy.owner is not None
                else "other processes try it, too; other copies are evicted meanwhile"
            )
            yield Finding(
                True, f"pid {pid} has been unloading {copy.tag} ({copy.mb:.0f} MB) for {age(copy.for_s)}: {rest}"
            )


def _suspensions(snapshot: Snapshot) -> Iterator[Finding]:
    pids = {member.slot: member.pid for member in snapshot.members}
    for copy in snapshot.instances:
        if copy.state in ("suspending", "resuming") and copy.for_s > limit_s(copy.device_mb):
            pid = "?" if copy.holder is None else pids.get(copy.holder, "?")
            yield Finding(
                True,
                f"pid {pid} has been {copy.state} {copy.tag} ({copy.device_mb:.0f} MB) for {age(copy.for_s)}: if it is "
                "stuck, its server is ended soon, and the model is loaded anew",
            )
    for model in snapshot.models:
        if model.unsuspendable:
            yield Finding(
                False,
                f"{model.tag} is unloaded where others are suspended, because "
                + _UNSUSPENDABLE.get(model.unsuspendable, f"of reason {model.unsuspendable}"),
            )


def _past(snapshot: Snapshot) -> Iterator[Finding]:
    if snapshot.written_off_mb > 0:
        yield Finding(
            False,
            f"{snapshot.written_off_mb:.0f} MB that were unloaded never came back; memory_return_seconds says how "
            "long that is waited for",
        )
    for count, text in (
        (snapshot.rollbacks, "transactions of processes that died in them, rolled back"),
        (snapshot.reaps, "processes that died; what they had was taken back"),
        (snapshot.out_of_memory, "loads or uses that ran out of memory"),
        (snapshot.failed_loads, "loads that failed"),
        (snapshot.timeouts, "waits that were given up"),
        (snapshot.files_put_back, "files that something removed under living processes, put back"),
    ):
        if count:
            yield Finding(False, f"since the namespace was made: {text}: {count}")
