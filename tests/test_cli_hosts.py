"""The command line under odd conditions: below the runtime root, in other namespaces, or in its streams."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import NewManager, wait_until
from loaders import Loads

from mpmm.cli import main
from mpmm.model_manager import ModelManager
from mpmm.observability.dashboard.watch import Watcher
from mpmm.shared_state.segment import segment_name
from mpmm.shared_state.snapshot import find_lost_namespaces, find_namespaces

Capture = pytest.CaptureFixture[str]
COMMANDS = (["inspect"], ["check", "--health"])


def use(manager: ModelManager, tag: str) -> None:
    """Load a model and give it back."""
    with manager.model(tag, Loads()):
        pass


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("name", ["lost+found", "copy of x", ".hidden", "x" * 65])
def test_a_folder_that_is_no_namespaces_is_left_aside(
    command: list[str], name: str, namespace: str, new_manager: NewManager, runtime_root: Path, capsys: Capture
) -> None:
    use(new_manager(), "a")
    (runtime_root / name).mkdir()
    try:
        assert main(command) == 0
        assert name not in capsys.readouterr().out
        assert (find_namespaces(), find_lost_namespaces()) == ([namespace], [])
    finally:
        (runtime_root / name).rmdir()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_namespace_that_has_lost_its_segment_is_a_problem_beside_others(
    command: list[str], namespace: str, new_manager: NewManager, runtime_root: Path, capsys: Capture
) -> None:
    use(new_manager(), "a")
    with ModelManager(namespace="second", memory_source="booked") as second, second.model("b", Loads()):
        os.unlink(f"/dev/shm/{segment_name(runtime_root, 'second')}")
        assert main(command) == 1
        said = " ".join(capsys.readouterr().out.split())
        assert "namespace 'second' is in use, but its segment" in said
        assert namespace in said
    assert main(["check", "--health", "second"]) != 0


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_namespace_that_cannot_be_read_hides_no_other(
    command: list[str], namespace: str, new_manager: NewManager, runtime_root: Path, capsys: Capture
) -> None:
    use(new_manager(), "a")
    # Before it in the order of names.
    (runtime_root / "Broken").mkdir(mode=0o700)
    segment = Path("/dev/shm", segment_name(runtime_root, "Broken"))
    segment.write_bytes(b"junk" * 10_000)
    try:
        assert main(command) == 1
    finally:
        segment.unlink()
        (runtime_root / "Broken").rmdir()
    said = capsys.readouterr().out
    assert "Broken: " in said
    assert namespace in said


# Creates a namespace, but stops while its segment has only the given number of bytes, until its input ends.
STOPS = """
import os, sys
from mpmm import ModelManager
from mpmm.shared_state import segment

def stops(name, size):
    descriptor = segment._posixshmem.shm_open(f"/{name}", os.O_RDWR | os.O_CREAT | os.O_EXCL, mode=0o600)
    os.ftruncate(descriptor, int(sys.argv[2]))
    print("made", flush=True)
    sys.stdin.read()

segment._shared_memory = stops
ModelManager(namespace=sys.argv[1], memory_source="booked")
"""


@pytest.mark.parametrize("size", [0, 100_000])
def test_a_namespace_is_no_problem_while_it_is_made_but_one_once_its_maker_is_dead(
    size: int, namespace: str, new_manager: NewManager, capsys: Capture
) -> None:
    use(new_manager(), "a")
    arguments = [sys.executable, "-c", STOPS, "coming", str(size)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        assert maker.stdout.readline() == "made\n"
        assert [main(command) for command in (*COMMANDS, ["ps"])] == [0, 0, 0]
        main(["doctor"])
        said = capsys.readouterr()
        assert "coming" not in said.out + said.err
        assert main(["check", "coming"]) == 2
        assert "namespace 'coming' is being made" in capsys.readouterr().err
        maker.kill()
    for command in (*COMMANDS, ["check", "--health", "coming"], ["doctor"]):
        assert main(command) == 1, command
        assert "namespace 'coming' is unfinished: the process that made it has died" in one_line(capsys)
    assert main(["check", "coming"]) == 2
    assert "has died" in one_line(capsys)
    # The next process creates it, as the message says.
    with ModelManager(namespace="coming", memory_source="booked"):
        assert main(["check", "--health"]) == 0


def one_line(capsys: Capture) -> str:
    """Return what was printed, without its line ends."""
    said = capsys.readouterr()
    return " ".join((said.out + said.err).split())


def test_a_dashboard_says_that_it_cannot_look_and_goes_on(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(new_manager(), "a")
    watcher = Watcher()
    watcher.start()
    try:
        look = Watcher.look

        def fails(watcher: Watcher) -> float:
            raise OSError("no descriptor is left")

        def problem() -> str:
            return watcher.state(namespace, "", 0, 60.0)["problem"] or ""

        monkeypatch.setattr(Watcher, "look", fails)
        wait_until(lambda: "no descriptor is left" in problem(), "the page says so")
        monkeypatch.setattr(Watcher, "look", look)
        wait_until(lambda: not problem(), "it looks again")
    finally:
        watcher.close()


@pytest.mark.parametrize(
    "streams",
    [
        *({"PYTHONIOENCODING": f"{encoding}:strict"} for encoding in ("latin-1", "ascii", "utf-8")),
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
    ids=str,
)
def test_whatever_the_output_can_write_all_of_it_arrives_in_some_form(
    streams: dict[str, str], namespace: str, new_manager: NewManager
) -> None:
    use(new_manager(), "Модель-\udcff")
    environment = {**os.environ, **streams}
    for command in (["--help"], ["help", "costs"], ["inspect"], ["ps"], ["ps", "--format", "{tag}"], ["metrics"]):
        done = subprocess.run(
            [sys.executable, "-m", "mpmm", *command], env=environment, capture_output=True, timeout=60, check=False
        )
        assert (done.returncode, done.stderr) == (0, b""), command
        assert done.stdout


def test_a_probe_without_an_output_judges_all_the_same(namespace: str, new_manager: NewManager) -> None:
    use(new_manager(), "a")
    command = f"exec {sys.executable} -m mpmm check --health {namespace} >&-"
    assert subprocess.run(command, shell=True, timeout=60, check=False).returncode == 0
