"""Host memory as a memory source: real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from containers import as_nobody
from fake_drivers import BUDGET_MB, used
from fake_drivers import plain_environment as plain_environment  # the fixture

from mpmm.errors import InvalidArgumentError
from mpmm.sources.base import MIB, process_exists
from mpmm.sources.host_memory import HostMemorySource, cgroup_limits, host_memory_mb
from mpmm.sources.process_tree import is_ending, is_stopped, nearest_roots, process_tree, start_time

BALLAST_MB = 64
SECOND_NS = 10**9


CHILD = f"""
import sys
ballast = b"x" * ({BALLAST_MB} << 20)
print("full", flush=True)
sys.stdin.readline()
del ballast
print("empty", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    """A process that holds BALLAST_MB, frees it at a line on stdin, and ends at the next."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        assert next(running.stdout or iter(())) == "full\n"
        yield running
        running.kill()


def say(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()


class TestHostMemory:
    def test_memory_of_a_process_is_seen_to_come_and_go(self, child: subprocess.Popen[str]) -> None:
        source = HostMemorySource(BUDGET_MB)
        (full,) = source.sample((child.pid,))
        assert full.used_mb == full.process_mb[child.pid] > BALLAST_MB
        say(child)
        assert next(child.stdout or iter(())) == "empty\n"
        (empty,) = source.sample((child.pid,))
        assert empty.used_mb is not None and empty.used_mb <= full.used_mb - BALLAST_MB + 1

    def test_a_process_that_is_gone_or_a_zombie_counts_nothing(self, child: subprocess.Popen[str]) -> None:
        source = HostMemorySource(BUDGET_MB)
        source.sample((child.pid,))
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not reaped: a zombie
        assert used(source, (child.pid,)) == [0]
        child.wait()
        assert used(source, (child.pid,)) == [0]

    def test_no_servers_use_nothing(self) -> None:
        assert used(HostMemorySource(BUDGET_MB)) == [0]

    def test_a_process_named_twice_counts_once(self, child: subprocess.Popen[str]) -> None:
        source = HostMemorySource(BUDGET_MB)
        assert used(source, (child.pid, child.pid)) == used(source, (child.pid,))

    def test_an_unchanged_process_is_walked_once(
        self, child: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        walks: list[int] = []
        walk = psutil.Process.memory_full_info

        def counted(process: psutil.Process) -> Any:
            walks.append(process.pid)
            return walk(process)

        monkeypatch.setattr(psutil.Process, "memory_full_info", counted)
        source = HostMemorySource(BUDGET_MB)
        assert used(source, (child.pid,)) == used(source, (child.pid,))
        assert len(walks) == 1
        monkeypatch.setattr("mpmm.sources.host_memory.USS_LIFETIME_NS", 0)
        source.sample((child.pid,))
        assert len(walks) == 2

    def test_a_process_whose_pages_may_not_be_walked_counts_with_its_rss(
        self, child: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(process: psutil.Process) -> None:
            raise psutil.AccessDenied(process.pid)

        monkeypatch.setattr(psutil.Process, "memory_full_info", refuse)
        (sample,) = HostMemorySource(BUDGET_MB).sample((child.pid,))
        assert sample.used_mb == pytest.approx(psutil.Process(child.pid).memory_info().rss / MIB, abs=2)
        monkeypatch.setattr(psutil.Process, "memory_info", refuse)
        assert used(HostMemorySource(BUDGET_MB), (child.pid,)) == [None]

    def test_without_a_budget_everybody_counts(
        self, child: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=9000 * MIB, available=6000 * MIB))
        limits: list[tuple[int, int | None]] = []
        monkeypatch.setattr("mpmm.sources.host_memory.cgroup_limits", lambda: limits)
        (sample,) = HostMemorySource().sample((child.pid,))
        assert sample.used_mb == 3000
        assert sample.unrelated_mb((child.pid,)) == 3000 - sample.process_mb[child.pid] < 3000 - BALLAST_MB
        # A group with a limit, 500 MB of which are left; and its parent, whose use cannot be seen.
        limits += [(2000 * MIB, 1500 * MIB), (4000 * MIB, None)]
        source = HostMemorySource()
        assert source.devices()[0].total_mb == 2000
        assert used(source) == [1500]
        # A group may have more than its limit, which was lowered meanwhile.
        limits[0] = (2000 * MIB, 2500 * MIB)
        assert used(source) == [2000]
        limits[0] = (2000 * MIB, 1500 * MIB)
        # The host itself may be shorter of memory than the group.
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=9000 * MIB, available=100 * MIB))
        assert used(source) == [1900]
        # Nothing at all is in use.
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=9000 * MIB, available=9000 * MIB))
        limits.clear()
        assert used(HostMemorySource()) == [0]

    def test_the_total_is_the_budget_or_what_the_host_has(self) -> None:
        assert HostMemorySource(budget_mb=1234).devices()[0].total_mb == 1234.0
        total_mb = HostMemorySource().devices()[0].total_mb
        assert total_mb == host_memory_mb() <= psutil.virtual_memory().total / MIB

    @pytest.mark.parametrize("budget_mb", [0, -1, float("nan"), float("inf")])
    def test_a_budget_that_is_no_size_is_refused(self, budget_mb: float) -> None:
        with pytest.raises(InvalidArgumentError, match="budget_mb"):
            HostMemorySource(budget_mb)

    def test_limits_of_the_control_group_and_its_parents_count(self, tmp_path: Path) -> None:
        membership = tmp_path / "cgroup"
        mount = tmp_path / "mount"
        (mount / "pod" / "box").mkdir(parents=True)
        (mount / "memory" / "pod").mkdir(parents=True)
        (mount / "pod" / "box" / "memory.max").write_text("max\n")
        (mount / "pod" / "memory.max").write_text("5000\n")
        (mount / "memory" / "pod" / "memory.limit_in_bytes").write_text("7000\n")
        membership.write_text("0::/pod/box\n")
        (mount / "pod" / "memory.current").write_text("4000\n")
        (mount / "pod" / "memory.stat").write_text("anon 1\ninactive_file 1500\nactive_file 9\n")
        assert cgroup_limits(mount, membership) == [(5000, 2500)]
        # The throttling limit of a group counts like its hard limit wherever it is lower.
        (mount / "pod" / "memory.high").write_text("4500\n")
        (mount / "pod" / "box" / "memory.high").write_text("max\n")
        assert cgroup_limits(mount, membership) == [(4500, 2500)]
        (mount / "pod" / "memory.high").write_text("6000\n")
        (mount / "pod" / "box" / "memory.high").write_text("3000\n")
        assert cgroup_limits(mount, membership) == [(3000, None), (5000, 2500)]
        (mount / "memory" / "pod" / "memory.soft_limit_in_bytes").write_text("10\n")
        membership.write_text("5:cpu,memory:/pod\n4:pids:/\n")
        assert cgroup_limits(mount, membership) == [(7000, None)]
        (mount / "memory" / "pod" / "memory.usage_in_bytes").write_text("6500\n")
        (mount / "memory" / "pod" / "memory.stat").write_text("inactive_file 4\ntotal_inactive_file 500\n")
        assert cgroup_limits(mount, membership) == [(7000, 6000)]
        assert cgroup_limits(mount, tmp_path / "missing") == []
        # No less than nothing is used, whatever the kernel counts as cached meanwhile.
        (mount / "memory" / "pod" / "memory.stat").write_text("total_inactive_file 7000\ntotal_inactive_file_x 9\n")
        assert cgroup_limits(mount, membership) == [(7000, 0)]

    def test_all_groups_of_a_process_count_up_to_the_root_of_what_it_sees(self, tmp_path: Path) -> None:
        membership, mount = tmp_path / "cgroup", tmp_path / "mount"
        (mount / "memory").mkdir(parents=True)
        (tmp_path / "memory.max").write_text("1\n")
        (mount / "memory.max").write_text("5000\n")
        (mount / "memory" / "memory.limit_in_bytes").write_text("7000\n")
        # In a container, the kernel may tell the host's path.
        membership.write_text("5:cpu:/\n4:memory:/host:1/box\n3:pids:/\n0::/host:1/box\n")
        assert cgroup_limits(mount, membership) == [(7000, None), (5000, None)]


class MadeUp:
    """A process whose figures are what the test says; stands in for psutil's."""

    rss, uss = 100 * MIB, 80 * MIB
    runs, status_now = True, str(psutil.STATUS_RUNNING)
    walks = 0

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def is_running(self) -> bool:
        """Tell whether it is the same process still."""
        return MadeUp.runs

    def status(self) -> str:
        """Return its state."""
        return MadeUp.status_now

    def memory_info(self) -> SimpleNamespace:
        """Return what costs little."""
        return SimpleNamespace(rss=MadeUp.rss)

    def memory_full_info(self) -> SimpleNamespace:
        """Return what costs more."""
        MadeUp.walks += 1
        return SimpleNamespace(uss=MadeUp.uss)


class TestWhenPagesAreWalked:
    """A process's USS costs a walk through its pages, so it is read again only if it may have changed."""

    @pytest.fixture
    def source(self, monkeypatch: pytest.MonkeyPatch) -> HostMemorySource:
        """A source that has read the process once, at second 1."""
        for name in ("rss", "uss", "runs", "status_now", "walks"):
            monkeypatch.setattr(MadeUp, name, getattr(MadeUp, name))
        monkeypatch.setattr(psutil, "Process", MadeUp)
        monkeypatch.setattr("time.monotonic_ns", lambda: SECOND_NS)
        source = HostMemorySource(BUDGET_MB)
        assert (used(source, (7,)), MadeUp.walks) == ([80], 1)
        MadeUp.uss = 81 * MIB
        return source

    @pytest.mark.parametrize(
        ("more_bytes", "later_ns", "again"),
        [
            *((0, 0, False), (0, 5 * SECOND_NS, False), (0, 5 * SECOND_NS + 1, True)),
            *((2**20, 0, False), (2**20 + 1, 0, True), (-(2**20), 0, False), (-(2**20) - 1, 0, True)),
        ],
    )
    def test_after_a_mib_or_five_seconds(
        self, source: HostMemorySource, monkeypatch: pytest.MonkeyPatch, more_bytes: int, later_ns: int, again: bool
    ) -> None:
        MadeUp.rss += more_bytes
        monkeypatch.setattr("time.monotonic_ns", lambda: SECOND_NS + later_ns)
        assert (used(source, (7,)), MadeUp.walks) == (([81], 2) if again else ([80], 1))

    def test_for_another_process_of_the_same_number(self, source: HostMemorySource) -> None:
        MadeUp.runs = False
        assert used(source, (7,)) == [81]

    def test_after_the_source_was_closed_or_not_asked_for_the_process(self, source: HostMemorySource) -> None:
        source.close()
        (sample,) = source.sample((7,))
        assert (sample.index, sample.used_mb, MadeUp.walks) == (source.devices()[0].index, 81, 2) == (0, 81, 2)
        assert used(source, (8,)) == [81]
        assert (used(source, (7,)), MadeUp.walks) == ([81], 4)

    def test_not_for_one_that_only_has_to_be_reaped(self, source: HostMemorySource) -> None:
        source.close()
        MadeUp.status_now = psutil.STATUS_ZOMBIE
        (sample,) = source.sample((7,))
        assert (sample.used_mb, sample.process_mb, sample.processes_known, MadeUp.walks) == (0, {}, True, 1)

    def test_one_that_may_not_be_looked_at_is_unknown_and_so_is_the_sum(
        self, source: HostMemorySource, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def look(pid: int) -> MadeUp:
            if pid == 8:
                raise psutil.AccessDenied(pid)
            return MadeUp(pid)

        monkeypatch.setattr(psutil, "Process", look)
        (sample,) = source.sample((8, 7))
        assert (sample.used_mb, sample.process_mb, sample.processes_known) == (None, {7: 80}, False)
        assert sample.trouble == "this process may not look at another one"
        (sample,) = HostMemorySource().sample((8, 7))
        assert sample.used_mb is not None
        assert (sample.process_mb, sample.processes_known, sample.trouble) == ({7: 81}, False, None)


@pytest.fixture
def stat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that tells of a process, whichever is asked for."""
    monkeypatch.setattr("mpmm.sources.process_tree.Path", lambda _: tmp_path / "stat")
    return tmp_path / "stat"


@pytest.mark.parametrize(
    ("state", "flags", "ending", "stopped"),
    [
        *(("S", 0, False, False), ("R", 0x4, True, False), ("R", 0x400FB, False, False), ("R", 0x40104, True, False)),
        *(("Z", 0, True, False), ("X", 0, True, False), ("T", 0, False, True), ("t", 0, False, False)),
    ],
)
def test_the_kernel_tells_whether_a_process_ends_or_is_stopped(
    stat: Path, state: str, flags: int, ending: bool, stopped: bool
) -> None:
    stat.write_text(f"12 (S) T (x) {state} 1 4 4 4 4 {flags} 4 4 4\n")
    assert (is_ending(12), is_stopped(12)) == (ending, stopped)


def test_of_a_process_that_cannot_be_read_nothing_is_known(stat: Path) -> None:
    stat.write_text("")
    assert (is_ending(12), is_stopped(12)) == (False, False)
    stat.unlink()
    assert (is_ending(12), is_stopped(12)) == (False, False)


def test_a_process_without_a_parent_descends_from_nobody(stat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat.write_text("1 (init) S 0 1 1 0 -1 4194560\n")
    assert nearest_roots([1], [0]) == {}
    stat.write_text("2 (b) S 1 1 1 0 -1 4194560\n")
    assert nearest_roots([2], [1]) == {2: 1}
    # It has ended, or there is no such file.
    stat.unlink()
    assert nearest_roots([2**22 + 7], [1]) == {}
    for parent, found in ((0, {}), (5, {1: 5})):
        monkeypatch.setattr(psutil, "Process", lambda _, parent=parent: SimpleNamespace(ppid=lambda: parent))
        assert nearest_roots([1], [0, 5]) == found


def test_trees_end_whatever_the_kernel_tells_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pids are reused, so that processes may seem to descend from each other."""
    children = {1: [4, 2, 3, 3], 2: [4], 4: [1, 5], 3: [4]}
    monkeypatch.setattr("mpmm.sources.process_tree._children", lambda pid: children.get(pid, []))
    assert sorted(process_tree(1)) == [1, 2, 3, 4, 5]
    assert sorted(process_tree(1, without={4})) == [1, 2, 3]
    assert sorted(process_tree(4, without={4, 3})) == [1, 2, 4, 5]
    parents = {2: 1, 3: 1, 4: 2, 5: 4, 6: 7, 7: 6, 8: 7}
    asked: list[int] = []

    def parent_of(pid: int) -> int | None:
        asked.append(pid)
        return parents.get(pid)

    monkeypatch.setattr("mpmm.sources.process_tree._parent_of", parent_of)
    assert nearest_roots([5, 4, 3, 6, 8, 9, 1], [2]) == {5: 2, 4: 2}
    assert sorted(asked) == [1, 3, 4, 5, 6, 7, 8, 9], "each once"
    assert nearest_roots([5, 6], []) == {}
    assert nearest_roots([5, 4, 3, 2, 1], [1, 4]) == {5: 4, 4: 4, 3: 1, 2: 1, 1: 1}, "the nearest"


@pytest.mark.parametrize("proc", ["as it is", "not there"])
def test_the_tree_of_a_process_is_itself_and_what_it_has_started(
    proc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if proc == "not there":
        monkeypatch.setattr("mpmm.sources.process_tree.Path", lambda _: tmp_path / "proc")
    program = "import subprocess, sys; child = subprocess.Popen(['cat']); print(child.pid, flush=True); child.wait()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdin is not None
        child = int(parent.stdout.readline())
        assert process_tree(parent.pid) == [parent.pid, child]
        assert process_tree(parent.pid, without={child}) == [parent.pid]
        assert set(process_tree(os.getpid())) >= {os.getpid(), parent.pid, child}
        assert nearest_roots([parent.pid, child, os.getpid()], [parent.pid]) == dict.fromkeys(
            [parent.pid, child], parent.pid
        )
        assert nearest_roots([child, parent.pid], [os.getpid()]) == dict.fromkeys([child, parent.pid], os.getpid())
        assert nearest_roots([parent.pid], [child]) == {}
        parent.stdin.close()
    assert process_tree(parent.pid) == [parent.pid]


def test_a_process_is_told_from_a_later_one_with_its_pid_by_when_it_started(stat: Path) -> None:
    stat.write_text("12 (a b) S 1 12 12 0 -1 4194560 1 0 0 0 2 3 0 0 20 0 1 0 7654 9 9\n")
    assert start_time(12) == 7654
    stat.unlink()
    assert start_time(12) == 0


def test_a_process_is_ending_until_it_is_reaped_and_nobody_can_tell_of_one_that_is_not_there() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert not is_ending(child.pid)
        child.stdin.close()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert is_ending(child.pid)
    assert not is_ending(child.pid)


def test_a_process_exists_until_it_is_reaped_whoevers_it_is() -> None:
    def exists() -> bool:
        return process_exists(1)

    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        assert process_exists(child.pid)
    assert not process_exists(child.pid)
    assert process_exists(os.getpid()), "it is asked for, and not disturbed"
    # The first process is root's, and no other user may send it a signal.
    assert (as_nobody(exists) if os.getuid() == 0 else repr(exists())) == "True"
    assert process_exists(2**40), "that is no pid of another namespace"
