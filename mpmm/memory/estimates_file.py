"""Estimates that outlast a namespace: a file, so that the next run has nothing to profile.

    {"format": "mpmm estimates", "version": 1,
     "devices": {"NVIDIA A100-SXM4-40GB": {"detector": {"mb": 3120.5, "measured": true, "updated": 1764072000.0,
                                                        "suspend_s": 1.6, "resume_s": 0.7}}}}

An estimate is kept by tag and by the names of the devices of the namespace, because a model takes more on one kind than
on another. `mb` is in MB (MiB), `measured` says that it was read from processes, `updated` is a Unix time. `suspend_s`
and `resume_s` are how long it takes to suspend and to resume a copy, 0 or missing if that has not been done.

Many processes and namespaces may have the same file. A writer locks a file beside it, reads what others have written
meanwhile, and replaces the file in one step, so a reader finds the old file or the new one, and a writer that is killed
leaves the old one. A file that cannot be read is reported and ignored; the next write replaces it.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpmm.errors import LockTimeoutError
from mpmm.interpreter.thread_locks import new_lock
from mpmm.memory.estimator import ALONE_SD
from mpmm.shared_state.lock_file import LockFile
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.transaction import Transaction
from mpmm.text.printable import printable_logger

__all__ = ["ESTIMATES_PATH_VARIABLE", "Estimate", "EstimatesFile", "NamespaceEstimates"]

_LOG = printable_logger("mpmm")

ESTIMATES_PATH_VARIABLE = "MPMM_ESTIMATES_PATH"
FORMAT, VERSION = "mpmm estimates", 1
# For each kind of devices; the oldest are removed.
TAGS_KEPT = 10_000
LOCK_TIMEOUT_S = 1.0
SAVE_INTERVAL_S = 5.0
# A smaller difference is not worth a new file.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Estimate:
    """The MB that a copy of a model takes; measured: read from its process, not inferred. updated: Unix time.

    suspend_s, resume_s: how long it takes to suspend and to resume a copy; 0: unknown.
    """

    mb: float
    measured: bool
    updated: float
    suspend_s: float = 0.0
    resume_s: float = 0.0

    @property
    def is_possible(self) -> bool:
        """Tell whether mpmm could have written these figures."""
        amounts = (self.mb, self.suspend_s, self.resume_s)
        return all(math.isfinite(amount) and amount >= 0 for amount in amounts) and math.isfinite(self.updated)

    def differs_from(self, other: Estimate) -> bool:
        """Tell whether this differs enough from `other`, which the file has, to write a new file."""
        amounts = ((self.mb, other.mb), (self.suspend_s, other.suspend_s), (self.resume_s, other.resume_s))
        return self.measured != other.measured or any(abs(a - b) > TOLERANCE * max(a, b) for a, b in amounts)


class EstimatesFile:
    """One file. Every method may be called by several processes; none needs the namespace's lock."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._reported = ""

    def read(self, kind: str) -> dict[str, Estimate]:
        """Return the estimates for a kind of devices by tag; none, with a warning, if the file cannot be read."""
        return self._read().get(kind, {})

    def merge(self, kind: str, estimates: Mapping[str, Estimate]) -> None:
        """Add estimates to the file, which is made with its folder if need be; those of others stay.

        Raises OSError if the folder cannot be written, LockTimeoutError if others write for too long.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with closing(LockFile(self.path.with_name(f"{self.path.name}.lock"))) as lock:
            lock.exclusive(LOCK_TIMEOUT_S)
            found = self._read()
            merged = {**found.get(kind, {}), **estimates}
            newest = sorted(merged, key=lambda tag: merged[tag].updated)[-TAGS_KEPT:]
            found[kind] = {tag: merged[tag] for tag in sorted(newest)}
            self._write(found)

    def _read(self) -> dict[str, dict[str, Estimate]]:
        try:
            content = json.loads(self.path.read_bytes())
            found = _parsed(content)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            self._report(f"{type(error).__name__}: {error}")
            return {}
        self._reported = ""
        return found

    def _write(self, estimates: Mapping[str, Mapping[str, Estimate]]) -> None:
        devices = {
            kind: {tag: vars(estimate) for tag, estimate in of_kind.items()} for kind, of_kind in estimates.items()
        }
        text = json.dumps({"format": FORMAT, "version": VERSION, "devices": devices}, indent=1)
        # If this process is killed here, the next writer, which needs the lock, too, replaces the file.
        new = self.path.with_name(f"{self.path.name}.new")
        with open(new, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.path)

    def _report(self, what: str) -> None:
        if what != self._reported:
            _LOG.warning("mpmm: ignoring the estimates in %s (%s); they will be replaced", self.path, what)
        self._reported = what


def _parsed(content: Any) -> dict[str, dict[str, Estimate]]:
    """Return the estimates in a file's content. Raises ValueError and others for any other content."""
    if content["format"] != FORMAT or content["version"] != VERSION:
        raise ValueError(f"{content['format']!r}, version {content['version']!r}: expected {FORMAT!r}, {VERSION}")
    found = {
        str(kind): {
            str(tag): Estimate(
                float(entry["mb"]),
                bool(entry["measured"]),
                float(entry["updated"]),
                float(entry.get("suspend_s", 0.0)),
                float(entry.get("resume_s", 0.0)),
            )
            for tag, entry in of_kind.items()
        }
        for kind, of_kind in content["devices"].items()
    }
    for of_kind in found.values():
        for tag, estimate in of_kind.items():
            if not estimate.is_possible:
                raise ValueError(f"{tag!r}: {estimate}")
    return found


class NamespaceEstimates:
    """A namespace's estimates and their file, as one of its processes sees them."""

    def __init__(self, namespace: Namespace, path: str | os.PathLike[str]) -> None:
        """Describe the file; nothing is read yet."""
        self._namespace = namespace
        self._file = EstimatesFile(path)
        self._kind = ""
        self._remembered: dict[str, Estimate] = {}
        self._saved: dict[str, Estimate] = {}
        self._save_due = 0.0
        self._failed = False
        # One save at a time: that of the background thread, or of the thread that closes the session.
        self._mutex = new_lock()

    def load(self) -> None:
        """Read the file, without the lock; call it once the devices are known."""
        tables = self._namespace.tables
        rows = tables.used_rows(self._namespace.segment.layout.devices)
        self._kind = " + ".join(sorted({tables.device_name(row) for row in rows}))
        self._remembered = self._file.read(self._kind)
        self._saved = dict(self._remembered)

    def recall(self, t: Transaction, model: int, tag: str, span: int = 1) -> None:
        """Take the estimate of a model (row) from the file if there is none yet. Needs the lock.

        span: over how many devices a copy is to be loaded.
        """
        remembered = self._remembered.get(tag)
        row = self._namespace.tables.models[model]
        if remembered is not None and not row.suspends:
            self._namespace.transitions.suspensions.expect(t, model, remembered.suspend_s, remembered.resume_s)
        if remembered is None or row.known:
            return
        if remembered.mb <= row.at_least_mb:
            # The model has run out of memory with more than that free.
            return
        if not remembered.measured and self._is_above_limits(remembered.mb / span):
            # It would have the model refused, and no load could change it. As an unknown one it is measured anew.
            return
        # An inferred estimate keeps yielding to better figures.
        sd_mb = 0.0 if remembered.measured else ALONE_SD * remembered.mb
        self._namespace.transitions.estimates.estimate(t, model, remembered.mb, remembered.measured, sd_mb)

    def _is_above_limits(self, share_mb: float) -> bool:
        """Tell whether an inferred share is larger than the limit of each device, where devices are measured."""
        namespace = self._namespace
        tables, least_free = namespace.tables, namespace.settings.slack_percentage
        if tables.header.source_accounting_only:
            return False
        rows = tables.used_rows(namespace.segment.layout.devices)
        return all(share_mb > tables.devices[row].total_mb * (1.0 - least_free) for row in rows)

    def save_if_due(self) -> None:
        """Write what has changed, every few seconds at most; without the lock."""
        if time.monotonic() >= self._save_due:
            self._save_due = time.monotonic() + SAVE_INTERVAL_S
            self.save()

    def save(self) -> None:
        """Write what has changed; a file that cannot be written is reported once. Without the lock."""
        with self._mutex:
            changed = self._changed()
            if not changed:
                return
            try:
                self._file.merge(self._kind, changed)
            except (OSError, LockTimeoutError) as error:
                if not self._failed:
                    _LOG.warning("mpmm: cannot save estimates in %s: %s", self._file.path, error)
                self._failed = True
                return
            self._failed = False
            self._saved.update(changed)

    def _changed(self) -> dict[str, Estimate]:
        """Return the estimates that differ from those in the file. Reads without the lock; skips unfinished rows."""
        tables, now = self._namespace.tables, time.time()
        changed = {}
        for row in tables.model_rows():
            model = tables.models[row]
            generation, known, measured, mb = model.generation, model.known, model.measured, model.estimate_mb
            tag = tables.tag_of(row)
            if not known or not math.isfinite(mb) or model.generation != generation:
                continue
            saved = self._saved.get(tag)
            found = Estimate(mb, measured, now, model.suspend_s, model.resume_s)
            if saved is None or found.differs_from(saved):
                changed[tag] = found
        return changed
