"""What `mpmm check` finds if one field of one row is changed, for every field, recorded in `recorded_checks.txt`.

Each line has a change and the invariants that it breaks. After an intended change of the answers, run `python
tests/broken_rows.py` to record them again.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

from random_tables import RandomTables
from test_invariants import SEED, fill

from mpmm.shared_state.invariants import check_invariants
from mpmm.shared_state.runtime_dir import RUNTIME_DIR_VARIABLE
from mpmm.shared_state.snapshot import Snapshot, read_snapshot

RECORDED = Path(__file__).parent / "recorded_checks.txt"
TABLES = ("members", "models", "instances", "tickets", "pins", "devices")
STATES = {
    "instances": ("loading", "active", "idle", "unloading", "leased", "suspending", "suspended", "resuming"),
    "tickets": ("waiting", "granted", "load", "refused", "reset", "enough"),
}
START_NS = 10**15


def whole() -> Snapshot:
    """Return a snapshot that keeps all invariants."""
    made: list[RandomTables] = []
    with mock.patch("time.monotonic_ns", side_effect=lambda: made[0].now if made else START_NS):
        made.append(RandomTables(SEED, devices=3))
        with closing(made[0]):
            with made[0].namespace.transaction() as t:
                fill(made[0], t)
                made[0].transitions.isolation.begin(t, made[0].tables.rows_where(made[0].layout.instances, 0, 1)[-1])
            return read_snapshot(made[0].namespace.name)


def changed(value: Any, name: str, table: str) -> list[Any]:
    """Return other values for a field."""
    if name == "state":
        return [state for state in STATES.get(table, ()) if state != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, value - 1, -value - 100, math.nan if isinstance(value, float) else value + 1000, None]
    if value is None:
        return [0, 1, 1e9]
    if isinstance(value, dict):
        return [{}, {**value, 77: 1.0}, {key: one + 1 for key, one in value.items()}]
    if isinstance(value, str):
        return ["", "another", "active", "handle"]
    return []


def checks() -> Iterator[str]:
    """Yield the findings of each change: of the header, then of all rows."""
    snapshot = whole()
    yield f"nothing: {_said(snapshot)}"
    for field in fields(Snapshot):
        for to in changed(getattr(snapshot, field.name), field.name, "header"):
            header: dict[str, Any] = {field.name: to}
            yield f"{field.name}={to}: {_said(replace(snapshot, **header))}"
    for most in range(1, 6):
        settings = replace(snapshot.settings, max_model_copies=float(most))
        limited = replace(snapshot, settings=settings)
        yield f"at most {most}: {_said(limited)}"
        yield f"at most {most} from now on: {_said(replace(limited, settings_changed_ago_s=1.0))}"
        for place, row in enumerate(snapshot.instances):
            going = replace(row, unload_on_release=not row.unload_on_release)
            instances = (*snapshot.instances[:place], going, *snapshot.instances[place + 1 :])
            yield f"at most {most} and instance {place} to go: {_said(replace(limited, instances=instances))}"
    for table in TABLES:
        rows: tuple[Any, ...] = getattr(snapshot, table)
        for place, row in enumerate(rows):
            for field in fields(row):
                for to in changed(getattr(row, field.name), field.name, table):
                    changes: dict[str, Any] = {field.name: to}
                    broken: dict[str, Any] = {table: (*rows[:place], replace(row, **changes), *rows[place + 1 :])}
                    yield f"{table} {place} {field.name}={to}: {_said(replace(snapshot, **broken))}"
            without: dict[str, Any] = {table: (*rows[:place], *rows[place + 1 :])}
            yield f"{table} {place} left out: {_said(replace(snapshot, **without))}"
            twice: dict[str, Any] = {table: (*rows, row)}
            yield f"{table} {place} twice: {_said(replace(snapshot, **twice))}"


def _said(snapshot: Snapshot) -> str:
    try:
        found = Counter(line.split(" ", 1)[0] for line in check_invariants(snapshot))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        # A snapshot never has such a value.
        return type(error).__name__
    return " ".join(name if count == 1 else f"{name}*{count}" for name, count in sorted(found.items())) or "-"


def recorded() -> list[str]:
    """Return the lines of all changes that break an invariant, and the number of all changes."""
    lines = list(checks())
    return [*(line for line in lines if not line.endswith(": -")), f"{len(lines)} changes"]


def main() -> None:
    """Record the findings."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {RUNTIME_DIR_VARIABLE: folder}):
        RECORDED.write_text("".join(f"{line}\n" for line in recorded()))


if __name__ == "__main__":
    main()
