"""Display names for tags that mean nothing to people: where they are shown; programs see tags."""

from __future__ import annotations

import itertools
import json
import logging
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from harness import NewManager, NewProcess, Seat, acquire, release, wait_until, waiting
from loaders import Loads
from patience import DEADLINE_S

from mpmm import AcquireTimeoutError, QueueFullError, UnloadTimeoutError
from mpmm.beam.run_inference import name_of_handler
from mpmm.cli import main
from mpmm.model_manager import ModelManager
from mpmm.observability.dashboard.history import Recorder
from mpmm.observability.findings import attention_texts
from mpmm.observability.json_text import snapshot_json
from mpmm.observability.tables import shortened, shortened_apart
from mpmm.policy.view import Reason
from mpmm.shared_state.events import Cause
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.text.display_names import MOST_BYTES, MOST_NAMES, display_name, set_display_name, shown_tag, shown_tags
from mpmm.text.model_names import meant_tag

TAG = "0123456789abcdef0123456789abcdef"
NAME = "SklearnModelHandlerNumpy models/digits.joblib"
SHOWN = f"{NAME} [01234567…]"


def acquire_named(seat: Seat, tag: str, name: str) -> None:
    """Acquire and keep a copy of a model that this process, other than those that wait for it, has a name for."""
    set_display_name(tag, name)
    acquire(seat, tag)


def sentences(path: str, found: Any) -> list[str]:
    """Return all texts in JSON but those that stand for a tag, with where they stand."""
    if isinstance(found, dict):
        return [text for key, value in found.items() if key != "tag" for text in sentences(f"{path}.{key}", value)]
    if isinstance(found, list | tuple):
        return [text for one in found for text in sentences(path, one)]
    return [f"{path}: {found}"] if isinstance(found, str) else []


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


def test_those_who_wait_are_told_names_in_logs_and_errors(
    namespace: str, new_manager: NewManager, new_process: NewProcess, caplog: pytest.LogCaptureFixture
) -> None:
    manager, holder = new_manager(fallback_memory_mb=100.0, wait_timeout_seconds=1.0), new_process()
    # The other process knows the name, and this one has to take it from the segment.
    holder.call(acquire_named, TAG, NAME)
    assert display_name(TAG) == ""
    manager._connected().warn_after_s = (0.05,)
    with caplog.at_level(logging.WARNING, "mpmm"), pytest.raises(AcquireTimeoutError) as timed_out:
        manager.acquire_model("b", Loads())
    [line] = [line for line in caplog.messages if "has waited" in line]
    for text in (line, str(timed_out.value)):
        assert f"pid {holder.pid} holds {SHOWN} for " in text
        assert TAG not in text
    with pytest.raises(AcquireTimeoutError, match=NAME) as late:
        manager.acquire_model(TAG, Loads())
    assert late.value.tag == TAG
    assert TAG not in str(late.value)
    with pytest.raises(QueueFullError, match=NAME) as full:
        manager.acquire_model(TAG, Loads(), max_waiting=0)
    assert (full.value.tag, TAG in str(full.value)) == (TAG, False)
    with pytest.raises(UnloadTimeoutError, match=NAME) as left:
        manager.unload(TAG, timeout_seconds=0.01)
    assert (left.value.tag, TAG in str(left.value)) == (TAG, False)
    holder.call(release)


def test_reasons_made_in_the_process_have_names(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, holder = new_manager(fallback_memory_mb=100.0), new_process()
    holder.call(acquire_named, TAG, NAME)
    waiter = threading.Thread(target=lambda: manager.release_model("b", manager.acquire_model("b", Loads())))
    waiter.start()
    wait_until(lambda: waiting(namespace, "b"), "it waits")
    try:
        session = manager._connected()
        with session.namespace.transaction() as t:
            tables = session.namespace.tables
            [row] = tables.used_rows(session.namespace.segment.layout.tickets)
            other = tables.model_row(TAG)
            assert other is not None
            for reason in (Reason.IN_USE, Reason.QUIET, Reason.OUTRANKED):
                cause = Cause(reason, 100.0, 0.0, 100.0, 1.0, other + 1)
                session.namespace.transitions.tickets.set_reason(t, row, cause)
                assert SHOWN in session.scheduler.sentence(row)
                assert TAG not in session.scheduler.sentence(row)
    finally:
        holder.call(release)
        waiter.join(DEADLINE_S)


def test_the_dashboard_has_names_and_goes_by_tags(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, waiter = new_manager(fallback_memory_mb=100.0), new_process()
    set_display_name(TAG, NAME)
    manager.release_model(TAG, manager.acquire_model(TAG, Loads()))
    handle = manager.acquire_model("plain", Loads())
    manager.release_model("plain", handle)
    handle = manager.acquire_model(TAG, Loads())
    waiter.send(acquire, "plain")
    wait_until(lambda: waiting(namespace, "plain"), "the other one waits")
    recorder = Recorder(namespace, None)
    recorder.look()
    state = recorder.state("", 0, 600.0)
    assert state["names"] == {TAG: SHOWN}
    assert TAG in {copy["tag"] for copy in state["copies"]["set"].values()}
    assert TAG in {model["tag"] for model in state["models"]["set"].values()}
    assert any(SHOWN in one["text"] for one in state["decisions"])
    # Spans go by tags in their second place.
    texts = sentences("", {**state, "names": {}, "spans": [span[3:] for span in state["spans"]]})
    assert [text for text in texts if TAG in text] == []
    # A name that the recorder knows is not sent again.
    recorder.look()
    assert recorder.state(state["epoch"], state["look"], 600.0)["names"] == {}
    manager.release_model(TAG, handle)
    waiter.result()
    waiter.call(release)


def test_sentences_in_json_and_of_probes_have_names(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, waiter = new_manager(fallback_memory_mb=100.0), new_process()
    set_display_name(TAG, NAME)
    handle = manager.acquire_model(TAG, Loads())
    manager.pin(TAG)
    manager.release_model(TAG, handle)
    waiter.send(acquire, "plain")
    wait_until(lambda: waiting(namespace, "plain"), "the other one waits")
    wait_until(lambda: attention_texts(read_snapshot(namespace)), "it cannot be helped")
    snapshot = read_snapshot(namespace)
    # Whatever the sentence, the model is named in it.
    pinned = replace(snapshot, tickets=tuple(replace(one, tag=TAG) for one in snapshot.tickets))
    [text] = attention_texts(pinned)
    assert SHOWN in text
    found = json.loads(snapshot_json(pinned))
    assert found["tickets"][0]["tag"] == TAG
    assert any(SHOWN in one["text"] for one in found["findings"])
    manager.unpin(TAG)
    waiter.result()
    waiter.call(release)


def test_no_two_models_are_shown_alike() -> None:
    names = {TAG: NAME, f"{TAG}_reload_0": NAME, "01234567x" * 4: "another", "plain": ""}
    assert shown_tags(names) == {
        TAG: f"{NAME} [{TAG}]",
        f"{TAG}_reload_0": f"{NAME} [{TAG}_reload_0]",
        "01234567x" * 4: "another [01234567…]",
    }


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
    # A manager without names removes none.
    set_display_name(TAG, TAG)
    fourth = manager.acquire_model(TAG, Loads())
    assert name_in_row() == "short"
    for copy in (first, second, third, fourth):
        manager.release_model(TAG, copy)


def test_log_lines_have_the_name(caplog: pytest.LogCaptureFixture) -> None:
    set_display_name(TAG, NAME)
    from mpmm.text.printable import printable_logger

    printable_logger("mpmm").warning("about %s and %d of %s", TAG, 3, "another")
    assert caplog.messages == [f"about {SHOWN} and 3 of another"]
    assert logging.getLogger("mpmm").name == "mpmm"


def test_log_lines_have_the_names_that_other_processes_know(
    new_manager: NewManager, new_process: NewProcess, caplog: pytest.LogCaptureFixture
) -> None:
    manager, other = new_manager(), new_process()
    other.call(acquire_named, TAG, NAME)
    with caplog.at_level(logging.INFO, "mpmm"):
        manager.release_model(TAG, manager.acquire_model(TAG, Loads("second")))
        other.call(release)
        manager.unload(TAG)
    for said in ("begins to load", "loaded", "unloads", "unloaded"):
        assert any(f"{said} {SHOWN}" in line for line in caplog.messages), said
    assert [line for line in caplog.messages if TAG in line] == []


def test_names_are_cut_where_a_character_ends_and_old_ones_are_forgotten() -> None:
    set_display_name("tag", "ü" * MOST_BYTES)
    assert display_name("tag") == "ü" * (MOST_BYTES // 2)
    set_display_name("tag", "tag")
    assert display_name("tag") == ""
    for number in range(MOST_NAMES + 1):
        set_display_name(str(number), "name")
    assert (display_name("0"), display_name("1")) == ("", "name")
    assert (shown_tag("short", "name"), shown_tag("short", "")) == ("name [short]", "short")


def test_of_a_long_name_the_end_is_kept_and_no_two_read_the_same() -> None:
    assert shortened("gs://my-company/models/production/fraud-v1/model.joblib", 40) == (
        "gs://my-c…oduction/fraud-v1/model.joblib"
    )
    assert shortened("short", 5) == "short"
    alike = [f"gs://my-company/{version}/{'a/long/path/' * 5}model.joblib" for version in ("v1", "v2", "v2b")]
    tails = [f"{one}/{'b' * 40}{two}" for one in alike for two in "xy"]
    for width in (40, 24, 12):
        for texts in (alike, tails, [f"{'a' * 50}{middle * 30}{'z' * 50}" for middle in "bcdefgh"]):
            short = shortened_apart(texts, width)
            assert list(short) == texts
            assert len({*short.values()}) == len(texts)
            assert max(map(len, short.values())) <= width
    assert "/v1/" in shortened_apart(alike, 40)[alike[0]]


def test_at_80_columns_different_models_read_differently(
    namespace: str, new_manager: NewManager, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = new_manager()
    tags = [f"0123{number}" + "456789abcdef" * 2 for number in range(4)]
    for tag, version in zip(tags, ("v1", "v2", "v1", "v2"), strict=True):
        path = f"gs://my-company/models/production/fraud-{version}/model.joblib"
        # Two have their path for a tag.
        named = tag in tags[:2]
        set_display_name(tag, f"SklearnModelHandlerNumpy {path}" if named else "")
        manager.release_model(tag if named else path, manager.acquire_model(tag if named else path, Loads(tag)))
    monkeypatch.setattr("mpmm.cli._width", lambda: 80)
    for command in ("ps", "inspect"):
        assert main([command, namespace]) == 0
        tables = capsys.readouterr().out.split("\n\n")
        for title in ("copies:", "models:") if command == "inspect" else ("  model",):
            [found] = [part.splitlines() for part in tables if part.startswith(title)]
            cells = [re.split(" {2,}", line.strip()) for line in found]
            names = [cell for cell in itertools.chain.from_iterable(cells) if "…" in cell]
            assert len({*names}) == len(names) == 4, found
            assert max(map(len, found)) <= 80
            ends = ("[01230456…]", "[01231456…]", "v1/model.joblib", "v2/model.joblib")
            assert all(name.endswith(end) for name, end in zip(sorted(names), ends, strict=True))
            # Shown names can be typed.
            meant = {
                meant_tag(name, {model.tag: model.name for model in read_snapshot(namespace).models}) for name in names
            }
            assert len(meant - {None}) == 4


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
