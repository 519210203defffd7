"""The parameters that hold for a whole namespace: its creator chooses them, and processes that join later follow them.

Each is declared once, in `Settings`, with its default, unit, range and meaning. `ModelManager` checks its arguments
against that, `mpmm help settings` prints it, and a test compares it with `ModelManager`'s signature and docstring.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from mpmm.errors import InvalidArgumentError
from mpmm.text.arguments import checked_number, in_brief

__all__ = ["ALWAYS", "CHANGEABLE", "CHECKPOINTS", "NEVER", "SETTINGS", "Setting", "Settings", "checkpoints_by_name"]

#: Whether the CUDA driver suspends model servers, by the value of `suspend_checkpoints`: the names of `suspend`.
CHECKPOINTS = ("cooperative", "auto", "checkpoint")
NEVER, ALWAYS = 0, 2


@dataclass(frozen=True)
class Setting:
    """The description of one setting, for checks, docs and `mpmm help settings`.

    unit, low, high: which values are allowed. meaning: a sentence. fixed: why it cannot be changed at run time, empty
    if it can be.
    """

    unit: str
    low: float
    high: float
    meaning: str
    fixed: str = ""


def _setting(default: float, unit: str, low: float, high: float, meaning: str, fixed: str = "") -> Any:
    return field(default=default, metadata={"setting": Setting(unit, low, high, meaning, fixed)})


_SECONDS, _SHARE, _COUNT, _MB = "seconds", "a fraction", "a count", "MB"
_SOURCE = "each process has made its source of memory figures with it; slack_percentage sets the limit"
_BUDGET = (
    "the total memory for the `host` source, of model servers alone; None takes that of the whole host, or of its "
    "control group"
)


@dataclass(frozen=True)
class Settings:
    """Numeric parameters of `ModelManager`, with Beam's defaults where it has any; stored as floats, in this order."""

    slack_percentage: float = _setting(0.10, _SHARE, 0.0, 0.99, "the share of a device that is never filled")
    poll_interval: float = _setting(0.5, _SECONDS, 0.01, 3600.0, "the time between two samples of the leader")
    peak_window_seconds: float = _setting(30.0, _SECONDS, 0.01, 86400.0, "how long a peak of memory counts")
    min_data_points: float = _setting(5, _COUNT, 1, 1e6, "readings that the estimator needs before its first solution")
    smoothing_factor: float = _setting(0.2, _SHARE, 0.0, 1.0, "the weight of a new estimate against the old one")
    eviction_cooldown_seconds: float = _setting(
        10.0,
        _SECONDS,
        0.0,
        math.inf,
        "a copy that was used more recently counts as warm, and is evicted after cold ones",
    )
    min_model_copies: float = _setting(
        1, _COUNT, 0, 1e6, "copies of a model beyond this number are surplus, and are evicted first"
    )
    wait_timeout_seconds: float = _setting(
        300.0,
        _SECONDS,
        0.0,
        math.inf,
        "`acquire_model` gives up after this time; 0 takes only what is free at once, and evicts nothing",
        "it is each manager's own; `timeout_seconds` of a call is for that call",
    )
    lock_timeout_seconds: float = _setting(
        60.0,
        _SECONDS,
        0.001,
        86400.0,
        "a transaction gives up waiting for the lock after this time; it takes microseconds",
    )
    fallback_memory_mb: float = _setting(
        16000.0, _MB, 1.0, 1e9, "the total memory where nothing can be measured (`booked`)", _SOURCE
    )
    memory_budget_mb: float = _setting(math.inf, _MB, 1.0, math.inf, _BUDGET, _SOURCE)
    default_estimate_mb: float = _setting(4000.0, _MB, 1.0, 1e9, "what an unknown model is assumed to need")
    max_overtake_seconds: float = _setting(
        2.0,
        _SECONDS,
        0.0,
        math.inf,
        "how long requests for idle copies may overtake the first waiter that needs memory",
    )
    memory_return_seconds: float = _setting(
        5.0, _SECONDS, 0.0, math.inf, "how long unloaded memory may take to come back before it is written off"
    )
    load_timeout_seconds: float = _setting(
        math.inf,
        _SECONDS,
        0.001,
        math.inf,
        "a load that takes longer is abandoned: its reservation is dropped and the model server that it started is "
        "killed, but a loader that hangs in this process is not interrupted",
    )
    max_model_copies: float = _setting(
        math.inf, _COUNT, 1, math.inf, "how many copies of one model may be loaded at a time; None allows any number"
    )
    idle_ttl_seconds: float = _setting(
        math.inf,
        _SECONDS,
        0.0,
        math.inf,
        "a copy that is idle for this long, and not pinned, is unloaded; None keeps it until others need its memory; "
        "`keep_alive_seconds` of a call sets it for one model (-1 for ever, 0 at once)",
    )
    max_waiting: float = _setting(
        math.inf,
        _COUNT,
        0,
        math.inf,
        "how many requests may wait for one model; further ones get QueueFullError at once; None allows any number",
    )
    suspend_budget_mb: float = _setting(
        math.inf,  # the creator then derives it from the host's memory, see `Header.HOST_SHARE_MB`
        _MB,
        0.0,
        math.inf,
        "host memory for suspended copies, which come back sooner than by a load, see `mpmm.suspend`; None takes half "
        "of the host memory that is free when the namespace is created, as far as it is free still, 0 suspends nothing",
    )
    suspend_checkpoints: float = _setting(
        1,  # an index into CHECKPOINTS
        _COUNT,
        0,
        2,
        "the number of the value of `suspend`",
        "it is what was given as `suspend` when the namespace was created",
    )

    def __post_init__(self) -> None:
        for name, setting in SETTINGS.items():
            value = getattr(self, name)
            number = checked_number(name, value, setting.low, setting.high, setting.unit)
            if setting.unit == _COUNT and math.isfinite(number) and not number.is_integer():
                raise InvalidArgumentError(f"{name}={in_brief(value)}: expected {_COUNT}, a whole number")
            object.__setattr__(self, name, number)

    def changed(self, changes: Mapping[str, object]) -> Settings:
        """Return these parameters with some changed at run time; None means no limit. Raises InvalidArgumentError."""
        for name, value in changes.items():
            # People know this setting by the parameter `suspend`.
            setting = SETTINGS.get("suspend_checkpoints" if name == "suspend" else name)
            if setting is None:
                raise InvalidArgumentError(f"setting {in_brief(name)}: expected one of {', '.join(CHANGEABLE)}")
            if setting.fixed:
                raise InvalidArgumentError(f"{name} cannot be changed at run time: {setting.fixed}")
            if value is None and not math.isinf(setting.high):
                raise InvalidArgumentError(f"{name}=None: expected {setting.unit}")
        given: Any = {name: math.inf if value is None else value for name, value in changes.items()}
        return replace(self, **given)


def checkpoints_by_name(suspend: object) -> float:
    """Return the number that a value of `suspend` stands for. Raises InvalidArgumentError."""
    if suspend not in CHECKPOINTS:
        raise InvalidArgumentError(f"suspend={in_brief(suspend)}: expected one of {', '.join(CHECKPOINTS)}")
    return float(CHECKPOINTS.index(str(suspend)))


#: Every setting, by name.
SETTINGS: dict[str, Setting] = {field.name: field.metadata["setting"] for field in fields(Settings)}
#: The parameters that `ModelManager.update_settings` changes.
CHANGEABLE = tuple(name for name, setting in SETTINGS.items() if not setting.fixed)
