"""Tell whether a process lives. A module of its own, because model servers import it and should import little."""

from __future__ import annotations

from pathlib import Path

__all__ = ["lives"]


def lives(pid: int) -> bool:
    """Tell whether a process lives. A zombie does not: the kernel has taken back its memory."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"
