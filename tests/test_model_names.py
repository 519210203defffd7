"""Names of models as people type them from a screen: tags, their beginnings, display names, and shortened ones."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path

import pytest
from harness import NewManager, copies_of
from loaders import Loads

from mpmm.cli import main
from mpmm.errors import InvalidArgumentError
from mpmm.model_manager import ModelManager
from mpmm.observability.event_lines import Choice, show_events
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.text.display_names import set_display_name
from mpmm.text.model_names import meant_tag

Capture = pytest.CaptureFixture[str]
ONE, OTHER, THIRD = "0123456789abcdef0123456789abcdef", "89abcdef0123456789abcdef01234567", "0123ffff" * 4
NAME = "SklearnModelHandlerNumpy gs://models/fraud-v1/model.joblib"
NAMES = {ONE: NAME, OTHER: "Torch gs://models/sorter.pt", THIRD: "", "plain": "", "plain-v2": "", "bad\x1btag": ""}


@pytest.fixture(autouse=True)
def without_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget afterwards what a test has named."""
    monkeypatch.setattr("mpmm.text.display_names._names", {})


@pytest.mark.parametrize(
    ("wanted", "meant"),
    [
        (ONE, ONE),
        ("plain", "plain"),
        ("plain-", "plain-v2"),
        ("01234567", ONE),
        ("01234567…", ONE),
        ("0123f", THIRD),
        (NAME, ONE),
        (f"{NAME} [01234567…]", ONE),
        ("SklearnMod…fraud-v1/model.joblib [01234567…]", ONE),
        ("Torch…", OTHER),
        (r"bad\x1btag", "bad\x1btag"),
        ("Sklearn", None),
        ("nothing", None),
        ("…", None),
        ("", None),
    ],
)
def test_one_model_is_meant(wanted: str, meant: str | None) -> None:
    assert meant_tag(wanted, NAMES) == meant


def test_where_several_fit_all_are_named() -> None:
    for wanted in ("0123", "0123…"):
        with pytest.raises(InvalidArgumentError) as error:
            meant_tag(wanted, NAMES)
        assert f"2 models fit: {THIRD}, {NAME} [01234567…]; expected" in str(error.value)
    with pytest.raises(InvalidArgumentError, match=r"2 models fit: .* \[0123456789abcdef.{16}\], .*_reload_0\]"):
        meant_tag(NAME, {**NAMES, f"{ONE}_reload_0": NAME})
    with pytest.raises(InvalidArgumentError, match=r"12 models fit: .* and 2 more;"):
        meant_tag("m", {f"m{number}": "" for number in range(12)})
    # Those that there is something to be done with.
    assert meant_tag("0123", NAMES, first=[ONE, OTHER]) == ONE


def test_a_model_to_come_is_not_mistaken_for_one_whose_tag_begins_so() -> None:
    assert meant_tag("plain-v", NAMES, may_be_new=True) is None
    assert meant_tag("plain-v…", NAMES, may_be_new=True) == "plain-v2"
    assert meant_tag("01234567", NAMES, may_be_new=True) == ONE


@pytest.fixture
def named(namespace: str, new_manager: NewManager) -> ModelManager:
    """A namespace with idle copies of two models that begin alike, one of which has a name, and of a plain one."""
    manager = new_manager()
    set_display_name(ONE, NAME)
    for tag in (ONE, THIRD, "plain-v2"):
        manager.release_model(tag, manager.acquire_model(tag, Loads(tag)))
    return manager


@pytest.mark.parametrize("model", ["01234567", "01234567…", NAME, f"{NAME} [01234567…]"])
def test_what_screens_show_can_be_typed(named: ModelManager, namespace: str, model: str, capsys: Capture) -> None:
    def said(*arguments: str, status: int = 0) -> str:
        assert main([*arguments]) == status
        return capsys.readouterr().out

    shown = f"{NAME} [01234567…]"
    assert said("pin", model) == f"{shown}: pinned for all\n"
    assert [pin.model for pin in read_snapshot(namespace).pins] == [copies_of(namespace, ONE)[0].model]
    assert said("unpin", model) == f"{shown}: no longer pinned for all\n"
    assert said("suspend", model, status=1) == f"{namespace}: 0 copies of {shown} suspended\n"
    assert said("resume", model, status=1) == f"{namespace}: 0 copies of {shown} resumed\n"
    found = [json.loads(line) for line in said("events", "--json", "--model", model).splitlines()]
    assert {event["tag"] for event in found} == {ONE}
    assert shown in said("events", "--model", model)
    # There is one already.
    assert said("preload", model, "test_model_names:never") == f"{shown}: 0 loaded\n"
    assert said("unload", model) == f"{shown}: 1 unloaded\n"
    assert copies_of(namespace, ONE) == []
    assert len(copies_of(namespace, THIRD)) == 1


def never() -> str:
    """Be a loader that is not called."""
    raise AssertionError("there is a copy")


def test_an_ambiguous_model_is_refused_and_nothing_changes(
    named: ModelManager, namespace: str, capsys: Capture
) -> None:
    for command in (["unload", "0123"], ["unpin", "0123"], ["suspend", "0123"], ["events", "--model", "0123"]):
        assert main(command) == 2, command
        assert f"2 models fit: {THIRD}, {NAME} [01234567…]" in capsys.readouterr().err
    assert len(copies_of(namespace, ONE)) == len(copies_of(namespace, THIRD)) == 1
    # Of two with the same beginning one is left that can be unloaded.
    assert main(["unload", ONE]) == 0
    assert main(["unload", "0123"]) == 0
    assert copies_of(namespace, THIRD) == []


def test_of_two_models_of_one_name_none_is_taken_silently_while_something_can_be_done_with_either(
    namespace: str, new_manager: NewManager, capsys: Capture
) -> None:
    manager = new_manager()
    for tag in (ONE, OTHER):
        set_display_name(tag, NAME)
        manager.release_model(tag, manager.acquire_model(tag, Loads(tag)))
    manager.pin(OTHER, for_all=True)
    manager.unload(OTHER)
    for command in ("unpin", "pin", "unload", "suspend", "resume", "preload"):
        assert main([command, NAME, *(["test_model_names:never"] if command == "preload" else [])]) == 2, command
        said = capsys.readouterr().err
        assert f"2 models fit: {NAME} [01234567…], {NAME} [89abcdef…]; expected the tag of one" in said
    assert main(["unpin", "89abcdef…"]) == 0
    # It is only remembered now, like what an earlier run of a pipeline has left.
    assert main(["pin", NAME]) == 0
    assert capsys.readouterr().out.endswith(f"{NAME} [01234567…]: pinned for all\n")
    assert {model.tag: model.pins for model in read_snapshot(namespace).models} == {ONE: 1, OTHER: 0}


def test_what_fits_no_model_is_taken_for_a_tag(named: ModelManager, namespace: str, capsys: Capture) -> None:
    assert main(["unload", "ffff"]) == 1
    assert capsys.readouterr().out == "ffff: no copy is loaded\n"
    assert main(["events", "--model", "ffff"]) == 0
    assert capsys.readouterr().out == ""
    # `plain-v2` is another model.
    for command in ("unload", "suspend"):
        assert main([command, "plain-v"]) == 1
        assert capsys.readouterr().out in (
            "plain-v: no copy is loaded\n",
            f"{namespace}: 0 copies of plain-v suspended\n",
        )
    assert main(["pin", "plain"]) == 0
    assert {model.tag: model.pins for model in read_snapshot(namespace).models}["plain"] == 1


def test_a_model_that_comes_later_is_followed(namespace: str, new_manager: NewManager, runtime_root: Path) -> None:
    manager, lines = new_manager(), []
    manager.release_model("plain", manager.acquire_model("plain", Loads()))
    set_display_name(ONE, NAME)
    use = threading.Thread(target=lambda: manager.release_model(ONE, manager.acquire_model(ONE, Loads())))

    def say(line: str) -> None:
        lines.append(line)
        if "releases a copy" in line:
            # The end of the namespace ends it.
            manager.shutdown()

    timer = threading.Timer(0.1, use.start)
    timer.start()
    assert show_events(namespace, runtime_root, Choice("01234567", follow=True), say) == 0
    timer.join()
    use.join()
    assert all(NAME in line for line in lines)


def test_the_live_screen_is_filtered_by_whole_tags_too(named: ModelManager, namespace: str) -> None:
    pytest.importorskip("rich", reason="needs the extra cli")
    from rich.console import Console

    from mpmm.observability.controls import Controls
    from mpmm.observability.top import History, screen

    for text in (ONE, "01234567…", "fraud-v1"):
        console = Console(width=100, record=True, file=io.StringIO())
        console.print(screen(read_snapshot(namespace), History(), 100, 40, Controls(filter=text)))
        assert f"models with {text!r}: 1 of 3" in console.export_text()
