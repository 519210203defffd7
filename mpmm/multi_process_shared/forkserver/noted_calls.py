"""Calls during an import whose results belong to one process: its pid, random bytes, and temporary files.

A module that keeps such a result, as `ID = uuid.uuid4()` does, would give it to all servers that are forked after the
import. `NotedCalls` replaces the functions for the time of an import by objects that call them and note who called.

A profile function (`sys.setprofile`) would see the calls of these functions and leave nothing behind, but it makes an
import take twice as long: numpy.random 0.6 s instead of 0.3, pandas 2.2 s instead of 1.0, matplotlib.pyplot 3.6 s
instead of 1.8. An audit hook cannot be removed and would slow each server. The objects cost nothing but at a call.
Modules that bind one during the import (`from os import getpid`) get the function back after it; elsewhere, say as the
default of a parameter, an object may stay, and only calls the function from then on.
"""

from __future__ import annotations

import operator
import os
import random
import re
import sys
import tempfile
import uuid
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any

__all__ = ["NotedCalls"]

PACKAGE = __name__.partition(".")[0]
STANDARD_LIBRARY = os.path.dirname(os.__file__) + os.sep
INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]")
# A library that asks for the pid compares it later, or logs it: `logging` and `redis`, say. These keep it as the pid
# of the process that they describe.
KEEPERS_OF_PIDS = frozenset({"multiprocessing.process", "psutil"})
# Modules whose temporary files servers may share. Matplotlib makes a folder for its settings and its list of fonts if
# it may not write below the home folder.
HARMLESS_MAKERS = re.compile(r"matplotlib(\..+)?")
# NumPy draws that many bits for a generator without a seed, and each server gives the generator another one.
NUMPY_BITS = 128


class _Noting:
    """A function whose calls are noted until `note` is None.

    Like a built-in function, and unlike one in Python, it does not become a method of a class that has it as an
    attribute.
    """

    def __init__(self, function: Callable[..., Any], note: Callable[[FrameType, Any], None]) -> None:
        self.__wrapped__ = function
        self.__name__ = self.__qualname__ = function.__name__
        self.__module__ = function.__module__
        self.__doc__ = function.__doc__
        self.note: Callable[[FrameType, Any], None] | None = note

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        result = self.__wrapped__(*arguments, **named)
        note = self.note
        if note is not None:
            note(sys._getframe(1), result)
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        # Its pickle is one of the function.
        return operator.itemgetter(0), ((self.__wrapped__,),)


class NotedCalls:
    """Notes, from `begin` to `end`, which of the calls leave modules with what belongs to one process."""

    def __init__(self) -> None:
        self._replaced: list[tuple[ModuleType, str, _Noting]] = []
        self._modules: set[str] = set()
        self._first: str | None = None
        # What was made, each with a sentence about it.
        self._made: list[tuple[str, str]] = []
        # Whether NumPy's draws come through a function of mpmm.
        self.numpy_is_watched = False

    def begin(self) -> None:
        """Forget what was noted, and start noting."""
        self._first = None
        self._made.clear()
        self._modules = set(sys.modules)
        self._replace(self._note_pid, (os, "getpid"))
        self._replace(self._note_bytes, (os, "urandom"), (random, "_urandom"), (os, "getrandom"))
        self._replace(self._note_bytes, (uuid, "_generate_time_safe"))
        self._replace(self._note_made, (tempfile, "mkdtemp"), (tempfile, "_mkstemp_inner"))
        self._replace(self._note_name, (tempfile, "mktemp"))

    def end(self) -> None:
        """Put the functions back."""
        for module, name, noting in reversed(self._replaced):
            noting.note = None
            # The import may have put something else there, which stays, as it would in a server.
            if vars(module).get(name) is noting:
                setattr(module, name, noting.__wrapped__)
        if not self._replaced:
            return
        self._replaced.clear()
        for name, imported in sys.modules.copy().items():
            if name not in self._modules and isinstance(imported, ModuleType):
                for bound, value in vars(imported).copy().items():
                    if type(value) is _Noting:
                        vars(imported)[bound] = value.__wrapped__

    def problem(self) -> str | None:
        """Return what a module has that belongs to one process; None if there is nothing."""
        kept = (sentence for path, sentence in self._made if os.path.lexists(path))
        return self._first or next(kept, None)

    def _replace(self, note: Callable[[FrameType, Any], None], *places: tuple[ModuleType, str]) -> None:
        for module, name in places:
            function = getattr(module, name, None)
            # `os.getrandom` and `uuid._generate_time_safe` are not everywhere.
            if function is not None:
                noting = _Noting(function, note)
                setattr(module, name, noting)
                self._replaced.append((module, name, noting))

    def _note_pid(self, caller: FrameType, pid: Any) -> None:
        if caller.f_globals.get("__name__") in KEEPERS_OF_PIDS or _is_own(caller.f_code.co_filename):
            self._note_own("the pid", caller)

    def _note_bytes(self, caller: FrameType, drawn: Any) -> None:
        if not self._is_of_numpy(caller):
            self._note_own("random bytes", caller)

    def _note_name(self, caller: FrameType, path: Any) -> None:
        self._note_own("the name of a temporary file", caller)

    def _note_made(self, caller: FrameType, made: Any) -> None:
        path = made[1] if isinstance(made, tuple) else made
        importing = _importing(caller)
        if importing is None or importing.f_code.co_filename.startswith("<"):
            return
        name, where = _name_of(importing), importing.f_code.co_filename
        if _is_own(where) or (INSTALLED.search(where) and not HARMLESS_MAKERS.fullmatch(name)):
            self._made.append((os.fspath(path), f"a temporary file of {name}"))

    def _note_own(self, what: str, caller: FrameType) -> None:
        """Note a call on behalf of a module that is not installed."""
        importing = _importing(caller)
        if self._first is None and importing is not None and _is_own(importing.f_code.co_filename):
            self._first = f"{what} in {_name_of(importing)}"

    def _is_of_numpy(self, caller: FrameType) -> bool:
        """Tell whether NumPy draws a seed by itself; its frames cannot be seen, because they are of compiled code."""
        return (
            not self.numpy_is_watched
            and "numpy.random" in sys.modules
            and caller.f_code is random.SystemRandom.getrandbits.__code__
            and caller.f_locals.get("k") == NUMPY_BITS
        )


def _importing(frame: FrameType | None) -> FrameType | None:
    """Return the frame of the module whose code a call serves; None if it serves mpmm, or a thread, or no module.

    mpmm knows of forks. It also calls the preload hooks, and each server calls these again.
    """
    while frame is not None:
        if _name_of(frame).partition(".")[0] == PACKAGE:
            return None
        code = frame.f_code
        # Not code that a module executes as text, as `collections.namedtuple` does.
        if code.co_name == "<module>" and (not code.co_filename.startswith("<") or "frozen" in code.co_filename):
            return frame
        frame = frame.f_back
    return None


def _name_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))


def _is_own(file: str) -> bool:
    """Tell whether a file of code is the user's, neither installed nor of the standard library."""
    return not (file.startswith((STANDARD_LIBRARY, "<frozen")) or INSTALLED.search(file))
