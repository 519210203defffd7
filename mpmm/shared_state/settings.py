"""The parameters that hold for a whole namespace: whoever creates it chooses them, later comers take them over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from mpmm.arguments import checked_number, in_brief
from mpmm.errors import InvalidArgumentError

__all__ = ["ALWAYS", "CHANGEABLE", "CHECKPOINTS", "NEVER", "Settings", "checkpoints_by_name"]

#: Whether the CUDA driver suspends model servers, by the value of `suspend_checkpoints`: the names of `suspend`.
CHECKPOINTS = ("cooperative", "auto", "checkpoint")
NEVER, ALWAYS = 0, 2


@dataclass(frozen=True)
class Settings:
    """Numbers of `ModelManager`, with Beam's defaults where Beam has them. Stored as one float each, in this order."""

    slack_percentage: float = 0.10
    poll_interval: float = 0.5
    peak_window_seconds: float = 30.0
    min_data_points: float = 5
    smoothing_factor: float = 0.2
    eviction_cooldown_seconds: float = 10.0
    min_model_copies: float = 1
    wait_timeout_seconds: float = 300.0
    lock_timeout_seconds: float = 60.0
    fallback_memory_mb: float = 16000.0
    memory_budget_mb: float = math.inf  # none
    default_estimate_mb: float = 4000.0
    max_overtake_seconds: float = 2.0
    memory_return_seconds: float = 5.0
    load_timeout_seconds: float = math.inf
    max_model_copies: float = math.inf  # none
    idle_ttl_seconds: float = math.inf  # none
    max_waiting: float = math.inf  # none
    suspend_budget_mb: float = math.inf  # chosen by what the host has, see `Header.HOST_SHARE_MB`
    suspend_checkpoints: float = 1  # an index into CHECKPOINTS

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            low, high, unit = _RANGES[field.name]
            number = checked_number(field.name, value, low, high, unit)
            if unit == _COUNT and math.isfinite(number) and not number.is_integer():
                raise InvalidArgumentError(f"{field.name}={in_brief(value)}: expected {_COUNT}, a whole number")
            object.__setattr__(self, field.name, number)

    def changed(self, changes: Mapping[str, object]) -> Settings:
        """Return these parameters with some changed at run time; None is no limit. Raises InvalidArgumentError."""
        for name, value in changes.items():
            if name not in _RANGES:
                raise InvalidArgumentError(f"setting {in_brief(name)}: expected one of {', '.join(CHANGEABLE)}")
            if name not in CHANGEABLE:
                raise InvalidArgumentError(f"{name} cannot be changed at run time: {_FIXED[name]}")
            if value is None and not math.isinf(_RANGES[name][1]):
                raise InvalidArgumentError(f"{name}=None: expected {_RANGES[name][2]}")
        given: Any = {name: math.inf if value is None else value for name, value in changes.items()}
        return replace(self, **given)


def checkpoints_by_name(suspend: object) -> float:
    """Return the number that a value of `suspend` stands for. Raises InvalidArgumentError."""
    if suspend not in CHECKPOINTS:
        raise InvalidArgumentError(f"suspend={in_brief(suspend)}: expected one of {', '.join(CHECKPOINTS)}")
    return float(CHECKPOINTS.index(str(suspend)))


_SECONDS = (0.0, math.inf, "seconds")
_MB = (1.0, 1e9, "MB")
_COUNT = "a count"
_RANGES: dict[str, tuple[float, float, str]] = {
    "slack_percentage": (0.0, 0.99, "a fraction"),
    "poll_interval": (0.01, 3600.0, "seconds"),
    "peak_window_seconds": (0.01, 86400.0, "seconds"),
    "min_data_points": (1, 1e6, _COUNT),
    "smoothing_factor": (0.0, 1.0, "a fraction"),
    "eviction_cooldown_seconds": _SECONDS,
    "min_model_copies": (0, 1e6, _COUNT),
    "wait_timeout_seconds": _SECONDS,
    "lock_timeout_seconds": (0.001, 86400.0, "seconds"),
    "fallback_memory_mb": _MB,
    "memory_budget_mb": (1.0, math.inf, "MB"),
    "default_estimate_mb": _MB,
    "max_overtake_seconds": _SECONDS,
    "memory_return_seconds": _SECONDS,
    "load_timeout_seconds": (0.001, math.inf, "seconds"),
    "max_model_copies": (1, math.inf, _COUNT),
    "idle_ttl_seconds": _SECONDS,
    "max_waiting": (0, math.inf, _COUNT),
    "suspend_budget_mb": (0.0, math.inf, "MB"),
    "suspend_checkpoints": (0, 2, _COUNT),
}
_SOURCE = "each process has made its source of memory figures with it; slack_percentage sets the limit"
_FIXED = {
    "fallback_memory_mb": _SOURCE,
    "memory_budget_mb": _SOURCE,
    "suspend_checkpoints": "it is what was given as `suspend` when the namespace was created",
    "wait_timeout_seconds": "it is each manager's own; `timeout_seconds` of a call is for that call",
}
#: The parameters that `ModelManager.update_settings` changes.
CHANGEABLE = tuple(name for name in _RANGES if name not in _FIXED)
