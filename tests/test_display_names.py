"""Names for people beside tags that say nothing to them: where they are shown, and that programs see tags."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from loaders import Loads

from mpmm.beam.run_inference import name_of_handler
from mpmm.cli import main
from mpmm.model_manager import ModelManager
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.text.display_names import MOST_BYTES, MOST_NAMES, display_name, set_display_name, shown_tag

TAG = "0123456789abcdef0123456789abcdef"
NAME = "SklearnModelHandlerNumpy models/digits.joblib"
SHOWN = f"{NAME} [01234567…]"


@pytest.fixture(autouse=True)
def without_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget afterwards what a test has named."""
    monkeypatch.setattr("mpmm.text.display_names._names", {})


def test_people_see_the_name_and_programs_the_tag(
    namespace: str, new_manager: Callable[..., ModelManager], capsys: pytest.CaptureFixture[str]
) -> None:
    manager = new_manager()
    set_display_name(TAG, NAME)
    manager.release_model(TAG, manager.acquire_model(TAG, Loads()))
    manager.release_model("plain", manager.acquire_model("plain", Loads()))

    def said(*arguments: str) -> str:
        assert main([*arguments, namespace]) == 0
        return capsys.readouterr().out

    for command in ("inspect", "events", "trace", "ps"):
        output = said(command)
        assert NAME in output, command
        assert TAG not in output, command
        assert "plain" in output, command
    copies = {copy["tag"]: copy["name"] for copy in map(json.loads, said("ps", "--format", "json").splitlines())}
    assert copies == {TAG: NAME, "plain": ""}
    assert TAG in said("metrics")
    assert TAG in said("events", "--json", "--model", TAG)
    assert TAG in said("inspect", "--json")


def test_a_name_that_comes_later_takes_the_place_of_another(
    namespace: str, new_manager: Callable[..., ModelManager]
) -> None:
    manager = new_manager()

    def name_in_row() -> str:
        return next(model.name for model in read_snapshot(namespace).models if model.tag == TAG)

    first = manager.acquire_model(TAG, Loads())
    assert name_in_row() == ""
    set_display_name(TAG, NAME)
    second = manager.acquire_model(TAG, Loads())
    assert name_in_row() == NAME
    set_display_name(TAG, "short")
    third = manager.acquire_model(TAG, Loads())
    assert name_in_row() == "short"
    for copy in (first, second, third):
        manager.release_model(TAG, copy)


def test_log_lines_have_the_name(caplog: pytest.LogCaptureFixture) -> None:
    set_display_name(TAG, NAME)
    from mpmm.text.printable import printable_logger

    printable_logger("mpmm").warning("about %s and %d of %s", TAG, 3, "another")
    assert caplog.messages == [f"about {SHOWN} and 3 of another"]
    assert logging.getLogger("mpmm").name == "mpmm"


def test_names_are_cut_where_a_character_ends_and_old_ones_are_forgotten() -> None:
    set_display_name("tag", "ü" * MOST_BYTES)
    assert display_name("tag") == "ü" * (MOST_BYTES // 2)
    set_display_name("tag", "tag")
    assert display_name("tag") == ""
    for number in range(MOST_NAMES + 1):
        set_display_name(str(number), "name")
    assert (display_name("0"), display_name("1")) == ("", "name")
    assert (shown_tag("short", "name"), shown_tag("short", "")) == ("name [short]", "short")


def _handler(kind: str, **attributes: Any) -> Any:
    return type(kind, (SimpleNamespace,), {})(**attributes)


def test_a_handler_is_named_by_its_class_and_path_without_its_wrappers() -> None:
    inner = _handler("Sklearn", _model_uri="gs://bucket/digits.joblib")
    assert name_of_handler(inner) == "Sklearn gs://bucket/digits.joblib"
    assert name_of_handler(_handler("Pre", _base=_handler("Keyed", _unkeyed=inner))) == name_of_handler(inner)
    several = _handler("KeyedModelHandler", _id_to_mh_map={"a": inner, "b": _handler("Other")})
    assert name_of_handler(several) == "KeyedModelHandler of Sklearn gs://bucket/digits.joblib and 1 more"
    assert name_of_handler(_handler("Bare", _model=object())) == "Bare"
    long = name_of_handler(_handler("Far", _model_path="/a/very" * 20 + "/model.pt"))
    assert long.startswith("Far …")
    assert long.endswith("/model.pt")
    assert len(long) < 60
