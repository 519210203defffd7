"""A shared object that keeps and echoes payloads, and things to send. Servers import it, so it imports little."""

from __future__ import annotations

import copyreg
import multiprocessing
import os
import pickle
import signal
import weakref
from array import array as number_array
from contextlib import suppress
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import numpy as np
import psutil


def shared_buffers() -> int:
    """Return the number of shared buffers that this process has mapped."""
    return Path("/proc/self/maps").read_text().count("memfd:mpmm-buffer")


class Store:
    """The shared object: returns its arguments, or keeps them."""

    def __init__(self) -> None:
        self.kept: list[Any] = []
        self._lent: weakref.WeakSet[StaysHere] = weakref.WeakSet()

    def lend(self) -> Any:
        lent = StaysHere()
        self._lent.add(lent)
        return lent

    def number_lent(self) -> int:
        """Return how many of the objects that were lent are still kept."""
        return len(self._lent)

    def echo(self, thing: Any) -> Any:
        return thing

    def keep(self, thing: Any) -> None:
        self.kept.append(thing)

    def get_kept(self) -> list[Any]:
        return self.kept

    def zeros(self, count: int) -> Any:
        return np.zeros(count)

    def fail_with(self, thing: Any) -> None:
        raise CarriesArray(thing)

    def views(self) -> list[Any]:
        table = {"a": 1}
        return [table.keys(), table.values(), table.items()]

    def fail_with_attribute(self, thing: Any) -> None:
        error = ValueError("carries it")
        error.thing = thing  # type: ignore[attr-defined]  # as programs add to exceptions
        raise error

    def open_pipe(self) -> Any:
        return multiprocessing.Pipe()[0]

    def pid(self) -> int:
        return os.getpid()

    def shared_buffers(self) -> int:
        return shared_buffers()

    def descriptors(self) -> int:
        return int(psutil.Process().num_fds())

    def close_descriptors(self) -> None:
        """Do what programs do that become daemons."""
        os.closerange(3, 1024)

    def close_locks(self) -> None:
        """Close the lock files alone."""
        for fd in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                if os.readlink(f"/proc/self/fd/{fd}").endswith((".lock", ".life")):
                    os.close(int(fd))

    def end_abruptly(self, thing: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class StaysHere:
    """Cannot be pickled."""

    name = "lent"

    def __reduce__(self) -> Any:
        raise TypeError("this one stays in the server")


class CarriesArray(Exception):
    """An exception with a payload."""


class Subclass(np.ndarray):
    """An array of a user-defined type."""


class HasBuffer:
    """Leaves its data out of pickles, as pandas and pyarrow do."""

    def __init__(self, numbers: number_array[float]) -> None:
        self.numbers = numbers

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return HasBuffer.from_buffer, (pickle.PickleBuffer(self.numbers),)

    @classmethod
    def from_buffer(cls, data: Any) -> HasBuffer:
        return cls(number_array("d", bytes(data)))


class CallsWhenUnpickled:
    """Makes a call when it is unpickled in the process that made it."""

    def __init__(self, home: int, proxy: Any) -> None:
        self.home = home
        self.proxy = proxy

    def __reduce__(self) -> tuple[Any, ...]:
        return arrive, (self.home, self.proxy)


def arrive(home: int, proxy: Any) -> Any:
    return proxy.echo("x" * 1000) if os.getpid() == home else CallsWhenUnpickled(home, proxy)


class Registered:
    """Pickled only by a reducer in copyreg's table."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AssertionError("the registered reducer comes first")


def reduce_registered(thing: Registered) -> tuple[Any, ...]:
    return Registered, (thing.number + 1,)


copyreg.pickle(Registered, reduce_registered)


class RegisteredAsBeamExpects:
    """Pickled only by a reducer in the table of multiprocessing."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("the registered reducer comes first")


def reduce_as_beam_expects(thing: RegisteredAsBeamExpects) -> tuple[Any, ...]:
    return RegisteredAsBeamExpects, (thing.number + 1,)


reduction.register(RegisteredAsBeamExpects, reduce_as_beam_expects)
