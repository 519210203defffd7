"""`mpmm doctor` and its support bundle."""

from __future__ import annotations

import configparser
import io
import json
import os
import re
import stat
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest
from harness import CHECKOUT, NewManager, NewProcess, acquire, files_in
from loaders import LoadsObject, MakesServed

from mpmm.cli import main
from mpmm.commands.settings_page import ENVIRONMENT
from mpmm.multi_process_shared import MultiProcessShared
from mpmm.observability import doctor
from mpmm.observability.doctor import Check, Group, examine, report
from mpmm.sources import booked

Capture = pytest.CaptureFixture[str]


def checks(title: str, root: Path | None = None) -> list[Check]:
    """Return what the doctor says about one thing."""
    [group] = [group for group in examine(root) if group.title == title]
    return list(group.checks)


def test_it_tells_versions_sources_limits_permissions_and_namespaces(
    new_manager: NewManager, namespace: str, capsys: Capture
) -> None:
    manager = new_manager()
    manager.acquire_model("m", LoadsObject())
    status = main(["doctor"])
    text = capsys.readouterr().out
    for wanted in (
        *("versions:", "driver:", "memory sources:", "limits:", "permissions:", "namespaces:", "  ok       psutil "),
        *("booked: measures nothing", "host: device 0, host memory", "memory_source='auto' takes", "/dev/shm: "),
        *("open files: ", "locks and sockets work in ", f"{namespace}: healthy, since ", "1 processes, 1 copies"),
    ):
        assert wanted in text
    assert status == ("PROBLEM" in text)


def test_a_problem_is_an_exit_status(
    namespace: str, new_process: NewProcess, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = new_process()
    process.call(acquire, "held")
    process.kill()
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert f"PROBLEM  {namespace}: dead: none of its 1 processes is alive" in text
    assert "leftovers of dead processes take" in text
    assert text.splitlines()[-1].endswith("problem") or text.splitlines()[-1].endswith("problems")
    assert main(["prune"]) == 0


def test_a_runtime_directory_that_cannot_be_used_is_a_problem(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    [check] = checks("permissions", tmp_path)
    assert (check.state, "has mode 0755, expected 0700" in check.text) == ("PROBLEM", True)
    [missing, tried] = checks("permissions", tmp_path / "below" / "it")
    assert "does not exist yet" in missing.text
    assert tried.text.startswith(f"locks and sockets work in {tmp_path} (")
    # It leaves nothing behind.
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("size_mb", "free_mb", "state", "said"),
    [
        (64, 60, "ok", "60 free"),
        (64, 2, "PROBLEM", "--shm-size=1g"),
        (9000, 8000, "ok", "8000 free"),
    ],
)
def test_shared_memory_that_is_too_small_is_said(
    size_mb: int, free_mb: int, state: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs("/dev/shm")
    blocks = 2**20 // real.f_frsize
    figures = list(real)
    figures[2], figures[4] = size_mb * blocks, free_mb * blocks
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(figures))
    [check] = [check for check in checks("limits") if check.text.startswith("/dev/shm")]
    assert (check.state, said in check.text) == (state, True)


@pytest.mark.parametrize(
    ("chosen", "state", "said"),
    [
        ("", "note", "takes booked: no GPU can be measured"),
        ("auto", "note", "takes booked: no GPU can be measured"),
        ("host", "ok", "takes host, because MPMM_MEMORY_SOURCE says so"),
        ("nvml", "PROBLEM", "takes nvml, because MPMM_MEMORY_SOURCE says so, but that does not work here"),
        ("none", "PROBLEM", "takes none, because MPMM_MEMORY_SOURCE says so, but that does not work here"),
    ],
)
def test_the_variable_that_replaces_auto_is_said(
    chosen: str, state: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPMM_MEMORY_SOURCE", chosen)
    choices = [check for check in checks("memory sources") if check.text.startswith("memory_source='auto'")]
    assert [(check.state, said in check.text) for check in choices] == [(state, True)]


def test_a_source_that_hangs_or_fails_is_a_problem_and_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SAMPLE_TIMEOUT_S", 0.1)
    answer = threading.Event()
    monkeypatch.setattr(booked.BookedSource, "sample", lambda *_: answer.wait())
    try:
        assert any(
            check == Check("PROBLEM", "booked: does not answer: no answer within 0.1 s")
            for check in checks("memory sources")
        )
    finally:
        answer.set()

    def fails(*_: object) -> None:
        raise ZeroDivisionError("no figure")

    monkeypatch.setattr(booked.BookedSource, "sample", fails)
    assert checks("memory sources")[-1] == Check("PROBLEM", "cannot be examined: ZeroDivisionError: no figure")


def test_only_the_variables_that_mpmm_and_drivers_read_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    groups = examine()
    assert "CUDA_VISIBLE_DEVICES=0,1" in report(groups)
    assert "hunter2" not in report(groups)


# Variables that mpmm sets for the programs and servers that it starts, in which mpmm reads them.
_SET_BY_MPMM = {"MPMM_LEASE_MB", "MPMM_DEVICES", "MPMM_MEMORY_FRACTION", "MPMM_SERVER_LIVES_BY"}


def test_every_variable_that_the_package_reads_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [path.read_text() for path in (CHECKOUT / "mpmm").rglob("*") if path.suffix in (".py", ".c")]
    read = {name for source in sources for name in re.findall(r"\bMPMM_[A-Z0-9_]+[A-Z0-9]\b", source)} - _SET_BY_MPMM
    assert read == {name for name in doctor.VARIABLES if name.startswith("MPMM_")}
    assert read == set(ENVIRONMENT)
    monkeypatch.setenv("MPMM_LOAD_AHEAD", "0")
    monkeypatch.setenv("MPMM_DASHBOARD_TOKEN", "a secret that nobody else knows")
    said = [check.text for check in checks("settings in the environment")]
    assert "MPMM_LOAD_AHEAD=0" in said
    # Reports are passed on to others.
    assert "MPMM_DASHBOARD_TOKEN is set" in said


def test_every_library_that_users_may_install_is_named_with_its_extra() -> None:
    options = configparser.ConfigParser()
    options.read(CHECKOUT / "setup.cfg")

    def libraries(text: str) -> set[str]:
        found = (re.match(r"[\w-]+", line) for line in text.split())
        return {name[0] for name in found if name} - {"mpmm"}

    assert libraries(options["options"]["install_requires"]) == set(doctor.REQUIRED)
    extras = options["options.extras_require"]
    for_users = {*re.findall(r"[a-z]+", extras["all"].split("[")[1]), "amd"}
    wanted = {(library, extra) for extra in for_users for library in libraries(extras[extra])}
    assert wanted == {(library, extra) for library, extra in doctor.OPTIONAL.items() if extra}


def test_the_report_fits_the_terminal() -> None:
    groups = [Group("things", (Check("ok", "short"), Check("PROBLEM", "word " * 40)))]
    narrow = report(groups, 70)
    assert max(map(len, narrow.splitlines())) <= 70
    assert narrow.split().count("word") == 40
    assert narrow.splitlines()[3].startswith(" " * 11 + "word")
    assert narrow.endswith("\n1 problem")
    assert report(groups[:0]).endswith("no problems")


def packed(path: Path) -> dict[str, str]:
    """Return the files of a bundle, by name."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name).decode() for name in archive.namelist()}
    with tarfile.open(path) as tar:
        found = {member.name: tar.extractfile(member) for member in tar.getmembers()}
        return {name: io.TextIOWrapper(file).read() for name, file in found.items() if file is not None}


@pytest.mark.parametrize("name", ["bundle.tar.gz", "bundle.zip"])
def test_a_bundle_has_everything_in_one_file_and_no_secrets(
    name: str,
    new_manager: NewManager,
    namespace: str,
    runtime_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    monkeypatch.setenv("MPMM_DASHBOARD_TOKEN", "swordfish")
    monkeypatch.setenv("MPMM_ARENA_MB", "77")
    manager = new_manager()
    manager.acquire_model("m", LoadsObject())
    shared = MultiProcessShared(MakesServed(), tag="served", spawn_process=True, always_proxy=True)
    shared.acquire()
    path = tmp_path / name
    main(["doctor", "--bundle", str(path)])
    assert f"wrote {path}" in capsys.readouterr().err
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    files = {name.removeprefix("mpmm-support/"): text for name, text in packed(path).items()}
    assert set(files) == {
        "doctor.txt",
        *(f"{namespace}/{part}" for part in ("inspect.json", "inspect.txt", "events.txt")),
    }
    assert json.loads(files[f"{namespace}/inspect.json"])["schema"] == 2
    assert "load begins on device 0" in files[f"{namespace}/events.txt"]
    assert files["doctor.txt"].startswith("versions:\n")
    everything = "\n".join(files.values())
    assert "MPMM_ARENA_MB=77" in files["doctor.txt"]
    secrets = [b"hunter2", b"swordfish"]
    for file in map(Path, files_in(runtime_root)):
        with_path = file if file.is_absolute() else runtime_root / file
        if with_path.is_file() and with_path.stat().st_size >= 8:
            secrets.append(with_path.read_bytes())
    assert len(secrets) > 3, "the namespace's and the server's keys are looked for"
    for secret in secrets:
        assert secret.decode("latin-1") not in everything
        assert secret.hex() not in everything
    shared.unsafe_hard_delete()


def test_the_page_for_operators_names_every_variable_whose_value_a_bundle_contains() -> None:
    page = " ".join((CHECKOUT / "mpmm" / "OPERATING.md").read_text().split())
    [said] = re.findall(r"A support bundle (.*?) About the dashboard's token it says only that it is set\.", page)
    assert "the environment variables of `mpmm help settings`" in said
    named = set(re.findall(r"`([A-Z_]+)`", said))
    assert named | set(ENVIRONMENT) == set(doctor.VARIABLES)


def test_a_bundle_of_another_kind_is_refused_and_one_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, capsys: Capture
) -> None:
    assert main(["doctor", "--bundle", str(tmp_path / "bundle.rar")]) == 2
    assert "expected a name that ends in .tar.gz, .tgz or .zip" in capsys.readouterr().err
    assert main(["doctor", "--bundle", str(tmp_path / "nowhere" / "bundle.zip")]) == 2
    (tmp_path / "taken.zip").mkdir()
    assert main(["doctor", "--bundle", str(tmp_path / "taken.zip")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["taken.zip"]
