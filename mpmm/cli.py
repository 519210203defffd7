"""The command line: look into a namespace, check it, reset it, run a program in it.

    mpmm list                     the namespaces of this user
    mpmm inspect [NAMESPACE]      members, leader, devices, models, copies, waiters, as tables
    mpmm inspect --json           the same as one JSON object
    mpmm check [NAMESPACE]        verify the invariants; exit status 1 if one does not hold
    mpmm reset NAMESPACE          unload everything and send all waiters away
    mpmm run --mb MB -- PROGRAM ARGUMENTS…
                                  run a program once so much memory is free, and count it as used meanwhile

`run` ends with the exit status of its program, 128 + n if signal n ended that; 127 and 126 if there is no such program
or it cannot be run, 125 if the memory is not to be had. See `mpmm.run`.

`inspect` and `check` take no lock, so they answer while the lock's holder is stopped, and say so.

JSON schema, version 1: an object with `schema` (1), and every field of `mpmm.shared_state.snapshot.Snapshot` under
its name, its rows as arrays of objects with the fields of `MemberInfo`, `ModelInfo` and so on. Memory is in MB
(MiB), durations in seconds, `*_wall_s` are Unix times; what is unknown or infinite is null. A lease that is held is
among `instances`, with state `leased`, and every lease is among `models`, with kind `lease`. Tickets, and events that
the policy has decided, also have `why`, the sentence that `mpmm inspect` shows.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
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
EXIT_NO_LEASE = 125
# Where programs run for which no namespace was named, if there is none at all.
DEFAULT_NAMESPACE = "default"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, 1 for a broken invariant, 2 when there is nothing to look at."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # What is behind belongs to the program that is to be run, whatever it looks like.
    ours, program = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = _parser()
    options = parser.parse_args(ours)
    root = Path(options.runtime_root) if options.runtime_root else None
    if bool(program) != (options.command == "run"):
        parser.error("a program and its arguments stand behind `--`, and belong to `run` alone")
    if options.command == "run":
        return _run(options, program, root)
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
    run = commands.add_parser(
        "run",
        help="run a program on a lease of memory",
        usage="%(prog)s --mb MB [--namespace NAMESPACE] [--name NAME] [--wait SECONDS] -- PROGRAM [ARGUMENT ...]",
    )
    run.add_argument("--mb", type=float, required=True, help="memory that the program takes at most, in MB (MiB)")
    run.add_argument("--namespace", help=f"default: the only one there is; if there is none, {DEFAULT_NAMESPACE!r}")
    run.add_argument("--name", help="name of the lease (default: the program's)")
    run.add_argument("--wait", type=float, default=math.inf, metavar="SECONDS", help="give up then (default: never)")
    return parser


def _only_namespace(root: Path | None) -> str:
    names = find_namespaces(root)
    if len(names) != 1:
        found = ", ".join(names) or "none"
        raise FileNotFoundError(f"which namespace? There are {len(names)}: {found}")
    return names[0]


def _run(options: argparse.Namespace, program: Sequence[str], root: Path | None) -> int:
    # Imported here because looking at a namespace should not load what managing one needs.
    from mpmm.run import run_on_lease

    # The standard streams are the program's. That our defaults are not the namespace's settings is nothing to report.
    logging.getLogger("mpmm").setLevel(logging.ERROR)
    name = options.name or Path(program[0]).name
    try:
        namespace = options.namespace or (_only_namespace(root) if find_namespaces(root) else DEFAULT_NAMESPACE)
        return run_on_lease(program, options.mb, name=name, namespace=namespace, root=root, wait_seconds=options.wait)
    except (FileNotFoundError, MpmmError) as error:
        print(f"mpmm: {error}", file=sys.stderr)
        return EXIT_NO_LEASE


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
        f"source {snapshot.source or '(none yet)'}{', which knows processes' if snapshot.measures_processes else ''}; "
        f"loads {snapshot.loads}, reuses {snapshot.hits}, "
        f"evictions {snapshot.evictions}, failed loads {snapshot.failed_loads}, "
        f"out of memory {snapshot.out_of_memory}, reaped {snapshot.reaps}, rolled back {snapshot.rollbacks}, "
        f"written off {snapshot.written_off_mb:.0f} MB",
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
    lines += _section("leases", _LEASE_HEAD, _lease_rows(snapshot))
    lines += _section("waiting", _TICKET_HEAD, _ticket_rows(snapshot))
    lines += _section("last decisions", _DECISION_HEAD, _decision_rows(snapshot))
    lines += _section("members", _MEMBER_HEAD, _member_rows(snapshot))
    return "\n".join(lines)


_DEVICE_HEAD = ("device", "used MB", "reserved", "returning", "limit", "total", "highest", "sample age")
_MODEL_HEAD = (
    *("model", "MB", "loaded", "active", "idle", "loading", "unloading", "waiting", "loads", "reuses", "evict", "pins"),
    *("load s", "hold s", "per s", "unused s"),
)
_COPY_HEAD = ("copy", "model", "state", "for s", "MB", "holder pid", "kept by pid", "uses")
_LEASE_HEAD = ("lease", "name", "MB", "taken MB", "for s", "device", "holder pid", "program pid")
_TICKET_HEAD = ("ticket", "for", "pid", "state", "waited s", "left s", "needs MB", "reason", "why")
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
            *(str(count) for count in (model.waiting, model.loads, model.hits, model.evictions, model.pins)),
            f"{model.load_s:.3f}",
            f"{model.hold_s:.3f}",
            f"{Demand(model.gap_s, model.requests).per_second(model.requested_ago_s):.3g}",
            f"{model.unused_for_s:.1f}",
        )
        for model in sorted(snapshot.models, key=lambda model: model.tag)
        if model.kind == "model"
    ]


def _pids(snapshot: Snapshot) -> Callable[[int | None], str]:
    """Return what tells the pid of the member in a slot, as text."""
    pids = {member.slot: str(member.pid) for member in snapshot.members}
    return lambda slot: "-" if slot is None else pids.get(slot, "?")


def _lease_rows(snapshot: Snapshot) -> list[tuple[str, ...]]:
    pid_of = _pids(snapshot)
    devices = {device.row: device.name for device in snapshot.devices}
    return [
        (
            str(lease.row),
            lease.tag,
            _mb(lease.reserved_mb),
            _mb(lease.mb) if lease.mb else "?",
            f"{lease.for_s:.1f}",
            devices.get(lease.device, "?"),
            pid_of(lease.holder),
            "?" if lease.program is None else str(lease.program),
        )
        for lease in snapshot.instances
        if lease.state == "leased"
    ]


def _copy_rows(snapshot: Snapshot) -> list[tuple[str, ...]]:
    pid_of = _pids(snapshot)
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
        if copy.state != "leased"
    ]


def _ticket_rows(snapshot: Snapshot) -> list[tuple[str, ...]]:
    return [
        (
            str(ticket.number),
            ticket.tag,
            str(ticket.pid),
            ticket.state,
            f"{ticket.waited_s:.1f}",
            "-" if math.isinf(ticket.time_left_s) else f"{ticket.time_left_s:.1f}",
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
