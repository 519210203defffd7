"""Sources of memory figures, and the choice of one.

A source measures; the monitor (`mpmm.memory.monitor`) decides when, and keeps the figures.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable

from mpmm.errors import InvalidArgumentError, SourceUnavailableError
from mpmm.sources.base import (
    START_TIMEOUT_S,
    DeviceInfo,
    DeviceSample,
    Measures,
    MemorySource,
    counts_named_only,
    frees_late,
    ignores_names,
    is_accounting_only,
    process_knowledge,
    unavailable,
    what_it_measures,
)
from mpmm.sources.booked import BookedSource
from mpmm.sources.timeouts import answer_within
from mpmm.text.printable import printable_logger

__all__ = [
    "DeviceInfo",
    "DeviceSample",
    "Measures",
    "MemorySource",
    "SourceUnavailableError",
    "choose_source",
    "counts_named_only",
    "frees_late",
    "ignores_names",
    "is_accounting_only",
    "process_knowledge",
    "what_it_measures",
]

SOURCE_VARIABLE = "MPMM_MEMORY_SOURCE"
# Since when sources are starting, or hang as they start, by name and process: a forked child tries for itself.
_starting: dict[tuple[str, int], float] = {}


def choose_source(
    name: str | MemorySource = "auto",
    *,
    fallback_memory_mb: float = 16000.0,
    budget_mb: float | None = None,
    logger: logging.Logger | None = None,
    warn: bool = True,
) -> MemorySource:
    """Return the source called `name`, ready to measure.

    name: `nvml`, `nvidia-smi`, `amdsmi`, `host`, `booked`, or `auto` for the first of `nvml`, `nvidia-smi`,
        `amdsmi` and `booked` that works. `$MPMM_MEMORY_SOURCE` replaces `auto`, and nothing else. A source
        object is returned as it is.
    fallback_memory_mb: the total of `booked`.
    budget_mb: the total of `host`; the other sources measure theirs.
    logger: gets one warning when `auto` falls back to `booked`, unless `warn` is off.

    Raises InvalidArgumentError for an unknown name, SourceUnavailableError (a child of it) if a source
    that was named cannot work here. A driver that has not answered within `START_TIMEOUT_S` does not work.
    """
    if not isinstance(name, str):
        if isinstance(name, MemorySource):
            return name
        raise InvalidArgumentError(f"source is {name!r}: expected a name or an object with MemorySource's members")
    if name == "auto":
        name = os.environ.get(SOURCE_VARIABLE) or "auto"
    makers = _makers(fallback_memory_mb, budget_mb)
    if name in makers:
        return makers[name]()
    if name != "auto":
        raise InvalidArgumentError(
            f"memory source {name!r}: expected one of auto, {', '.join(makers)} "
            f"(setting: the source parameter, or {SOURCE_VARIABLE} where that is 'auto')"
        )
    reasons = []
    for candidate in ("nvml", "nvidia-smi", "amdsmi"):
        try:
            return makers[candidate]()
        except SourceUnavailableError as error:
            reasons.append(f"{candidate}: {error.reason}")
    if warn:
        (logger or printable_logger(__name__)).warning(
            "No GPU memory to measure (%s). Using accounting alone, with a total of %.0f MB: models are admitted by "
            "their estimates. With a GPU, make sure that its driver is loaded and visible here (in a container: "
            "--gpus all); `mpmm doctor` says what is missing. Without one, memory_source='host' measures the host's "
            "memory, and 'booked' does without this warning",
            "; ".join(reasons),
            fallback_memory_mb,
        )
    return makers["booked"]()


def _makers(fallback_memory_mb: float, budget_mb: float | None) -> dict[str, Callable[[], MemorySource]]:
    """Return the function that makes each source. It imports the source's library, which is not imported before."""

    def nvml() -> MemorySource:
        from mpmm.sources.nvml import NvmlSource

        return _started("nvml", NvmlSource)

    def nvidia_smi() -> MemorySource:
        from mpmm.sources.nvidia_smi import NvidiaSmiSource

        return _started("nvidia-smi", NvidiaSmiSource)

    def amdsmi() -> MemorySource:
        from mpmm.sources.amd import AmdSource

        return _started("amdsmi", AmdSource)

    def host() -> MemorySource:
        from mpmm.sources.host_memory import HostMemorySource

        return HostMemorySource(budget_mb)

    return {
        "nvml": nvml,
        "nvidia-smi": nvidia_smi,
        "amdsmi": amdsmi,
        "host": host,
        "booked": lambda: BookedSource(fallback_memory_mb),
    }


def _started(name: str, make: Callable[[], MemorySource]) -> MemorySource:
    """Return what `make` returns, but give up in time: a driver may hang when it is initialised."""
    this = name, os.getpid()
    if time.monotonic() - _starting.get(this, math.inf) > START_TIMEOUT_S:
        # Another try would hang beside the first one, and hold up its caller for as long again.
        raise unavailable(name, "its driver still hangs in the first call")
    _starting[this] = time.monotonic()

    def start() -> MemorySource:
        try:
            return make()
        finally:
            _starting.pop(this, None)

    try:
        return answer_within(start, START_TIMEOUT_S, f"mpmm-start-{name}")
    except TimeoutError as error:
        raise unavailable(name, f"its driver hangs: {error}") from error
