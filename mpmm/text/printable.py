"""Makes other people's texts safe for a terminal or a log: nothing in them is left that a terminal would obey.

A tag, or the name of a lease, a host or a source, may be anything that a caller has passed in. An escape sequence in it
could clear the screen, retitle the window or reverse letters; a newline could forge a line of a log. So every text for
people goes through `printable`: output as it is written, errors when they are put into words, and log records here.
What programs read (JSON, traces, metrics) stays exact, but for bytes in metrics that are not UTF-8, as metrics must be.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from mpmm.text.display_names import display_name, shown_tag

__all__ = ["printable", "printable_lines", "printable_logger"]


def printable(text: str, keep: str = "") -> str:
    r"""Return a text with characters that do not print, unless in `keep`, as Python escapes them: `\x1b`, `\u202e`."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() or sign in keep else ascii(sign)[1:-1] for sign in text)


def printable_lines(text: str) -> str:
    """Return a text of several lines, each made printable."""
    return printable(text, "\n\t")


class _Printable(logging.Filter):
    """Makes the texts among a record's arguments printable, and adds names to tags; passes on all records."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the arguments of a record in place, before any handler sees them."""
        if isinstance(record.args, tuple):
            record.args = tuple(_shown(value) for value in record.args)
        elif isinstance(record.args, Mapping):
            record.args = {name: _shown(value) for name, value in record.args.items()}
        return True


def _shown(value: object) -> object:
    return printable(shown_tag(value, display_name(value))) if isinstance(value, str) else value


_FILTER = _Printable()


def printable_logger(name: str) -> logging.Logger:
    """Return the logger of that name, with printable records. Filters are not inherited, so each logger gets one."""
    found = logging.getLogger(name)
    found.addFilter(_FILTER)
    return found
