"""Tells to whom the pids belong that a source lists: members, model servers, programs of leases, or unrelated programs.

Nothing here needs the lock, nor would be safer with it: a process may end at any time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

from mpmm.shared_state.durations import to_ns
from mpmm.shared_state.layout import Instance, Member
from mpmm.shared_state.liveness import is_member_here, pid_namespace
from mpmm.shared_state.namespace import Namespace
from mpmm.sources import DeviceSample
from mpmm.sources.process_tree import is_ending, nearest_roots, process_tree, start_time

__all__ = ["ListedPids"]


class ListedPids:
    """This process's knowledge of the pids in its samples."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        # When this process has last seen each of the model servers.
        self._servers_at_ns: dict[int, int] = {}
        # Generations, by slot, of the members whose pids mean the same processes here.
        self._here: dict[int, int] = {}
        # The processes in the last samples that model servers have started: when each began, and the server's pid.
        self._started: dict[int, tuple[int, int]] = {}

    def with_servers(self, samples: Sequence[DeviceSample]) -> tuple[Sequence[DeviceSample], Set[int]]:
        """Return the samples with what the processes that a server has started take as part of what the server takes.

        The second value: the pids of the servers of which such processes take memory.

        An engine may hold a model in a process of its own, and it is the server's unload that frees this memory.
        Processes that are counted by themselves are no part of it: members, and programs of leases, each with what it
        has started. A process whose parent has ended stays the server's. After the server's end, all of them are as it
        is in `unrelated`.
        """
        members, servers = self._members(), self._servers()
        alone = members | set(self.leases().values())
        others = {pid for sample in samples for pid in sample.process_mb} - alone
        # Usually only members are listed, and then no process is looked up.
        nearest = nearest_roots(others, alone) if others else {}
        known = servers | self._servers_at_ns.keys()
        started: dict[int, tuple[int, int]] = {}
        for pid in others:
            if nearest.get(pid) in servers:
                started[pid] = start_time(pid), nearest[pid]
            elif pid in self._started and pid not in nearest:
                began, server = self._started[pid]
                # 0: it has ended since the sample, and the kernel has not reused its pid yet.
                if server in known and start_time(pid) in (began, 0):
                    started[pid] = began, server
        self._started = started
        if not started:
            return samples, frozenset()
        taking = {pid for sample in samples for pid, mb in sample.process_mb.items() if mb > 0}
        return [_merged(sample, started) for sample in samples], {started[pid][1] for pid in taking & started.keys()}

    def members_among(self, listed: Mapping[int, float]) -> set[int]:
        """Return the slots of the members whose pids are listed."""
        tables = self._namespace.tables
        return {slot for slot in tables.used_members() if tables.members[slot].pid in listed and self._is_here(slot)}

    def are_apart(self) -> bool:
        """Tell whether there are, or were, members in another container than this process, whose pids differ."""
        return pid_namespace() not in (0, self._namespace.tables.header.pid_namespace)

    def unrelated(self, listed: Mapping[int, float]) -> set[int]:
        """Return which of these processes are neither members nor programs of leases.

        listed: without the processes that servers have started, see `with_servers`.

        Processes that a worker has started without a lease are unrelated: they hold nothing that could be unloaded. A
        server that is ending is no longer a member while the driver still lists it with all of its memory: this memory
        is coming back, and belongs to no other program.
        """
        ours = self._members() | {pid for tree in self.programs().values() for pid in tree}
        return {pid for pid in set(listed) - ours - self._servers_at_ns.keys() if not is_ending(pid)}

    def to_measure(self, trees: bool = True) -> Sequence[int]:
        """Return the pids of the namespace's model servers, and of programs that have leases.

        trees: also those of the processes that the servers have started; 0.1 ms for each server.
        """
        servers = self._servers()
        now_ns = time.monotonic_ns()
        # For as long as memory may take to come back; then it is written off.
        lately_ns = now_ns - to_ns(self._namespace.settings.memory_return_seconds)
        lately = {pid: at_ns for pid, at_ns in self._servers_at_ns.items() if at_ns >= lately_ns}
        self._servers_at_ns = {**lately, **dict.fromkeys(servers, now_ns)}
        programs = self.programs()
        named = [*servers, *(pid for tree in programs.values() for pid in tree)]
        if trees:
            alone = self._members() | programs.keys()
            named += [pid for server in servers for pid in process_tree(server, alone) if pid != server]
        return named

    def leases(self) -> dict[int, int]:
        """Return the rows of leases whose program is known, each with the program's pid here."""
        tables = self._namespace.tables
        leases = tables.rows_where(self._namespace.segment.layout.instances, Instance.STATE, Instance.LEASED)
        programs = {row: (tables.instances[row].program, tables.instances[row].holder) for row in leases}
        # A lease without a holder has just ended.
        return {
            row: pid for row, (pid, holder) in programs.items() if pid and holder is not None and self._is_here(holder)
        }

    def programs(self) -> dict[int, list[int]]:
        """Return the programs of leases, by pid: the pids of each, and of the processes that it has started.

        Processes that are counted by themselves are not the program's: a model server, the program of another lease.
        """
        programs = set(self.leases().values())
        if not programs:
            return {}
        counted_alone = self._servers() | programs
        return {pid: process_tree(pid, counted_alone) for pid in programs}

    def _is_here(self, slot: int) -> bool:
        """Tell whether this process and its source can know a member by its pid.

        A process of another container may have the pid of a process in this one: containers count from 1.
        """
        tables = self._namespace.tables
        if not self.are_apart():
            return True
        generation = tables.members[slot].generation
        if self._here.get(slot) == generation:
            return True
        # A negative answer is not kept, because the member's row may have been half written.
        found = is_member_here(tables, slot)
        if found:
            self._here[slot] = generation
        return found

    def _members(self) -> set[int]:
        """Return the pids of all members, as far as they are known here."""
        tables = self._namespace.tables
        return {tables.members[slot].pid for slot in tables.used_members() if self._is_here(slot)}

    def _servers(self) -> set[int]:
        """Return the pids of the namespace's model servers, as far as they are known here."""
        tables, layout = self._namespace.tables, self._namespace.segment.layout
        slots = tables.rows_where(layout.members, Member.STATE, Member.SERVER)
        return {tables.members[slot].pid for slot in slots if self._is_here(slot)}


def _merged(sample: DeviceSample, started: Mapping[int, tuple[int, int]]) -> DeviceSample:
    """Return a sample in which what these processes take is part of what their servers take."""
    merged: dict[int, float] = {}
    for pid, mb in sample.process_mb.items():
        counted = started[pid][1] if pid in started else pid
        merged[counted] = merged.get(counted, 0.0) + mb
    return replace(sample, process_mb=merged)
