"""What the keys of `mpmm top` do: sorting, filtering, pausing, help; and how single keys are read from a terminal."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mpmm.observability.inspect_screen import Section
from mpmm.shared_state.snapshot import InstanceInfo, ModelInfo

__all__ = ["HELP", "SORTS", "Controls", "single_keys"]

HELP = """\
q, Ctrl-C  quit; the last picture stays on the terminal
h, ?       show or hide this help
space      pause or continue
s          sort copies and models by the next of:
           {sorts}
r          reverse the order
/          filter: type part of a tag, or a pid; Enter keeps
           the filter, Esc shows all rows

bar        █ used  ▓ reserved for loads and leases
           ░ on its way back from unloads  · free  │ limit
below it   memory in use over time, a column for each update"""

# Sort keys of copies and of models; `state` is the order of `mpmm inspect`.
_COPY_KEYS: dict[str, Callable[[InstanceInfo], Any]] = {
    "MB": lambda copy: -max(copy.mb, copy.reserved_mb),
    "age": lambda copy: -copy.for_s,
    "name": lambda copy: copy.tag,
    "uses": lambda copy: -copy.uses,
}
_MODEL_KEYS: dict[str, Callable[[ModelInfo], Any]] = {
    "MB": lambda model: -(model.estimate_mb or 0.0),
    "age": lambda model: -model.unused_for_s,
    "name": lambda model: model.tag,
    "uses": lambda model: -(model.hits + model.loads),
}
_KEYS: dict[str, Mapping[str, Callable[[Any], Any]]] = {"copies": _COPY_KEYS, "models": _MODEL_KEYS}
SORTS = ("state", *_COPY_KEYS)
_BACKSPACE = "\x7f\x08"
_ESCAPE = "\x1b"


@dataclass
class Controls:
    """What the user has chosen so far. typing: keys are added to the filter."""

    sort: str = SORTS[0]
    backwards: bool = False
    filter: str = ""
    typing: bool = False
    paused: bool = False
    helping: bool = False

    def press(self, key: str) -> bool:
        """Handle a key; return whether it ends the program. An unknown one does nothing."""
        if self.typing:
            self._type(key)
        elif key == "q":
            return True
        elif key in ("h", "?"):
            self.helping = not self.helping
        elif key == " ":
            self.paused = not self.paused
        elif key == "s":
            self.sort = SORTS[(SORTS.index(self.sort) + 1) % len(SORTS)]
        elif key == "r":
            self.backwards = not self.backwards
        elif key == "/":
            self.typing, self.helping = True, False
        elif key == _ESCAPE:
            self.filter, self.helping = "", False
        return False

    def _type(self, key: str) -> None:
        if key in ("\r", "\n"):
            self.typing = False
        elif key == _ESCAPE:
            self.typing, self.filter = False, ""
        elif key in _BACKSPACE:
            self.filter = self.filter[:-1]
        elif key.isprintable():
            self.filter += key

    def arranged(self, section: Section[Any], tags: Mapping[str, str] | None = None) -> Section[Any]:
        """Return a section with the rows that the filter lets through, in the chosen order.

        tags: whole tags, by what the rows show instead.
        """
        items = [item for item in section.items if self._wants(section, item, tags or {})]
        keys = _KEYS.get(section.title, {})
        if self.sort in keys:
            items.sort(key=keys[self.sort])
        if self.backwards and keys:
            items.reverse()
        title = section.title
        if self.filter:
            title += f" with {self.filter!r}: {len(items)} of {len(section.items)}"
        return replace(section, items=items, title=title)

    def _wants(self, section: Section[Any], item: Any, tags: Mapping[str, str]) -> bool:
        wanted, shown = self.filter.casefold(), item.tag or ""
        texts = (shown, tags.get(shown, ""))
        if not wanted or any(wanted in text.casefold() for text in texts):
            return True
        # A row has the pids of the processes that hold, keep or wait for its item.
        pids = (cell for name, cell in zip(section.head, section.row(item), strict=False) if "pid" in name)
        return wanted.isdigit() and wanted in pids

    def footer(self) -> str:
        """Return the line that says what the keys do and what is chosen."""
        if self.typing:
            return f"filter: {self.filter}_   (Enter keeps it, Esc shows all rows)"
        parts = ["q quit", "h help", f"s sort: {self.sort}{', reversed' if self.backwards else ''}"]
        parts.append(f"/ filter: {self.filter}" if self.filter else "/ filter")
        return "  ".join([*parts, "space: continue (paused)" if self.paused else "space pause"])


@contextlib.contextmanager
def single_keys() -> Iterator[Callable[[float], str]]:
    """Read single keys; yield a function that waits some seconds for any and returns them, one character each.

    Keys that send an escape sequence, such as arrows, are ignored. Without a terminal to read from there are no keys.
    """
    if not sys.stdin.isatty():
        yield _no_keys
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def wait(seconds: float) -> str:
        if not select.select([descriptor], [], [], seconds)[0]:
            return ""
        typed = os.read(descriptor, 1024)
        if not typed:
            # The terminal is gone; `select` would report it as ready for ever.
            raise KeyboardInterrupt
        keys = typed.decode("utf-8", "ignore")
        return "" if len(keys) > 1 and keys[0] == _ESCAPE else keys

    try:
        tty.setcbreak(descriptor)
        yield wait
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _no_keys(seconds: float) -> str:
    time.sleep(seconds)
    return ""
