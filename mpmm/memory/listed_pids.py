"""Tells to whom the pids belong that a source lists: members, model servers, programs of leases, or unrelated programs.

Nothing here needs the lock, nor would be safer with it: a process may end at any time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from mpmm.shared_state.durations import to_ns
from mpmm.shared_state.layout import Instance, Member
from mpmm.shared_state.liveness import is_member_here, pid_namespace
from mpmm.shared_state.namespace import Namespace
from mpmm.sources.process_tree import is_ending, process_tree, unrelated_to

__all__ = ["ListedPids"]


class ListedPids:
    """This process's knowledge of the pids in its samples."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        # When this process has last seen each of the model servers.
        self._servers_at_ns: dict[int, int] = {}
        # Generations, by slot, of the members whose pids mean the same processes here.
        self._here: dict[int, int] = {}

    def members_among(self, listed: Mapping[int, float]) -> set[int]:
        """Return the slots of the members whose pids are listed."""
        tables = self._namespace.tables
        return {slot for slot in tables.used_members() if tables.members[slot].pid in listed and self._is_here(slot)}

    def are_apart(self) -> bool:
        """Tell whether there are, or were, members in another container than this process, whose pids differ."""
        return pid_namespace() not in (0, self._namespace.tables.header.pid_namespace)

    def unrelated(self, listed: Mapping[int, float]) -> set[int]:
        """Return which of these processes are neither members, nor programs of leases, nor a server's children.

        Processes that a worker has started without a lease are unrelated: they hold nothing that could be unloaded. A
        server that is ending is no longer a member while the driver still lists it with all of its memory: this memory
        is coming back, and belongs to no other program.
        """
        tables = self._namespace.tables
        members = {tables.members[slot].pid for slot in tables.used_members() if self._is_here(slot)}
        ours = members | {pid for tree in self.programs().values() for pid in tree}
        unrelated = unrelated_to(set(listed) - ours - self._servers_at_ns.keys(), self._servers())
        return {pid for pid in unrelated if not is_ending(pid)}

    def to_measure(self) -> Sequence[int]:
        """Return the pids of the namespace's model servers, and of programs that have leases."""
        servers = self._servers()
        now_ns = time.monotonic_ns()
        # For as long as memory may take to come back; then it is written off.
        lately_ns = now_ns - to_ns(self._namespace.settings.memory_return_seconds)
        lately = {pid: at_ns for pid, at_ns in self._servers_at_ns.items() if at_ns >= lately_ns}
        self._servers_at_ns = {**lately, **dict.fromkeys(servers, now_ns)}
        return [*servers, *(pid for tree in self.programs().values() for pid in tree)]

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

    def _servers(self) -> set[int]:
        """Return the pids of the namespace's model servers, as far as they are known here."""
        tables, layout = self._namespace.tables, self._namespace.segment.layout
        slots = tables.rows_where(layout.members, Member.STATE, Member.SERVER)
        return {tables.members[slot].pid for slot in slots if self._is_here(slot)}
