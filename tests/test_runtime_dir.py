"""The folder of a namespace: which one it is, its modes, and how it is made and removed."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from containers import NOBODY, as_root, being_nobody

from mpmm.errors import InvalidArgumentError, RuntimeDirectoryError
from mpmm.shared_state import runtime_dir
from mpmm.shared_state.lock_file import identity_of
from mpmm.shared_state.runtime_dir import (
    RUNTIME_DIR_VARIABLE,
    RuntimeDirectory,
    check_private_folder,
    default_root,
    is_namespace_name,
    leftovers_in,
    root_below,
)

STICKY = 0o1700


def mode_of(path: Path) -> int:
    """Return the permission bits of a file."""
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.parametrize(
    ("name", "possible"),
    [
        *((name, True) for name in ("a", "Z", "0", "_", "-", "a.b", "a..", "n" * 64, "mpmm-1_x.Y")),
        *((name, False) for name in ("", ".", "..", ".a", "n" * 65, "a/b", "a b", "ä", "a\n", "a\0")),
    ],
)
def test_a_name_is_possible_if_it_is_a_short_file_name_that_is_not_hidden(name: str, possible: bool) -> None:
    assert is_namespace_name(name) is possible
    if possible:
        assert RuntimeDirectory(name, "/r").text == f"/r/{name}"
    else:
        with pytest.raises(InvalidArgumentError, match="expected 1 to 64 characters"):
            RuntimeDirectory(name, "/r")


@pytest.mark.parametrize("name", [None, 7, b"bytes", ["a"]])
def test_a_name_is_text(name: object) -> None:
    with pytest.raises(InvalidArgumentError, match="expected 1 to 64 characters"):
        RuntimeDirectory(name, "/r")  # type: ignore[arg-type]  # that is the point


@pytest.mark.parametrize(
    ("setting", "expected"),
    [(None, f"/tmp/mpmm-{os.getuid()}"), ("", f"/tmp/mpmm-{os.getuid()}"), ("/set/it", "/set/it")],
)
def test_the_default_root_is_the_setting_or_one_of_this_users_own(
    monkeypatch: pytest.MonkeyPatch, setting: str | None, expected: str
) -> None:
    monkeypatch.delenv(RUNTIME_DIR_VARIABLE)
    if setting is not None:
        monkeypatch.setenv(RUNTIME_DIR_VARIABLE, setting)
    assert default_root() == Path(expected)
    assert RuntimeDirectory("n").path == Path(expected, "n")
    given = RuntimeDirectory("n", "/given")
    assert (given.root, given.path) == (Path("/given"), Path("/given/n"))
    assert given.file("a", "b") == Path("/given/n/a/b")
    assert repr(given) == "RuntimeDirectory('/given/n')"


def test_a_relative_setting_is_made_absolute_for_children_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(RUNTIME_DIR_VARIABLE, "run")
    assert default_root() == tmp_path / "run"
    assert os.environ[RUNTIME_DIR_VARIABLE] == str(tmp_path / "run")
    assert RuntimeDirectory("n", "given").root == tmp_path / "given"


def test_users_have_folders_of_their_own() -> None:
    assert root_below("/f") == f"/f/mpmm-{os.getuid()}"
    assert (root_below("/f", 7), root_below("/f", 0)) == ("/f/mpmm-7", "/f/mpmm-0")


# ---- making it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o277, 0o777], ids=oct)
def test_folders_are_private_and_a_root_of_ours_is_marked_whatever_the_umask_is(tmp_path: Path, umask: int) -> None:
    # With files in the umask's way, also the folder above could not be entered.
    (tmp_path / "above").mkdir()
    runtime = RuntimeDirectory("n", tmp_path / "above" / "run")
    before = os.umask(umask)
    try:
        runtime.ensure()
        runtime.ensure()
    finally:
        os.umask(before)
    assert (mode_of(runtime.root), mode_of(runtime.path)) == (STICKY, 0o700)


@pytest.mark.parametrize("mode", [0o700, STICKY, 0o2700])
def test_a_root_that_is_there_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    root = tmp_path / "run"
    root.mkdir()
    root.chmod(mode)
    runtime = RuntimeDirectory("n", root)
    runtime.ensure()
    assert (mode_of(root), mode_of(runtime.path) & 0o777) == (mode, 0o700)


def test_missing_folders_above_are_made_and_those_that_are_there_stay(tmp_path: Path) -> None:
    runtime = RuntimeDirectory("n", tmp_path / "a" / "b" / "run")
    runtime.ensure()
    shutil.rmtree(tmp_path / "a" / "b" / "run")
    runtime.ensure()
    assert mode_of(runtime.root) == STICKY
    assert mode_of(tmp_path / "a") != STICKY


def test_a_root_that_is_removed_between_two_steps_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, make, calls = RuntimeDirectory("n", tmp_path / "run"), runtime_dir._make_folder, []

    def make_late(folder: Path, mode: int) -> None:
        calls.append(folder)
        if len(calls) == 2:
            runtime.root.rmdir()
        make(folder, mode)

    monkeypatch.setattr(runtime_dir, "_make_folder", make_late)
    runtime.ensure()
    assert calls == 2 * [runtime.root, runtime.path]
    assert mode_of(runtime.path) == 0o700


def test_a_root_that_cannot_be_made_is_an_error_that_names_the_folder_and_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(number: int) -> Callable[..., None]:
        def fail(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        return fail

    runtime = RuntimeDirectory("n", tmp_path / "run")
    for number, reason in ((errno.EROFS, ": nothing can be written there"), (errno.EMFILE, "")):
        monkeypatch.setattr(runtime_dir, "_make_folder", refuse(number))
        with pytest.raises(RuntimeDirectoryError) as caught:
            runtime.ensure()
        text = (
            f"cannot create the runtime directory {runtime.path}: {os.strerror(number)}{reason}; set MPMM_RUNTIME_DIR"
        )
        assert str(caught.value).startswith(text)
        assert caught.value.path == str(runtime.path)


# ---- looking at it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o700, STICKY, 0o500, 0o300, 0o4700])
def test_a_folder_of_ones_own_that_nobody_else_may_use_is_private(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(mode)
    before = mode_of(folder)
    check_private_folder(folder)
    assert mode_of(folder) == before


@pytest.mark.parametrize("mode", [0o000, 0o1000])
def test_a_folder_that_denies_even_its_owner_is_made_right(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(mode)
    check_private_folder(str(folder))
    assert mode_of(folder) == 0o700 | mode


@pytest.mark.parametrize("mode", [0o701, 0o702, 0o704, 0o710, 0o720, 0o740, 0o777, 0o1701, 0o001, 0o070])
def test_a_folder_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(
        RuntimeDirectoryError, match=f"{folder} has mode {mode:04o}, expected 0700; remove it"
    ) as caught:
        check_private_folder(folder)
    assert caught.value.path == str(folder)
    assert mode_of(folder) == mode


@pytest.mark.parametrize("made", [Path.touch, lambda path: path.symlink_to(path.parent)], ids=["file", "link"])
@pytest.mark.parametrize("mode", [0o000, 0o600])
def test_what_is_no_folder_is_refused_and_left_alone(tmp_path: Path, made: Callable[[Path], None], mode: int) -> None:
    path = tmp_path / "it"
    made(path)
    if not path.is_symlink():
        path.chmod(mode)
    before = mode_of(path)
    with pytest.raises(RuntimeDirectoryError, match="is not a directory"):
        check_private_folder(path)
    assert mode_of(path) == before


@as_root
@pytest.mark.parametrize("mode", [0o000, 0o700])
def test_a_folder_of_somebody_else_is_refused_and_left_alone(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(mode)
    os.chown(folder, NOBODY, -1)
    with pytest.raises(RuntimeDirectoryError, match=f"belongs to uid {NOBODY}, not to 0"):
        check_private_folder(folder)
    assert mode_of(folder) == mode


@pytest.mark.parametrize("level", ["root", "namespace"])
def test_folders_that_are_there_are_looked_at_each_time(tmp_path: Path, level: str) -> None:
    runtime = RuntimeDirectory("n", tmp_path / "run")
    runtime.ensure()
    folder = runtime.root if level == "root" else runtime.path
    folder.chmod(0o755)
    with pytest.raises(RuntimeDirectoryError, match="has mode 0755"):
        runtime.ensure()


@as_root
def test_a_root_of_somebody_else_is_refused_before_anything_is_made_in_it(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir(mode=0o700)
    os.chown(root, NOBODY, -1)
    with pytest.raises(RuntimeDirectoryError, match="belongs to uid"):
        RuntimeDirectory("n", root).ensure()
    assert list(root.iterdir()) == []


# ---- removing it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("identity", ["not given", "its own", "of another one"])
@pytest.mark.parametrize("root_mode", [STICKY, 0o700])
@pytest.mark.parametrize("beside", [False, True])
def test_the_folder_that_is_meant_is_removed_and_an_empty_root_of_ours(
    tmp_path: Path, identity: str, root_mode: int, beside: bool
) -> None:
    runtime = RuntimeDirectory("n", tmp_path / "run")
    runtime.ensure()
    runtime.root.chmod(root_mode)
    (runtime.file("below")).mkdir()
    runtime.file("below", "file").touch()
    if beside:
        RuntimeDirectory("other", runtime.root).ensure()
    found = identity_of(runtime.path)
    assert found is not None
    meant = {"not given": None, "its own": found, "of another one": (found[0], found[1] + 1)}[identity]
    runtime.remove(meant)
    stays = identity == "of another one"
    assert runtime.path.exists() is stays
    assert runtime.root.exists() is (stays or beside or root_mode != STICKY)
    expected = (["n"] if stays else []) + (["other"] if beside else [])
    assert not runtime.root.exists() or sorted(os.listdir(runtime.root)) == expected
    # Missing ones are fine.
    shutil.rmtree(runtime.root, ignore_errors=True)
    runtime.remove(meant)
    runtime.remove()


@pytest.mark.parametrize("third", [False, True])
def test_another_folder_that_has_come_meanwhile_gets_its_name_back_unless_there_is_a_third_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, third: bool
) -> None:
    runtime = RuntimeDirectory("n", tmp_path / "run")
    runtime.ensure()
    meant, rename, taken = identity_of(runtime.path), os.rename, list[object]()

    def rename_another_one(source: Path, target: Path) -> None:
        if not taken:
            rename(runtime.path, tmp_path / "meant")
            runtime.ensure()
            taken.append(identity_of(runtime.path))
            rename(source, target)
            if third:
                runtime.ensure()
                runtime.file("of the third").touch()
        else:
            rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", rename_another_one)
        runtime.remove(meant)
    assert (identity_of(runtime.path) == taken[0]) is not third
    assert runtime.file("of the third").exists() is third
    assert os.listdir(runtime.root) == ["n"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_leaves_no_folder_that_others_would_have_to_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    runtime = RuntimeDirectory("n", tmp_path / "run")
    runtime.ensure()
    runtime.file("file").touch()
    rename = os.rename

    def interrupt(source: Path, target: Path) -> None:
        if when == "after":
            rename(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            runtime.remove(identity_of(runtime.path))
    assert os.listdir(runtime.root) == (["n"] if when == "before" else [])


@pytest.mark.parametrize(
    ("name", "age_s", "left_over"),
    [
        (".n.gone.1", 30.1, True),
        (".n.gone.1", 29.9, False),
        (".n.gone.1", 30.0, False),
        ("n.gone.1", 1e6, False),
        (".hidden", 1e6, False),
        ("n", 1e6, False),
    ],
)
def test_a_folder_is_left_over_if_its_removal_began_longer_ago_than_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, age_s: float, left_over: bool
) -> None:
    folder = tmp_path / name
    (folder / "below").mkdir(parents=True)
    began = os.stat(folder).st_ctime
    monkeypatch.setattr(runtime_dir, "time", SimpleNamespace(time=lambda: began + age_s))
    assert leftovers_in(tmp_path) == ([folder] if left_over else [])
    RuntimeDirectory("other", tmp_path).sweep()
    assert folder.exists() is not left_over


def test_one_that_removes_its_folder_sweeps_those_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = RuntimeDirectory("n", tmp_path / "run")
    runtime.ensure()
    (runtime.root / ".other.gone.1" / "below").mkdir(parents=True)
    monkeypatch.setattr(runtime_dir, "REMOVAL_S", -1.0)
    runtime.remove()
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_swept_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert leftovers_in(tmp_path / "missing") == []
    monkeypatch.setattr(runtime_dir, "REMOVAL_S", -1.0)
    file = tmp_path / ".n.gone.1"
    file.touch()
    runtime = RuntimeDirectory("n", tmp_path)
    runtime.sweep()
    runtime.remove()
    assert file.exists()


@as_root
def test_a_folder_whose_content_cannot_be_removed_is_left_to_others(nobodys_folder: Path) -> None:
    runtime = RuntimeDirectory("n", nobodys_folder / "run")
    runtime.ensure()
    runtime.file("of root").mkdir()
    runtime.file("of root", "file").touch()
    for folder in (runtime.root, runtime.path):
        os.chown(folder, NOBODY, -1)
    with being_nobody():
        runtime.remove()
    assert not runtime.path.exists()
    assert [name[:8] for name in os.listdir(runtime.root)] == [".n.gone."]
