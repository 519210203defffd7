"""The shared-memory segment: its name, how it is made, opened and removed, and what a copy of it has."""

from __future__ import annotations

import errno
import os
import re
import resource
import stat
import sys
from collections.abc import Iterator
from contextlib import closing
from multiprocessing import resource_tracker
from pathlib import Path

import psutil
import pytest
from harness import open_descriptors, segments_of

from mpmm.errors import SegmentAllocationError
from mpmm.shared_state import segment as segment_module
from mpmm.shared_state.layout import LAYOUT_VERSION, Capacities, Header, Layout
from mpmm.shared_state.lock_file import identity_of
from mpmm.shared_state.segment import (
    GONE,
    Segment,
    SegmentProblem,
    UnfinishedSegment,
    boot_hash,
    place_of,
    read_header,
    segment_lost,
    segment_name,
    unlink_segment,
)

SMALL = Capacities(members=3, models=4, instances=5, tickets=2, pins=1, devices=2, observations=3, events=6, undo=64)
TOKEN = 4711


@pytest.fixture
def name(runtime_root: Path) -> str:
    """The name of a segment that is not there yet."""
    return segment_name(runtime_root, "test")


@pytest.fixture
def segment(name: str) -> Iterator[Segment]:
    """A segment that is ready for others."""
    made = Segment.create(name, SMALL, TOKEN)
    made.seal()
    yield made
    made.close()
    unlink_segment(name)


def path_of(name: str) -> Path:
    """Return the path of a segment's file."""
    return Path("/dev/shm", name)


# ---- names and places --------------------------------------------------------------------------------------------


def test_the_name_says_whose_the_segment_is_and_which_root_and_namespace_it_belongs_to(tmp_path: Path) -> None:
    one, two, link = (tmp_path / name for name in ("one", "two", "link"))
    one.mkdir()
    two.mkdir()
    link.symlink_to(one)
    name = segment_name(one, "a.b")
    assert re.fullmatch(rf"mpmm-{os.getuid()}-[0-9a-f]{{12}}-a\.b", name)
    assert segment_name(link, "a.b") == name
    assert segment_name(one, "c") == name.removesuffix("a.b") + "c"
    assert segment_name(two, "a.b") != name
    with pytest.raises(FileNotFoundError):
        segment_name(tmp_path / "missing", "a")


def test_a_place_is_the_path_with_the_folder_above_or_with_the_mounts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "above" / "root"
    root.mkdir(parents=True)
    folder, mounts = place_of(root)
    assert folder != mounts
    root.rmdir()
    root.mkdir()
    assert place_of(root) == (folder, mounts)
    root.parent.rename(tmp_path / "elsewhere")
    root.mkdir(parents=True)
    assert place_of(root)[0] != folder
    assert place_of(root)[1] == mounts
    assert set(place_of(root.parent)).isdisjoint(place_of(root))
    ask = os.stat

    def refuse_mounts(path: str) -> os.stat_result:
        if path == "/proc/self/ns/mnt":
            raise PermissionError
        return ask(path)

    monkeypatch.setattr(os, "stat", refuse_mounts)
    other_folder, other_mounts = place_of(root)
    assert other_folder == place_of(root)[0]
    assert other_mounts not in (mounts, other_folder)


def test_a_boot_has_a_word_of_its_own_also_where_its_id_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    word = boot_hash()
    assert word == boot_hash()

    def refuse(path: Path, **_: object) -> str:
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", refuse)
    words = set()
    for seconds in (1000.2, 1000.8, 1001.2):
        monkeypatch.setattr(psutil, "boot_time", lambda seconds=seconds: seconds)
        words.add(boot_hash())
    assert len(words) == 2, "the clock may be set by less than a second"
    assert word not in words
    assert all(0 <= one < 2**64 for one in (word, *words))


def test_the_error_of_a_lost_segment_names_it() -> None:
    error = segment_lost("n", "name")
    assert error.name == "name"
    assert "namespace 'n' is in use, but its segment /dev/shm/name is gone" in str(error)


# ---- making one --------------------------------------------------------------------------------------------------


def test_a_new_segment_has_all_its_memory_and_is_read_by_others_once_it_is_sealed(name: str) -> None:
    before = open_descriptors()
    made = Segment.create(name, SMALL, TOKEN)
    found = path_of(name).stat()
    assert made.identity == (found.st_dev, found.st_ino)
    assert found.st_size == Layout(SMALL).size_bytes
    assert found.st_blocks * 512 >= found.st_size
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert made.words[Header.NEXT_GENERATION] == 1
    assert (made.name, made.path, made.is_closed, made.is_current()) == (name, str(path_of(name)), False, True)
    with pytest.raises(UnfinishedSegment, match="found magic 0x0"):
        Segment.open(name)
    made.seal()
    with closing_segment(Segment.open(name, TOKEN)) as opened:
        assert opened.copy() == made.copy() == path_of(name).read_bytes()
        assert (opened.identity, opened.layout.capacities) == (made.identity, SMALL)
    with pytest.raises(FileExistsError):
        Segment.create(name, SMALL, TOKEN)
    made.unlink()
    made.close()
    assert open_descriptors() == before


def closing_segment(segment: Segment | None) -> closing[Segment]:
    """Return a segment that is there, for `with`."""
    assert segment is not None
    return closing(segment)


def text_of(number: int) -> str:
    """Return the system's text for an error."""
    return os.strerror(number)


@pytest.mark.parametrize(
    ("number", "what_to_do"),
    [
        (errno.ENOSPC, "free or enlarge /dev/shm, or create the namespace with smaller capacities"),
        (errno.ENOENT, "this host has no /dev/shm: mount a tmpfs there, of mode 1777"),
        (errno.EROFS, "/dev/shm is mounted read-only: mount it read-write"),
        (errno.EACCES, "/dev/shm cannot be written by this user: give it mode 1777"),
        (errno.EFBIG, "this process's limit on the size of files is lower: raise it (ulimit -f)"),
        (errno.ENOMEM, "its limit on memory (ulimit -v) is 12345: raise it"),
        (errno.EMFILE, None),
        (errno.ENFILE, None),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else "",
)
@pytest.mark.parametrize("step", ["made", "filled"])
def test_memory_that_is_refused_is_one_error_that_says_what_to_do_and_leaves_nothing(
    name: str, runtime_root: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int, what_to_do: str | None
) -> None:
    cause = OSError(number, text_of(number))

    def refuse(*_: object) -> None:
        raise cause

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (12345, 12345))
    if step == "made":
        monkeypatch.setattr(segment_module, "_shared_memory", refuse)
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    before = open_descriptors()
    with pytest.raises((OSError, SegmentAllocationError)) as caught:
        Segment.create(name, SMALL, TOKEN)
    assert caught.value.__traceback__ is not None
    assert open_descriptors() == before
    assert segments_of(runtime_root) == set()
    if what_to_do is None:
        assert caught.value is cause
        return
    assert isinstance(caught.value, SegmentAllocationError)
    size = Layout(SMALL).size_bytes
    assert (caught.value.name, caught.value.size_bytes) == (name, size)
    assert str(caught.value).endswith(f"{size} bytes of shared memory were refused ({text_of(number)}); {what_to_do}")


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="the tracker can be told not to care")
def test_the_tracker_of_resources_learns_nothing_of_the_segment_and_all_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[tuple[str, str, str]] = []
    for call in ("register", "unregister"):
        monkeypatch.setattr(
            resource_tracker, call, lambda resource, kind, call=call: told.append((call, resource, kind))
        )
    before = resource_tracker.register, resource_tracker.unregister
    # A signal handler may open another one meanwhile.
    with segment_module._unknown_to_tracker("ours"), segment_module._unknown_to_tracker("also ours"):
        for resource_name in ("/ours", "ours", "/also ours", "/others"):
            resource_tracker.register(resource_name, "shared_memory")
            resource_tracker.unregister(resource_name, "shared_memory")
    assert told == [(call, "/others", "shared_memory") for call in ("register", "unregister")]
    assert (resource_tracker.register, resource_tracker.unregister) == before


# ---- opening one -------------------------------------------------------------------------------------------------


def write_word(name: str, word: int, value: int) -> None:
    """Overwrite a word of a segment."""
    with path_of(name).open("r+b") as file:
        file.seek(8 * word)
        file.write(value.to_bytes(8, "little"))


SIZE = Layout(SMALL).size_bytes
LAST_CAPACITY = Header.CAPACITIES + 8


@pytest.mark.parametrize(
    ("word", "value", "found", "kind"),
    [
        (Header.MAGIC, 0, "magic 0x0, expected 0x", UnfinishedSegment),
        (Header.MAGIC, 1, "magic 0x1, expected 0x", SegmentProblem),
        (Header.VERSION, 999, f"layout version 999, expected layout version {LAYOUT_VERSION}", SegmentProblem),
        (Header.BOOT, 1, "a segment from before the last start of the machine, expected one", SegmentProblem),
        (Header.CAPACITIES, 0, "table capacities [0, 4, 5, 2, 1, 2, 3, 6, 64], expected numbers", SegmentProblem),
        (LAST_CAPACITY, 0, "table capacities [3, 4, 5, 2, 1, 2, 3, 6, 0], expected numbers", SegmentProblem),
        (LAST_CAPACITY, 2**20 + 1, f"table capacities [3, 4, 5, 2, 1, 2, 3, 6, {2**20 + 1}]", SegmentProblem),
        (LAST_CAPACITY, 2**20, f"{SIZE} bytes that claim to be {SIZE}, expected ", SegmentProblem),
        (LAST_CAPACITY, 1, f"{SIZE} bytes that claim to be {SIZE}, expected ", SegmentProblem),
        (
            Header.SIZE_BYTES,
            SIZE - 8,
            f"{SIZE} bytes that claim to be {SIZE - 8}, expected {SIZE} bytes",
            SegmentProblem,
        ),
        (
            Header.SIZE_BYTES,
            SIZE + 8,
            f"{SIZE} bytes that claim to be {SIZE + 8}, expected {SIZE} bytes",
            SegmentProblem,
        ),
    ],
)
def test_a_segment_that_is_not_ours_is_not_read(
    segment: Segment, word: int, value: int, found: str, kind: type[SegmentProblem]
) -> None:
    write_word(segment.name, word, value)
    with pytest.raises(SegmentProblem, match=re.escape(f"found {found}")) as caught:
        Segment.open(segment.name)
    assert type(caught.value) is kind
    assert str(caught.value) == f"found {caught.value.found}, expected {caught.value.expected}"


@pytest.mark.parametrize(
    ("size", "found"),
    [
        (0, "an empty segment"),
        (8, "8 bytes, expected at least"),
        (Header.WORDS * 8 - 8, "bytes, expected at least"),
        (Header.WORDS * 8, f"{Header.WORDS * 8} bytes that claim to be {SIZE}"),
        (Header.WORDS * 8 + 8, f"{Header.WORDS * 8 + 8} bytes that claim to be {SIZE}"),
        (SIZE - 8, f"{SIZE - 8} bytes that claim to be {SIZE}"),
    ],
)
def test_a_segment_that_was_cut_short_is_not_read(segment: Segment, size: int, found: str) -> None:
    whole = segment.copy()
    os.truncate(segment.path, size)
    before = open_descriptors()
    with pytest.raises(SegmentProblem, match=found) as caught:
        Segment.open(segment.name)
    assert type(caught.value) is (UnfinishedSegment if size == 0 else SegmentProblem)
    # The error keeps the mapping.
    del caught
    assert open_descriptors() == before
    Path(segment.path).write_bytes(whole)


def test_a_segment_with_more_memory_than_it_needs_is_read(segment: Segment) -> None:
    os.truncate(segment.path, SIZE + 4096)
    with closing_segment(Segment.open(segment.name)) as opened:
        assert opened.copy() == segment.copy()


@pytest.mark.parametrize(("token", "fits"), [(None, True), (TOKEN, True), (TOKEN + 1, False), (0, False)])
def test_a_segment_of_another_folder_is_not_read_where_that_is_asked(
    segment: Segment, token: int | None, fits: bool
) -> None:
    if fits:
        with closing_segment(Segment.open(segment.name, token)) as opened:
            assert opened.words[Header.TOKEN] == TOKEN
    else:
        with pytest.raises(SegmentProblem, match="found a segment of another runtime directory"):
            Segment.open(segment.name, token)


def test_a_segment_may_have_one_row_of_each(name: str) -> None:
    one = Capacities(*9 * [1])
    with closing(Segment.create(name, one, TOKEN)) as made:
        made.seal()
        with closing_segment(Segment.open(name)) as opened:
            assert opened.layout.capacities == one
        made.unlink()


def test_a_segment_that_is_not_there_is_none_and_leaves_no_descriptor(name: str, segment: Segment) -> None:
    before = open_descriptors()
    assert Segment.open(name + "x") is None
    with closing_segment(Segment.open(name)):
        pass
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("word", "value"), [(Header.MAGIC, 1), (Header.VERSION, 1), (Header.BOOT, 1)], ids=["magic", "version", "boot"]
)
def test_a_header_is_read_only_if_it_is_of_this_layout_and_boot(segment: Segment, word: int, value: int) -> None:
    assert read_header(segment.name) == segment.words[: Header.WORDS].tolist()
    write_word(segment.name, word, value)
    assert read_header(segment.name) is None


@pytest.mark.parametrize(("size", "whole"), [(0, False), (Header.WORDS * 8 - 1, False), (Header.WORDS * 8, True)])
def test_a_header_is_whole_or_none(segment: Segment, size: int, whole: bool) -> None:
    header = segment.words[: Header.WORDS].tolist()
    os.truncate(segment.path, size)
    assert read_header(segment.name) == (header if whole else None)
    assert read_header(segment.name + "x") is None


# ---- removing and renaming it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("identity", ["not given", "its own", "of another one"])
def test_a_name_is_removed_if_it_is_that_of_the_segment_that_is_meant(
    segment: Segment, runtime_root: Path, identity: str
) -> None:
    device, inode = segment.identity
    meant = {"not given": None, "its own": (device, inode), "of another one": (device, inode + 1)}[identity]
    for _ in range(2):
        unlink_segment(segment.name, meant)
        expected = {segment.name} if identity == "of another one" else set()
        assert segments_of(runtime_root) == expected
    assert segment.is_current() is bool(expected)


@pytest.mark.parametrize("third", [False, True])
def test_another_segment_that_has_come_meanwhile_gets_its_name_back_unless_there_is_a_third_one(
    segment: Segment, runtime_root: Path, monkeypatch: pytest.MonkeyPatch, third: bool
) -> None:
    path, rename = Path(segment.path), os.rename

    def rename_another_one(source: str, target: str) -> None:
        path.unlink()
        path.write_text("second")
        rename(source, target)
        if third:
            path.write_text("third")

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", rename_another_one)
        segment.unlink()
    assert path.read_text() == ("third" if third else "second")
    assert segments_of(runtime_root) == {segment.name}


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_leaves_no_segment_that_others_would_have_to_sweep(
    segment: Segment, runtime_root: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    rename = os.rename

    def interrupt(source: str, target: str) -> None:
        if when == "after":
            rename(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            segment.unlink()
    assert segments_of(runtime_root) == ({segment.name} if when == "before" else set())


def test_what_a_process_died_over_can_be_removed_as_well(segment: Segment, runtime_root: Path) -> None:
    gone = f"{segment.name}{GONE}0123"
    os.rename(segment.path, path_of(gone))
    unlink_segment(gone)
    assert segments_of(runtime_root) == set()


def test_a_segment_is_renamed_by_the_first_and_the_others_follow(segment: Segment, runtime_root: Path) -> None:
    old, new = segment.name, segment_name(runtime_root, "new")
    other = Segment.open(old)
    assert other is not None
    assert segment.rename(old) is True
    assert segment.rename(new) is True
    assert (segment.name, segments_of(runtime_root)) == (new, {new})
    assert other.is_current() is False
    assert other.rename(old) is False
    assert other.rename(new) is True
    assert (other.name, other.is_current()) == (new, True)
    other.close()
    assert segment.rename(old) is True


@pytest.mark.parametrize("taken", ["the new name", "the old name"])
def test_a_segment_is_not_renamed_if_another_one_has_one_of_the_names(
    segment: Segment, runtime_root: Path, taken: str
) -> None:
    new = segment_name(runtime_root, "new")
    if taken == "the old name":
        os.unlink(segment.path)
    other = path_of(new if taken == "the new name" else segment.name)
    other.write_text("other")
    assert segment.rename(new) is False
    assert segment.name != new
    assert other.read_text() == "other"
    assert segments_of(runtime_root) == {segment.name, other.name}
    if other.name == new:
        other.unlink()


def test_the_lock_of_a_segment_is_on_its_own_file_alone(segment: Segment) -> None:
    lock = segment.lock_file()
    assert lock.identity == segment.identity == identity_of(segment.path)
    lock.close()
    path = Path(segment.path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        segment.lock_file()
    assert not path.exists()
    path.touch()
    before = open_descriptors()
    with pytest.raises(FileNotFoundError, match="is another segment by now") as caught:
        segment.lock_file()
    assert caught.value.__traceback__ is not None
    assert open_descriptors() == before


def test_a_segment_that_is_closed_to_newcomers_says_so(segment: Segment) -> None:
    for value, closed in ((0, False), (1, False), (Header.IS_CLOSED, True), (Header.IS_CLOSED + 1, False)):
        segment.words[Header.CLOSED] = value
        assert segment.is_closed is closed


# ---- reading it --------------------------------------------------------------------------------------------------


def test_views_of_tables_are_live_until_the_segment_is_unmapped(segment: Segment) -> None:
    models = segment.layout.models
    for row in (1, 2):
        view = segment.view(models)
        assert view.shape == (models.capacity, models.words)
        segment.words[models.base + row * models.words + 3] = 10 + row
        assert view[row, 3] == 10 + row
        del view
    segment.floats[Header.HOST_SHARE_MB] = 2.5
    assert segment.words[Header.HOST_SHARE_MB] == 0x4004 << 48
    with closing_segment(Segment.open(segment.name)) as other:
        words, floats = other.words, other.floats
    for read in (lambda: words[0], lambda: floats[0], lambda: other.view(models), other.copy):
        with pytest.raises(ValueError, match="released memoryview"):
            read()


def filled(segment: Segment) -> None:
    """Set every word of the tables to another number, and say how many rows were in use, or are said to have been."""
    layout = segment.layout
    for word in range(layout.tables[0].base, layout.words):
        segment.words[word] = word
    for table, in_use in zip(layout.growing, (0, 1, 2**63, layout.tickets.capacity, 0), strict=True):
        segment.words[table.end_word] = in_use


@pytest.mark.parametrize("with_events", [True, False])
@pytest.mark.parametrize(("events", "undo"), [(0, 0), (3, 5), (5, 64), (6, 2**63), (100, 1)])
@pytest.mark.parametrize("into", [False, True])
def test_a_copy_has_the_rows_that_were_in_use(
    segment: Segment, with_events: bool, events: int, undo: int, into: bool
) -> None:
    filled(segment)
    layout, words = segment.layout, segment.words
    words[Header.EVENTS], words[Header.UNDO_COUNT] = events, undo
    rows = {table.name: min(words[table.end_word], table.capacity) for table in layout.growing}
    rows["undo"] = min(undo, layout.undo.capacity)
    # And the row that may be being written.
    rows["events"] = min(events + 1, layout.events.capacity) if with_events else 0
    earlier = bytearray(b"x" * SIZE)
    expected = bytearray(earlier) if into else bytearray(SIZE)
    parts = [(0, Header.WORDS)]
    parts += [(table.base, table.base + rows.get(table.name, table.capacity) * table.words) for table in layout.tables]
    for begin, end in parts:
        expected[8 * begin : 8 * end] = segment.copy()[8 * begin : 8 * end]
    copied = segment.copy_in_use(events=with_events, into=earlier if into else None)
    assert copied == expected
    assert (copied is earlier) is into
    if with_events and not into:
        assert segment.copy_in_use() == expected
