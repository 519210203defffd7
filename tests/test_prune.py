"""Segments without an owner: a process that creates a namespace removes them, and so does `mpmm prune`; no others."""

from __future__ import annotations

import contextlib
import errno
import mmap
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import psutil
import pytest
from containers import NOBODY, as_root, can_unshare, run_unshared
from harness import OWN_LEFT_OVER, NewManager, NewProcess, Process, files_in, segments_of, stop_process, wait_until

from mpmm.cli import main
from mpmm.multi_process_shared.registry import open_lock, registry_at
from mpmm.shared_state import leftovers, prune, removal
from mpmm.shared_state import namespace as namespace_module
from mpmm.shared_state.layout import Header
from mpmm.shared_state.lifecycle import Lifecycle
from mpmm.shared_state.lock_file import is_open_anywhere
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.prune import Orphan, find_orphans
from mpmm.shared_state.runtime_dir import RuntimeDirectory
from mpmm.shared_state.segment import Segment, segment_name

NAMESPACE = OWN_LEFT_OVER


CHILDREN = """
import multiprocessing, os, signal, sys, time
from mpmm.model_manager import ModelManager

manager = ModelManager(namespace="served", memory_source="booked") if __name__ == "__mp_main__" else None


def work(how, ready):
    with manager.model("a", object):
        pass
    ready.put(how)
    if how == "interrupted":
        # Not one long sleep: a signal that comes just before its call to the kernel would show only at its end.
        for _ in range(600):
            time.sleep(0.1)
    elif how == "exits":
        sys.exit(3)


if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    if sys.argv[1] == "fork":
        # The children inherit it in use.
        manager = ModelManager(namespace="served", memory_source="booked")
        manager.acquire_model("b", object)
    ready = context.Queue()
    ways = ("returns", "exits", "interrupted")
    children = {how: context.Process(target=work, args=(how, ready)) for how in ways}
    for child in children.values():
        child.start()
    for _ in ways:
        ready.get(timeout=60)
    os.kill(children["interrupted"].pid, signal.SIGINT)
    for child in children.values():
        child.join()
    print([child.exitcode for child in children.values()])
"""


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A root besides that of the test, which sees no segments but its own."""
    root = Path(tempfile.mkdtemp(prefix="mpmm-t"))
    before, real = set(os.listdir("/dev/shm")), prune._names
    monkeypatch.setattr(prune, "_names", lambda: [name for name in real() if name not in before and NAMESPACE in name])
    yield root
    shutil.rmtree(root, ignore_errors=True)
    assert not [name for name in set(os.listdir("/dev/shm")) - before if NAMESPACE in name]


GUARD = """
import sys
with open(sys.argv[1], "rb"):
    print(flush=True)
    sys.stdin.read()
"""
_guards: list[subprocess.Popen[bytes]] = []


@pytest.fixture(autouse=True)
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the processes that `guard` starts not count in this one, and end them."""
    monkeypatch.setattr(prune, "is_open_anywhere", is_open_but_for_guards)
    yield
    while _guards:
        one = _guards.pop()
        one.kill()
        one.communicate()


def is_open_but_for_guards(path: str) -> bool:
    """Do as `is_open_anywhere`, but look for the processes instead."""
    guards = {one.pid for one in _guards}
    return any(pid not in guards and has(pid, path) for pid in psutil.pids())


def has(pid: int, path: str) -> bool:
    """Tell whether a process has a file open or mapped."""
    links = []
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            # It may have closed this one just now, and have mapped the file before.
            with contextlib.suppress(FileNotFoundError):
                links.append(os.readlink(entry.path))
        return path in links or path in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        # It has ended.
        return False


def guard(segment: Path) -> Path:
    """Keep a segment from the processes of other tests, which sweep as well when they make a namespace."""
    one = subprocess.Popen([sys.executable, "-c", GUARD, segment], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    _guards.append(one)
    assert one.stdout is not None
    one.stdout.readline()
    return segment


def found(look: Callable[[], list[Orphan]]) -> list[Orphan]:
    """Return what a look or sweep finds, which is nothing while a process of another test looks at the segment, too."""
    orphans: list[Orphan] = []

    def finds() -> bool:
        orphans[:] = look()
        return bool(orphans)

    wait_until(finds, "there is an orphan")
    return orphans


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_children_of_multiprocessing_leave_nothing_however_they_end(
    tmp_path: Path, runtime_root: Path, method: str
) -> None:
    program = tmp_path / "program.py"
    program.write_text(CHILDREN)
    done = subprocess.run([sys.executable, program, method], capture_output=True, text=True, timeout=40, check=False)
    assert done.stdout == "[0, 3, 1]\n", done.stderr
    assert "KeyboardInterrupt" in done.stderr
    assert files_in(runtime_root) == []
    assert segments_of(runtime_root) == set()


def leave_segment(new_process: NewProcess, root: Path, end: Callable[[Process], None] = Process.kill) -> Path:
    """Have a process make a namespace below `root`, and die there; return the path of the segment."""
    process = new_process(namespace=NAMESPACE, runtime_root=root)
    segment = guard(Path("/dev/shm", segment_name(root, NAMESPACE)))
    end(process)
    return segment


def stop(process: Process) -> None:
    """Stop a process."""
    stop_process(process.pid)


def change_header(segment: Path, word: int, value: int) -> None:
    """Overwrite a word."""
    with open(segment, "r+b") as file:
        file.seek(8 * word)
        file.write(value.to_bytes(8, "little"))


def test_who_makes_a_namespace_sweeps_segments_whose_root_and_members_are_gone(
    elsewhere: Path, new_process: NewProcess, new_manager: NewManager
) -> None:
    segment = leave_segment(new_process, elsewhere)
    new_manager(namespace="first", memory_source="booked")
    assert segment.exists(), "somebody may come to it"
    shutil.rmtree(elsewhere)
    # While a process of another test looks at it, it is not swept.
    for name in ("second", "third", "fourth"):
        new_manager(namespace=name)
        if not segment.exists():
            break
    assert not segment.exists()


def test_a_segment_that_is_damaged_keeps_nobody_from_making_a_namespace(
    elsewhere: Path, new_process: NewProcess
) -> None:
    segment = leave_segment(new_process, elsewhere)
    # No path has a letter 0.
    change_header(segment, Header.ROOT + 1, int.from_bytes(b"/tmp\0abc", "little"))
    Namespace.join("undisturbed").leave()
    segment.unlink()


def test_a_segment_whose_folder_must_not_be_looked_at_is_no_orphan(elsewhere: Path, new_process: NewProcess) -> None:
    segment = leave_segment(new_process, elsewhere)
    shut = mock.Mock(side_effect=lambda root, name: segment_name(root, name) if root != elsewhere else _refuse(root))
    with mock.patch.object(prune, "segment_name", shut):
        assert find_orphans() == []
    segment.unlink()


def _refuse(root: Path) -> str:
    raise PermissionError(errno.EACCES, "Permission denied", str(root))


def test_the_segment_of_a_living_process_is_never_an_orphan(elsewhere: Path, new_process: NewProcess) -> None:
    process = new_process(namespace=NAMESPACE, runtime_root=elsewhere)
    guard(Path("/dev/shm", segment_name(elsewhere, NAMESPACE)))
    stop(process)
    shutil.rmtree(elsewhere)
    assert find_orphans(of_other_versions=True) == []
    process.kill()
    (orphan,) = found(find_orphans)
    assert str(elsewhere) in orphan.why
    assert orphan.size_mb == os.stat(f"/dev/shm/{orphan.name}").st_blocks * 512 / 1024**2
    assert [orphan.name for orphan in found(prune.sweep_orphans)] == [orphan.name]


def test_what_a_process_has_mapped_is_no_orphan_though_it_is_no_member(
    elsewhere: Path, new_process: NewProcess
) -> None:
    name = leave_segment(new_process, elsewhere).name
    shutil.rmtree(elsewhere)
    mapped = Segment.open(name)
    assert mapped is not None
    assert find_orphans() == []
    mapped.close()
    assert [orphan.name for orphan in found(prune.sweep_orphans)] == [name]


def hold_open(path: Path) -> int:
    """Open it."""
    return os.open(path, os.O_RDONLY)


def hold_mapped(path: Path) -> mmap.mmap:
    """Map it, and close it."""
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), 0)


@pytest.mark.parametrize("hold", [hold_open, hold_mapped])
def test_the_kernel_tells_whether_a_process_has_a_file_open_or_mapped(hold: Callable[[Path], object]) -> None:
    descriptor, name = tempfile.mkstemp(dir="/dev/shm")
    path = Path(name)
    os.truncate(path, 8192)
    assert is_open_anywhere(path), "here"
    os.close(descriptor)
    assert not is_open_anywhere(path)
    context = multiprocessing.get_context("fork")
    it_has, it_may_end = context.Event(), context.Event()

    def work() -> None:
        kept = hold(path)
        it_has.set()
        it_may_end.wait()
        del kept

    child = context.Process(target=work)
    child.start()
    it_has.wait()
    assert is_open_anywhere(path), "there"
    it_may_end.set()
    child.join()
    assert not is_open_anywhere(path)
    path.unlink()
    assert not is_open_anywhere(path), "it is not there"


@can_unshare
@pytest.mark.parametrize("version", [7, None], ids=["of another version", "of this one"])
@pytest.mark.parametrize("proc", ["--mount-proc", "--mount"], ids=["a /proc of its own", "that of the host"])
def test_what_a_process_of_another_container_has_is_not_pruned(
    elsewhere: Path, new_process: NewProcess, proc: str, version: int | None
) -> None:
    """Containers may share /dev/shm; in one of them the processes of the others do not show."""
    member = new_process(namespace=NAMESPACE, runtime_root=elsewhere)
    segment = Path("/dev/shm", segment_name(elsewhere, NAMESPACE))
    if version is not None:
        change_header(segment, Header.VERSION, version)
    stop_process(member.pid)
    shutil.rmtree(elsewhere)
    script = """
    from mpmm.shared_state.prune import find_orphans
    print([orphan.name for orphan in find_orphans(of_other_versions=True)])
    """
    assert segment.name not in run_unshared(["--pid", "--fork", proc], script)
    guard(segment)
    member.kill()
    assert [orphan.name for orphan in found(lambda: find_orphans(of_other_versions=True))] == [segment.name]
    segment.unlink()


@as_root
def test_a_segment_with_junk_for_its_root_is_no_orphan_and_keeps_nobody_from_joining(runtime_root: Path) -> None:
    broken = Namespace.join("broken", root=runtime_root)
    words = broken.segment.words
    before = words[Header.ROOT + 1]
    words[Header.ROOT + 1] = 0
    assert not [orphan for orphan in find_orphans() if orphan.name == broken.segment.name]
    Namespace.join("another", root=runtime_root).leave()
    words[Header.ROOT + 1] = before
    broken.leave()


def test_the_segment_of_another_user_with_our_number_in_its_name_is_not_ours(
    elsewhere: Path, new_process: NewProcess
) -> None:
    segment = leave_segment(new_process, elsewhere)
    shutil.rmtree(elsewhere)
    found(find_orphans)
    os.chown(segment, NOBODY, -1)
    assert find_orphans(of_other_versions=True) == []
    segment.unlink()


def test_the_segment_of_another_version_is_pruned_if_no_process_has_it_and_no_root_is_its(
    elsewhere: Path, new_process: NewProcess
) -> None:
    segment = leave_segment(new_process, elsewhere)
    change_header(segment, Header.VERSION, 7)
    assert find_orphans() == []
    assert find_orphans(of_other_versions=True, roots=(elsewhere,)) == []
    assert [orphan.name for orphan in found(lambda: find_orphans(of_other_versions=True))] == [segment.name]
    segment.unlink()


def test_a_segment_of_another_version_is_none_that_a_newcomer_to_a_namespace_of_its_name_joins(
    elsewhere: Path, new_process: NewProcess, new_manager: NewManager
) -> None:
    segment = leave_segment(new_process, elsewhere)
    change_header(segment, Header.VERSION, 7)
    before = segment.read_bytes()
    manager = new_manager(namespace=NAMESPACE, memory_source="booked")
    with manager.model("a", object):
        assert segment.read_bytes() == before
    segment.unlink()


def test_a_segment_is_not_pruned_while_a_process_makes_it_but_when_that_has_died(elsewhere: Path) -> None:
    segment = Path("/dev/shm", segment_name(elsewhere, NAMESPACE))
    with open(segment, "xb"):
        assert find_orphans(of_other_versions=True) == []
    guard(segment)
    assert [orphan.name for orphan in found(lambda: find_orphans(of_other_versions=True))] == [segment.name]
    segment.unlink()


def test_a_segment_that_takes_the_place_of_a_left_over_one_during_the_look_stays(
    elsewhere: Path, runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = Path("/dev/shm", segment_name(elsewhere, NAMESPACE))
    segment.touch()

    def is_replaced(path: str) -> bool:
        """Answer for the first file while another process replaces it."""
        if path == str(segment):
            segment.unlink()
            segment.write_bytes(b"new")
        return False

    monkeypatch.setattr(prune, "is_open_anywhere", is_replaced)
    [found] = leftovers.prune(runtime_root)
    assert found.what == f"segment {segment}"
    assert segment.read_bytes() == b"new"
    segment.unlink()


def test_prune_says_what_it_removes_and_a_dry_run_removes_nothing(
    elsewhere: Path, runtime_root: Path, new_process: NewProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    living = new_process(namespace="living")
    deserted = leave_segment(new_process, runtime_root)
    orphan = leave_segment(new_process, elsewhere).name
    shutil.rmtree(elsewhere)
    capsys.readouterr()
    found(find_orphans)
    assert main(["prune", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert orphan in shown
    assert str(runtime_root / NAMESPACE) in shown
    assert "2 would be removed, " in shown
    assert deserted.exists()
    assert (runtime_root / NAMESPACE).exists()
    assert Path("/dev/shm", orphan).exists()
    assert main(["prune"]) == 0
    removed = capsys.readouterr().out
    assert removed == shown.replace("would be removed", "removed")
    assert not deserted.exists()
    assert not (runtime_root / NAMESPACE).exists()
    assert not Path("/dev/shm", orphan).exists()
    assert (runtime_root / "living" / "token").exists()
    assert living.call(pid_of) == living.pid
    assert main(["prune"]) == 0
    assert capsys.readouterr().out == "0 removed, 0.0 MB\n"


def pid_of(seat: object) -> int:
    """Return the pid."""
    return os.getpid()


def test_what_a_process_died_over_while_it_removed_it_is_swept_later(
    elsewhere: Path, new_process: NewProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = leave_segment(new_process, elsewhere)
    gone = segment.with_name(f"{segment.name}.gone.0123")
    os.rename(segment, gone)
    folder = elsewhere / f".{NAMESPACE}.gone.0123"
    os.rename(elsewhere / NAMESPACE, folder)
    assert find_orphans() == [], "somebody may be about to do it"
    RuntimeDirectory("other", elsewhere).sweep()
    assert folder.exists()
    monkeypatch.setattr(prune, "REMOVAL_S", 0.0)
    monkeypatch.setattr("mpmm.shared_state.runtime_dir.REMOVAL_S", 0.0)
    assert [orphan.name for orphan in found(prune.sweep_orphans)] == [gone.name]
    RuntimeDirectory("other", elsewhere).sweep()
    assert not folder.exists()


@pytest.mark.usefixtures("elsewhere")
def test_it_says_how_much_memory_a_deserted_namespace_takes(
    runtime_root: Path, namespace: str, new_process: NewProcess
) -> None:
    new_process().kill()
    blocks = os.stat(f"/dev/shm/{segment_name(runtime_root, namespace)}").st_blocks
    [found] = [one for one in leftovers.prune(runtime_root, dry_run=True) if one.what.startswith("namespace ")]
    assert found.size_mb == blocks * 512 / 1024**2
    assert leftovers.prune(runtime_root)[0] == found


@pytest.mark.usefixtures("elsewhere")
def test_a_namespace_that_a_process_could_not_finish_is_pruned_and_one_in_the_making_is_not(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Short(Exception):
        """Of descriptors, say."""

    def refuse(*_: object) -> None:
        raise Short

    with monkeypatch.context() as patched:
        patched.setattr(namespace_module, "open_or_replace", refuse)
        with pytest.raises(Short):
            Namespace.join("begun", root=runtime_root)
    (runtime_root / "mine").mkdir()
    (runtime_root / "mine" / "lifecycle.lock").touch()
    (runtime_root / "mine" / "work").touch()
    with Lifecycle(RuntimeDirectory("begun", runtime_root)), monkeypatch.context() as patched:
        patched.setattr(removal, "REMOVAL_TIMEOUT_S", 0.0)
        assert leftovers.prune(runtime_root) == []
    [found] = leftovers.prune(runtime_root)
    assert found.what == f"namespace {runtime_root / 'begun'}"
    assert not (runtime_root / "begun").exists()
    assert (runtime_root / "mine" / "work").exists()
    shutil.rmtree(runtime_root / "mine")


def test_the_folder_of_the_registry_of_servers_is_no_namespace(runtime_root: Path) -> None:
    registry = registry_at(runtime_root)
    child = os.fork()
    if child == 0:
        registry.join()
        # It dies just as it begins to remove the registry.
        open_lock(registry.path / "lifecycle.lock")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert {path.name for path in registry.path.iterdir()} == {"lifecycle.lock", "alive.lock"}
    assert leftovers.prune(runtime_root, dry_run=True) == leftovers.prune(runtime_root) == []
    registry.join()
    registry.leave()
    assert not registry.path.exists()


def test_a_deserted_namespace_goes_with_its_segment_whatever_is_in_that(runtime_root: Path) -> None:
    runtime = RuntimeDirectory("junk", runtime_root)
    runtime.ensure()
    runtime.file("token").touch()
    segment = Path("/dev/shm", segment_name(runtime_root, "junk"))
    segment.write_bytes(b"junk" * 1024)
    assert removal.is_deserted(runtime_root, "junk")
    assert segment.exists()
    assert removal.remove_deserted(runtime_root, "junk")
    assert not segment.exists() and not runtime.path.exists()
