"""`mpmm top`: a namespace, live in the terminal. Needs rich, the extra `cli`."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from mpmm.printable import printable
from mpmm.shared_state.snapshot import DeviceInfo, EventChoice, Snapshot, read_snapshot
from mpmm.show.health import findings
from mpmm.show.screen import EVENTS_OF_EACH, Section, copies, evictions, headline, models, waiting
from mpmm.show.tables import table, wrapped
from mpmm.show.words import bar, for_people, mb

__all__ = ["History", "run", "screen"]

_LEVELS = " ▁▂▃▄▅▆▇█"
# So many columns are the widest terminal that is drawn to its edge.
HISTORY_LENGTH = 500
# What a section takes besides its rows: its title and its head.
HEAD_LINES = 2
BAR_SHARE = 0.3
NARROWEST_BAR = 10


class History:
    """Memory of each device over time: the last samples that the segment knows, then one figure for each look."""

    def __init__(self) -> None:
        self._figures: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=HISTORY_LENGTH))

    def add(self, snapshot: Snapshot) -> None:
        """Note the figures of a look."""
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


def run(namespace: str, root: Path | None, interval_s: float) -> int:
    """Show a namespace until `q` or an interrupt; return 0. Raises what `read_snapshot` raises at the first look."""
    console, history = Console(), History()
    choice = EventChoice(newest_of_each=EVENTS_OF_EACH)
    snapshot: Snapshot | None = read_snapshot(namespace, root, choice=choice)
    live = Live(console=console, screen=True, auto_refresh=False)
    with contextlib.suppress(KeyboardInterrupt), _keys() as key_pressed, live:
        while True:
            if snapshot is None:
                live.update(Text(f"there is no namespace {printable(namespace)} any more; q ends"), refresh=True)
            else:
                history.add(snapshot)
                # The size is asked for each time, as it may change.
                live.update(screen(snapshot, history, console.width, console.height), refresh=True)
            if key_pressed(interval_s):
                break
            try:
                snapshot = read_snapshot(namespace, root, choice=choice)
            except FileNotFoundError:
                snapshot = None
    return 0


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """Read single keys; yield what waits for `q` for some seconds and tells whether it came."""
    if not sys.stdin.isatty():
        yield lambda seconds: time.sleep(seconds)
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def wait(seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            ready, _, _ = select.select([descriptor], [], [], left)
            if ready and b"q" in os.read(descriptor, 64):
                return True
        return False

    try:
        tty.setcbreak(descriptor)
        yield wait
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def screen(snapshot: Snapshot, history: History, width: int, height: int) -> RenderableType:
    """Return what fills a terminal of so many columns and lines; the tables share what the rest leaves."""
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
    tables: list[Section[Any]] = [waiting(snapshot), copies(snapshot), models(snapshot), evictions(snapshot)]
    left = height - len(head) - len(device_lines) - 2
    shown: list[RenderableType] = []
    for place, section in enumerate(tables):
        # What one table leaves of its share the next ones have.
        room = max(1, left // (len(tables) - place) - HEAD_LINES)
        rows = min(room, max(1, len(section.items)))
        if rows + HEAD_LINES <= left:
            shown += _table(section, rows, width)
            left -= rows + HEAD_LINES
    return Group(*head, Panel(Group(*device_lines), title="memory", title_align="left"), *shown)


def _devices(snapshot: Snapshot, history: History, width: int) -> list[Text]:
    lines = []
    for device in snapshot.devices:
        figures = f" {mb(device.used_mb)} of {mb(device.limit_mb)} MB"
        if device.reserved_mb:
            figures += f", {mb(device.reserved_mb)} reserved"
        if device.returning_mb:
            figures += f", {mb(device.returning_mb)} returning"
        size = max(NARROWEST_BAR, int(width * BAR_SHARE))
        full = (device.used_mb or 0.0) + device.reserved_mb > device.limit_mb
        line = Text(f"{device.row} {device.name[:16]:16} ", no_wrap=True, overflow="crop")
        line.append(bar(device, size), style="red" if full else "cyan")
        line.append(figures)
        lines += [line, Text(history.line(device, max(NARROWEST_BAR, width)), style="blue", no_wrap=True)]
    return lines


def _table(section: Section[Any], rows: int, width: int) -> list[Text]:
    rest = len(section.items) - rows
    title = section.title + (f" (… and {rest} more)" if rest > 0 else "")
    if not section.items:
        return [Text(title, style="bold"), Text("  none", style="dim")]
    shown = [section.row(item) for item in section.items[:rows]]
    head, *lines = table(section.head, shown, width, least=section.least, prose=section.prose, wrap=False)
    styled = [Text(title, style="bold"), Text(head, style="dim"), *map(Text, lines)]
    for line in styled:
        line.no_wrap, line.overflow = True, "crop"
    return styled
