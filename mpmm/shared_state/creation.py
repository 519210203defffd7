"""Opens the segment that a process joins, or makes a new one. Only `Namespace.join` uses this.

The caller holds the lifecycle lock.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from dataclasses import astuple, fields
from typing import Any

import psutil

from mpmm.errors import InvalidArgumentError, LayoutMismatchError, SegmentCorruptError
from mpmm.shared_state.layout import Capacities, Header, Member
from mpmm.shared_state.lifecycle import close_segment
from mpmm.shared_state.liveness import pid_namespace
from mpmm.shared_state.lock_file import write_once
from mpmm.shared_state.prune import find_moved, sweep_orphans
from mpmm.shared_state.runtime_dir import RuntimeDirectory
from mpmm.shared_state.segment import Segment, SegmentProblem, place_of, segment_lost, segment_name, unlink_segment
from mpmm.shared_state.settings import Settings
from mpmm.shared_state.snapshot import ModelInfo, decode
from mpmm.shared_state.tables import fit_text
from mpmm.shared_state.transaction import float_bits
from mpmm.text.printable import printable_logger

__all__ = ["NoNamespaceError", "StartAgain", "create", "open_or_replace", "read_settings"]

_LOG = printable_logger("mpmm")


class StartAgain(Exception):
    """The namespace to join is being removed."""


class NoNamespaceError(FileNotFoundError):
    """There is no namespace, and none may be made."""


def read_settings(segment: Segment) -> Settings:
    """Return the parameters that the creator of the namespace chose. Raises SegmentProblem for impossible ones."""
    values = [segment.floats[Header.SETTINGS + offset] for offset in range(len(fields(Settings)))]
    try:
        return Settings(*values)
    except InvalidArgumentError as error:
        raise SegmentProblem(f"parameters that cannot be ({error})", "those of a manager") from error


def open_or_replace(
    runtime: RuntimeDirectory, deserted: bool, must_exist: bool
) -> tuple[Segment | None, tuple[ModelInfo, ...]]:
    """Return the namespace's segment, None if one has to be made; and the models whose estimates are kept."""
    estimates: tuple[ModelInfo, ...] = ()
    name = segment_name(runtime.root, runtime.name)
    try:
        segment = Segment.open(name, _token_if_any(runtime)) or find_moved(runtime, name)
        if segment is not None:
            read_settings(segment)
    except SegmentProblem as problem:
        if not deserted:
            raise LayoutMismatchError(
                f"namespace {runtime.name!r} is in use with an incompatible segment {name}: found {problem.found}, "
                f"expected {problem.expected}; end its processes, or choose another namespace",
                name=name,
                found=problem.found,
                expected=problem.expected,
            ) from None
        _LOG.info("mpmm %s: replacing a stale segment: %s", runtime.name, problem)
        unlink_segment(name)
        segment = None
    if segment is not None and segment.is_closed and not deserted:
        # The process that has closed it is about to remove it.
        segment.close()
        raise StartAgain
    if (
        segment is not None
        and deserted
        and (segment.is_closed or close_segment(segment, runtime, (Member.WORKER, Member.SERVER, Member.GUEST)))
    ):
        # All users and their model servers are gone: only the estimates of their models are still valid. The
        # newcomer chooses the parameters.
        with contextlib.suppress(SegmentCorruptError):
            models = decode(bytearray(segment.copy()), segment.layout, runtime.name, name, with_events=False).models
            estimates = tuple(model for model in models if model.kind == "model")
        segment.unlink()
        segment.close()
        segment = None
    if segment is None and not deserted:
        # A new segment would be a second set of accounts.
        raise segment_lost(runtime.name, name)
    if segment is None and must_exist:
        raise NoNamespaceError(f"there is no namespace {runtime.name!r} in {runtime.root}")
    if segment is not None:
        # The token may have been removed; it still is the same namespace.
        write_once(runtime.file("token"), f"{segment.words[Header.TOKEN]:016x}")
    return segment, estimates


def create(runtime: RuntimeDirectory, capacities: Capacities, settings: Settings, source: str) -> Segment:
    sweep_orphans()
    runtime.sweep()
    try:
        segment = Segment.create(segment_name(runtime.root, runtime.name), capacities, _token(runtime))
    except FileExistsError:
        # Made by a process that holds another `lifecycle.lock`.
        raise StartAgain from None
    words = segment.words
    # No process uses the segment before it is sealed, so these stores need no transaction.
    words[Header.CREATED_WALL] = time.time_ns()
    words[Header.PID_NAMESPACE] = pid_namespace()
    words[Header.ROOT_PLACE], words[Header.ROOT_MOUNTS] = place_of(runtime.root)
    place = os.fsencode(os.path.realpath(runtime.root))
    _store_text(words, Header.ROOT, place if len(place) <= Header.ROOT_BYTES else b"")
    for offset, value in enumerate(astuple(settings)):
        words[Header.SETTINGS + offset] = float_bits(float(value))
    words[Header.HOST_SHARE_MB] = float_bits(_host_share_mb())
    _store_text(words, Header.SOURCE_ASKED, fit_text(source, Header.SOURCE_NAME_BYTES))
    segment.seal()
    return segment


def _host_share_mb() -> float:
    """Return the host memory that suspended copies may take by default: half of what is left."""
    # Imported here, because model servers join, too, and never create.
    from mpmm.sources.host_memory import host_memory_left_mb

    try:
        return host_memory_left_mb() / 2
    except (OSError, ValueError, psutil.Error) as error:
        _LOG.warning(
            "mpmm: nothing is suspended, because the host's memory is unknown: %s; set suspend_budget_mb",
            error,
        )
        return 0.0


def _store_text(words: Any, at: int, text: bytes) -> None:
    words[at] = len(text)
    for offset in range(0, len(text), 8):
        words[at + 1 + offset // 8] = int.from_bytes(text[offset : offset + 8], "little")


def _token_if_any(runtime: RuntimeDirectory) -> int | None:
    """Return the word that ties directory and segment together, None if it is missing or invalid."""
    try:
        return int(runtime.file("token").read_text(encoding="ascii"), 16)
    except (FileNotFoundError, ValueError):
        return None


def _token(runtime: RuntimeDirectory) -> int:
    """Return the word that ties directory and segment together, made at first use; lifecycle lock held."""
    path = runtime.file("token")
    while True:
        token = _token_if_any(runtime)
        if token is not None:
            return token
        if not write_once(path, f"{secrets.randbits(64):016x}"):
            # Another process has made one by now, or the file holds no token: then remove it.
            with contextlib.suppress(FileNotFoundError):
                if _token_if_any(runtime) is None:
                    os.unlink(path)
