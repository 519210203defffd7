"""Checks that a tag stands for the object that a caller means, not for another one with the same tag.

Tags are compared by their text alone: two programs, or two namespaces, that both use the tag `model` would share the
object that was made first. A known difference is an error: two different named constructors that are both functions or
both classes, or a class and an object of another class. Constructors without a name of their own are trusted: a lambda,
a function defined in another one, an instance, a `partial`. Beam attaches to a tag with `lambda: None`.
"""

from __future__ import annotations

import inspect
from typing import Any

from mpmm.errors import InvalidArgumentError
from mpmm.multi_process_shared.context import served_namespaces
from mpmm.multi_process_shared.registry import ServerRecord

__all__ = ["check_identity", "name_of_constructor", "names_of_types"]

# A program's main module has another name in its servers, or when it is imported.
MAIN_MODULES = ("__main__", "__mp_main__")


def name_of_constructor(constructor: Any) -> str:
    """Return "class module:name" or "function module:name"; "" for a constructor without a name of its own."""
    kind = "class" if inspect.isclass(constructor) else "function" if inspect.isroutine(constructor) else ""
    module, name = getattr(constructor, "__module__", None), getattr(constructor, "__qualname__", "<")
    bound = getattr(constructor, "__self__", None)
    if not kind or not module or "<" in name or (bound is not None and not inspect.ismodule(bound)):
        return ""
    return f"{kind} {module}:{name}"


def names_of_types(shared: object) -> tuple[str, ...]:
    """Return the names of an object's classes, in the form of `name_of_constructor`."""
    return tuple(f"class {kind.__module__}:{kind.__qualname__}" for kind in type(shared).__mro__)


def check_identity(record: ServerRecord, constructor: Any) -> None:
    """Raise InvalidArgumentError if a server's object cannot be the one that the caller means."""
    wanted = name_of_constructor(constructor)
    if wanted and record.constructor and not _may_be(wanted, record):
        raise InvalidArgumentError(
            f"the tag {record.tag!r} stands for an object that {record.constructor} has made in pid {record.pid}, not "
            f"for one that {wanted} makes; choose another tag"
        )
    ours = served_namespaces()
    if ours and record.namespaces and not set(ours) & set(record.namespaces):
        raise InvalidArgumentError(
            f"the tag {record.tag!r} belongs to a model server of namespace {', '.join(record.namespaces)} (pid "
            f"{record.pid}); a loader of namespace {', '.join(ours)} has to choose another tag"
        )


def _may_be(wanted: str, record: ServerRecord) -> bool:
    if _is_same(wanted, record.constructor) or any(_is_same(wanted, name) for name in record.types):
        return True
    # A function may make an object of a class, and without `record.types` the object's class is not known.
    return wanted.split()[0] != record.constructor.split()[0] and not (wanted.startswith("class ") and record.types)


def _is_same(one: str, other: str) -> bool:
    if one == other:
        return True
    (kind, _, name), (other_kind, _, other_name) = one.partition(" "), other.partition(" ")
    (module, _, name), (other_module, _, other_name) = name.partition(":"), other_name.partition(":")
    in_main = module in MAIN_MODULES or other_module in MAIN_MODULES
    return in_main and kind == other_kind and name == other_name
