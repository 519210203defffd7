"""Colours, on a terminal only and never if the user has set NO_COLOR (https://no-color.org).

Lines are painted after they have been laid out, so colours do not affect how they are cut or padded.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TextIO

__all__ = ["Paint", "painter", "plain"]

#: Returns a text in a style, one of `_CODES`.
Paint = Callable[[str, str], str]
_CODES = {
    "urgent": "1;31",
    "note": "33",
    "well": "32",
    "title": "1",
    "head": "2",
}


def plain(style: str, text: str) -> str:
    """Return the text as it is."""
    return text


def painter(stream: TextIO) -> Paint:
    """Return the paint function of a stream: with colours if it is a terminal that has them and the user wants them."""
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return plain
    return _in_colours


def _in_colours(style: str, text: str) -> str:
    return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if text else text
