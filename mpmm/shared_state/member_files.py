"""The files of one member in the runtime directory: holds them for life, watches them, and puts back removed ones.

Only `Namespace` uses this; its docstring lists the files and says what removes them.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from mpmm.errors import ClosedError, LockTimeoutError
from mpmm.shared_state.layout import Header, Member
from mpmm.shared_state.lifecycle import REMOVAL_TIMEOUT_S
from mpmm.shared_state.lock_file import LockFile, write_once
from mpmm.shared_state.runtime_dir import RuntimeDirectory
from mpmm.shared_state.segment import Segment, segment_lost, segment_name
from mpmm.shared_state.tables import Tables
from mpmm.shared_state.transaction import TransactionLock
from mpmm.text.printable import printable_logger

__all__ = ["MemberFiles"]

_LOG = printable_logger("mpmm")
# How often a member checks that its files are in place, by twelve system calls.
LOOK_S = 1.0
# Cleaners remove files that have not been touched for days.
TOUCH_S = 3600.0


class MemberFiles:
    """What one member holds in the runtime directory: root, folder, `alive.lock` and its own lock file.

    alive: None for a member that is no worker.
    """

    def __init__(
        self,
        runtime: RuntimeDirectory,
        segment: Segment,
        tables: Tables,
        lock: TransactionLock,
        alive: LockFile | None,
    ) -> None:
        self.alive = alive
        self._runtime = runtime
        self._segment = segment
        self._tables = tables
        self._lock = lock
        self._folder = str(runtime.path)
        self._pid = os.getpid()
        self._slot = -1
        self._life: LockFile | None = None
        self._holds = _hold(runtime)
        self._look_due = time.monotonic() + LOOK_S
        self._touch_due = time.monotonic() + TOUCH_S
        # The root was made anew, and the segment's name has the old root's identity in it.
        self._root_changed = False
        self._lost = False
        self._complained = False
        self._watched = True

    def take_life(self, slot: int, life: LockFile) -> None:
        """Keep for life the lock file of the member's slot, which the caller has locked."""
        self._life = life
        self._slot = slot

    @property
    def life_fd(self) -> int:
        """The descriptor of this member's lock. Raises ClosedError before it is taken."""
        if self._life is None:
            raise ClosedError(f"this process has left the namespace {self._runtime.name!r}")
        return self._life.fd

    @property
    def folder_fd(self) -> int:
        """The descriptor of the folder that the member holds; it may have been removed by now."""
        return self._holds[-1].fd

    @property
    def folder_identity(self) -> tuple[int, int]:
        """Device and inode of the folder that the member holds: another one at its path must not be removed instead."""
        _, folder = self._holds
        return folder.identity

    def is_in_place(self) -> bool:
        """Tell whether a newcomer would find the same segment and files as this member."""
        held = [*self._holds] if self.alive is None else [*self._holds, self.alive]
        return self._segment.is_current() and all(lock.is_current() for lock in held)

    def give_up(self) -> None:
        """Put nothing back from now on, because the member leaves."""
        self._watched = False

    def close(self) -> None:
        """Close all files, by which others see that this member is gone."""
        self._watched = False
        for file in (self._life, self.alive, *self._holds):
            if file is not None:
                file.close()

    def forget_after_fork(self) -> None:
        """In a forked child: close the parent's descriptors without releasing its locks."""
        self._watched = False
        for file in (self._life, self.alive, *self._holds):
            if file is not None:
                file.forget_after_fork()

    def look_after(self, lead: LockFile, leading: bool) -> bool:
        """See `Namespace.look_after_files`."""
        now = time.monotonic()
        if now < self._look_due:
            return leading
        self._look_due = now + LOOK_S
        if now >= self._touch_due:
            self._touch_due = now + TOUCH_S
            _touch(self._runtime.root)
        self.put_back()
        if not self._may_put_back or lead.is_current():
            return leading
        try:
            made = lead.put_back() if leading else LockFile(lead.path)
            lead.become(made or LockFile(lead.path))
        except OSError as error:
            _LOG.warning("mpmm %s: cannot put %s back: %s", self._runtime.name, lead.path, error)
            return leading
        if made is not None and made.put_here:
            self._note_put_back(["leader.lock"])
        return leading and made is not None

    @property
    def _may_put_back(self) -> bool:
        # Once the last worker has left, everything is removed on purpose.
        return self._watched and not self._segment.is_closed

    def put_back(self) -> None:
        """Put back what is no longer in place, and log it; log a failure once."""
        if not self._may_put_back:
            return
        found: list[str] = []
        try:
            self._put_folder_back(found)
            if self._root_changed or not self._segment.is_current():
                self._look_for_segment(found)
            if write_once(self._runtime.file("token"), f"{self._segment.words[Header.TOKEN]:016x}"):
                found.append("token")
            if self.alive is not None and not self.alive.is_current():
                alive = self.alive.put_back(shared=True)
                if alive is not None:
                    # The new one is locked already, so model servers never find the old one free, and no new one.
                    self.alive, before = alive, self.alive
                    before.close()
                    # Each worker locks the new file, but only the one that has put it there reports it.
                    found += ["alive.lock"] if alive.put_here else []
            self._put_life_back(found)
            self._complained = False
        except (OSError, LockTimeoutError) as error:
            if not self._complained:
                self._complained = True
                _LOG.warning(
                    "mpmm %s: cannot put back what was removed of %s: %s", self._runtime.name, self._folder, error
                )
        if found:
            self._note_put_back(found)

    def _put_folder_back(self, found: list[str]) -> None:
        if all(hold.is_current() for hold in self._holds):
            for hold in self._holds:
                # A cleaner may have held the folder at an earlier attempt, so that we never got the lock.
                hold.try_shared()
            return
        if not self._runtime.path.is_dir():
            found.append("the folder")
        self._runtime.ensure()
        old, self._holds = self._holds, _hold(self._runtime)
        self._root_changed = self._root_changed or old[0].identity != self._holds[0].identity
        for hold in old:
            hold.close()

    def _look_for_segment(self, found: list[str]) -> None:
        """Give the segment the name that belongs to the current root, unless another member has done so."""
        # The lifecycle lock keeps newcomers out, which make a segment if they find none.
        with contextlib.closing(LockFile(self._runtime.file("lifecycle.lock"))) as lifecycle:
            if not lifecycle.try_exclusive():
                return
            old, name = self._segment.name, segment_name(self._runtime.root, self._runtime.name)
            if self._segment.rename(name):
                if name != old:
                    found.append("the root of the runtime directories")
                self._root_changed = self._lost = False
                return
        if not self._lost:
            self._lost = True
            lost = segment_lost(self._runtime.name, old)
            _LOG.error("mpmm: pid %d continues, but no process can join it: %s", self._pid, lost)

    def _put_life_back(self, found: list[str]) -> None:
        if self._life is None:
            return
        if not self._life.is_current():
            made = self._life.put_back(replace=True)
            if made is None:
                return
            self._life, before = made, self._life
            # Nobody looks at its lock any more: the path leads to the new file.
            before.close()
            found.append(made.path.name)
        # Other processes use the new file only once the row has its inode.
        word, inode = self._tables.member(self._slot) + Member.LOCK, self._life.identity[1]
        if self._segment.words[word] != inode:
            with self._lock(REMOVAL_TIMEOUT_S) as t:
                t.set(word, inode)

    def _note_put_back(self, found: list[str]) -> None:
        _LOG.warning(
            "mpmm %s: something has removed %s of %s under pid %d, which has put it back; keep cleaners away from this "
            "folder, or set MPMM_RUNTIME_DIR to one that no cleaner touches",
            self._runtime.name,
            ", ".join(found),
            self._folder,
            self._pid,
        )
        with contextlib.suppress(LockTimeoutError), self._lock(REMOVAL_TIMEOUT_S) as t:
            t.add(Header.PUT_BACK, len(found))


def _hold(runtime: RuntimeDirectory) -> list[LockFile]:
    """Lock root and folder, unless a cleaner has locked them. Raises FileNotFoundError if one is gone."""
    holds = [LockFile(folder, folder=True) for folder in (runtime.root, runtime.path)]
    for hold in holds:
        hold.try_shared()
    return holds


def _touch(root: Path) -> None:
    """Touch the files of all namespaces and model servers, so that they look new."""
    for folder, _, names in os.walk(root):
        for name in ("", *names):
            with contextlib.suppress(OSError):
                os.utime(os.path.join(folder, name), follow_symlinks=False)
