"""The page of `mpmm help settings`: parameters of `ModelManager` and environment variables, as one table each.

Settings of a whole namespace are declared in `shared_state.settings`, the other parameters and the variables here; a
test checks that the signature and the docstring of `ModelManager` agree with both.
"""

from __future__ import annotations

import inspect
import math
from typing import NamedTuple

from mpmm.shared_state.settings import CHANGEABLE, CHECKPOINTS, SETTINGS, Setting

__all__ = ["ENVIRONMENT", "OWN_PARAMETERS", "Variable", "allowed", "entry", "settings_page"]

#: Parameters of `ModelManager` that each manager has for itself, or that are not numbers, with their meanings.
OWN_PARAMETERS: dict[str, str] = {
    "monitor": "takes the place of the memory source: a `GPUMonitor`, or any object with the methods of Beam's monitor",
    "verbose_logging": "logs the steps of the estimator, and which requests queue",
    "namespace": "the name that processes share: all processes of one user on one host that pass the same name share "
    "one namespace; None makes a private one, which forked children and pickled copies share. A name is 1 to 64 "
    "characters of `A-Z a-z 0-9 _ . -`, does not start with a dot, and is not `shared`",
    "memory_source": "where memory figures come from: `auto`, `nvml`, `nvidia-smi`, `amdsmi`, `host`, `booked`, or a "
    "`MemorySource`; see `mpmm help memory`",
    "suspend": "which evicted copies may be kept in host memory instead of being unloaded, see `mpmm.suspend`: "
    "`cooperative`, those of objects with `sleep()` and `wake_up()`; `checkpoint`, also those of any model server, "
    "by the CUDA driver; `auto`, the latter on drivers that are known to be good",
    "devices": "indices or uuids of the devices to manage, of those that `CUDA_VISIBLE_DEVICES` shows; None takes all",
    "estimates_path": "a file that keeps the estimates from run to run; None takes `$MPMM_ESTIMATES_PATH`, and without "
    "that keeps none; the first manager of a process decides for the process",
    "autoscaling_metric": "what Beam's metric `num_loaded_models_<tag>` counts in this process: `loaded` copies, or "
    "`demand`, those in use, being loaded and waited for; None keeps what an earlier manager chose, `loaded` at first",
    "capacities": "how many rows the shared tables have, an `mpmm.Capacities`",
    "runtime_root": "the folder of the runtime directories; None takes `$MPMM_RUNTIME_DIR`, and without that "
    "`/tmp/mpmm-<uid>`",
}
#: Defaults that are clearer in words than as the value in the signature.
_DEFAULTS = {"suspend_budget_mb": "half of the free host memory", "memory_budget_mb": "none", "devices": "all"}
#: How the units of the settings are shown.
_UNITS = {"seconds": "s", "a fraction": "share", "a count": "count", "MB": "MB"}


class Variable(NamedTuple):
    """An environment variable: its default, what its value is, and what it means."""

    default: str
    value: str
    meaning: str


#: The environment variables that mpmm reads.
ENVIRONMENT: dict[str, Variable] = {
    "MPMM_RUNTIME_DIR": Variable(
        "`/tmp/mpmm-<uid>`",
        "folder",
        "holds the runtime directories, mode 0700; the default is the same for every process of a user, so neither "
        "TMPDIR nor XDG_RUNTIME_DIR counts",
    ),
    "MPMM_MEMORY_SOURCE": Variable("`auto`", "name", 'stands in for `memory_source="auto"`'),
    "MPMM_ESTIMATES_PATH": Variable("none", "file", "stands in for `estimates_path`"),
    "MPMM_ARENA_MB": Variable(
        "256", "MB", "bounds the shared memory for payloads in a process; 0 sends all payloads through sockets"
    ),
    "MPMM_PRELOAD": Variable(
        "none", "modules", "names modules, separated by commas, that model servers import beforehand"
    ),
    "MPMM_ZYGOTE": Variable("1", "0 or 1", "0 spawns model servers instead of forking them"),
    "MPMM_CORE": Variable(
        "none",
        "`python` or `compiled`",
        "`python` does without the compiled core, which is built if there is a C compiler and makes reuse several "
        "times faster; `compiled` requires it; `mpmm doctor` shows which one is in use",
    ),
    "MPMM_LOAD_AHEAD": Variable(
        "1",
        "0 or 1",
        "0 loads Beam's models at their first batches, even if memory is already free when a worker is set up",
    ),
    "MPMM_DASHBOARD_TOKEN": Variable(
        "random",
        "text",
        "the token of `mpmm dashboard`, if `--token` is not given: at least 8 letters, digits or . _ ~ -",
    ),
}
#: About the environment of programs that `mpmm run` starts, and of model servers that a steady load starts.
_FOR_PROGRAMS = (
    "`mpmm run` sets `MPMM_LEASE_MB`, `MPMM_DEVICES` and `MPMM_MEMORY_FRACTION` for its program: the memory that it "
    "leased, the devices, and the share of each device's memory. Model servers that a loader starts find the same for "
    "the memory that is reserved for the load, if that is `steady=True` or happens within `mpmm run`; a loader itself "
    "calls `mpmm.current_placement()`. If the size of a device is unknown, its share is missing, or empty."
)


def allowed(setting: Setting) -> str:
    """Return the unit of a setting and the values that are allowed, as text: `share, 0 to 0.99`."""
    least, most = (f"{value:.12g}" for value in (setting.low, setting.high))
    return f"{_UNITS[setting.unit]}, " + (f"at least {least}" if math.isinf(setting.high) else f"{least} to {most}")


def entry(name: str) -> str:
    """Return what the docstring of `ModelManager` says about a parameter, on one line."""
    setting = SETTINGS.get(name)
    return f"{name}: {OWN_PARAMETERS[name]}." if setting is None else f"{name} ({allowed(setting)}): {setting.meaning}."


def settings_page() -> str:
    """Return the page as Markdown."""
    from mpmm.model_manager import ModelManager

    parameters = list(inspect.signature(ModelManager.__init__).parameters.values())[1:]
    rows = [_row(parameter.name, parameter.default) for parameter in parameters]
    variables = [f"| `{name}` | {one.default} | {one.value} | {one.meaning} |" for name, one in ENVIRONMENT.items()]
    return "\n".join(
        [
            "# Settings",
            "",
            "All of them are parameters of `ModelManager`. The process that creates a namespace chooses the settings "
            "that hold for all of its processes; later processes log a warning if theirs differ. `mpmm settings` shows "
            "them; `mpmm settings set NAME VALUE` or `manager.update_settings(...)` changes the changeable ones for "
            "all processes. Memory is in MiB.",
            "",
            "| parameter | default | values | changeable | meaning |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "## Environment variables",
            "",
            "| variable | default | value | meaning |",
            "|---|---|---|---|",
            *variables,
            "",
            _FOR_PROGRAMS,
            "",
        ]
    )


def _row(name: str, default: object) -> str:
    setting = SETTINGS.get(name)
    if setting is None:
        # The only one of these that holds for the whole namespace.
        of_all = name == "suspend"
        values = ", ".join(f"`{choice}`" for choice in CHECKPOINTS) if of_all else ""
        changeable = "no" if of_all else ""
        return f"| `{name}` | {_shown(name, default)} | {values} | {changeable} | {OWN_PARAMETERS[name]} |"
    changeable = "yes" if name in CHANGEABLE else "no"
    return f"| `{name}` | {_shown(name, default)} | {allowed(setting)} | {changeable} | {setting.meaning} |"


def _shown(name: str, default: object) -> str:
    if name in _DEFAULTS:
        return _DEFAULTS[name]
    if default is None or default == math.inf:
        return "none"
    return f"{default:g}" if isinstance(default, int | float) and not isinstance(default, bool) else f"`{default}`"
