"""When a namespace counts as deserted, what is removed with it, and what is left for the next look."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from containers import as_root, being_nobody
from crash_lab import run_in_child
from harness import files_in, open_descriptors, segments_of
from test_lock_file import Clock

from mpmm.errors import LockTimeoutError, RuntimeDirectoryError
from mpmm.shared_state import leftovers, lock_file, prune, runtime_dir
from mpmm.shared_state.layout import Header, Member
from mpmm.shared_state.leftovers import Leftover
from mpmm.shared_state.lifecycle import Lifecycle, close_segment
from mpmm.shared_state.lock_file import LockFile, is_locked
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.removal import is_deserted, namespaces_below, remove_all_deserted, remove_deserted
from mpmm.shared_state.runtime_dir import RuntimeDirectory
from mpmm.shared_state.segment import segment_name


def desert(name: str, kind: int = Member.WORKER) -> None:
    """Let a process become the member of a namespace, and die."""

    def join_and_die() -> None:
        Namespace.join(name, kind=kind)
        os._exit(0)

    assert run_in_child(join_and_die) == 0


@pytest.fixture
def closing() -> Iterator[list[Callable[[], object]]]:
    """Calls to make at the end of the test, the last one first."""
    calls: list[Callable[[], object]] = []
    yield calls
    while calls:
        calls.pop()()


State = Callable[[str, Path, list[Callable[[], object]]], None]


def nothing_but_the_dead(name: str, root: Path, closing: list[Callable[[], object]]) -> None:
    desert(name)


def a_server(name: str, root: Path, closing: list[Callable[[], object]]) -> None:
    desert(name)
    closing.append(Namespace.join(name, kind=Member.SERVER).leave)


def no_segment(name: str, root: Path, closing: list[Callable[[], object]]) -> None:
    desert(name)
    os.unlink(f"/dev/shm/{segment_name(root, name)}")


def junk_for_a_segment(name: str, root: Path, closing: list[Callable[[], object]]) -> None:
    desert(name)
    Path("/dev/shm", segment_name(root, name)).write_bytes(b"junk" * 1024)


def a_segment_whose_lock_cannot_be_taken(name: str, root: Path, closing: list[Callable[[], object]]) -> None:
    desert(name)
    with open(f"/dev/shm/{segment_name(root, name)}", "r+b") as file:
        file.seek(8 * Header.UNDO_COUNT)
        file.write((2**40).to_bytes(8, "little"))


def no_lock_files(name: str, root: Path, closing: list[Callable[[], object]]) -> None:
    desert(name)
    for file in ("lifecycle.lock", "alive.lock"):
        (root / name / file).unlink()


def a_worker(name: str, root: Path, closing: list[Callable[[], object]]) -> None:
    closing.append(Namespace.join(name).leave)


def a_worker_whose_lock_on_alive_was_removed(name: str, root: Path, closing: list[Callable[[], object]]) -> None:
    a_worker(name, root, closing)
    (root / name / "alive.lock").unlink()


def a_newcomer(name: str, root: Path, closing: list[Callable[[], object]]) -> None:
    desert(name)
    alive = LockFile(root / name / "alive.lock")
    assert alive.try_shared()
    closing.append(alive.close)


def nothing(name: str, root: Path, closing: list[Callable[[], object]]) -> None:
    pass


DESERTED: list[State] = [
    nothing_but_the_dead,
    a_server,
    no_segment,
    junk_for_a_segment,
    a_segment_whose_lock_cannot_be_taken,
    no_lock_files,
]
IN_USE: list[State] = [a_worker, a_worker_whose_lock_on_alive_was_removed, a_newcomer]


def left(root: Path) -> tuple[list[str], set[str]]:
    """Return what there is of namespaces."""
    return files_in(root), segments_of(root)


@pytest.mark.parametrize("state", DESERTED)
def test_a_namespace_without_a_worker_is_deserted_and_removed_with_all_it_has(
    namespace: str, runtime_root: Path, closing: list[Callable[[], object]], state: State
) -> None:
    state(namespace, runtime_root, closing)
    before = left(runtime_root)
    assert is_deserted(runtime_root, namespace) is True
    assert left(runtime_root) == before
    assert remove_deserted(runtime_root, namespace) is True
    assert left(runtime_root) == ([], set())
    assert is_deserted(runtime_root, namespace) is False
    assert remove_deserted(runtime_root, namespace) is False


@pytest.mark.parametrize("state", [*IN_USE, nothing])
def test_a_namespace_with_a_worker_or_a_newcomer_is_not_deserted(
    namespace: str, runtime_root: Path, closing: list[Callable[[], object]], state: State
) -> None:
    state(namespace, runtime_root, closing)
    files, segments = left(runtime_root)
    assert is_deserted(runtime_root, namespace) is False
    assert remove_deserted(runtime_root, namespace) is False
    remove_all_deserted(runtime_root)
    assert segments_of(runtime_root) == segments
    assert set(files) <= set(files_in(runtime_root))
    while closing:
        closing.pop()()
    remove_deserted(runtime_root, namespace)


@pytest.mark.parametrize("look", [is_deserted, remove_deserted])
def test_a_namespace_whose_lifecycle_lock_was_replaced_meanwhile_is_left_for_the_next_look(
    namespace: str, runtime_root: Path, monkeypatch: pytest.MonkeyPatch, look: Callable[[Path, str], bool]
) -> None:
    desert(namespace)
    before = left(runtime_root)
    exclusive = LockFile.exclusive

    def take_what_is_replaced(lock: LockFile, timeout_s: float) -> None:
        exclusive(lock, timeout_s)
        lock.path.unlink()
        lock.path.touch()

    with monkeypatch.context() as patched:
        patched.setattr(LockFile, "exclusive", take_what_is_replaced)
        assert look(runtime_root, namespace) is False
    assert left(runtime_root) == before
    assert remove_deserted(runtime_root, namespace) is True


@pytest.mark.parametrize("look", [is_deserted, remove_deserted])
def test_who_cleans_up_after_others_waits_five_seconds_for_the_lifecycle_lock(
    namespace: str, runtime_root: Path, monkeypatch: pytest.MonkeyPatch, look: Callable[[Path, str], bool]
) -> None:
    desert(namespace)
    before, clock = left(runtime_root), Clock()
    with monkeypatch.context() as patched, Lifecycle(RuntimeDirectory(namespace, runtime_root)) as current:
        assert current is True
        patched.setattr(lock_file, "time", clock)
        assert look(runtime_root, namespace) is False
        assert 5.0 <= sum(clock.pauses) < 5.1
    assert left(runtime_root) == before
    assert look(runtime_root, namespace) is True
    remove_deserted(runtime_root, namespace)


def test_who_joins_waits_a_minute_for_the_lifecycle_lock(
    namespace: str, runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, clock = RuntimeDirectory(namespace, runtime_root), Clock()
    runtime.ensure()
    with monkeypatch.context() as patched, Lifecycle(runtime):
        patched.setattr(lock_file, "time", clock)
        before = open_descriptors()
        with pytest.raises(LockTimeoutError) as caught, Lifecycle(runtime):
            raise AssertionError("two have the lock")
        assert caught.tb is not None
        assert open_descriptors() == before
        assert 60.0 <= sum(clock.pauses) < 60.1
    assert not is_locked(runtime.file("lifecycle.lock"))
    runtime.remove()


def test_a_segment_is_closed_to_newcomers_if_none_of_the_kinds_lives_in_it(namespace: str, runtime_root: Path) -> None:
    joined = Namespace.join(namespace)
    assert close_segment(joined.segment, joined.runtime, (Member.WORKER, Member.SERVER)) is False
    assert joined.segment.is_closed is False
    assert close_segment(joined.segment, joined.runtime, (Member.SERVER,)) is True
    assert joined.segment.is_closed is True
    joined.leave()


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ((), False),
        (("token",), True),
        (("token", "lifecycle.lock", "work"), True),
        (("lifecycle.lock",), True),
        (("lifecycle.lock", "alive.lock"), True),
        (("alive.lock",), False),
        (("lifecycle.lock", "work"), False),
    ],
)
def test_a_folder_is_a_namespace_if_it_has_a_token_or_nothing_but_locks(
    tmp_path: Path, files: tuple[str, ...], found: bool
) -> None:
    for name in ("b", "a", ".hidden", runtime_dir.REGISTRY_FOLDER):
        (tmp_path / name).mkdir()
        for file in files:
            if name != runtime_dir.REGISTRY_FOLDER or file != "token":
                (tmp_path / name / file).touch()
    assert namespaces_below(tmp_path) == (["a", "b"] if found else [])
    assert namespaces_below(tmp_path / "missing") == []


def test_a_folder_that_vanishes_during_the_look_is_no_namespace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / "lifecycle.lock").touch()
    assert namespaces_below(tmp_path) == ["n"]

    def vanish(path: Path) -> Iterator[Path]:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "iterdir", vanish)
    assert namespaces_below(tmp_path) == []


def test_all_that_are_deserted_are_removed_and_no_others(
    runtime_root: Path, closing: list[Callable[[], object]]
) -> None:
    for name in ("one", "two"):
        desert(name)
    a_worker("three", runtime_root, closing)
    remove_all_deserted(runtime_root)
    assert namespaces_below(runtime_root) == ["three"]
    assert segments_of(runtime_root) == {segment_name(runtime_root, "three")}


# ---- mpmm prune --------------------------------------------------------------------------------------------------


@pytest.fixture
def orphans(monkeypatch: pytest.MonkeyPatch) -> list[prune.Orphan]:
    """The segments that no process can use, of which there are none to begin with."""
    found: list[prune.Orphan] = []
    monkeypatch.setattr(leftovers, "find_orphans", lambda **_: list(found))
    return found


def test_prune_tells_folders_of_which_removal_began_and_never_ended(
    runtime_root: Path, monkeypatch: pytest.MonkeyPatch, orphans: list[prune.Orphan]
) -> None:
    gone, file = runtime_root / ".n.gone.1", runtime_root / ".n.gone.2"
    (gone / "below").mkdir(parents=True)
    file.touch()
    monkeypatch.setattr(runtime_dir, "REMOVAL_S", -1.0)
    why = "a process died while it removed it"
    expected = [Leftover(f"folder {path}", 0.0, why) for path in (gone, file)]
    assert sorted(leftovers.prune(runtime_root, dry_run=True), key=str) == expected
    assert gone.exists()
    assert sorted(leftovers.prune(runtime_root), key=str) == expected
    # No folder of ours, whatever it is called.
    assert (gone.exists(), file.exists()) == (False, True)
    file.unlink()


def test_prune_tells_segments_of_which_it_removes_those_that_are_meant(
    runtime_root: Path, orphans: list[prune.Orphan]
) -> None:
    meant, other = (Path("/dev/shm", segment_name(runtime_root, name)) for name in ("meant", "other"))
    for path in (meant, other):
        path.touch()
        found = path.stat()
        orphans.append(prune.Orphan(path.name, (found.st_dev, found.st_ino + (path == other)), 1.5, "because"))
    expected = [Leftover(f"segment {path}", 1.5, "because") for path in (meant, other)]
    assert leftovers.prune(runtime_root, dry_run=True) == expected
    assert meant.exists()
    assert leftovers.prune(runtime_root) == expected
    assert (meant.exists(), other.exists()) == (False, True)
    other.unlink()


@pytest.mark.parametrize("state", [nothing_but_the_dead, no_segment])
def test_prune_tells_deserted_namespaces_with_the_memory_that_they_take(
    namespace: str,
    runtime_root: Path,
    orphans: list[prune.Orphan],
    closing: list[Callable[[], object]],
    state: State,
) -> None:
    state(namespace, runtime_root, closing)
    segment = Path("/dev/shm", segment_name(runtime_root, namespace))
    size_mb = segment.stat().st_blocks * 512 / 1024**2 if segment.exists() else 0.0
    expected = [Leftover(f"namespace {runtime_root / namespace}", size_mb, "no process is left in it")]
    before = left(runtime_root)
    assert leftovers.prune(runtime_root, dry_run=True) == expected
    assert left(runtime_root) == before
    assert leftovers.prune(runtime_root) == expected
    assert left(runtime_root) == ([], set())
    assert leftovers.prune(runtime_root) == []
    assert leftovers.prune(runtime_root / "missing") == []


@as_root
def test_prune_says_whose_the_root_is_where_it_may_not_look(runtime_root: Path, orphans: list[prune.Orphan]) -> None:
    with being_nobody(), pytest.raises(RuntimeDirectoryError, match=f"{runtime_root} belongs to uid 0"):
        leftovers.prune(runtime_root)


def test_prune_asks_for_segments_of_all_versions(runtime_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def look(**arguments: object) -> list[prune.Orphan]:
        asked.append(arguments)
        return []

    monkeypatch.setattr(leftovers, "find_orphans", look)
    leftovers.prune(runtime_root / "elsewhere")
    roots = (runtime_root / "elsewhere", runtime_root)
    assert asked == [{"of_other_versions": True, "roots": roots}]
