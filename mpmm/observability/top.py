"""`mpmm top`: a namespace, live in the terminal. Needs rich, the extra `cli`."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import defaultdict, deque
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from mpmm.errors import MpmmError
from mpmm.observability.controls import HELP, SORTS, Controls, single_keys
from mpmm.observability.findings import findings
from mpmm.observability.formatting import age, bar, for_people, mb, names_of
from mpmm.observability.inspect_screen import (
    EVENTS_OF_EACH,
    Section,
    copies,
    evictions,
    headline,
    leases,
    models,
    waiting,
)
from mpmm.observability.tables import blocks, wrapped
from mpmm.shared_state.runtime_dir import default_root
from mpmm.shared_state.snapshot import DeviceInfo, EventChoice, Snapshot, find_namespaces, read_snapshot
from mpmm.text.printable import printable

__all__ = ["History", "Looks", "print_once", "run", "screen"]

_LEVELS = " ▁▂▃▄▅▆▇█"
# In columns: history fills a terminal up to this width.
HISTORY_LENGTH = 500
# The lines of a section besides its rows: its title and its head.
HEAD_LINES = 2
BAR_SHARE = 0.3
NARROWEST_BAR = 10
# What COLUMNS and LINES may be.
_SIZE = re.compile("[1-9][0-9]{0,4}")
_CHOICE = EventChoice(newest_of_each=EVENTS_OF_EACH)


class History:
    """Memory of each device over time: the last samples in the segment, then one figure for each look."""

    def __init__(self) -> None:
        self._figures: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=HISTORY_LENGTH))
        self._created = 0.0

    def add(self, snapshot: Snapshot) -> None:
        """Note the figures of a look; those of an earlier namespace are forgotten."""
        if snapshot.created_wall_s != self._created:
            self._figures.clear()
            self._created = snapshot.created_wall_s
        for device in snapshot.devices:
            figures = self._figures[device.row]
            if not figures:
                figures.extend(amount for _, amount in device.samples)
            figures.append(device.used_mb or 0.0)

    def line(self, device: DeviceInfo, width: int) -> str:
        """Return the last `width` figures of a device as a line of blocks, the highest of which is the whole device."""
        figures = list(self._figures[device.row])[-width:]
        top = max(device.total_mb, 1.0)
        levels = [min(len(_LEVELS) - 1, round(amount / top * (len(_LEVELS) - 1))) for amount in figures]
        return "".join(_LEVELS[level] for level in levels).rjust(width)


class Looks:
    """Looks at a namespace again and again, even before it exists and after it has ended.

    namespace: None for the first one that exists. snapshot: the last picture, None before the first. notice: why the
    picture is not current, empty if it is.
    """

    def __init__(self, namespace: str | None, root: Path | None) -> None:
        self._namespace = namespace
        self._root = root
        self.snapshot: Snapshot | None = None
        self.history = History()
        self.notice = ""

    def look(self) -> None:
        """Look once, and note the figures.

        Until there is a picture, raises what `read_snapshot` raises, except FileNotFoundError.
        """
        try:
            if self._namespace is None:
                names = find_namespaces(self._root)
                if not names:
                    raise FileNotFoundError
                self._namespace = names[0]
            self.snapshot = read_snapshot(
                self._namespace, self._root, choice=EventChoice(newest_of_each=EVENTS_OF_EACH)
            )
            self.history.add(self.snapshot)
            self.notice = ""
        except FileNotFoundError:
            if self.snapshot is None:
                what = "a namespace" if self._namespace is None else f"namespace {self._namespace}"
                self.notice = f"waiting for {what} in {self._root or default_root()}"
            else:
                ago = age(time.monotonic() - self.snapshot.taken_s)
                self.notice = f"ended {ago} ago; this is its last picture; waiting for the namespace to start again"
        except MpmmError as error:
            if self.snapshot is None:
                raise
            self.notice = f"cannot be read: {error}"


def run(namespace: str | None, root: Path | None, interval_s: float, controls: Controls) -> int:
    """Show a namespace, or the first one that exists, until `q` or an interrupt; return 0.

    Waits for a namespace that does not exist yet. The last picture stays on the terminal. Raises what `read_snapshot`
    raises at the first look.
    """
    console, looks = _console(), Looks(namespace, root)
    looks.look()
    live = Live(console=console, screen=True, auto_refresh=False)
    with contextlib.suppress(KeyboardInterrupt), single_keys() as keys_pressed, live:
        due_s = time.monotonic() + interval_s
        ended = False
        while not ended:
            # Ask for the size each time, because it may change.
            live.update(_picture(looks, controls, console.width, console.height), refresh=True)
            keys = keys_pressed(max(0.0, due_s - time.monotonic()))
            # One key after another, up to one that ends the program.
            ended = any(controls.press(key) for key in keys)
            if time.monotonic() >= due_s:
                due_s = time.monotonic() + interval_s
                if not controls.paused:
                    looks.look()
    if looks.snapshot is not None:
        console.print(screen(looks.snapshot, looks.history, console.width, console.height - 1, controls))
    return 0


def print_once(namespace: str, root: Path | None, controls: Controls) -> int:
    """Print one picture, where there is no terminal to show more; return 0. Raises what `read_snapshot` raises."""
    console, history = _console(), History()
    snapshot = read_snapshot(namespace, root, choice=_CHOICE)
    history.add(snapshot)
    console.print(screen(snapshot, history, console.width, console.height, controls))
    return 0


def _console() -> Console:
    """Return the console of the output, whatever COLUMNS and LINES are: rich fails for `²`, and shows nothing for 0."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES") or _SIZE.fullmatch(value)
    }
    return Console(_environ=environment)


def _picture(looks: Looks, controls: Controls, width: int, height: int) -> RenderableType:
    if controls.helping:
        return Panel(Text(HELP.format(sorts=", ".join(SORTS))), title="mpmm top", title_align="left")
    foot = Text(controls.footer(), style="dim", no_wrap=True, overflow="ellipsis")
    if looks.snapshot is None:
        return Group(Text(printable(looks.notice)), foot)
    notice = [Text(line, style="reverse") for line in wrapped(printable(looks.notice), width) if line]
    picture = screen(looks.snapshot, looks.history, width, height - 1 - len(notice), controls)
    return Group(*notice, picture, foot)


def screen(
    snapshot: Snapshot, history: History, width: int, height: int, controls: Controls | None = None
) -> RenderableType:
    """Return the picture for a terminal of `width` columns and `height` lines; tables share what the rest leaves."""
    controls = controls or Controls()
    tags = {printable(shown): tag for tag, shown in names_of(snapshot).items()}
    snapshot = for_people(snapshot)
    said = findings(snapshot)
    head = [Text(line, no_wrap=True, overflow="ellipsis") for line in headline(snapshot)]
    if not any(finding.urgent for finding in said):
        head.append(Text("all well", style="green"))
    for finding in said:
        style, lead = ("bold red", "ATTENTION: ") if finding.urgent else ("yellow", "note: ")
        lines = wrapped(lead + finding.text, width) if finding.urgent else [lead + finding.text]
        head += [Text(line, style=style, no_wrap=True, overflow="ellipsis") for line in lines]
    device_lines = _devices(snapshot, history, width - 4)
    tables: list[Section[Any]] = [
        waiting(snapshot),
        copies(snapshot),
        *leases(snapshot),
        models(snapshot),
        evictions(snapshot),
    ]
    left = height - len(head) - len(device_lines) - 2
    shown: list[RenderableType] = []
    for place, section in enumerate(controls.arranged(one, tags) for one in tables):
        # What one table leaves of its share, the next ones get. The first has half: users first look why requests wait.
        share = left // (2 if not place else len(tables) - place)
        room = max(1, share - HEAD_LINES)
        if min(room, max(1, len(section.items))) + HEAD_LINES <= left:
            drawn = _table(section, room, width)
            shown += drawn
            left -= len(drawn)
    return Group(*head, Panel(Group(*device_lines), title="memory", title_align="left"), *shown)


def _devices(snapshot: Snapshot, history: History, width: int) -> list[Text]:
    lines = []
    for device in snapshot.devices:
        figures = f" {mb(device.used_mb)} of {mb(device.limit_mb)} MB"
        if device.reserved_mb:
            figures += f", {mb(device.reserved_mb)} reserved"
        if device.returning_mb:
            figures += f", {mb(device.returning_mb)} returning"
        begin = f"{device.row} {device.name[:16]:16} "
        # The figures that explain the bar take precedence over its length.
        size = max(NARROWEST_BAR, min(int(width * BAR_SHARE), width - len(begin) - len(figures)))
        full = (device.used_mb or 0.0) + device.reserved_mb > device.limit_mb
        line = Text(begin, no_wrap=True, overflow="crop")
        line.append(bar(device, size), style="red" if full else "cyan")
        line.append(figures)
        lines += [line, Text(history.line(device, max(NARROWEST_BAR, width)), style="blue", no_wrap=True)]
    return lines


def _table(section: Section[Any], room: int, width: int) -> list[Text]:
    """Return a table of at most `room` lines and its head, with as many rows as fit.

    The sentence of the first row is whole if `room` is enough for that; those of others as far as they fit.
    """
    if not section.items:
        return [Text.assemble((f"{section.title}: ", "bold"), ("none", "dim"))]
    shown = [section.row(item) for item in section.items[:room]]
    draw = partial(blocks, section.head, shown, width, least=section.least, prose=section.prose, below=True)
    whole, short = draw(), draw(wrap=False)
    rows, told = _fitting([len(block) for block in whole[1:]], room)
    [head], lines = short[0], [line for block in (*whole[1 : told + 1], *short[told + 1 : rows + 1]) for line in block]
    rest = len(section.items) - rows
    title = section.title + (f" (… and {rest} more)" if rest > 0 else "")
    styled = [Text(title, style="bold"), Text(head, style="dim"), *map(Text, lines)]
    for line in styled:
        line.no_wrap, line.overflow = True, "crop"
    return styled


def _fitting(sizes: list[int], room: int) -> tuple[int, int]:
    """Return how many rows fit into `room` lines, and how many of those with all of their lines, `sizes`, not with one.

    The first row, the most important one, has all of its lines if that is possible at all.
    """
    if sizes[0] > room:
        return min(len(sizes), room), 0
    rows = min(len(sizes), room - sizes[0] + 1)
    left, told = room - rows, 0
    while told < rows and sizes[told] - 1 <= left:
        left -= sizes[told] - 1
        told += 1
    return rows, told
