"""What the process that creates a namespace writes into its segment."""

from __future__ import annotations

import os
import stat
import time
from dataclasses import astuple
from pathlib import Path

import pytest

from mpmm.shared_state.layout import LAYOUT_VERSION, MAGIC, Capacities, Header
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.settings import Settings


def test_a_new_segment_says_whose_it_is_and_how_it_was_made(
    namespace: str, runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpmm.sources.host_memory.host_memory_left_mb", lambda: 5000.0)
    began, capacities = time.time_ns(), Capacities(members=5, models=6, instances=7, tickets=8, pins=9)
    settings = Settings(poll_interval=0.25, max_waiting=4.0)
    source = "a source of memory figures, of all"
    joined = Namespace.join(namespace, capacities=capacities, settings=settings, source=source)
    try:
        words, floats, tables = joined.segment.words, joined.segment.floats, joined.tables
        assert began <= words[Header.CREATED_WALL] <= time.time_ns()
        assert tables.text(Header.ROOT) == os.fsencode(os.path.realpath(runtime_root))
        assert tables.text(Header.SOURCE_ASKED) == source.encode()[: Header.SOURCE_NAME_BYTES]
        assert floats[Header.SETTINGS : Header.SETTINGS + len(astuple(settings))].tolist() == list(astuple(settings))
        assert words[Header.CAPACITIES : Header.CAPACITIES + 9].tolist() == list(astuple(capacities))
        assert floats[Header.HOST_SHARE_MB] == 2500.0, "half of what the host has left"
        assert f"{words[Header.TOKEN]:016x}" == (runtime_root / namespace / "token").read_text()
        assert words[Header.SIZE_BYTES] == joined.segment.layout.size_bytes == os.stat(joined.segment.path).st_size
        assert (words[Header.MAGIC], words[Header.VERSION]) == (MAGIC, LAYOUT_VERSION)
    finally:
        joined.leave()


def test_a_segment_is_private_and_its_makers_whatever_the_umask_is(namespace: str) -> None:
    for umask in (0o777, 0o000):
        before = os.umask(umask)
        try:
            joined = Namespace.join(namespace)
        finally:
            os.umask(before)
        mode = os.stat(joined.segment.path).st_mode
        joined.leave()
        assert stat.S_IMODE(mode) == 0o600


def test_a_host_whose_memory_is_unknown_suspends_nothing(
    namespace: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown() -> float:
        raise OSError("no such file")

    monkeypatch.setattr("mpmm.sources.host_memory.host_memory_left_mb", unknown)
    joined = Namespace.join(namespace)
    assert joined.segment.floats[Header.HOST_SHARE_MB] == 0.0
    joined.leave()
    assert "nothing is suspended, because the host's memory is unknown: no such file" in caplog.text
