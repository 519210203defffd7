"""Messages from workers to their conductor: lines of JSON through a pipe that all of them write to."""

from __future__ import annotations

import contextlib
import json
import os
import select
from collections.abc import Iterator
from typing import Any

__all__ = ["Mailbox"]


class Mailbox:
    """The pipe. reader: for the conductor only; writer: for its workers, which inherit it."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        self._unread = b""

    def messages(self, timeout_s: float) -> Iterator[dict[str, Any]]:
        """Wait for a message, at most `timeout_s`, and yield all that have arrived."""
        if not select.select([self.reader], [], [], timeout_s)[0]:
            return
        with contextlib.suppress(BlockingIOError):
            while True:
                self._unread += os.read(self.reader, 1 << 16)
                *lines, self._unread = self._unread.split(b"\n")
                yield from map(json.loads, lines)
