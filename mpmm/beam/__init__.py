"""Let Apache Beam's `RunInference` use mpmm: `mpmm.beam.install()` in the launching program is all it takes.

    import mpmm.beam
    mpmm.beam.install()
    ... RunInference(handler, use_model_manager=True, model_manager_args={"memory_source": "host"}) ...

Beam reaches its model manager through two modules, and both are replaced:

    apache_beam.ml.inference.model_manager    ->  mpmm.model_manager
    apache_beam.utils.multi_process_shared    ->  mpmm.multi_process_shared

and a few methods of RunInference do what managed models need (`mpmm.beam.run_inference`).

Workers are other processes, and they learn of the installation in one of two ways:

- Pickled objects carry it. `install()` gives the classes of Beam that hold a model handler or a loader a
  `__reduce_ex__`, so that unpickling them installs mpmm first. This needs nothing from the runner, so it
  works where workers get no pipeline options: the local multi-process runner, Beam's worker pool.
- The runner imports it. A worker whose pipeline options say `--beam_plugins=mpmm.beam` imports this
  module while it starts, and the import installs. `install()` also defines a `BeamPlugin`, so runners
  that collect plugins by themselves (Dataflow) list this module without being told.

Without either, importing this module does not change Beam.

Beam itself asks for models, so attributes of a handler stand for the options that other callers pass to
`ModelManager.acquire_model`:

    mpmm_users = 4          Four workers use one copy at a time (`users=`), for a model that may be called from several
                            threads at a time.
    mpmm_expect_mb = 1500   What a copy takes (`expect_mb=`) until the model is measured. An attribute `expect_mb` of
                            what `load_model` returns does the same, from the end of the first load on. The handlers
                            in a `KeyedModelHandler` with several models may have it, too: a copy holds all of the
                            models, so it takes the sum, or that of the `max_models_per_worker_hint` largest.
    mpmm_priority = 3       How urgent batches that wait for the model are (`priority=`), from -10 to 10.

From one host to many
    mpmm shares models between the processes of one host. Every host has its own namespace, with its own memory, queue
    and copies; mpmm sends nothing between hosts. The runner spreads the work, and mpmm makes the best of each host:

    Flink, Spark    Start Beam's worker pool on each host (environment `EXTERNAL`, address `localhost:50000`), with mpmm
                    installed there. Its workers share one namespace. Task slots of a host may outnumber its copies.
    Dask            Every worker process of Beam's `DaskRunner` is a member; those of one host share. See
                    `tools/examples/dask_hosts.py`.
    Dataflow        Put mpmm into the workers' container, or into their requirements, and start with
                    `--beam_plugins=mpmm.beam`.
    Ray             Actors create a `ModelManager` of the same namespace, see `tools/examples/ray_hosts.py`.

    What mpmm does not do: send requests or models to another host, choose a request's host, start or stop workers.
    `mpmm help hosts` says more: what counts as a host, and how a runner that scales by metrics learns of demand.
"""

from __future__ import annotations

import gc
import importlib
import importlib.machinery
import importlib.util
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from mpmm.beam.run_inference import replacements
from mpmm.interpreter.thread_locks import new_rlock
from mpmm.multi_process_shared.forkserver.client import add_preload_hook, remove_preload_hook

__all__ = ["install", "is_installed", "uninstall"]

_BASE = "apache_beam.ml.inference.base"
_MODEL_MANAGER = "apache_beam.ml.inference.model_manager"
_MULTI_PROCESS_SHARED = "apache_beam.utils.multi_process_shared"
_OURS = {_MODEL_MANAGER: "mpmm.model_manager", _MULTI_PROCESS_SHARED: "mpmm.multi_process_shared"}

# The names in the two modules that other modules import one by one.
_NAMES = ("GPUMonitor", "ModelManager", "MultiProcessShared", "QueueTicket", "ResourceEstimator")

# The classes of Beam that travel to workers and to model servers and need the replaced modules there.
_CARRIERS = ("_RunInferenceDoFn", "OOMProtectedFn")

# What the zygote has model servers of this process do first.
_PRELOAD_HOOK = "mpmm.beam:install"

_ABSENT = object()
_lock = new_rlock()
_changes: _Changes | None = None


def install() -> None:
    """Make Beam use mpmm, in this process and in every worker that its pipelines start.

    Any thread may call it, and a second call does nothing. Raises ImportError if Beam is not installed. Warns
    if this Beam is too old to have a model manager; then only `multi_process_shared` is replaced.
    """
    global _changes
    with _lock:
        if _changes is not None:
            return
        changes = _Changes()
        try:
            _replace_modules(changes)
            _replace_methods(changes)
            _inherit_log_levels(changes)
            _mark_carriers(changes)
            _define_plugin(changes)
        except BaseException:
            changes.undo()
            raise
        _changes = changes
        add_preload_hook(_PRELOAD_HOOK)


def uninstall() -> None:
    """Restore everything that `install` changed; does nothing if it is not installed.

    Modules outside Beam that imported a replaced name *while* it was replaced keep it. Objects that were
    pickled before still install mpmm where they are unpickled.
    """
    global _changes
    with _lock:
        if _changes is None:
            return
        remove_preload_hook(_PRELOAD_HOOK)
        _changes.undo()
        _changes = None
        _give_back_imported_meanwhile()
        # A class is listed among its base's subclasses until it is collected, and Dataflow's runner reads that list.
        gc.collect()


def is_installed() -> bool:
    """Return whether Beam uses mpmm in this process."""
    with _lock:
        return _changes is not None


class _Changes:
    """Makes changes and records them, so that it can undo them in reverse order."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def set_module(self, name: str, module: ModuleType) -> None:
        """Put `module` under `name` into sys.modules."""
        old = sys.modules.get(name)
        sys.modules[name] = module

        def put_back() -> None:
            if old is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = old

        self._undo.append(put_back)

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute; if other code overwrites it later, `undo` leaves that in place."""
        old = vars(owner).get(name, _ABSENT)
        setattr(owner, name, value)

        def put_back() -> None:
            if vars(owner).get(name, _ABSENT) is not value:
                return
            if old is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, old)

        self._undo.append(put_back)

    def call_at_undo(self, call: Callable[[], object]) -> None:
        """Let `undo` make this call, too."""
        self._undo.append(call)

    def undo(self) -> None:
        """Undo all changes, the last one first."""
        while self._undo:
            self._undo.pop()()


def _replace_modules(changes: _Changes) -> None:
    """Replace Beam's two modules by ours wherever they are referred to."""
    replaced = [_MULTI_PROCESS_SHARED]
    if _beam_has_model_manager():
        replaced.append(_MODEL_MANAGER)
    swaps: list[tuple[Any, Any]] = []
    for name in replaced:
        stock, ours = sys.modules.get(name), importlib.import_module(_OURS[name])
        if stock is not None and stock is not ours:
            swaps += _counterparts(stock, ours)
        # Import the class now, not at its first use, or every forked worker would import it for itself.
        _ = ours.ModelManager if name == _MODEL_MANAGER else ours.MultiProcessShared
        changes.set_module(name, ours)
    # Import Beam's packages only now, so that their own imports find our modules: Beam's model manager imports torch
    # if it is installed, and would load it into every worker.
    for name in replaced:
        package_name, _, attribute = name.rpartition(".")
        changes.set_attribute(importlib.import_module(package_name), attribute, sys.modules[name])
    _swap_everywhere(swaps, changes)

    base = importlib.import_module(_BASE)
    if _MODEL_MANAGER in replaced and base.ModelManager is None:
        # Beam was imported before us, without torch: then it does without both its manager and `resource`.
        changes.set_attribute(base, "ModelManager", sys.modules[_MODEL_MANAGER].ModelManager)
        resource = _import_or_none("resource")
        if base.resource is None and resource is not None:
            changes.set_attribute(base, "resource", resource)


def _replace_methods(changes: _Changes) -> None:
    """Give RunInference the methods that managed models need, see `mpmm.beam.run_inference`."""
    for owner, name, method in replacements(importlib.import_module(_BASE)):
        changes.set_attribute(owner, name, method)


def _inherit_log_levels(changes: _Changes) -> None:
    """Apply log levels of Beam's two modules, for example by `--sdk_harness_log_level_overrides`, to ours, too.

    Each pair of loggers becomes a chain: unless ours has a level of its own, it takes that of Beam's.
    """
    ours, proxy = logging.getLogger("mpmm"), logging.getLogger("mpmm.multi_process_shared")
    manager, shared = logging.getLogger(_MODEL_MANAGER), logging.getLogger(_MULTI_PROCESS_SHARED)
    # Setting a level, even the same one, makes loggers forget the levels that they have looked up.
    changes.call_at_undo(lambda: ours.setLevel(ours.level))
    for logger, asked_next in ((ours, manager), (proxy, shared), (shared, ours)):
        changes.set_attribute(logger, "parent", asked_next)
    ours.setLevel(ours.level)


def _beam_has_model_manager() -> bool:
    """Return whether the module's file exists: importing it needs torch, and importing its package would import it.

    Raises ImportError if Beam is not installed at all.
    """
    beam = importlib.util.find_spec("apache_beam")
    if beam is None:
        raise ImportError("mpmm.beam needs Apache Beam, which is not installed; try: pip install 'mpmm[beam]'")
    folders = [os.path.join(folder, "ml", "inference") for folder in beam.submodule_search_locations or ()]
    if importlib.machinery.PathFinder.find_spec(_MODEL_MANAGER, folders) is not None:
        return True
    version = getattr(importlib.import_module("apache_beam"), "__version__", "of unknown version")
    warnings.warn(
        f"Apache Beam {version} has no {_MODEL_MANAGER}, so RunInference lacks use_model_manager; only "
        f"{_MULTI_PROCESS_SHARED} is replaced. mpmm is made for Beam 2.72 to 2.77.",
        RuntimeWarning,
        stacklevel=4,
    )
    return False


def _counterparts(found: Any, wanted: Any) -> list[tuple[Any, Any]]:
    """Pair a module and its public classes with those of the same name in another module."""
    pairs = [(found, wanted)]
    for name in _NAMES:
        if hasattr(found, name):
            pairs.append((getattr(found, name), getattr(wanted, name, None)))
    return pairs


def _swap_everywhere(swaps: list[tuple[Any, Any]], changes: _Changes, prefix: str = "") -> None:
    """Replace the first of each pair by the second in the globals of all modules below `prefix`.

    The modules among the firsts are left alone, and so is mpmm itself.
    """
    wanted = {id(found): replacement for found, replacement in swaps}
    defining = {id(found) for found, _ in swaps}
    for name, module in sys.modules.copy().items():
        if not isinstance(module, ModuleType) or id(module) in defining:
            continue
        if not name.startswith(prefix) or name == "mpmm" or name.startswith("mpmm."):
            continue
        for attribute, value in vars(module).copy().items():
            if id(value) in wanted:
                changes.set_attribute(module, attribute, wanted[id(value)])


def _give_back_imported_meanwhile() -> None:
    """Undo the replacement in modules of Beam that were imported while it was in force."""
    base = sys.modules[_BASE]
    for name in _OURS:
        ours = importlib.import_module(_OURS[name])
        stock = _import_or_none(name)
        if stock is None and name == _MODEL_MANAGER and vars(base).get("ModelManager") is ours.ModelManager:
            # As Beam does if its own manager cannot be imported.
            vars(base)["resource"] = None
        # Not recorded: this is the state that an import without us would have left.
        _swap_everywhere(_counterparts(ours, stock), _Changes(), prefix="apache_beam.")


def _import_or_none(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


class _BringInstallation:
    """Comes first in a pickle, so that unpickling installs mpmm before it imports anything of Beam."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_bring_installation, ())


def _bring_installation() -> _BringInstallation:
    install()
    return _BringInstallation()


def _rebuild(_: _BringInstallation, function: Callable[..., Any], *arguments: Any) -> Any:
    """Rebuild an object as plain unpickling would; unpickling the first argument has just installed mpmm."""
    return function(*arguments)


def _mark_carriers(changes: _Changes) -> None:
    """Make pickles of Beam's carrier classes install mpmm wherever they are unpickled."""
    base = importlib.import_module(_BASE)
    for name in _CARRIERS:
        carrier = getattr(base, name, None)
        if carrier is not None:
            changes.set_attribute(carrier, "__reduce_ex__", _bringing(carrier.__reduce_ex__))


def _bringing(plain: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Wrap a class's `__reduce_ex__`. Works with pickle, cloudpickle, dill and copy."""

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
        function, arguments, *state = plain(self, protocol)
        return (_rebuild, (_BringInstallation(), function, *arguments), *state)

    return __reduce_ex__


def _define_plugin(changes: _Changes) -> None:
    """Define a `BeamPlugin`, so that runners that collect plugins have workers import this module.

    They pass on `mpmm.beam.MpmmPlugin`; Beam's worker finds no module of that name, and imports `mpmm.beam`.
    """
    plugin = importlib.import_module("apache_beam.utils.plugin").BeamPlugin
    ours = type("MpmmPlugin", (plugin,), {"__module__": __name__, "__doc__": "Imports mpmm.beam in workers."})
    changes.set_attribute(sys.modules[__name__], "MpmmPlugin", ours)


def _is_worker_that_asks_for_us(environment: Mapping[str, str]) -> bool:
    """Return whether this process is an SDK worker whose pipeline options name this module as a plugin.

    The options are where Beam's `sdk_worker_main` looks for them: in the file PIPELINE_OPTIONS_FILE, else in
    PIPELINE_OPTIONS; as JSON, either below "options" or flat, with or without "beam:option:...:v1" around the
    names.
    """
    if "CONTROL_API_SERVICE_DESCRIPTOR" not in environment:
        return False
    try:
        if "PIPELINE_OPTIONS_FILE" in environment:
            with open(environment["PIPELINE_OPTIONS_FILE"], encoding="utf-8") as file:
                text = file.read()
        else:
            text = environment.get("PIPELINE_OPTIONS", "{}")
        options = json.loads(text)
    except (OSError, ValueError):
        # Beam's worker reads the same text and reports what is wrong with it.
        return False
    if isinstance(options, dict) and "options" in options:
        options = options["options"]
    if not isinstance(options, dict):
        return False
    plugins: list[Any] = []
    for key, value in options.items():
        if re.fullmatch(r"(beam:option:)?beam_plugins?(:v1)?", key):
            plugins += value if isinstance(value, list) else [value]
    return any(isinstance(name, str) and f"{name}.".startswith(f"{__name__}.") for name in plugins)


if _is_worker_that_asks_for_us(os.environ):
    install()
