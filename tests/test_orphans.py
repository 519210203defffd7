"""Which segments no process can find any more, and why; and how a newcomer finds one whose root was made anew."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from containers import NOBODY, as_root

from mpmm.shared_state import prune, segment
from mpmm.shared_state.layout import LAYOUT_VERSION, MAGIC, Header
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.prune import Orphan, find_moved, find_orphans, sweep_orphans
from mpmm.shared_state.runtime_dir import RuntimeDirectory
from mpmm.shared_state.segment import SegmentProblem, boot_hash, segment_name, unlink_segment

GONE_AND_MADE_AGAIN = "the folder {root} was removed and made again"
NO_ROOT = "its folder {root} is gone"
NO_FOLDER = "its folder {root}/n is gone"
REMOVING = "a process died while it removed it"
FOREIGN = "another version of mpmm has made it, and no process uses it"


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of `/dev/shm`, of which no other process knows."""
    folder = tmp_path / "shm"
    folder.mkdir()
    for module in (prune, segment):
        monkeypatch.setattr(module, "SHARED_MEMORY", str(folder))
    return folder


def leave(memory: Path, name: str, root: str | Path, size: int = 1 << 20, **changed: int) -> Path:
    """Leave the header of a segment behind, with some words changed."""
    words = Header.WORDS * [0]
    words[Header.MAGIC], words[Header.VERSION], words[Header.BOOT] = MAGIC, LAYOUT_VERSION, boot_hash()
    text = os.fsencode(root)
    words[Header.ROOT] = len(text)
    for word, value in changed.items():
        words[getattr(Header, word)] = value
    whole = bytearray(b"".join(word.to_bytes(8, "little") for word in words))
    at = 8 * (Header.ROOT + 1)
    whole[at : at + len(text)] = text
    path = memory / name
    path.write_bytes(bytes(whole).ljust(size, b"\xff"))
    return path


def found(**arguments: object) -> dict[str, str]:
    """Return the names of orphans with the reasons."""
    return {orphan.name: orphan.why for orphan in find_orphans(**arguments)}  # type: ignore[arg-type]  # passed on


@pytest.mark.parametrize(
    ("root", "folder", "why"),
    [
        ("as it was", True, None),
        ("as it was", False, NO_FOLDER),
        ("made again", True, GONE_AND_MADE_AGAIN),
        ("made again", False, GONE_AND_MADE_AGAIN),
        ("gone", False, NO_ROOT),
        ("below a file", False, NO_ROOT),
    ],
)
def test_a_segment_whose_folder_is_gone_is_an_orphan(
    memory: Path, runtime_root: Path, root: str, folder: bool, why: str | None
) -> None:
    name, at = segment_name(runtime_root, "n"), runtime_root
    if root == "gone":
        at = runtime_root / "gone"
    elif root == "below a file":
        (runtime_root / "file").touch()
        at = runtime_root / "file" / "root"
    elif root == "made again":
        at = runtime_root / "again"
        at.mkdir()
    if folder:
        (at / "n").mkdir()
    leave(memory, name, at)
    expected = {} if why is None else {name: why.format(root=at)}
    assert found() == found(of_other_versions=True) == expected
    for left in ("again/n", "again", "n"):
        if (runtime_root / left).exists():
            (runtime_root / left).rmdir()
    (runtime_root / "file").unlink(missing_ok=True)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 63, 64, 65, 72, 255, 1023, Header.ROOT_BYTES])
def test_a_root_of_any_length_that_has_room_is_looked_for(memory: Path, runtime_root: Path, length: int) -> None:
    root = ("/missing" + 7 * ("/" + 200 * "x"))[:length].rstrip("/").ljust(length, "y")
    name = segment_name(runtime_root, "n")
    leave(memory, name, root)
    assert (found() == {}) is (root == "/")
    assert length == 1 or found() == {name: NO_ROOT.format(root=root)}


@pytest.mark.parametrize("length", [0, Header.ROOT_BYTES + 1, 2**63])
def test_a_segment_that_does_not_tell_its_root_is_left_alone(memory: Path, runtime_root: Path, length: int) -> None:
    leave(memory, segment_name(runtime_root, "n"), "/missing", ROOT=length)
    assert found(of_other_versions=True) == {}


@pytest.mark.parametrize("root", ["\0", "/miss\0ing", "/missing\0"])
def test_a_segment_whose_root_is_junk_is_left_alone_and_stops_no_look(
    memory: Path, runtime_root: Path, root: str
) -> None:
    leave(memory, segment_name(runtime_root, "n"), root)
    other = leave(memory, segment_name(runtime_root, "n2"), "/missing")
    assert found() == {other.name: NO_ROOT.format(root="/missing")}


@pytest.mark.parametrize("word", ["MAGIC", "VERSION", "BOOT"])
def test_a_segment_of_another_version_is_one_only_where_that_is_asked_and_if_no_root_is_its(
    memory: Path, runtime_root: Path, word: str
) -> None:
    name = segment_name(runtime_root, "n")
    leave(memory, name, "/missing", **{word: 7})
    assert found() == found(roots=(Path("/missing"),)) == {}
    assert found(of_other_versions=True) == {name: FOREIGN}
    elsewhere = (Path("/missing"), runtime_root / "file" / "below", Path("/"))
    (runtime_root / "file").touch()
    assert found(of_other_versions=True, roots=elsewhere) == {name: FOREIGN}
    assert found(of_other_versions=True, roots=(*elsewhere, runtime_root)) == {}
    (runtime_root / "file").unlink()


@pytest.mark.parametrize(("age_s", "left_over"), [(29.9, False), (30.0, True), (30.1, True)])
@pytest.mark.parametrize("version", [LAYOUT_VERSION, 7])
def test_a_segment_whose_removal_began_longer_ago_than_it_takes_is_an_orphan(
    memory: Path, runtime_root: Path, monkeypatch: pytest.MonkeyPatch, version: int, age_s: float, left_over: bool
) -> None:
    name = f"{segment_name(runtime_root, 'n')}{segment.GONE}0123"
    path = leave(memory, name, runtime_root, VERSION=version)
    began = path.stat().st_ctime
    monkeypatch.setattr(prune, "time", SimpleNamespace(time=lambda: began + age_s))
    why = REMOVING if version == LAYOUT_VERSION else FOREIGN
    assert found(of_other_versions=True) == ({name: why} if left_over else {})
    assert found() == ({name: why} if left_over and why == REMOVING else {})


def test_an_orphan_is_no_younger_than_it_is(memory: Path, runtime_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = segment_name(runtime_root, "n")
    path = leave(memory, name, "/missing")
    # One that is not being removed may be as young as it likes.
    monkeypatch.setattr(prune, "time", SimpleNamespace(time=lambda: path.stat().st_ctime))
    assert found() == {name: NO_ROOT.format(root="/missing")}


def test_what_a_process_has_open_is_no_orphan(memory: Path, runtime_root: Path) -> None:
    path = leave(memory, segment_name(runtime_root, "n"), "/missing")
    with path.open():
        assert found() == {}
    assert found() != {}


@pytest.mark.parametrize(
    "name", ["mpmm", "mpmm-x-0123456789ab-n", "mpmm-{uid}-0123456789a-n", "mpmm-{uid}-0123456789ab-", "x{mine}"]
)
def test_files_with_other_names_are_none_of_ours(memory: Path, runtime_root: Path, name: str) -> None:
    leave(memory, name.format(uid=os.getuid(), mine=segment_name(runtime_root, "n")), "/missing")
    assert found(of_other_versions=True) == {}


def test_segments_of_other_users_are_none_of_ours(memory: Path, runtime_root: Path) -> None:
    mine = segment_name(runtime_root, "n")
    leave(memory, mine.replace(f"mpmm-{os.getuid()}-", f"mpmm-{os.getuid() + 1}-"), "/missing")
    assert found(of_other_versions=True) == {}


@as_root
def test_a_file_of_another_user_is_none_of_ours_whatever_its_name_says(memory: Path, runtime_root: Path) -> None:
    path = leave(memory, segment_name(runtime_root, "n"), "/missing")
    os.chown(path, NOBODY, -1)
    assert found() == {}
    os.chown(path, 0, -1)
    assert found() != {}


def test_where_there_is_no_shared_memory_there_is_no_orphan(memory: Path) -> None:
    memory.rmdir()
    assert find_orphans() == []


def test_a_segment_that_vanishes_during_the_look_is_none(
    memory: Path, runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = segment_name(runtime_root, "n")
    leave(memory, name, "/missing")
    monkeypatch.setattr(prune, "_names", lambda: iter([f"{name}x", name]))
    assert found() == {name: NO_ROOT.format(root="/missing")}


def test_orphans_are_swept_and_told(memory: Path, runtime_root: Path, caplog: pytest.LogCaptureFixture) -> None:
    orphan = leave(memory, segment_name(runtime_root, "n"), "/missing", size=3 << 20)
    left = leave(memory, segment_name(runtime_root, "n2"), runtime_root)
    (runtime_root / "n2").mkdir()
    at = orphan.stat()
    size_mb = at.st_blocks * 512 / 1024**2
    assert size_mb >= 3.0
    with caplog.at_level(logging.INFO, "mpmm"):
        swept = sweep_orphans()
    assert swept == [Orphan(orphan.name, (at.st_dev, at.st_ino), size_mb, NO_ROOT.format(root="/missing"))]
    assert list(memory.iterdir()) == [left]
    assert f"removed the segment {orphan.name} ({size_mb:.1f} MB): its folder /missing is gone" in caplog.text
    assert sweep_orphans() == []
    (runtime_root / "n2").rmdir()


# ---- one whose root was made anew --------------------------------------------------------------------------------


@pytest.fixture
def moved(namespace: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Namespace]:
    """A member whose segment has the name of another root, and is the only one besides junk."""
    joined = Namespace.join(namespace)
    right = joined.segment.name
    prefix = right.rpartition("-")[0][: -len("0123456789ab")]
    assert joined.segment.rename(f"{prefix}{'0' * 12}-{namespace}")
    wrong = joined.segment.name
    monkeypatch.setattr(prune, "_names", lambda: iter([f"{prefix}{'1' * 12}-{namespace}", wrong, right]))
    yield joined
    monkeypatch.undo()
    unlink_segment(wrong)
    joined.segment.name = right
    joined.leave()


def look_for(member: Namespace, name: str | None = None) -> bool:
    """Look for the segment of a namespace; return whether it was found, and renamed."""
    runtime = RuntimeDirectory(name or member.name, member.runtime.root)
    right = segment_name(runtime.root, runtime.name)
    segment_found = find_moved(runtime, right)
    if segment_found is None:
        assert member.segment.is_current()
        return False
    assert (segment_found.name, segment_found.identity) == (right, member.segment.identity)
    assert segment_found.is_current()
    assert not os.path.exists(member.segment.path)
    segment_found.close()
    return True


def test_a_segment_of_living_members_is_found_and_gets_its_name_back(
    moved: Namespace, caplog: pytest.LogCaptureFixture
) -> None:
    assert look_for(moved)
    assert f"the folder {moved.runtime.root} was removed while processes were using it" in caplog.text
    # It has its name by now, by which it was not found.
    assert find_moved(moved.runtime, segment_name(moved.runtime.root, moved.name)) is None


def test_a_segment_of_another_namespace_is_not_taken(moved: Namespace) -> None:
    assert not look_for(moved, "other")


@pytest.mark.parametrize(
    ("place", "mounts", "taken"), [(0, 0, True), (0, 1, True), (1, 0, True), (1, 1, False)], ids=str
)
def test_a_segment_is_taken_that_has_the_folder_above_or_the_mounts_in_common(
    moved: Namespace, place: int, mounts: int, taken: bool
) -> None:
    moved.segment.words[Header.ROOT_PLACE] ^= place
    moved.segment.words[Header.ROOT_MOUNTS] ^= mounts
    assert look_for(moved) is taken


@pytest.mark.parametrize(("word", "value"), [(Header.CLOSED, Header.IS_CLOSED), (Header.VERSION, 7)])
def test_a_segment_that_is_closed_or_of_another_version_is_not_taken(moved: Namespace, word: int, value: int) -> None:
    before = moved.segment.words[word]
    moved.segment.words[word] = value
    assert not look_for(moved)
    moved.segment.words[word] = before


def test_a_segment_in_which_nobody_lives_is_not_taken(moved: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "has_living_member", lambda tables, folder: False)
    assert not look_for(moved)


@pytest.mark.parametrize("fails", ["it vanishes", "it has changed", "another one has its name"])
def test_a_segment_that_changes_during_the_look_is_not_taken(
    moved: Namespace, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def open_late(name: str) -> None:
        if fails == "it has changed":
            raise SegmentProblem("junk", "a segment")

    right = Path("/dev/shm", segment_name(moved.runtime.root, moved.name))
    if fails == "another one has its name":
        right.touch()
    else:
        monkeypatch.setattr(prune, "Segment", SimpleNamespace(open=open_late))
    assert not look_for(moved)
    right.unlink(missing_ok=True)
