"""Draw memory against the limit over time, with loads, evictions and leases marked, from the events of a trace.

Needs matplotlib, the extra `plot`.
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpmm.errors import InvalidArgumentError
from mpmm.observability.trace_tracks import DEVICE_PID, TraceEvent
from mpmm.shared_state.layout import MOST_DEVICES
from mpmm.text.arguments import in_brief
from mpmm.text.printable import printable

__all__ = ["SUFFIXES", "DeviceHistory", "draw", "histories", "read_trace"]

SUFFIXES = (".png", ".svg", ".pdf")
# The picture has only both ends of a longer tag.
MOST_LETTERS = 60
_COLOURS = ("#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#999933", "#44aa99", "#882255", "#bbbbbb")
_LEASED = "#555555"
_MEMORY, _LIMIT, _BOOKS = "memory MB", "limit MB", "models MB"


@dataclass
class DeviceHistory:
    """What a trace says about one device; times in µs.

    loaded: spans of copies, as (begin, end, tag, evicted). leased: spans of leases, as (begin, end, name, MB), where
    MB is the share of this device; all devices of a lease have the same.
    """

    name: str = ""
    used: list[tuple[float, float]] = field(default_factory=list)
    limit: list[tuple[float, float]] = field(default_factory=list)
    loaded: list[tuple[float, float, str, bool]] = field(default_factory=list)
    leased: list[tuple[float, float, str, float]] = field(default_factory=list)

    def leased_mb(self) -> list[tuple[float, float]]:
        """Return the changes of how much is leased, as (time, MB from then on), until the last lease has ended."""
        changes = sorted(
            [(begin, mb) for begin, _, _, mb in self.leased] + [(end, -mb) for _, end, _, mb in self.leased]
        )
        totals = itertools.accumulate(mb for _, mb in changes)
        return [(at, max(0.0, mb)) for (at, _), mb in zip(changes, totals, strict=True)]


def read_trace(path: Path) -> list[TraceEvent]:
    """Return the events of a trace, even if its end has not been written yet.

    Raises InvalidArgumentError if the file is not a trace, OSError.
    """
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        # For example an archive, or a picture.
        raise _no_trace(path) from None
    for end in ("", "]", "}]"):
        # A trace is written line by line, so at most the last line is cut off.
        for body in (text.rstrip(","), text.rpartition(",\n")[0]):
            try:
                found = json.loads(body + end)
            # Brackets nested without end, or a number of thousands of digits, are JSON that Python cannot read.
            except (ValueError, RecursionError):
                continue
            events = found.get("traceEvents") if isinstance(found, dict) else found
            if isinstance(events, list) and all(isinstance(event, dict) and "ph" in event for event in events):
                return events
    raise _no_trace(path)


def _no_trace(path: Path) -> InvalidArgumentError:
    return InvalidArgumentError(f"{path} is not a trace: expected the JSON that `mpmm trace` writes")


def histories(events: Iterable[TraceEvent]) -> dict[int, DeviceHistory]:
    """Return what a trace says about its devices, by the devices' rows.

    Raises InvalidArgumentError for a trace of another program that has processes with the numbers of our devices.
    """
    found: dict[int, DeviceHistory] = defaultdict(DeviceHistory)
    accounted: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        pid = event.get("pid")
        # Other programs name processes as they like.
        if not isinstance(pid, int) or not DEVICE_PID <= pid < DEVICE_PID + MOST_DEVICES:
            continue
        try:
            _add(found[pid - DEVICE_PID], accounted[pid - DEVICE_PID], event)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise InvalidArgumentError(
                f"this is not a trace of mpmm: `mpmm trace` writes no event {in_brief(event)}"
            ) from None
    for device, history in found.items():
        # A single point only says how much is in use now; the accounts say how it came to that.
        history.used = sorted(history.used if len(history.used) > 1 else accounted[device] + history.used)
        history.loaded.sort()
        history.leased.sort()
    return dict(found)


def _add(history: DeviceHistory, accounted: list[tuple[float, float]], event: TraceEvent) -> None:
    """Add what an event says about its device. Raises a built-in error if it does not have the form that we write."""
    kind, name = event["ph"], event.get("name")
    if kind == "M" and name == "process_name":
        history.name = str(event["args"]["name"])
    elif kind == "C" and name in (_MEMORY, _LIMIT, _BOOKS):
        points, figure = {
            _MEMORY: (history.used, "used"),
            _LIMIT: (history.limit, "limit"),
            _BOOKS: (accounted, "loaded"),
        }[name]
        points.append((_finite(event["ts"]), _finite(event["args"][figure])))
    elif kind == "X" and event.get("cat") in ("loaded", "leased"):
        begin = _finite(event["ts"])
        end, tag = begin + _finite(event["dur"]), str(event["name"])
        if event["cat"] == "loaded":
            history.loaded.append((begin, end, tag, bool(event["args"].get("evicted"))))
        else:
            history.leased.append((begin, end, tag, _finite(event["args"].get("MB") or 0.0)))


def _finite(value: float) -> float:
    """Return a number of a trace. Raises ValueError if it is infinite or nan, TypeError if it is not a number."""
    if not math.isfinite(value):
        raise ValueError(value)
    return float(value)


def _shown(tag: str) -> str:
    """Return a tag, shortened to the room that there is, and with printable characters only."""
    tag = printable(tag)
    return tag if len(tag) <= MOST_LETTERS else f"{tag[: MOST_LETTERS // 2 - 1]}…{tag[-MOST_LETTERS // 2 :]}"


def draw(events: Iterable[TraceEvent], path: Path) -> None:
    """Draw a trace into a file whose suffix says its format.

    Raises InvalidArgumentError for another suffix, or when the trace has nothing to draw, ImportError without
    matplotlib.
    """
    if path.suffix not in SUFFIXES:
        raise InvalidArgumentError(f"{path}: expected a name that ends in one of {', '.join(SUFFIXES)}")
    found = histories(events).items()
    devices = {device: history for device, history in found if history.used or history.loaded or history.leased}
    if not devices:
        raise InvalidArgumentError(
            "the trace has neither figures of memory nor loads nor leases: there is nothing to draw"
        )
    # Imported here because it is big, and an extra. The figure is made without pyplot, which would look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1 + 4.5 * len(devices)), layout="constrained")
    tags = sorted({tag for history in devices.values() for _, _, tag, _ in history.loaded})
    colours = {tag: _COLOURS[number % len(_COLOURS)] for number, tag in enumerate(tags)}
    start = min(
        float(entry[0]) for history in devices.values() for entry in (*history.used, *history.loaded, *history.leased)
    )
    first: Any = None
    for place, history in enumerate(devices.values()):
        # All have the same time axis, so that what is drawn below each other happened at the same moment.
        axes = figure.add_subplot(len(devices), 1, place + 1, sharex=first)
        first = first or axes
        _draw_device(axes, history, start, colours)
    with warnings.catch_warnings():
        # A letter that the font lacks becomes a box; a warning with a line of our code would not explain that.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        figure.savefig(path, dpi=100)


def _draw_device(axes: Any, history: DeviceHistory, start: float, colours: dict[str, str]) -> None:
    def seconds(ts: float) -> float:
        return (ts - start) / 1e6

    # Here and below: a tag with two `$` is not a formula.
    axes.set_title(_shown(history.name), loc="left", fontsize=10, parse_math=False)
    leased = history.leased_mb()
    top = max([mb for _, mb in (*history.used, *history.limit, *leased)], default=1.0) or 1.0
    if history.used:
        times, figures = [seconds(ts) for ts, _ in history.used], [mb for _, mb in history.used]
        axes.fill_between(times, figures, step="post", color="#4477aa", alpha=0.25, label="memory in use")
        axes.step(times, figures, where="post", color="#4477aa")
    if leased:
        # Not stacked on the memory in use, which already includes what the program of a lease has taken.
        times, figures = [seconds(ts) for ts, _ in leased], [mb for _, mb in leased]
        axes.fill_between(times, figures, step="post", facecolor="none", edgecolor=_LEASED, hatch="//", linewidth=0.8)
        axes.fill_between([], [], facecolor="none", edgecolor=_LEASED, hatch="//", label="leased")
    if history.limit:
        axes.axhline(history.limit[-1][1], color="#cc3311", linestyle="--", label="limit")
    leases = {name: f"{name} (lease, {mb:.0f} MB)" for _, _, name, mb in history.leased}
    lanes = sorted({tag for _, _, tag, _ in history.loaded}) + sorted(leases.values())
    # The copies are drawn below the curve, in one row for each model; its height is a share of the axis.
    height = 0.05 * top
    for begin, end, tag, evicted in history.loaded:
        y = -height * (1.4 + 1.4 * lanes.index(tag))
        axes.broken_barh([(seconds(begin), max((end - begin) / 1e6, 1e-3))], (y, height), color=colours[tag], alpha=0.8)
        axes.plot(seconds(begin), y + height / 2, marker="^", color=colours[tag], markersize=5, markeredgecolor="black")
        if evicted:
            axes.plot(seconds(end), y + height / 2, marker="x", color="black", markersize=6)
    for begin, end, name, _ in history.leased:
        y = -height * (1.4 + 1.4 * lanes.index(leases[name]))
        span = (seconds(begin), max((end - begin) / 1e6, 1e-3))
        axes.broken_barh([span], (y, height), facecolor="none", edgecolor=_LEASED, hatch="//")
    for tag in lanes:
        y = -height * (1.4 + 1.4 * lanes.index(tag))
        axes.annotate(
            _shown(tag),
            (0, y + height / 2),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=7,
            parse_math=False,
        )
    if history.loaded:
        axes.plot([], [], marker="^", color="white", markeredgecolor="black", label="loaded")
        axes.plot([], [], marker="x", color="black", linestyle="none", label="evicted")
    axes.set_ylim(-height * (1.4 * len(lanes) + 1.0), 1.12 * top)
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= 1.12 * top])
    axes.set_ylabel("MB")
    axes.set_xlabel("seconds")
    axes.legend(loc="upper left", fontsize=8, ncols=4)
    axes.spines[["top", "right"]].set_visible(False)
