"""Shared objects that report on themselves and their process. Servers import this module, so it imports little."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from patience import DEADLINE_S

from mpmm.multi_process_shared import MultiProcessShared


class Lazy:
    """Has a method only once it has loaded."""

    predict: Callable[[int], int]

    def load(self) -> None:
        self.predict = _double


def _double(number: int) -> int:
    return 2 * number


class Counter:
    """The shared object of most tests."""

    def __init__(self, start: int = 0) -> None:
        self.count = start
        self.opened = threading.Event()

    def increment(self, by: int = 1) -> int:
        self.count += by
        return self.count

    def pid(self) -> int:
        return os.getpid()

    def environment(self, name: str) -> str | None:
        return os.environ.get(name)

    def open(self) -> None:
        self.opened.set()

    def wait_until_open(self) -> bool:
        return self.opened.wait(DEADLINE_S)

    def end_abruptly(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def returns_generator(self) -> Iterator[int]:
        return (number for number in range(3))

    def raises_key_error(self) -> None:
        raise KeyError("missing key")

    def raises_what_does_not_unpickle(self) -> None:
        raise CannotBeMadeAgain("left", "right")

    def raises_needs_two(self) -> None:
        raise NeedsTwo("left", right="right")

    def raises_what_it_was_given(self) -> None:
        raise KeepsWhatItWasGiven(threading.Lock())

    def raises_changed_text(self) -> None:
        raise ChangesItsText(5)

    def raises_os_error(self) -> None:
        raise NoSuchWeights("resnet")

    def leaves(self) -> None:
        sys.exit(3)

    def start_another(self, path: str) -> int:
        return int(MultiProcessShared(Counter, "nested", path=path, spawn_process=True).acquire().pid())

    def fork_sleeper(self) -> int:
        return fork_sleeper()

    def _private(self) -> None:
        raise AssertionError("never called")


class NeedsTwo(Exception):
    def __init__(self, left: str, right: str) -> None:
        super().__init__(left + right)
        self.left = left


class KeepsWhatItWasGiven(Exception):
    def __init__(self, given: object) -> None:
        super().__init__(given)

    def __str__(self) -> str:
        return "it cannot be sent"


class ChangesItsText(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")
        self.lock = threading.Lock()


class NoSuchWeights(FileNotFoundError):
    def __init__(self, name: str) -> None:
        super().__init__(2, "no weights", f"/models/{name}")


class CannotBeMadeAgain(Exception):
    def __init__(self, left: str, right: str) -> None:
        super().__init__(left + right)

    def __reduce__(self) -> tuple[Any, ...]:
        return CannotBeMadeAgain, ("one",)


def fork_sleeper(memory: dict[str, Any] | None = None) -> int:
    """Fork a child that never uses this package, and return its pid."""
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    return child


def fail_to_construct() -> Counter:
    raise ZeroDivisionError("no such model")


def die_in_constructor() -> Counter:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


class SlowToConstruct:
    """Makes a Counter once the test writes to a named pipe; reports through another that it began."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("began", "go"):
            os.mkfifo(folder / name)

    def __call__(self) -> Counter:
        (self.folder / "began").write_text(str(os.getpid()))
        (self.folder / "go").read_text()
        return Counter(100)


def remember_tag(tag: str) -> object:
    os.environ["STARTED_FOR"] = tag
    return object()


class Surroundings:
    """A shared object that reports its process's surroundings."""

    def __init__(self) -> None:
        self.seen = os.environ.get("MPMM_TEST_SEEN")

    def seen_by_constructor(self) -> str | None:
        return self.seen

    def environment(self, name: str) -> str | None:
        return os.environ.get(name)

    def folder(self) -> str:
        return os.getcwd()

    def draw(self) -> float:
        return random.random()

    def print(self, text: str, flush: bool = True) -> None:
        print(text, flush=flush)
        print(text, file=sys.stderr, flush=True)

    def threads(self) -> int:
        return len(os.listdir("/proc/self/task"))

    def descriptors(self) -> list[str]:
        found = []
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                found.append(os.readlink(f"/proc/self/fd/{fd}"))
        return found


class Imported:
    """Reports a module's contents, and the state of this process after importing it."""

    def __init__(self, module: str) -> None:
        self.module = __import__(module, fromlist=["*"])

    def pid(self) -> int:
        return os.getpid()

    def parent(self) -> int:
        return os.getppid()

    def value(self, name: str) -> Any:
        found = getattr(self.module, name)
        return found() if callable(found) else found

    def state(self) -> dict[str, Any]:
        """Return what must be equal in a forked and in a spawned server."""
        kept = ("MPMM_ZYGOTE", "PYTEST_CURRENT_TEST")
        return {
            "arguments": sys.argv,
            "folder": os.getcwd(),
            "environment": {name: value for name, value in os.environ.items() if name not in kept},
            "descriptors": sorted({_kind_of_descriptor(fd) for fd in os.listdir("/proc/self/fd")}),
            "threads": sorted(
                thread.name for thread in threading.enumerate() if not thread.name.startswith(("mpmm-", "MainThread"))
            ),
            "signals": {
                int(number): str(signal.getsignal(number)).partition(" at ")[0] for number in signal.valid_signals()
            },
            "masked signals": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))),
            "path": sys.path,
            "umask": _umask(),
            "children": [child.name() for child in psutil.Process().children()],
            "logging": (logging.getLogger().level, len(logging.getLogger().handlers)),
            "streams": (sys.stdout.encoding, sys.stderr.encoding, sys.stdout.fileno(), sys.stderr.fileno()),
            "main": sorted({"__main__", "__mp_main__"} & set(sys.modules)),
            "start method": multiprocessing.get_start_method(allow_none=True),
            "recursion": sys.getrecursionlimit(),
            "locale": __import__("locale").setlocale(__import__("locale").LC_ALL),
        }

    def draws(self) -> dict[str, float]:
        """Return what must differ from server to server."""
        drawn = {"random": random.random()}
        if "numpy.random" in sys.modules:
            drawn["numpy"] = float(sys.modules["numpy.random"].random())
        if "torch" in sys.modules:
            drawn["torch"] = float(sys.modules["torch"].rand(1))
        return drawn


def _kind_of_descriptor(fd: str) -> str:
    with contextlib.suppress(OSError):
        target = os.readlink(f"/proc/self/fd/{fd}")
        # Locks differ from server to server.
        return "" if "/shared/" in target else target.rstrip("0123456789[]")
    return ""


def _umask() -> int:
    found = os.umask(0o077)
    os.umask(found)
    return found


@dataclass(frozen=True)
class Imports:
    """The constructor of an `Imported`."""

    module: str

    def __call__(self) -> Imported:
        return Imported(self.module)


class Importing:
    """Makes a Counter after importing a module that the zygote has to find out about."""

    def __init__(self, module: str) -> None:
        self.module = module

    def __call__(self) -> Counter:
        return Counter(__import__(self.module).answer)
