"""`mpmm completion` and `mpmm man`: real shells and a real formatter read what they print."""

from __future__ import annotations

import os
import pty
import select
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

# What bash does when the user presses Tab, with the words of the command line as arguments.
PRESS_TAB = 'COMP_LINE=$*; COMP_POINT=${#COMP_LINE}; _mpmm mpmm "${!#}"; printf "%s\\n" "${COMPREPLY[@]}"'
PROMPT = b"ready> "


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


class Terminal:
    """An interactive bash that has read the script, at a terminal of its own."""

    def __init__(self, script: Path) -> None:
        pid, self._terminal = pty.fork()
        if not pid:
            os.execvpe(
                "bash", ["bash", "--norc", "--noprofile", "-i"], {**os.environ, "PS1": PROMPT.decode(), "TERM": "dumb"}
            )
        self._pid = pid
        self._read()
        self.type(f"source {script}")

    def type(self, line: str) -> str:
        """Type a line, and press Enter; return what the terminal shows until the next prompt."""
        os.write(self._terminal, line.encode() + b"\n")
        return self._read()

    def _read(self) -> str:
        shown = b""
        while not shown.endswith(PROMPT):
            assert select.select([self._terminal], [], [], 60.0)[0], shown
            shown += os.read(self._terminal, 4096)
        return shown.decode()

    def close(self) -> None:
        """Hang up."""
        os.close(self._terminal)
        os.waitpid(self._pid, 0)


def test_bash_completes_tags_with_colons_and_blanks_however_they_are_quoted(command: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    command.write_text(
        "#!/bin/sh\ncase $1 in ps) cat " + str(tmp_path / "tags") + ";; *) printf '<%s>' \"$@\";; esac\n"
    )
    tags = ["group/model:v2", "two words", f"run $(touch {marker})", 'it\'s "mine"', "a=b:c d"]
    (tmp_path / "tags").write_text("".join(f"{tag}\n" for tag in tags))
    script = tmp_path / "script"
    script.write_text(completion(make_parser(), "bash"))
    terminal = Terminal(script)
    try:
        begun = [
            ("gro", "group/model:", "group/model:v"),
            ("tw", "two\\ w", "'two w", '"two w'),
            ("r", "run\\ \\$", '"run \\$', "'run $"),
            ("it", "'it", '"it'),
            ("a", "a=b:", "a=b:c\\ "),
        ]
        for tag, typed in zip(tags, begun, strict=True):
            for begin in typed:
                assert f"\n<pin><{tag}>" in terminal.type(f"mpmm pin {begin}\t").replace("\r", ""), begin
        assert "<events><--model=group/model:v2>" in terminal.type("mpmm events --model=group/model:\t")
        # The shell would run anything added after this `$`.
        assert "<pin><run $>" in terminal.type('mpmm pin "run $\t"')
    finally:
        terminal.close()
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
