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
from mpmm.sources.process_tree import is_ending, process_tree, unrelated_to

BALLAST_MB = 64


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
        # The host itself may be shorter of memory than the group.
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=9000 * MIB, available=100 * MIB))
        assert used(source) == [1900]

    def test_the_total_is_the_budget_or_what_the_host_has(self) -> None:
        assert HostMemorySource(budget_mb=1234).devices()[0].total_mb == 1234.0
        total_mb = HostMemorySource().devices()[0].total_mb
        assert total_mb == host_memory_mb() <= psutil.virtual_memory().total / MIB

    @pytest.mark.parametrize("budget_mb", [0, -1, float("nan")])
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
        assert unrelated_to([parent.pid, child, os.getpid()], [parent.pid]) == {os.getpid()}
        assert unrelated_to([child, parent.pid], [os.getpid()]) == set()
        assert unrelated_to([parent.pid], [child]) == {parent.pid}
        parent.stdin.close()
    assert process_tree(parent.pid) == [parent.pid]


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
    # The first process is root's, and no other user may send it a signal.
    assert (as_nobody(exists) if os.getuid() == 0 else repr(exists())) == "True"
    assert process_exists(2**40), "that is no pid of another namespace"
