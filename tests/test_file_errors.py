"""What the errors of the system about our files mean: who refuses, and what to change."""

from __future__ import annotations

import errno
import os
import pwd
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from containers import NOBODY, as_root, being_nobody

from mpmm.errors import RuntimeDirectoryError
from mpmm.shared_state.file_errors import file_error, reason_of, told_by_file

REFUSED = PermissionError(errno.EACCES, "Permission denied")
NOBODY_HERE = "and this process runs as uid 65534 (nobody): "


def error_of(number: int, *place: object) -> OSError:
    """Return an error as the system raises it."""
    return OSError(number, os.strerror(number), *place)


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (errno.EROFS, "nothing can be written there"),
        (errno.ENOSPC, "free space (or inodes) there"),
        (errno.EDQUOT, "free space there"),
        (errno.EFBIG, "the process's limit on the size of files (ulimit -f) is too low"),
        (errno.EIO, "its disk does not answer"),
        (errno.ELOOP, "a symbolic link is not followed"),
        (errno.ENAMETOOLONG, "choose a shorter path"),
        *((number, "") for number in (errno.ENOENT, errno.EMFILE, errno.EAGAIN, errno.ENOTDIR, errno.EINTR)),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else "",
)
def test_lasting_problems_are_explained_and_others_are_not(number: int, why: str) -> None:
    error = error_of(number, "/somewhere")
    assert reason_of(error, "/elsewhere") == why
    told = file_error(error, "/elsewhere")
    if why:
        assert isinstance(told, RuntimeDirectoryError)
        assert str(told).startswith(f"/somewhere cannot be used: {os.strerror(number)}: {why}; or set MPMM_RUNTIME_DIR")
        assert told.path == "/somewhere"
    else:
        assert told is error


def test_an_error_without_a_number_or_of_ours_is_not_explained() -> None:
    unnumbered = OSError("text")
    assert file_error(unnumbered, "/somewhere") is unnumbered
    own = RuntimeDirectoryError("told", path="/a")
    own.errno = errno.EROFS
    assert file_error(own, "/somewhere") is own
    assert reason_of(OSError("text"), "/somewhere") == ""


@pytest.mark.parametrize(
    ("named", "expected"),
    [((), "/given"), (("/text",), "/text"), ((b"/bytes",), "/bytes"), ((Path("/path"),), "/path"), ((7,), "/given")],
)
def test_the_error_is_about_the_file_that_it_names_or_else_about_the_one_that_was_used(
    named: tuple[object, ...], expected: str
) -> None:
    told = file_error(error_of(errno.EROFS, *named), Path("/given"))
    assert isinstance(told, RuntimeDirectoryError)
    assert told.path == expected
    assert str(told).startswith(f"{expected} cannot be used")


def test_a_block_raises_what_says_more() -> None:
    with told_by_file("/given"):
        pass
    plain = error_of(errno.ENOENT)
    with pytest.raises(FileNotFoundError) as caught, told_by_file("/given"):
        raise plain
    assert caught.value is plain
    refused = error_of(errno.EROFS)
    with pytest.raises(RuntimeDirectoryError, match=r"^/given cannot be used") as told, told_by_file("/given"):
        raise refused
    assert told.value.__cause__ is refused


# ---- who refuses -------------------------------------------------------------------------------------------------


def make(folder: Path, name: str, mode: int, uid: int = NOBODY) -> Path:
    """Make a file, or a folder if its name ends in a slash."""
    path = folder / name
    if name.endswith("/"):
        path.mkdir()
    else:
        path.touch()
    path.chmod(mode)
    os.chown(path, uid, -1)
    return path


def why(path: Path, number: int = errno.EACCES) -> str:
    """Return what another user is told about an error."""
    with being_nobody():
        return reason_of(error_of(number), path)


def belongs(place: Path, owner: str = "uid 65534 (nobody)", what_to_do: str = "") -> str:
    """Return what to expect if a place is what refuses."""
    mode = stat.S_IMODE(place.lstat().st_mode)
    return f"{place} belongs to {owner}, {NOBODY_HERE}{what_to_do or f'change its mode ({mode:04o})'}"


@as_root
@pytest.mark.parametrize("mode", [0o000, 0o200, 0o400, 0o500])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_a_file_that_may_not_be_both_read_and_written_is_what_refuses(
    nobodys_folder: Path, number: int, mode: int
) -> None:
    file = make(nobodys_folder, "file", mode)
    assert why(file, number) == belongs(file)


@as_root
@pytest.mark.parametrize("mode", [0o000, 0o200, 0o400, 0o600])
@pytest.mark.parametrize("then", ["there", "missing"])
def test_a_folder_that_may_not_be_entered_is_what_refuses(nobodys_folder: Path, mode: int, then: str) -> None:
    make(nobodys_folder, "there", 0o600)
    nobodys_folder.chmod(mode)
    assert why(nobodys_folder / then) == belongs(nobodys_folder)


@as_root
def test_a_folder_that_may_not_be_written_refuses_what_is_not_there_yet_and_nothing_else(nobodys_folder: Path) -> None:
    below = make(nobodys_folder, "below/", 0o700)
    file = make(below, "file", 0o400)
    nobodys_folder.chmod(0o500)
    assert why(nobodys_folder / "missing") == belongs(nobodys_folder)
    assert why(nobodys_folder / "missing" / "below") == belongs(nobodys_folder)
    assert why(file) == belongs(file)


@as_root
def test_a_file_of_another_user_asks_for_that(nobodys_folder: Path) -> None:
    file = make(nobodys_folder, "file", 0o600, uid=0)
    assert why(file) == belongs(file, "uid 0 (root)", "run it as the user who owns that")


@as_root
def test_a_user_without_a_name_is_told_by_number(nobodys_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make(nobodys_folder, "file", 0o600, uid=54321)

    def unknown(uid: int) -> object:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert f"{file} belongs to uid 54321, and this process runs as uid {NOBODY}: run it" in why(file)


@as_root
@pytest.mark.parametrize("find", [lambda folder: folder / "missing" / "below", lambda folder: make(folder, "a", 0o600)])
def test_where_nothing_refuses_as_far_as_one_can_see_the_user_is_told(
    nobodys_folder: Path, find: Callable[[Path], Path]
) -> None:
    """Another layer of the system may refuse, such as SELinux."""
    assert why(find(nobodys_folder)) == "this process runs as uid 65534 (nobody)"
    assert reason_of(REFUSED, nobodys_folder) == "this process runs as uid 0 (root)"


@as_root
def test_a_relative_path_is_told_in_full(nobodys_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make(nobodys_folder, "file", 0o400)
    monkeypatch.chdir(nobodys_folder)
    assert why(Path("file")) == belongs(file)
