"""Finds and removes everything that crashed processes have left, for `mpmm prune`."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from mpmm.shared_state.file_errors import told_by_file
from mpmm.shared_state.prune import find_orphans
from mpmm.shared_state.removal import is_deserted, namespaces_below, remove_deserted
from mpmm.shared_state.runtime_dir import default_root, leftovers_in
from mpmm.shared_state.segment import SHARED_MEMORY, segment_name, unlink_segment

__all__ = ["Leftover", "prune"]


@dataclass(frozen=True)
class Leftover:
    """Something that no process uses: what it is, how much memory it takes, and how that is known."""

    what: str
    size_mb: float
    why: str


def prune(root: Path, *, dry_run: bool = False) -> list[Leftover]:
    """Remove segments without a root, and namespaces below `root` without a worker; return what was removed.

    dry_run: only return it. Raises RuntimeDirectoryError if this user may not read `root`.
    """
    with told_by_file(root):
        return _prune(root, dry_run)


def _prune(root: Path, dry_run: bool) -> list[Leftover]:
    removed = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        # Raises if this user may not read the folder, where `glob` would silently find nothing.
        os.scandir(root).close()
    for name in namespaces_below(root):
        size_mb = 0.0
        with contextlib.suppress(FileNotFoundError):
            size_mb = os.stat(f"{SHARED_MEMORY}/{segment_name(root, name)}").st_blocks * 512 / 2**20
        if is_deserted(root, name) if dry_run else remove_deserted(root, name):
            removed.append(Leftover(f"namespace {root / name}", size_mb, "no process is left in it"))
    for gone in leftovers_in(root):
        removed.append(Leftover(f"folder {gone}", 0.0, "a process died while it removed it"))
        if not dry_run:
            shutil.rmtree(gone, ignore_errors=True)
    for orphan in find_orphans(of_other_versions=True, roots=(root, default_root())):
        removed.append(Leftover(f"segment {SHARED_MEMORY}/{orphan.name}", orphan.size_mb, orphan.why))
        if not dry_run:
            unlink_segment(orphan.name, orphan.identity)
    return removed
