"""Leftovers of imports in a process besides code, and how servers that are forked afterwards deal with them.

A server that imports a module itself has its own copy of everything. A server that is forked from a template that has
imported the module would share it with all others. So the template checks itself before and after each import:

    left behind                                            in forked servers
    ─────────────────────────────────────────────────────────────────────────────────────────────────────
    Python's and NumPy's global generators, torch's,       seeded anew, unless the import seeded them: then each server
      instances of `random.Random`, NumPy's other          has the state that this seed gives, as if it had imported
      generators
    environment variables                                  set in each server
    signal handlers                                        kept, except for the signals that end a server
    descriptors, threads, child processes, memory that     a reason not to import the module before a fork: all servers
      is shared for writing, another working directory       would have the same one, or none
    a user's module's pid, random bytes (`uuid.uuid4()`,   the same
      `secrets`) and temporary names, anyone's temporary
      files that still exist (see `noted_calls`)
    values read from a variable that differs from server   a reason to have a template for each value
      to server (`CUDA_VISIBLE_DEVICES`, `MPMM_LEASE_MB`)
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import re
import sys
import weakref
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

from mpmm.multi_process_shared.forkserver.noted_calls import NotedCalls

__all__ = ["PER_PROCESS_VARIABLES", "Watch"]

# These differ from one worker or server to the next, and hardly any library reads them at import.
PER_PROCESS_VARIABLES = re.compile(
    r"WORKER_ID|PIPELINE_OPTIONS(_FILE)?|\w+_API_SERVICE_DESCRIPTOR|PYTEST_\w+|(CUDA|HIP)_VISIBLE_DEVICES|PWD|OLDPWD|SHLVL|_|COLUMNS|LINES"
    r"|MPMM_(LEASE_MB|DEVICES|MEMORY_FRACTION)"
)
# Devices without a state that readers or writers would share.
STATELESS = frozenset({"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"})
# Modules whose reads do not matter. The first copies the whole environment for the scripts that a web server starts.
# Beam's worker looks up which worker it is and how to reach its runner, which no model server does; a template for each
# worker would cost every server the memory and the time of its imports.
HARMLESS_READERS = re.compile(r"wsgiref\.handlers|apache_beam\..+")
# Imported before the modules that need them, so that later changes of their generators can be told apart.
FIRST = ("numpy.random", "torch")
# NumPy draws 128 bits for a generator without a seed. No person chooses such a long seed.
LONGEST_SEED_BITS = 64


class _Environ(os._Environ[str]):
    """An `os.environ` that notes which of PER_PROCESS_VARIABLES are read."""

    def __getitem__(self, key: str) -> str:
        if isinstance(key, str) and PER_PROCESS_VARIABLES.fullmatch(key):
            reader = _reader()
            if not HARMLESS_READERS.fullmatch(reader):
                _reads.add((key, reader))
        return super().__getitem__(key)


def _reader() -> str:
    """Return the name of the module that reads a variable."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") in ("os", "_collections_abc", "collections.abc"):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__")) if frame is not None else ""


# Variables, each with the module that has read it.
_reads: set[tuple[str, str]] = set()


class Watch:
    """Watches this process, a template, for what imports leave behind; the servers that it forks call `renew`."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Start watching; environment: what imports are to find in `os.environ`."""
        os.environ.clear()
        os.environ.update(environment)
        os.environ.__class__ = _Environ
        self._environment = dict(environment)
        self._unseeded: weakref.WeakSet[random.Random] = weakref.WeakSet()
        self._python_seeded = False
        self._numpy_seeded: bool | None = None
        self._numpy_drew = False
        self._watches_draws = False
        self._torch_seed: int | None = None
        # NumPy's bit generators for which it drew a seed.
        self._drawn: list[Any] = []
        self._calls = NotedCalls()
        self._watch_random()
        self._folder = os.getcwd()
        self._before: tuple[dict[int, str], set[str], set[str]] = ({}, set(), set())

    # ---- in the template -----------------------------------------------------------------------------------

    def begin(self) -> None:
        """Record the state before an import, and start noting calls; `end` must follow."""
        _reads.clear()
        self._numpy_drew = False
        self._before = (_descriptors(), _shared_mappings(), _children())
        self._calls.begin()

    def end(self) -> None:
        """Note no more calls: the import has ended."""
        self._calls.end()

    def reads(self, but_by: str = "") -> set[str]:
        """Return the variables that differ from server to server and were read since `begin`.

        but_by: a module whose reads do not count.
        """
        return {variable for variable, reader in _reads if reader != but_by}

    def problem(self) -> str | None:
        """Return what has changed since `begin` and keeps servers from being forked; None if nothing has."""
        descriptors, mappings, children = self._before
        for fd, target in _descriptors().items():
            if descriptors.get(fd) != target and target not in STATELESS:
                return f"a descriptor of {target}"
        if _shared_mappings() - mappings:
            return "memory that is shared for writing"
        if _children() - children:
            return "a child process"
        if _working_directory() != self._folder:
            return "another working directory"
        return self._calls.problem() or self._generators()

    def known(self, name: str) -> None:
        """Note the state of a library's generator right after the import of `name`, one of FIRST."""
        library: Any = sys.modules.get(name)
        if name == "numpy.random" and library is not None:
            self._numpy_seeded = False
            original = library.seed

            def note_seed(seed: Any = None) -> Any:
                self._numpy_seeded = seed is not None
                return original(seed)

            library.seed = note_seed
            # Searching all objects for new generators takes a tenth of a second, and hardly any import makes one.
            draw = library.bit_generator.randbits

            def note_draw(bits: int) -> int:
                self._numpy_drew = True
                return int(draw(bits))

            library.bit_generator.randbits = note_draw
            self._watches_draws = self._calls.numpy_is_watched = True
        if name == "torch":
            with contextlib.suppress(Exception):
                self._torch_seed = library.initial_seed()

    def changes(self) -> tuple[dict[str, str], list[str], Any]:
        """Return, for `renew`: variables that imports have set and removed, and the state of a seeded generator."""
        now = os.environ._data  # type: ignore[attr-defined]  # a read that is not noted
        found = {os.fsdecode(name): os.fsdecode(value) for name, value in now.items()}
        put = {name: value for name, value in found.items() if self._environment.get(name) != value}
        removed = [name for name in self._environment if name not in found]
        return put, removed, random.getstate() if self._python_seeded else None

    def _generators(self) -> str | None:
        numpy_random: Any = sys.modules.get("numpy.random")
        if numpy_random is None:
            return None
        legacy = numpy_random.mtrand._rand._bit_generator
        if self._numpy_seeded is None and _seed_sequence(legacy) is None:
            return "a NumPy generator that was seeded before it was watched"
        if self._watches_draws and not self._numpy_drew:
            return None
        known = {id(generator) for generator in (legacy, *self._drawn)}
        for thing in gc.get_objects():
            if not isinstance(thing, numpy_random.BitGenerator) or id(thing) in known:
                continue
            if _is_drawn(getattr(_seed_sequence(thing), "entropy", None)):
                if not _seed_anew(thing):
                    return "a NumPy generator without a seed that cannot be given another one"
                self._drawn.append(thing)
        return None

    def _watch_random(self) -> None:
        original, unseeded = random.Random.seed, self._unseeded
        hidden: random.Random = random._inst  # the generator behind the functions

        def seed(generator: random.Random, a: Any = None, version: int = 2) -> None:
            with contextlib.suppress(TypeError):
                unseeded.add(generator) if a is None else unseeded.discard(generator)
            if generator is hidden:
                self._python_seeded = a is not None
            original(generator, a, version)

        self._seed_of_random = original
        random.Random.seed = seed  # type: ignore[method-assign, assignment]  # to watch it
        random.seed = hidden.seed

    def _unwatch_random(self) -> None:
        random.Random.seed = self._seed_of_random  # type: ignore[method-assign]  # as it was
        random.seed = random._inst.seed

    # ---- in a server ---------------------------------------------------------------------------------------

    def renew(self, environment: Iterable[tuple[str, str]], changes: tuple[dict[str, str], list[str], Any]) -> None:
        """Make this fork of the template like a process that has imported everything itself, with this environment."""
        put, removed, state = changes
        os.environ.__class__ = os._Environ
        os.environ.clear()
        os.environ.update(environment)
        os.environ.update(put)
        for name in removed:
            os.environ.pop(name, None)
        self._unwatch_random()
        for generator in list(self._unseeded):
            generator.seed()
        if state is not None:
            # Python has given it a new seed at the fork.
            random.setstate(state)
        if "numpy.random" in sys.modules and not self._numpy_seeded:
            sys.modules["numpy.random"].seed()
        for generator in self._drawn:
            _seed_anew(generator)
        torch: Any = sys.modules.get("torch")
        if torch is not None:
            with contextlib.suppress(Exception):
                if self._torch_seed in (None, torch.initial_seed()):
                    torch.default_generator.seed()


def _seed_sequence(generator: Any) -> Any:
    """Return the seed sequence of a bit generator; None if it was seeded in the old way."""
    # The second name is that of older versions.
    return getattr(generator, "seed_seq", None) or getattr(generator, "_seed_seq", None)


def _seed_anew(generator: Any) -> bool:
    """Give a bit generator another seed that NumPy draws; return whether that is possible.

    The seed sequence is read-only, but unpickling can set its state, and generators that are spawned later are derived
    from it.
    """
    try:
        other = type(generator)()
        sequence, new = _seed_sequence(generator), _seed_sequence(other)
        *_, state = new.__reduce__()
        sequence.__setstate__(state)
        generator.state = other.state
    except Exception:
        return False
    return bool(sequence.entropy == new.entropy)


def _is_drawn(entropy: Any) -> bool:
    """Tell whether a generator's entropy is a number that NumPy drew."""
    return isinstance(entropy, int) and entropy.bit_length() > LONGEST_SEED_BITS


def _descriptors() -> dict[int, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        # The descriptor through which they were listed is closed by now.
        with contextlib.suppress(OSError):
            found[int(fd)] = os.readlink(f"/proc/self/fd/{fd}")
    return found


def _shared_mappings() -> set[str]:
    """Return the address ranges of memory that this process shares for writing."""
    with open("/proc/self/maps", "rb") as file:
        parts = (line.split(None, 2) for line in file)
        return {where.decode() for where, permissions, _ in parts if permissions[1:4:2] == b"ws"}


def _children() -> set[str]:
    """Return the child processes, as far as the kernel tells."""
    found: set[str] = set()
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{thread}/children", encoding="ascii") as file:
            found.update(file.read().split())
    return found


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:
        return None
