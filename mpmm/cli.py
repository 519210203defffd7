"""The command line: look into a namespace, check it, reset it.

    mpmm list                     the namespaces of this user
    mpmm inspect [NAMESPACE]      members, leader, devices, models, copies, waiters, as tables
    mpmm inspect --json           the same as one JSON object
    mpmm check [NAMESPACE]        verify the invariants; exit status 1 if one does not hold
    mpmm reset NAMESPACE          unload everything and send all waiters away

`inspect` and `check` take no lock, so they answer while the lock's holder is stopped, and say so.

JSON schema, version 1: an object with `schema` (1), and every field of `mpmm.shared_state.snapshot.Snapshot` under
its name, its rows as arrays of objects with the fields of `MemberInfo`, `ModelInfo` and so on. Memory is in MB
(MiB), durations in seconds, `*_wall_s` are Unix times; what is unknown or infinite is null. Tickets, and
events that the policy has decided, also have `why`, the sentence that `mpmm inspect` shows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mpmm.errors import MpmmError
from mpmm.policy.demand import Demand
from mpmm.policy.reasons import explain
from mpmm.policy.view import Reason
from mpmm.shared_state.invariants import check_invariants
from mpmm.shared_state.snapshot import EventInfo, Snapshot, TicketInfo, as_json, find_namespaces, read_snapshot

__all__ = ["main", "render"]

SCHEMA_VERSION = 1
EXIT_PROBLEM = 1
EXIT_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, 1 for a broken invariant, 2 when there is nothing to look at."""
    options = _parser().parse_args(arguments)
    root = Path(options.runtime_root) if options.runtime_root else None
    try:
        if options.command == "list":
            print("\n".join(find_namespaces(root)) or "no namespaces")
            return 0
        namespace = options.namespace or _only_namespace(root)
        if options.command == "reset":
            return _reset(namespace, root)
        snapshot = read_snapshot(namespace, root, events=options.command == "inspect")
    except (FileNotFoundError, MpmmError) as error:
        print(f"mpmm: {error}", file=sys.stderr)
        return EXIT_USAGE
    if options.command == "check":
        return _check(snapshot)
    if options.json:
        found = as_json(snapshot)
        for name in ("tickets", "events"):
            for row, shown in zip(getattr(snapshot, name), found[name], strict=True):
                shown["why"] = _why(row)
        print(json.dumps({"schema": SCHEMA_VERSION, **found}))
    else:
        print(render(snapshot))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mpmm", description="Look into the multi-process model manager of this host.")
    parser.add_argument("--runtime-root", help="folder of the runtime directories (default: $MPMM_RUNTIME_DIR)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name the namespaces of this user")
    inspect = commands.add_parser("inspect", help="show members, devices, models, copies and waiters")
    inspect.add_argument("--json", action="store_true", help="as one JSON object")
    for command in (inspect, commands.add_parser("check", help="verify the invariants")):
        command.add_argument("namespace", nargs="?", help="default: the only one there is")
    reset = commands.add_parser("reset", help="unload everything, send all waiters away")
    reset.add_argument("namespace")
    return parser


def _only_namespace(root: Path | None) -> str:
    names = find_namespaces(root)
    if len(names) != 1:
        found = ", ".join(names) or "none"
        raise FileNotFoundError(f"which namespace? There are {len(names)}: {found}")
    return names[0]


def _check(snapshot: Snapshot) -> int:
    problems = check_invariants(snapshot)
    for problem in problems:
        print(problem)
    print(f"{snapshot.namespace}: {len(problems)} invariants broken" if problems else f"{snapshot.namespace}: all well")
    return EXIT_PROBLEM if problems else 0


def _reset(namespace: str, root: Path | None) -> int:
    # Imported here because looking at a namespace should not load what managing one needs.
    from mpmm.model_manager import ModelManager

    read_snapshot(namespace, root, events=False)
    with ModelManager(namespace=namespace, runtime_root=root) as manager:
        manager.force_reset()
    print(f"{namespace}: reset")
    return 0


def render(snapshot: Snapshot) -> str:
    """Return a snapshot as text for people."""
    lock = snapshot.lock
    lines = [
        f"namespace {snapshot.namespace}, segment {snapshot.segment}, layout {snapshot.layout_version}",
        f"source {snapshot.source or '(none yet)'}, loads {snapshot.loads}, reuses {snapshot.hits}, "
        f"evictions {snapshot.evictions}, failed loads {snapshot.failed_loads}, reaped {snapshot.reaps}, "
        f"rolled back {snapshot.rollbacks}, written off {snapshot.written_off_mb:.0f} MB",
    ]
    if lock.holder_stopped:
        lines.append(
            f"ATTENTION: process {lock.last_holder_pid} is stopped and has held the lock for {lock.taken_ago_s:.1f} s"
        )
    if snapshot.torn_words:
        lines.append(f"a transaction of process {lock.last_holder_pid} is open; shown is the state before it")
    leader = next((member for member in snapshot.members if member.slot == snapshot.leader), None)
    lines.append(f"leader: {f'pid {leader.pid}' if leader else 'none'}")
    if snapshot.isolated is not None:
        alone = next((copy for copy in snapshot.instances if copy.row == snapshot.isolated), None)
        lines.append(f"isolation: {alone.tag if alone else '?'} runs alone to be measured")
    lines += _section("devices", _DEVICE_HEAD, _device_rows(snapshot))
    lines += _section("models", _MODEL_HEAD, _model_rows(snapshot))
    lines += _section("copies", _COPY_HEAD, _copy_rows(snapshot))
    lines += _section("waiting", _TICKET_HEAD, _ticket_rows(snapshot))
    lines += _section("last decisions", _DECISION_HEAD, _decision_rows(snapshot))
    lines += _section("members", _MEMBER_HEAD, _member_rows(snapshot))
    return "\n".join(lines)


_DEVICE_HEAD = ("device", "used MB", "reserved", "returning", "limit", "total", "highest", "sample age")
_MODEL_HEAD = (
    *("model", "MB", "loaded", "active", "idle", "loading", "unloading", "waiting", "loads", "reuses", "evict"),
    *("load s", "hold s", "per s", "unused s"),
)
_COPY_HEAD = ("copy", "model", "state", "for s", "MB", "holder pid", "kept by pid", "uses")
_TICKET_HEAD = ("ticket", "model", "pid", "state", "waited s", "left s", "needs MB", "reason", "why")
_DECISION_HEAD = ("s ago", "event", "model", "ticket", "why")
_DECISIONS_SHOWN = 16
_MEMBER_HEAD = ("member", "kind", "pid", "alive", "attached s", "MB", "name")


def _mb(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f}"


def _device_rows(snapshot: Snapshot) -> list[tuple[str, ...]]:
    return [
        (
            device.name,
            _mb(device.used_mb),
            _mb(device.reserved_mb),
            _mb(device.returning_mb),
            _mb(device.limit_mb),
            _mb(device.total_mb),
            _mb(device.peak_since_start_mb),
            "never" if device.sample_age_s is None else f"{device.sample_age_s:.1f}",
        )
        for device in snapshot.devices
    ]


def _model_rows(snapshot: Snapshot) -> list[tuple[str, ...]]:
    return [
        (
            model.tag,
            _mb(model.estimate_mb),
            *(str(count) for count in (model.loaded, model.active, model.idle, model.loading, model.unloading)),
            *(str(count) for count in (model.waiting, model.loads, model.hits, model.evictions)),
            f"{model.load_s:.3f}",
            f"{model.hold_s:.3f}",
            f"{Demand(model.gap_s, model.requests).per_second(model.requested_ago_s):.3g}",
            f"{model.unused_for_s:.1f}",
        )
        for model in sorted(snapshot.models, key=lambda model: model.tag)
    ]


def _copy_rows(snapshot: Snapshot) -> list[tuple[str, ...]]:
    pids = {member.slot: str(member.pid) for member in snapshot.members}

    def pid_of(slot: int | None) -> str:
        return "-" if slot is None else pids.get(slot, "?")

    return [
        (
            str(copy.row),
            copy.tag,
            copy.state,
            f"{copy.for_s:.1f}",
            _mb(copy.mb),
            pid_of(copy.holder),
            pid_of(copy.owner if copy.server is None else copy.server),
            str(copy.uses),
        )
        for copy in snapshot.instances
    ]


def _ticket_rows(snapshot: Snapshot) -> list[tuple[str, ...]]:
    return [
        (
            str(ticket.number),
            ticket.tag,
            str(ticket.pid),
            ticket.state,
            f"{ticket.waited_s:.1f}",
            f"{ticket.time_left_s:.1f}",
            _mb(ticket.need_mb),
            Reason(ticket.reason).name.lower() if ticket.reason in Reason._value2member_map_ else str(ticket.reason),
            _why(ticket),
        )
        for ticket in snapshot.tickets
    ]


def _decision_rows(snapshot: Snapshot) -> list[tuple[str, ...]]:
    decided = [event for event in snapshot.events if event.reason is not None]
    return [
        (
            f"{event.age_s:.2f}",
            event.kind,
            event.tag or "?",
            "" if event.ticket is None else str(event.ticket),
            _why(event),
        )
        for event in decided[-_DECISIONS_SHOWN:]
    ]


def _why(row: TicketInfo | EventInfo) -> str:
    """Return the sentence for a decision, empty where the policy has decided nothing."""
    if row.reason is None:
        return ""
    return explain(
        row.reason, row.need_mb or 0.0, row.free_mb or 0.0, row.coming_mb or 0.0, row.seconds or 0.0, row.other
    )


def _member_rows(snapshot: Snapshot) -> list[tuple[str, ...]]:
    return [
        (
            str(member.slot),
            member.kind,
            str(member.pid),
            {True: "yes", False: "DEAD", None: "?"}[member.alive],
            f"{member.attached_for_s:.1f}",
            _mb(member.measured_mb) if member.kind == "server" else "",
            member.name,
        )
        for member in snapshot.members
    ]


def _section(title: str, head: Sequence[str], rows: list[tuple[str, ...]]) -> list[str]:
    if not rows:
        return ["", f"{title}: none"]
    widths = [max(len(row[column]) for row in [tuple(head), *rows]) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()

    return ["", f"{title}:", line(head), line(["-" * width for width in widths]), *(line(row) for row in rows)]


if __name__ == "__main__":
    sys.exit(main())
