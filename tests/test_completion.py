"""`mpmm completion` and `mpmm man`: real shells and a real formatter read what they print."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import NewManager, import_path
from loaders import LoadsObject

from mpmm.cli import main
from mpmm.commands.parser import make_parser
from mpmm.observability.completion import SHELLS, completion, man_page

# What bash does when somebody presses Tab, with the words of the command line as arguments.
PRESS_TAB = 'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _mpmm; printf "%s\\n" "${COMPREPLY[@]}"'


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the PATH with the command `mpmm`, of this checkout."""
    script = tmp_path / "bin" / "mpmm"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m mpmm "$@"\n')
    script.chmod(0o700)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", import_path())
    return script


def tab(*words: str) -> list[str]:
    """Return what bash offers for the last of some words."""
    script = completion(make_parser(), "bash") + PRESS_TAB
    done = subprocess.run(
        ["bash", "-c", script, "bash", *words], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""
    return done.stdout.split("\n")[:-1]


def test_bash_completes_commands_options_and_choices(command: Path) -> None:
    assert tab("mpmm", "insp") == ["inspect"]
    assert tab("mpmm", "inspect", "--m") == ["--max-wait"]
    assert tab("mpmm", "completion", "z") == ["zsh"]
    # Files, and whatever belongs to another program, are the shell's business.
    assert tab("mpmm", "doctor", "--bundle", "") == [""]
    assert tab("mpmm", "run", "--mb", "5g", "--", "l") == [""]


def test_bash_completes_namespaces_and_tags_and_runs_nothing_of_them(
    command: Path, namespace: str, new_manager: NewManager, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    manager = new_manager()
    tag = f"model $(touch {marker})"
    manager.release_model(tag, manager.acquire_model(tag, LoadsObject()))
    assert tab("mpmm", "inspect", "te") == [namespace]
    [offered] = tab("mpmm", "unpin", "mod")
    assert offered == rf"model\ \$\(touch\ {marker}\)"
    assert not marker.exists()


@pytest.mark.parametrize("shell", sorted(SHELLS))
def test_each_shell_can_read_its_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert script.count("inspect") and script.endswith("\n")
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed here")
    subprocess.run([program, "-n"], input=script, text=True, timeout=60, check=True)


def test_every_command_is_in_the_manual(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["man"]) == 0
    text = capsys.readouterr().out
    for name in ("inspect", "doctor", "run", "completion"):
        assert f".SS \\fB{name}\\fR" in text
    assert r"\fB\-\-follow\fR" in text
    assert not any(line.startswith(("'", ".'")) for line in text.splitlines())


def test_a_formatter_has_nothing_to_complain_of() -> None:
    groff = shutil.which("groff")
    if groff is None:
        pytest.skip("groff is not installed here")
    page = man_page(make_parser(), "1.2.3")
    done = subprocess.run(
        [groff, "-man", "-Tutf8", "-ww"], input=page, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""
    assert "mpmm 1.2.3" in done.stdout
