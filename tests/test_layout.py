"""The layout of segments: processes of one layout version share them, whatever release of mpmm each of them runs."""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import fields, replace
from enum import IntEnum
from typing import Any

import numpy as np
import pytest

from mpmm.errors import InvalidArgumentError
from mpmm.policy.suspension import Unsuspendable, Way
from mpmm.policy.view import Reason
from mpmm.shared_state import layout
from mpmm.shared_state.events import Cause, EventKind, placed
from mpmm.shared_state.layout import LAYOUT_VERSION, Capacities, Layout, device_bits, device_rows, text_words
from mpmm.shared_state.settings import (
    ALWAYS,
    CHANGEABLE,
    CHECKPOINTS,
    NEVER,
    SETTINGS,
    Settings,
    checkpoints_by_name,
)
from mpmm.sources.base import Measures

ROWS = ("Header", "Member", "Model", "Instance", "Ticket", "Pin", "Device", "Observation", "Event", "Undo")
# By version, a checksum of all that the words of a segment mean. A change of it must raise the version, and note
# here what the new one is: else a process of an earlier release would take one word for another.
LAYOUTS = {11: 1755061728}
NUMBERS: dict[type[IntEnum], str] = {
    EventKind: """
        JOINED=1 LEFT=2 REAPED=3 LEADER=4 QUEUED=5 HIT=6 GRANTED=7 RELEASED=8 LOAD_BEGAN=9 LOAD_ENDED=10
        LOAD_FAILED=11 UNLOAD_BEGAN=12 UNLOAD_ENDED=13 ISOLATION_BEGAN=14 ISOLATION_ENDED=15 ESTIMATED=16
        LEFT_QUEUE=17 REFUSED=18 LOST=19 WRITTEN_OFF=20 RESET=21 LEASED=22 LEASE_ENDED=23 PINNED=24 UNPINNED=25
        OUT_OF_MEMORY=26 WAITS=27 UNLOAD_ON_RELEASE=28 SETTINGS=29 SUSPEND_BEGAN=40 SUSPEND_ENDED=41
        SUSPEND_FAILED=42 RESUME_BEGAN=43 RESUME_ENDED=44 RESUME_FAILED=45 RESUME_GIVEN_UP=46""",
    Reason: """
        BEHIND=0 DRAINING=1 MEMORY=2 UNLOADING=3 RETURNING=4 NO_DEVICE=5 SHARING=6 PINNED=7 COPIES=8 LEASED=9
        IN_USE=10 EXTERNAL=11 TABLE_FULL=12 OUTRANKED=13 BACKING_OFF=14 SUSPENDING=15 IDLE_COPY=16 OVERTAKES=17
        RESUMES=20 FITS=24 ALONE=25 BACKFILL=26 ANOTHER_COPY=27 LEAST_FULL=28 TIGHTEST=29 ONLY_ONE=30
        LOWEST_SCORE=32 CHEAPEST_RELOAD=33 FLUSHED=34 NO_ROW=35 EXCHANGED=36 ASKED=37 EXPIRED=38 RESET=39
        TOO_LARGE=40 QUIET=41 RESTLESS=42 ONLY_COPY=43 BY_HAND=44 HOST_FULL=45 HOST_SHORT=46 OUT_OF_MEMORY=47
        NOT_FREE=48""",
    Measures: "UNKNOWN=0 NOTHING=1 DEVICES=2 PROCESSES=3",
    Unsuspendable: "SUSPEND_FAILED=1 RESUME_FAILED=2 TIMED_OUT=3",
    Way: "NONE=0 COOPERATIVE=1 CHECKPOINT=2",
}

# Default, lowest and highest value of each setting.
PROMISED: dict[str, tuple[float, float, float]] = {
    "slack_percentage": (0.1, 0.0, 0.99),
    "poll_interval": (0.5, 0.01, 3600.0),
    "peak_window_seconds": (30.0, 0.01, 86400.0),
    "min_data_points": (5.0, 1, 1e6),
    "smoothing_factor": (0.2, 0.0, 1.0),
    "eviction_cooldown_seconds": (10.0, 0.0, math.inf),
    "min_model_copies": (1.0, 0, 1e6),
    "wait_timeout_seconds": (300.0, 0.0, math.inf),
    "lock_timeout_seconds": (60.0, 0.001, 86400.0),
    "fallback_memory_mb": (16000.0, 1.0, 1e9),
    "memory_budget_mb": (math.inf, 1.0, math.inf),
    "default_estimate_mb": (4000.0, 1.0, 1e9),
    "max_overtake_seconds": (2.0, 0.0, math.inf),
    "memory_return_seconds": (5.0, 0.0, math.inf),
    "load_timeout_seconds": (math.inf, 0.001, math.inf),
    "max_model_copies": (math.inf, 1, math.inf),
    "idle_ttl_seconds": (math.inf, 0.0, math.inf),
    "max_waiting": (math.inf, 0, math.inf),
    "suspend_budget_mb": (math.inf, 0.0, math.inf),
    "suspend_checkpoints": (1.0, 0, 2),
}


def described() -> list[object]:
    """Return what there is to agree upon: places and values of words, the order of tables and of settings."""
    rows = [(row, name, value) for row in ROWS for name, value in vars(getattr(layout, row)).items() if name.isupper()]
    sizes = Capacities(**{field.name: 1 + number for number, field in enumerate(fields(Capacities))})
    tables = [(table.name, table.base, table.words, table.end, table.end_word) for table in Layout(sizes).tables]
    return [layout.MAGIC, rows, tables, Layout(sizes).words, [field.name for field in fields(Settings)]]


def test_a_layout_that_has_changed_has_another_version() -> None:
    assert {LAYOUT_VERSION: zlib.crc32(repr(described()).encode())} == LAYOUTS


@pytest.mark.parametrize("kind", NUMBERS, ids=lambda kind: str(kind.__name__))
def test_numbers_that_stand_in_segments_stay(kind: type[IntEnum]) -> None:
    kept = [one.partition("=") for one in NUMBERS[kind].split()]
    assert {name: int(number) for name, _, number in kept}.items() <= {one.name: one.value for one in kind}.items()


def test_the_tables_follow_one_another() -> None:
    tables = Layout(Capacities()).tables
    assert [table.base for table in tables] == [layout.Header.WORDS, *(table.end for table in tables[:-1])]
    assert Layout(Capacities()).size_bytes == 8 * tables[-1].end


# ---- how large tables may be -------------------------------------------------------------------------------


def test_the_default_capacities_are_meant_for_one_host() -> None:
    found = Capacities()
    assert [getattr(found, field.name) for field in fields(found)] == [
        *(1024, 1024, 2048, 4096, 1024, 16, 256, 8192),
        139264,
    ]
    assert 7.0 < Layout(found).size_bytes / 2**20 < 8.0, "as the help says"


@pytest.mark.parametrize(
    ("table", "words"),
    [
        *(("members", 24), ("instances", 24), ("tickets", 8), ("models", 8), ("pins", 4), ("devices", 256)),
        *(("observations", 0), ("events", 0)),
    ],
)
def test_the_undo_log_grows_with_the_rows_that_one_step_can_overwrite(table: str, words: int) -> None:
    ones = dict.fromkeys((field.name for field in fields(Capacities)), 1)
    assert Capacities(**{**ones, "undo": 0}).undo == 2 * layout.STEP_WORDS + 24 + 24 + 8 + 8 + 4 + 256
    assert Capacities(**{**ones, "undo": 0, table: 3}).undo - Capacities(**{**ones, "undo": 0}).undo == 2 * words


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        *((field.name, 1, 64 if field.name == "devices" else 2**20) for field in fields(Capacities)[:-1]),
        ("undo", 0, 2**28),
    ],
)
def test_a_table_has_as_many_rows_as_it_may_have(table: str, low: int, high: int) -> None:
    for size in (low, high):
        assert getattr(replace(Capacities(undo=1), **{table: size}), table) in (size, Capacities().undo)
    for size in (low - 1, high + 1):
        with pytest.raises(InvalidArgumentError, match=f"capacity {table}={size}: "):
            replace(Capacities(undo=1), **{table: size})


# ---- settings ----------------------------------------------------------------------------------------------


def test_the_settings_have_the_defaults_and_bounds_that_are_promised() -> None:
    """A default of another value is another behaviour for all who have not chosen one."""
    assert {name: (getattr(Settings(), name), one.low, one.high) for name, one in SETTINGS.items()} == PROMISED


def test_settings_are_stored_as_floats_and_counts_are_whole() -> None:
    chosen = Settings(min_data_points=7, max_model_copies=3, poll_interval=np.float64(0.25), max_waiting=0)
    assert [type(getattr(chosen, name)) for name in SETTINGS] == [float] * len(SETTINGS)
    assert (chosen.min_data_points, chosen.poll_interval, chosen.max_waiting) == (7.0, 0.25, 0.0)
    assert Settings(max_waiting=math.inf).max_waiting == math.inf
    assert Settings(slack_percentage=0.25).slack_percentage == 0.25
    impossible: list[dict[str, Any]] = [{"max_waiting": 1.5}, {"min_data_points": 5.25}, {"poll_interval": math.nan}]
    for changes in impossible:
        with pytest.raises(InvalidArgumentError):
            replace(Settings(), **changes)


def test_settings_are_changed_one_by_one_and_none_means_no_limit() -> None:
    before = Settings(max_waiting=3, idle_ttl_seconds=1.0)
    assert before.changed({}) == before
    assert before.changed({"max_waiting": None}) == replace(before, max_waiting=math.inf)
    assert before.changed({"idle_ttl_seconds": None, "slack_percentage": 0.5}) == replace(
        before, idle_ttl_seconds=math.inf, slack_percentage=0.5
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"slack_percentage": None}, "slack_percentage=None: expected a fraction"),
        ({"min_data_points": None}, "min_data_points=None: expected a count"),
        ({"wait_timeout_seconds": 5.0}, "wait_timeout_seconds cannot be changed at run time: it is each manager's own"),
        ({"suspend": "auto"}, "suspend cannot be changed at run time: it is what was given as `suspend`"),
        ({"max_waitings": 5}, "setting 'max_waitings': expected one of slack_percentage, poll_interval"),
    ],
)
def test_a_setting_that_cannot_be_changed_that_way_says_why(change: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=re.escape(said)):
        Settings().changed(change)


def test_those_settings_are_changeable_that_no_process_has_for_itself() -> None:
    fixed = ("wait_timeout_seconds", "fallback_memory_mb", "memory_budget_mb", "suspend_checkpoints")
    assert [name for name, one in SETTINGS.items() if one.fixed] == list(fixed)
    assert tuple(name for name in SETTINGS if name not in fixed) == CHANGEABLE


def test_the_value_of_suspend_has_a_number() -> None:
    assert [checkpoints_by_name(name) for name in CHECKPOINTS] == [NEVER, 1.0, ALWAYS]
    for junk in ("never", None, 1):
        with pytest.raises(InvalidArgumentError, match="suspend="):
            checkpoints_by_name(junk)


# ---- words that name several things ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "bits"), [([], 0), ([0], 1), ([5], 32), ([0, 1], 3), ([1, 3, 4], 26), ([0, 63], 2**63 + 1), ([63], 2**63)]
)
def test_devices_are_bits(rows: list[int], bits: int) -> None:
    assert device_rows(bits) == rows
    assert device_bits(rows) == bits


@pytest.mark.parametrize(("most", "words"), [(0, 1), (1, 2), (8, 2), (9, 3), (631, 80)])
def test_a_text_takes_a_word_for_its_length_and_as_many_as_its_bytes_need(most: int, words: int) -> None:
    assert text_words(most) == words


@pytest.mark.parametrize(
    ("devices", "word"),
    [(0, 9), (0b101, 9 | 5 << 32), (1 << 31, 9 | 1 << 63), (1 << 32, 9), (1 << 40 | 2, 9 | 2 << 32)],
)
def test_an_event_says_where_it_is_placed_on_the_first_devices(devices: int, word: int) -> None:
    assert placed(EventKind.LOAD_BEGAN, devices) == word


def test_a_cause_without_figures_has_none() -> None:
    assert Cause(Reason.MEMORY) == (Reason.MEMORY, 0.0, 0.0, 0.0, 0.0, 0, 0)
