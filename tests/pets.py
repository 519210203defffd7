"""Shared objects for the tests of servers, which import this module, so it imports little."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from patience import DEADLINE_S


class UsesManager:
    """Has a manager of its own, of a namespace that its starter may have left."""

    def __init__(self) -> None:
        from mpmm import ModelManager

        self.manager = ModelManager(namespace="test", memory_source="booked")

    def attached(self) -> bool:
        return self.manager._attachment.session is not None

    def use(self) -> str:
        with self.manager.model("part", lambda: "a handle") as part:
            return str(part)


class Speaker:
    """Says things."""

    def say(self, text: str) -> None:
        os.write(1, f"{text}\n".encode())
        print(text, "on stderr", file=sys.stderr)

    def say_much(self, mb: int) -> None:
        for _ in range(mb):
            os.write(2, b"x" * (1 << 20))

    def say_through_logging(self, text: str) -> None:
        import logging

        logging.getLogger("a.library").info(text)
        logging.getLogger("a.library").debug("not this")

    def say_through_own_logging(self, text: str) -> None:
        import logging

        logging.basicConfig(format="mine: %(message)s")
        logging.getLogger("a.library").info(text)

    def pid(self) -> int:
        return os.getpid()


class LongNative:
    """Made by native code that continues after every signal, and never runs Python's handlers."""

    def __init__(self) -> None:
        import ctypes

        library = ctypes.CDLL(None)
        lock = ctypes.create_string_buffer(64)
        library.pthread_mutex_lock(lock)
        Path(os.environ["BEGAN"]).write_text(str(os.getpid()))
        # The second call waits for the first lock forever.
        library.pthread_mutex_lock(lock)


class TakesSigterm:
    """Made by code that has a handler of its own for SIGTERM."""

    def __init__(self) -> None:
        signal.signal(signal.SIGTERM, lambda *_: None)
        Path(os.environ["BEGAN"]).write_text(str(os.getpid()))
        while True:
            time.sleep(60)


class NotesSignals:
    """Sends a signal to a thread of its process, so that the main thread's sleep is not interrupted."""

    def pid(self) -> int:
        return os.getpid()

    def send_to_a_thread(self, number: int) -> None:
        import threading

        def send() -> None:
            signal.pthread_kill(threading.get_ident(), number)

        threading.Thread(target=send).start()


class ForksChildren:
    """Has a child that SIGTERM ends."""

    def end_child(self) -> int:
        import multiprocessing

        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        child.start()
        child.terminate()
        child.join(DEADLINE_S)
        return int(child.exitcode or 0)


class ForksAndComesBack:
    """Forks without `os._exit` in the child, which then returns from a call, or the constructor, a second time."""

    def __init__(self, child: str = "") -> None:
        self.status = self.fork(child) if child else -1

    def fork(self, child: str) -> int:
        """Fork, return the child's status once it has ended; the child does what `child` says."""
        pid = os.fork()
        if pid == 0:
            if child == "raises":
                raise ValueError("in the child")
            if child == "exits":
                sys.exit(3)
            if child == "says":
                sys.exit("a farewell")
            return 0
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise TimeoutError("the child did not end")

    def forked_before(self) -> int:
        """Return how the constructor's child ended."""
        return self.status


class Cats:
    """One thing."""

    def says(self) -> str:
        return "meow"


class Lions(Cats):
    """A special one."""


class Dogs:
    """Another thing."""

    def says(self) -> str:
        return "woof"


def make_cats() -> Cats:
    return Cats()


def make_dogs() -> Dogs:
    return Dogs()
