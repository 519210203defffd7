"""The commands that change something in a namespace: unload, pin, unpin, preload, settings."""

from __future__ import annotations

import argparse
import functools
import importlib
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpmm.commands.joining import join
from mpmm.commands.models import HELP, HELP_IF_NEW, asked_model
from mpmm.errors import InvalidArgumentError, UnloadTimeoutError
from mpmm.shared_state.settings import CHANGEABLE, CHECKPOINTS, Settings
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.text.arguments import checked_size_mb, checked_timeout, in_brief
from mpmm.text.printable import printable

__all__ = ["COMMANDS", "add_commands"]

EXIT_PROBLEM = 1
# Long enough to unload idle copies; to wait for copies in use, the user passes a longer time.
UNLOAD_WAIT_S = 10.0
_UNLIMITED = ("none", "inf")
# The parameter whose value is not a number.
_SUSPEND = "suspend"
_OF_EACH_MANAGER = "wait_timeout_seconds"


def add_commands(commands: Any) -> None:
    """Add the commands to the subparsers of an `ArgumentParser`."""
    unload = commands.add_parser("unload", help="unload a model: idle copies now, copies in use when they are released")
    unload.add_argument(
        "--wait",
        type=float,
        default=UNLOAD_WAIT_S,
        metavar="SECONDS",
        help=f"wait at most this long until the copies are unloaded, then exit with 1 (default: {UNLOAD_WAIT_S:g})",
    )
    pin = commands.add_parser("pin", help="keep the idle copies of a model, in all processes, until `mpmm unpin`")
    unpin = commands.add_parser("unpin", help="undo `mpmm pin`; pins that processes set themselves stay")
    preload = commands.add_parser("preload", help="load a model in a server process, for all processes of a namespace")
    for command in (unload, pin, unpin, preload):
        command.add_argument("tag", metavar="TAG", help=HELP_IF_NEW if command in (pin, preload) else HELP)
    preload.add_argument(
        "--copies",
        type=int,
        default=1,
        metavar="NUMBER",
        help="how many copies should be loaded in the end (default: 1)",
    )
    preload.add_argument(
        "--suspend", action="store_true", help="then suspend the copies in host memory, like `mpmm suspend`"
    )
    preload.add_argument("--pin", action="store_true", help="also pin the model, like `mpmm pin`")
    preload.add_argument(
        "--wait", type=float, default=math.inf, metavar="SECONDS", help="wait this long for memory (default: for ever)"
    )
    preload.add_argument(
        "loader", metavar="MODULE:FUNCTION", help="a function that returns a handle, the tag of a MultiProcessShared"
    )
    preload.add_argument(
        "--keep-alive",
        type=float,
        metavar="SECONDS",
        help="keep idle copies this long, -1 for ever (default: what the last request said, else idle_ttl_seconds)",
    )
    preload.add_argument(
        "--users",
        type=int,
        metavar="N",
        help="how many may use a copy at a time (default: what the last request said, else 1)",
    )
    preload.add_argument(
        "--expect-mb",
        metavar="SIZE",
        help="what a copy is expected to take until it is measured: MB, or 5g, 5GiB (default: what the "
        "last request said, else default_estimate_mb)",
    )
    preload.add_argument(
        "--priority",
        type=int,
        default=0,
        metavar="NUMBER",
        help="rank among waiting preloads, from -10 to 10; each step counts as 10 s of waiting",
    )
    settings = commands.add_parser("settings", help="show the settings, or change one for all processes")
    settings.add_argument(
        "change", nargs="*", metavar="set NAME VALUE", help="if left out, show the settings; VALUE `none`: no limit"
    )
    for command in (unload, pin, unpin, preload, settings):
        command.add_argument("--namespace", help="default: the only one there is")


def _unload(options: argparse.Namespace, name: str, root: Path | None) -> int:
    from mpmm.model_manager.administration import unload_model, visit, wait_for_unload
    from mpmm.scheduling import Scheduler

    wait_s = checked_timeout("--wait", options.wait)
    model = asked_model(options.tag, name, root)
    with visit(name, root) as namespace:
        asked = unload_model(namespace, Scheduler(namespace), model.tag)
        try:
            wait_for_unload(namespace, asked, wait_s)
        except UnloadTimeoutError as error:
            print(f"mpmm: {error}", file=sys.stderr)
            return EXIT_PROBLEM
    print(f"{model.shown}: {f'{asked.copies} unloaded' if asked.copies else 'no copy is loaded'}")
    return 0 if asked.copies else EXIT_PROBLEM


def _pin(options: argparse.Namespace, name: str, root: Path | None) -> int:
    from mpmm.model_manager.administration import pin_for_all, visit

    model = asked_model(options.tag, name, root)
    with visit(name, root) as namespace:
        pin_for_all(namespace, model.tag)
    print(f"{model.shown}: pinned for all")
    return 0


def _unpin(options: argparse.Namespace, name: str, root: Path | None) -> int:
    from mpmm.model_manager.administration import unpin_for_all, visit
    from mpmm.scheduling import Scheduler

    model = asked_model(options.tag, name, root)
    with visit(name, root) as namespace:
        unpin_for_all(namespace, Scheduler(namespace), model.tag)
    print(f"{model.shown}: no longer pinned for all")
    return 0


def _preload(options: argparse.Namespace, name: str, root: Path | None) -> int:
    model = asked_model(options.tag, name, root)
    expect_mb = None if options.expect_mb is None else checked_size_mb("--expect-mb", options.expect_mb)
    load = functools.partial(_load_handle, _function(options.loader), options.loader)
    with join(name, root) as manager:
        loaded = manager.preload(
            model.tag,
            load,
            copies=options.copies,
            timeout_seconds=options.wait,
            state="suspended" if options.suspend else "idle",
            keep_alive_seconds=options.keep_alive,
            users=options.users,
            expect_mb=expect_mb,
            priority=options.priority,
        )
        if options.pin:
            manager.pin(model.tag, for_all=True)
    print(f"{model.shown}: {loaded} loaded{', pinned for all' if options.pin else ''}")
    return 0


def _function(name: str) -> Callable[[], Any]:
    """Return what `module:function` names; as with `python -m`, modules of the working directory are found."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise InvalidArgumentError(f"loader {name!r}: expected MODULE:FUNCTION")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = functools.reduce(getattr, function.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise InvalidArgumentError(f"loader {name!r}: {printable(str(error))}") from error
    except Exception as error:
        # A relative name, or whatever the module's own code raises while it is imported.
        raise InvalidArgumentError(f"loader {name!r}: {type(error).__name__}: {printable(str(error))}") from error
    if not callable(found):
        raise InvalidArgumentError(f"loader {name!r}: {in_brief(found)} cannot be called")
    result: Callable[[], Any] = found
    return result


def _load_handle(load: Callable[[], Any], name: str) -> str:
    """Return a loader's handle. Raises InvalidArgumentError if it returns an object, which would end with us."""
    value = load()
    if not isinstance(value, str):
        raise InvalidArgumentError(
            f"loader {name!r} returned a {type(value).__name__}, which would end with this command; expected a handle, "
            "the tag of a MultiProcessShared with spawn_process=True"
        )
    return value


def _settings(options: argparse.Namespace, name: str, root: Path | None) -> int:
    from mpmm.model_manager.administration import change_settings, visit
    from mpmm.scheduling import Scheduler

    if not options.change:
        _show(read_snapshot(name, root, events=False).settings)
        return 0
    if len(options.change) != 3 or options.change[0] != "set":
        raise InvalidArgumentError(
            f"settings {in_brief(' '.join(options.change))}: expected nothing, or set NAME VALUE"
        )
    _, setting, text = options.change
    with visit(name, root) as namespace:
        settings = change_settings(namespace, Scheduler(namespace), {setting: _value(setting, text)})
    print(f"{setting} {_shown(getattr(settings, setting))}")
    return 0


def _value(setting: str, text: str) -> float | None:
    if text.lower() in _UNLIMITED:
        return None
    try:
        return float(text)
    except ValueError:
        if setting.endswith("_mb"):
            return checked_size_mb(setting, text)
        if setting in CHANGEABLE:
            raise InvalidArgumentError(f"{setting}={in_brief(text)}: expected a number, or none") from None
        # The setting is refused whatever the value, and the error says why it cannot be changed.
        return None


def _show(settings: Settings) -> None:
    """Print the settings under the names of the parameters of `ModelManager`."""
    values = {name: _shown(value) for name, value in asdict(settings).items()}
    # The segment stores it as a number; people see the word.
    values[_SUSPEND] = CHECKPOINTS[int(settings.suspend_checkpoints)]
    del values["suspend_checkpoints"]
    width = max(map(len, values))
    for name, value in values.items():
        if name in CHANGEABLE:
            note = ""
        else:
            note = "  (each manager has its own)" if name == _OF_EACH_MANAGER else "  (chosen at creation)"
        print(f"{name:<{width}}  {value}{note}")


def _shown(value: float) -> str:
    return "none" if math.isinf(value) else f"{value:.12g}"


#: The function of each command: takes the options, a namespace and the root, and returns the exit status.
COMMANDS: dict[str, Callable[[argparse.Namespace, str, Path | None], int]] = {
    "unload": _unload,
    "pin": _pin,
    "unpin": _unpin,
    "preload": _preload,
    "settings": _settings,
}
