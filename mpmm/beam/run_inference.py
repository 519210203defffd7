"""What Beam's `RunInference` must do differently when a manager evicts, reloads and lends out its models.

`mpmm.beam.install` replaces these methods of Beam, and `uninstall` restores them:

    _RunInferenceDoFn._run_inference    A result that is computed while it is read is read before the copy is released,
                                        because the manager may then hand it to another process or evict it.
    _RunInferenceDoFn._load_model       An update of a keyed handler with several models reaches the handler even if no
                                        copy is loaded. Copies of the previous version are evicted first. A model whose
                                        tag is a uuid gets a readable name. If memory is free, a model is loaded before
                                        its first batch arrives, see `load_ahead`. Attributes of the handler set the
                                        options of requests for its model, see `OPTIONS`.
    _SharedModelWrapper.all_models      Handles become proxies, because such an update calls methods of every copy.
    _SharedModelWrapper.next_model      The demand for the model is reported, if `autoscaling_metric` says so.
    _SharedModelWrapper.release_model   The same. A copy of an updated model is released under the tag of its acquire.

Without `use_model_manager` they behave as before.
"""

from __future__ import annotations

import functools
import heapq
import math
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from numbers import Real
from types import ModuleType
from typing import Any

from mpmm.beam.load_ahead import load_ahead
from mpmm.errors import ModelServerError, SharedObjectReleasedError
from mpmm.interpreter.fork_hooks import in_forked_child
from mpmm.interpreter.thread_locks import new_lock
from mpmm.memory.beam_metrics import report_demand, reports_demand
from mpmm.multi_process_shared import MultiProcessShared, SharedProxy
from mpmm.text.display_names import set_display_name

__all__ = ["OPTIONS", "name_of_handler", "options_of_handler", "replacements"]

Method = Callable[..., Any]

# The tag that Beam gives a model without `model_identifier`, also when it loads it anew after a time-out.
_UUID = re.compile(r"[0-9a-f]{32}(_reload_\d+)?")
# The attributes in which Beam's handlers, and most others, keep the path that they load from.
_PATHS = (
    *("_model_uri", "_model_path", "_state_dict_path", "_torch_script_model_path", "_engine_path", "_model_name"),
    *("model_uri", "model_path", "model_name", "_model", "_path", "path"),
)
#: The attributes of a handler that set options of requests for its model, each with its option of `acquire_model`.
OPTIONS = {"mpmm_users": "users", "mpmm_expect_mb": "expect_mb", "mpmm_priority": "priority"}
# A longer path is shown by its end, which says more than its beginning.
PATH_SHOWN = 48


def replacements(base: ModuleType) -> Iterator[tuple[type, str, Method]]:
    """Yield class, name and new method, for each of them that this Beam has in `apache_beam.ml.inference.base`."""
    wanted = (
        ("_RunInferenceDoFn", "_run_inference", _draining),
        ("OOMProtectedFn", "__call__", _drained_if_asked),
        ("_RunInferenceDoFn", "_load_model", _updating_keyed_models),
        ("_SharedModelWrapper", "all_models", _as_proxies),
        ("_SharedModelWrapper", "next_model", _reporting_demand),
        ("_SharedModelWrapper", "release_model", _as_acquired),
    )
    for class_name, name, wrapped in wanted:
        owner = getattr(base, class_name, None)
        plain = vars(owner).get(name) if isinstance(owner, type) else None
        if isinstance(owner, type) and callable(plain):
            yield owner, name, functools.wraps(plain)(wrapped(plain))


class _ThisThread(threading.local):
    """drains: Beam's next protected call in this thread is an inference on a copy that it releases right after."""

    drains = False


_this_thread = _ThisThread()


def _draining(plain: Method) -> Method:
    def _run_inference(self: Any, *args: Any, **kwargs: Any) -> Any:
        _this_thread.drains = bool(getattr(self, "use_model_manager", False))
        try:
            return plain(self, *args, **kwargs)
        finally:
            _this_thread.drains = False

    return _run_inference


def _drained_if_asked(plain: Method) -> Method:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _this_thread.drains:
            return plain(self, *args, **kwargs)
        _this_thread.drains = False
        inference = self.func
        # Read it inside the protection: a generator runs out of memory only while it is read.
        return plain(type(self)(lambda *args, **kwargs: list(inference(*args, **kwargs))), *args, **kwargs)

    return __call__


def _updating_keyed_models(plain: Method) -> Method:
    def _load_model(self: Any, side_input_model_path: Any = None) -> Any:
        before = self._model
        wrapper = plain(self, side_input_model_path)
        if getattr(self, "use_model_manager", False):
            if _UUID.fullmatch(wrapper.model_tag):
                set_display_name(wrapper.model_tag, name_of_handler(self._model_handler))
            if options := options_of_handler(self._model_handler):
                wrapper.models.set_request_defaults(wrapper.model_tag, **options)
            if before is None and side_input_model_path is None and not getattr(self, "_load_model_at_runtime", False):
                _load_ahead(wrapper)
            if before is not None and before.model_tag != wrapper.model_tag:
                wrapper.models.supersede(before.model_tag, wrapper.model_tag)
            if isinstance(side_input_model_path, list):
                # Beam has updated the copies of an earlier wrapper. A worker's first batch also finds others' copies.
                _update(self._model_handler, wrapper.all_models() if before is None else [], side_input_model_path)
        return wrapper

    return _load_model


def _load_ahead(wrapper: Any) -> None:
    """Begin to load the model of a transform that is being set up, as its first batch would."""
    loader = getattr(sys.modules[type(wrapper).__module__], "_ProxyLoader", None)
    if loader is not None:
        load_ahead(wrapper.models, wrapper.model_tag, loader(wrapper.loader_func, wrapper.model_tag))


def _update(handler: Any, copies: list[Any], paths: list[Any]) -> None:
    """Give a keyed handler with several models, and copies of its models, the new paths to load from."""
    keyed = _keyed(handler)
    if keyed is not None:
        for copy in [*copies, _NoCopy()]:
            keyed.update_model_paths(copy, paths)


def name_of_handler(handler: Any) -> str:
    """Return a readable name of a handler: its class, without Beam's wrappers, and the path of its model."""
    while (inner := getattr(handler, "_base", None) or getattr(handler, "_unkeyed", None)) is not None:
        handler = inner
    models = getattr(handler, "_id_to_mh_map", None)
    if models:
        first, *more = models.values()
        return f"{type(handler).__name__} of {name_of_handler(first)}{f' and {len(more)} more' if more else ''}"
    paths = (getattr(handler, name, None) for name in _PATHS)
    path = next((path for path in paths if isinstance(path, str) and path), "")
    if len(path) > PATH_SHOWN:
        path = f"…{path[1 - PATH_SHOWN :]}"
    return f"{type(handler).__name__} {path}".strip()


def options_of_handler(handler: Any) -> dict[str, Any]:
    """Return the options of requests for its model that a handler sets, by the attributes of `OPTIONS`.

    Each may be an attribute of the handler or of one that it wraps; the outer one counts. If a keyed handler with
    several models does not set its size, its models' handlers do.
    """
    found: dict[str, Any] = {}
    while handler is not None:
        for attribute, option in OPTIONS.items():
            value = getattr(handler, attribute, None)
            if value is not None:
                found.setdefault(option, value)
        models = getattr(handler, "_id_to_mh_map", None)
        if models and "expect_mb" not in found:
            found |= _size_of_several(models.values(), getattr(handler, "_max_models_per_worker_hint", None))
        handler = getattr(handler, "_base", None) or getattr(handler, "_unkeyed", None)
    return found


def _size_of_several(handlers: Iterable[Any], most: int | None) -> dict[str, Any]:
    """Return the size option of a copy that holds the models of several handlers, from the sizes that these set.

    most: how many of the models a copy keeps at a time, None for all; the largest are assumed.
    """
    said = [options["expect_mb"] for options in map(options_of_handler, handlers) if "expect_mb" in options]
    wrong = [size for size in said if not (isinstance(size, Real) and float(size) > 0)]
    if wrong or not said:
        # The manager refuses a wrong size, as it would that of a single handler.
        return {"expect_mb": wrong[0]} if wrong else {}
    return {"expect_mb": math.fsum(heapq.nlargest(len(said) if most is None else most, said))}


def _keyed(handler: Any) -> Any:
    """Return the keyed handler with several models that a handler is, or wraps; None if there is none."""
    while handler is not None:
        if getattr(handler, "_single_model", None) is False:
            return handler
        handler = getattr(handler, "_base", None)
    return None


class _NoCopy:
    """Takes an update of a keyed handler in place of a copy: the next load takes the handler's paths."""

    def update_model_handler(self, key: str, model_path: str, previous_key: str) -> None:
        """Do nothing."""


def _as_proxies(plain: Method) -> Method:
    def all_models(self: Any) -> Any:
        copies = plain(self)
        if not getattr(self, "use_model_manager", False):
            return copies
        return _proxies.of(self.model_tag, copies)

    return all_models


def _as_acquired(plain: Method) -> Method:
    def release_model(self: Any, model_tag: str, model: Any) -> Any:
        released = plain(self, self.model_tag, model)
        if _reports_demand(self):
            report_demand(self.model_tag, self.models._demand(self.model_tag))
        return released

    return release_model


def _reporting_demand(plain: Method) -> Method:
    def next_model(self: Any) -> Any:
        if not _reports_demand(self):
            return plain(self)
        # Report before the wait: it may be long, and is the reason to start another worker.
        report_demand(self.model_tag, self.models._demand(self.model_tag) + 1)
        model = plain(self)
        report_demand(self.model_tag, self.models._demand(self.model_tag))
        return model

    return next_model


def _reports_demand(wrapper: Any) -> bool:
    return reports_demand() and bool(getattr(wrapper, "use_model_manager", False))


class _Proxies:
    """One proxy for each copy that updates have reached; kept, because every batch repeats the update."""

    def __init__(self) -> None:
        self._mutex = new_lock()
        self._by_tag: dict[str, dict[str, SharedProxy]] = {}

    def of(self, tag: str, copies: list[Any]) -> list[Any]:
        """Return proxies for handles, and objects as they are, without what is gone or belongs to other processes."""
        with self._mutex:
            known = self._by_tag.pop(tag, {})
            current = {copy: known.pop(copy, None) or _proxy_of(copy) for copy in copies if isinstance(copy, str)}
            for proxy in known.values():
                with suppress(ModelServerError, SharedObjectReleasedError):
                    proxy._mpmm_use.release()
            found = {handle: proxy for handle, proxy in current.items() if proxy is not None}
            if found:
                self._by_tag[tag] = found
        objects = [copy for copy in copies if copy is not None and not isinstance(copy, str)]
        return [*found.values(), *objects]


_proxies = _Proxies()


def _proxy_of(handle: str) -> SharedProxy | None:
    """Return a proxy of a handle's object, None if its server is gone."""
    try:
        proxy: Any = MultiProcessShared(lambda: None, tag=handle, always_proxy=True).acquire()
    except ModelServerError:
        return None
    return proxy if isinstance(proxy, SharedProxy) else None


def _start_over_in_child() -> None:
    """Leave the proxies to the parent: a release in the child would end them there, too."""
    global _proxies
    _proxies = _Proxies()


in_forked_child(_start_over_in_child)
