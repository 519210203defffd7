"""No name from users reaches a terminal or a log as a control sequence; programs read names unchanged."""

from __future__ import annotations

import json
import logging
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from harness import NewManager

from mpmm.cli import main
from mpmm.errors import AcquireTimeoutError, DeadlockError, MpmmError, NotAcquiredError
from mpmm.observability.inspect_screen import overview, render
from mpmm.observability.top import History, screen
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.text.printable import printable, printable_lines

# Clears the screen, retitles the window, forges a line, turns letters around, and is half a character.
EVIL = "a\x1b[2J\x1b]0;owned\x07\r\nforged: line\u202eb\x9b1m\udce9"
SHOWN = r"a\x1b[2J\x1b]0;owned\x07\r\nforged: line\u202eb\x9b1m\udce9"


class Fails:
    """A loader that fails, with the tag in its words."""

    def __call__(self) -> object:
        raise OSError("no such file")


def _is_harmless(text: str) -> bool:
    return all(sign.isprintable() or sign in "\n" for sign in text) and "\nforged" not in text


def test_what_does_not_print_is_written_as_python_writes_it() -> None:
    assert printable(EVIL) == SHOWN
    assert printable("caf\xe9 – 模型 🐈") == "caf\xe9 – 模型 🐈"
    assert printable_lines("a\n\tb\rc") == "a\n\tb\\rc"
    assert printable("") == ""


def test_screens_are_harmless_and_json_is_exact(
    namespace: str, new_manager: NewManager, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = new_manager()
    with manager.model(EVIL, object), manager.reserve(10, name=EVIL + "lease"):
        manager.pin(EVIL)
        snapshot = read_snapshot(namespace)
        texts = [render(snapshot), render(snapshot, everything=True, width=90), overview([snapshot, snapshot])]
        texts += [_drawn(snapshot)]
        for text in texts:
            assert _is_harmless(text)
        assert SHOWN in texts[0]
        assert SHOWN + "lease" in texts[0]
        for arguments in (["inspect"], ["inspect", "--all"], ["list"], ["check"]):
            assert main(arguments) == 0
            assert _is_harmless(capsys.readouterr().out)
        assert main(["inspect", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert {model["tag"] for model in found["models"]} == {EVIL, EVIL + "lease"}
        assert main(["trace"]) == 0
        assert any(EVIL in text for text in _texts(json.loads(capsys.readouterr().out)))
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        assert main(["metrics"]) == 0
        assert _is_harmless(capsys.readouterr().out)


def test_what_scripts_read_is_harmless_on_a_terminal_and_exact_in_a_pipe(
    namespace: str, new_manager: NewManager, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with new_manager().model(EVIL, object):
        assert main(["ps", "--format", "{tag}"]) == 0
        # The stream escapes what it cannot encode.
        assert capsys.readouterr().out == EVIL.encode("utf-8", "backslashreplace").decode() + "\n"
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        # The escape sequences of the format are the user's own, and wanted.
        assert main(["ps", "--format", "\x1b[1m{tag}\x1b[m\\t{state:>7}"]) == 0
        assert capsys.readouterr().out == f"\x1b[1m{SHOWN}\x1b[m\t active\n"
        for command in ("ps --format json", "events --json", "inspect --json", "trace", "trace -o -"):
            assert main(command.split()) == 0
            assert _is_harmless(capsys.readouterr().out), command


def _texts(found: Any) -> Iterator[str]:
    if isinstance(found, str):
        yield found
    for one in found.values() if isinstance(found, dict) else found if isinstance(found, list) else ():
        yield from _texts(one)


def _drawn(snapshot: Any) -> str:
    from rich.console import Console

    console = Console(width=120, height=40, force_terminal=False)
    with console.capture() as capture:
        console.print(screen(snapshot, History(), 120, 40))
    return capture.get()


def test_errors_are_harmless_and_their_facts_exact(
    namespace: str, new_manager: NewManager, capsys: pytest.CaptureFixture[str]
) -> None:
    manager = new_manager(max_model_copies=1)
    with pytest.raises(NotAcquiredError) as caught:
        manager.release_model(EVIL, object())
    held = manager.acquire_model("b", object)
    with pytest.raises(AcquireTimeoutError) as timed_out:
        manager.reserve(1000, name=EVIL, timeout_seconds=0.01)
    manager.release_model("b", held)
    with manager.model("b", object), pytest.raises(DeadlockError) as deadlock:
        manager.reserve(1000, name=EVIL)
    # Lines are kept: the traceback of a model server has many.
    lines = MpmmError("made\nfrom " + EVIL.replace("\nforged", ""), tag=EVIL)
    errors: list[MpmmError] = [caught.value, timed_out.value, deadlock.value, lines]
    for error in errors:
        assert _is_harmless(str(error))
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.message, again.facts["tag"]) == (str(error), error.message, EVIL)
    capsys.readouterr()
    for arguments in (["inspect", EVIL], ["check", EVIL], ["reset", EVIL], ["top", EVIL], ["metrics", EVIL]):
        assert main(arguments) == 2
        assert _is_harmless(capsys.readouterr().err)
    with pytest.raises(SystemExit):
        main(["inspect", "--" + EVIL.replace(" ", "")])
    assert _is_harmless(capsys.readouterr().err)


def test_logs_are_harmless(new_manager: NewManager, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="mpmm")
    manager = new_manager(verbose_logging=True)
    copy = manager.acquire_model(EVIL, object)
    manager.release_model(EVIL + "other", copy)
    with pytest.raises(OSError, match="no such file"):
        manager.acquire_model(EVIL + "fails", Fails())
    manager._estimator.set_initial_estimate(EVIL, 5)
    said = [record.getMessage() for record in caplog.records]
    assert sum(SHOWN in line for line in said) >= 3
    for line in said:
        assert _is_harmless(line)
        assert "\n" not in line
