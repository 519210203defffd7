"""Log records for a user at a terminal: wrapped between words, and in a colour that sets them apart."""

from __future__ import annotations

import logging
import os
import textwrap
from typing import TextIO

from mpmm.observability.colours import painter

__all__ = ["terminal_handler"]

# A terminal that is narrower, or does not know its width, breaks lines itself.
_NARROWEST = 30
_INDENT = "  "


def terminal_handler(stream: TextIO) -> logging.Handler | None:
    """Return a handler that writes log records to a stream if that is a terminal, else None."""
    if not stream.isatty():
        return None
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Formatter(stream))
    return handler


class _Formatter(logging.Formatter):
    """Lays a record out for the width that the terminal has at the time."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._paint = painter(stream)

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record."""
        lines, width = [super().format(record)], _width(self._stream)
        if width >= _NARROWEST:
            # Names and numbers stay whole, so that they can be searched for and copied.
            lines = textwrap.wrap(
                lines[0], width, subsequent_indent=_INDENT, break_long_words=False, break_on_hyphens=False
            )
        return "\n".join(self._paint("note", line) for line in lines)


def _width(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 0
