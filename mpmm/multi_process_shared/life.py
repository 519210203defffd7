"""The life lock of a shared object's server, and what shows that the server lives when the lock's file was removed.

The lock belongs to a file, and a cleaner may remove that under a living server. Until the server has put it back, a
process that looks for it would find none, and start a second server with a copy of its own. So a server also listens at
an abstract address of the kernel, which is no file, but exists for as long as a process has it open. Nothing is said
there: who needs the server connects, whereupon the server looks after its files at once, and hangs up.

The kernel tells which process listens, so another user's process that takes the address deceives nobody. The
address exists only on Linux, and in one network namespace: elsewhere the file alone counts.
"""

from __future__ import annotations

import hashlib
import os
import select
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import psutil

from mpmm.interpreter.fork_hooks import close_in_children, closing_guard, fork_guard
from mpmm.multi_process_shared.rpc import sockets
from mpmm.multi_process_shared.rpc.sockets import ForkSafeSocket, peer_pid, peer_uid
from mpmm.shared_state.lock_file import LockFile, identity_of

__all__ = ["LifeLock", "address_for", "wait_for_answer"]

LOOK_MS = 50


class LifeLock(LockFile):
    """A life lock. While it is held, its owner may listen for processes that do not find its file."""

    _listener: ForkSafeSocket | None = None

    def listen_at(self, address: bytes | None) -> None:
        """Listen at an abstract address, if there is one and no process has it."""
        if address is not None:
            # A second server of the tag, say, finds it taken: processes wait for the first one.
            with suppress(OSError):
                self._listener = sockets.listen_at(address)

    @property
    def listeners(self) -> list[ForkSafeSocket]:
        """What is readable when a process does not find the file: one socket or none."""
        # Read once, because another thread may close it.
        listener = self._listener
        return [] if listener is None else [listener]

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Look after the files inside the block: after it, the processes that connected before it look again.

        Raises OSError before the block.
        """
        with ExitStack() as lines:
            # One that connects from now on is for the next block.
            while (line := self._next_line()) is not None:
                lines.enter_context(line)
            yield

    def _next_line(self) -> ForkSafeSocket | None:
        with fork_guard:
            # Read once, because another thread may close it.
            listener = self._listener
            if listener is not None:
                try:
                    return close_in_children(ForkSafeSocket(fileno=listener.accept()[0].detach()))
                except BlockingIOError:
                    pass
                except OSError:
                    if self._listener is listener:
                        raise
        return None

    def stop_listening(self) -> None:
        """Let another server take this one's place, though the lock may be held to the end of the process."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()

    def forget_after_fork(self) -> None:
        """Close the descriptors."""
        with closing_guard():
            self.stop_listening()
            super().forget_after_fork()


def address_for(root: str, name: str) -> bytes | None:
    """Return the abstract address of the server `name` below a root, the same for all processes with that root.

    The root may have been made anew, so it is known by its path and the folder that it is in.
    """
    if sys.platform != "linux":
        return None
    path = os.path.realpath(root)
    place = f"{path}:{identity_of(os.path.dirname(path))}:{name}"
    return f"\0mpmm-{os.getuid()}-{hashlib.blake2b(os.fsencode(place), digest_size=16).hexdigest()}".encode()


def wait_for_answer(address: bytes | None, give_up: Callable[[], bool]) -> bool:
    """Wait until the process of this user that listens at an address hangs up, or ends; False if there is none.

    Returns True as well once `give_up` does, which is asked some twenty times a second.
    """
    if address is None:
        return False
    with fork_guard:
        line = close_in_children(ForkSafeSocket(socket.AF_UNIX, socket.SOCK_STREAM))
    with line:
        # Nobody accepts while the object is being made, and a full queue must not hold this process up.
        line.setblocking(False)
        try:
            line.connect(address)
        except OSError:
            return False
        if peer_uid(line.fileno()) != os.getuid():
            return False
        # None if its pid namespace is not visible here.
        pid = peer_pid(line.fileno())
        poll = select.poll()
        poll.register(line, select.POLLIN)
        while not poll.poll(LOOK_MS) and not give_up():
            if pid is not None and not _is_running(pid):
                # A child that native code has forked still has the dead server's descriptors.
                return False
    return True


def _is_running(pid: int) -> bool:
    """Tell whether a process exists and is no zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
