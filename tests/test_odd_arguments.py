"""Odd arguments of commands: each is refused in one line, or does what it says, and none is a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from harness import NewManager, import_path
from loaders import Loads

from mpmm.cli import main
from mpmm.model_manager import ModelManager
from mpmm.shared_state.snapshot import read_snapshot

Capture = pytest.CaptureFixture[str]
Case = tuple[str, ...]

LONE, NO_UTF8 = "\ud800", os.fsdecode(b"caf\xe9")
TEXTS = (
    "",
    " ",
    "\0",
    "a\0b",
    LONE,
    NO_UTF8,
    "x" * 10000,
    "\n",
    "a/b",
    "..",
    ".",
    "\x1b[2J",
    "１２",
    "²",
    "-",
    "{",
    "%s",
)
NUMBERS = ("", "x", "nan", "inf", "-inf", "-1", "1e400", "9" * 400, "9" * 5000, "１２", "²", "0", LONE, "1_0", " 1 ")
PATHS = ("", "\0", "a\0b", LONE, NO_UTF8, "a folder", "a folder/", ".", "/proc/nope/x", "x" * 5000)
TRACES = {
    "binary": b"\xff\xfe\x00",
    "empty": b"",
    "number": b"5",
    "long number": b"9" * 10000,
    "deep": b"[" * 100000,
    "nothing": b"[]",
    "no phase": b'[{"a": 1}]',
    "not ours": b'[{"ph": "X", "pid": 1000000}]',
    "half a pair": b'[{"ph": "M", "name": "\\ud800"}]',
}
FORMATS = (
    *(
        "{tag.x}",
        "{tag[0]}",
        "{0}",
        "{}",
        "{",
        "}",
        "{*}",
        "{nope}",
        "{tag!q}",
        "{tag!}",
        "{tag:d}",
        "{mb:%Y}",
        "{mb:s}",
    ),
    *("{tag:{mb}}", "{tag:{tag:{tag}}}", "{copy:c}", "{pid:c}", "{devices:d}", "{seconds!s:d}", "{tag:\0>9}", "JSON"),
    *("{tag:999999999999}", "{tag:99999999999999999999999}", "{mb:.99999999999f}", "{mb:.2147483647f}", "{tag" * 2000),
)
LOADERS = (
    *(".mod:fn", "..:f", "mod..x:f", ".:f", "\0:f", "os.path.:join", "a b:c", "no_such_module:f", "fails:f"),
    *("os:", ":f", "os:nope", "os:path", "os:path..join", "os:getcwd.x", "json:JSONDecoder.no", "invalid:f", "odd:f"),
)
MODULES = {"fails": "1 / 0", "invalid": "def (:", "odd": "def __getattr__(name):\n    raise ValueError(name)\n"}
HOSTS = ("..", "a..b", "." + "x" * 70, "x" * 70, "%", "a b", "é" * 70, LONE, NO_UTF8, "127.0.0.1\0", "256.1.1.1")
PORTS = ("", "x", "²", "１２", "-1", "70000", "9" * 5000, "0x1", "+1", " 1", "\n")
PRELOAD: Case = ("preload", "new", "builtins:object", "--wait", "0")


def about_texts(text: str) -> Iterable[Case]:
    """Commands that take a name, a tag, a word or a program."""
    for command in ("inspect", "ps", "top", "events", "trace", "metrics", "check"):
        yield from ((command, text), (command, "--namespace", text))
    yield from (
        ("reset", "--yes", text),
        ("events", "--model", text),
        ("ps", "--format", text),
        ("top", "--filter", text),
    )
    yield from (("unload", text, "--wait", "0"), ("pin", text), ("unpin", text), ("suspend", text, "--wait", "0"))
    yield from (("resume", text, "--wait", "0"), ("settings", text), ("settings", "set", text, "1"), ("help", text))
    yield from (("settings", "set", "memory_budget_mb", text), ("settings", "set", "suspend", text), (f"--x{text}",))
    yield from (("completion", text), (text,), ("top", "--sort", text), ("metrics", "--serve", f"{text}:no"))
    yield from (
        ("dashboard", "--namespace", text, "--port", "99999"),
        ("dashboard", "--token", text, "--port", "99999"),
    )
    yield from (("preload", text, "builtins:object", "--wait", "0"), ("preload", "new", f"os:{text}", "--wait", "0"))
    yield from (("preload", "new", text, "--wait", "0"), ("run", "--mb", text, "--", "true"))
    yield from (("run", "--mb", "1", "--name", text, "--", ""), ("run", "--mb", "1", "--namespace", text, "--", ""))
    yield from (("run", "--mb", "1", "--", text), ("run", "--mb", "1", "--steady", text, "--", ""))


def about_numbers(number: str) -> Iterable[Case]:
    """Commands that take a number."""
    yield from (("inspect", "--max-wait", number), ("top", "--interval", number), ("events", "-n", number))
    yield from (("dashboard", "--host", "..", "--port", number), ("suspend", "held", "--wait", number))
    yield from (("resume", "held", "--wait", number), ("unload", "absent", "--wait", number))
    for option in ("--copies", "--users", "--keep-alive", "--priority", "--expect-mb"):
        yield (*PRELOAD, option, number)
    for option in ("--wait", "--priority", "--steady"):
        yield ("run", "--mb", "1", option, number, "--", "")
    for setting in ("poll_interval", "max_waiting", "suspend_budget_mb"):
        yield ("settings", "set", setting, number)


def about_paths(path: str) -> Iterable[Case]:
    """Commands that read or write a file."""
    for command in (("list",), ("prune",), ("inspect",), ("run", "--mb", "1", "--", "")):
        yield ("--runtime-root", path, *command)
    yield from (("trace", "-o", path), ("plot", "-o", path), ("plot", "-o", f"{path}.png"))
    yield from (("plot", "--trace", path, "-o", "x.png"), ("doctor", "--bundle", path))
    yield from (("doctor", "--bundle", f"{path}.tar.gz"), ("doctor", "--bundle", f"{path}.zip"))


CASES: dict[str, list[Case]] = {
    "texts": [case for text in TEXTS for case in about_texts(text)],
    "numbers": [case for number in NUMBERS for case in about_numbers(number)],
    "paths": [case for path in PATHS for case in about_paths(path)],
    "traces": [("plot", "--trace", name, "-o", "x.png") for name in TRACES],
    "formats": [("ps", "--format", template) for template in FORMATS],
    "loaders": [("preload", "new", loader, "--wait", "0") for loader in LOADERS],
    "hosts": [case for host in HOSTS for case in (("dashboard", "--host", host), ("metrics", "--serve", f"{host}:80"))],
    "ports": [("metrics", "--serve", port) for port in PORTS],
    "programs": [("run", "--mb", "1", "--", "true", argument) for argument in ("\0", LONE)],
}
# Of the longest lists every seventh case is tried, so each command meets other values; with MPMM_TEST_EXAMPLES, all.
if "MPMM_TEST_EXAMPLES" not in os.environ:
    CASES.update({kind: CASES[kind][::7] for kind in ("texts", "numbers", "paths")})
# Everything in these is an error; in the others some of it is a name or a number like any other.
ERRORS = ("traces", "loaders", "hosts", "ports")


@pytest.mark.parametrize("kind", CASES)
def test_odd_arguments_are_refused_in_one_line(
    kind: str,
    namespace: str,
    new_manager: NewManager,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    (tmp_path / "a folder").mkdir()
    for name, content in TRACES.items():
        (tmp_path / name).write_bytes(content)
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    manager = new_manager()
    with manager.model("held", Loads()):
        for case in CASES[kind]:
            try:
                status: object = main(case)
            except SystemExit as end:
                # The parser's own errors.
                status = end.code
            except Exception as error:
                pytest.fail(f"{case!r:.200}: {error!r}")
            said = capsys.readouterr().err
            assert status in (0, 1, 2, 125, 126, 127), case
            assert status != 0 or kind not in ERRORS, case
            if status in (2, 125, 126, 127):
                lines = [line for line in said.splitlines() if not line.startswith(("usage: ", " "))]
                assert len(lines) == 1, (case, said)
                assert lines[0].startswith("mpmm"), case
        assert [copy.tag for copy in read_snapshot(namespace).copies] == ["held"]


@pytest.mark.parametrize("columns", ["0", "-1", "1", "²", "x", "9" * 30, ""])
@pytest.mark.parametrize("command", ["inspect", "ps", "events", "top", "check"])
def test_the_width_may_be_anything(
    command: str, columns: str, busy: ModelManager, namespace: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert main([command, namespace]) == 0
    if command != "top":
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        assert main([command, namespace]) == 0
    assert capsys.readouterr().out.strip()


def test_a_closed_standard_input_is_an_empty_one(namespace: str, new_manager: NewManager) -> None:
    new_manager()
    environment = {**os.environ, "PYTHONPATH": import_path()}
    for command in (f"reset {namespace}", f"top {namespace}", f"inspect --json {namespace}"):
        done = subprocess.run(
            f"exec {sys.executable} -m mpmm {command} <&-",
            shell=True,
            capture_output=True,
            text=True,
            timeout=60,
            env=environment,
        )
        assert (done.returncode, done.stderr) == (0, ""), command
    assert json.loads(done.stdout)["resets"] == 1
