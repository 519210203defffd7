"""A model server in a newly started interpreter, for when none can be forked: see `forkserver.client`.

`multiprocessing` could spawn one, too, but would import the main module before any code of mpmm runs, and so before the
process knows that it is a server, and it insists on start methods that only the parent has registered (loky's).
"""

from __future__ import annotations

import functools
import os
import pickle
import sys
from contextlib import suppress
from multiprocessing import popen_fork, spawn, util
from multiprocessing import process as mp_process
from multiprocessing.connection import Connection
from typing import Any

from mpmm.interpreter.fork_hooks import fork_guard
from mpmm.interpreter.main_module import is_main_importable
from mpmm.interpreter.new_interpreter import command_line
from mpmm.interpreter.sigpipe import without_sigpipe
from mpmm.interpreter.standard_descriptors import keep_standard_descriptors
from mpmm.multi_process_shared.server_process import ServerPlan, run_server

__all__ = ["SpawnedServer", "call_this_process", "main", "preparation_for"]

# Start methods that every process knows, on every platform.
START_METHODS = (None, "fork", "spawn", "forkserver")


def preparation_for(name: str, constructor: object) -> dict[str, Any]:
    """Return what `multiprocessing.spawn` tells a new process: paths, arguments, how to import `__main__`.

    constructor: what the new process has to import; if `sys.path` no longer leads to it, as in a program that has
        imported it from the working directory (`celery -A app`), its folder is added.
    Raises RuntimeError in a process that is still importing its own main module, FileNotFoundError if its working
    directory was removed.
    """
    main = sys.modules.get("__main__")
    if main is not None and not hasattr(main, "__spec__"):
        # pdb removes it, but multiprocessing needs it; that of a script is None.
        main.__spec__ = None
    preparation = spawn.get_preparation_data(name)
    if not is_main_importable():
        # For a script from standard input, say, multiprocessing takes "<stdin>" for its file.
        preparation.pop("init_main_from_path", None)
    # As bytes, because the key's own type refuses to be pickled outside of a spawn.
    preparation["authkey"] = bytes(preparation["authkey"])
    preparation["sys_path"] = [path for path in preparation["sys_path"] if isinstance(path, str)]
    if (folder := _folder_off_path(constructor)) is not None:
        preparation["sys_path"].append(folder)
    if preparation.get("start_method") not in START_METHODS:
        # Registered by a library (loky), which the new process has not imported.
        preparation.pop("start_method", None)
    return preparation


def _folder_off_path(constructor: object) -> str | None:
    """Return the folder from which a constructor's package was imported, if no import would find it there now."""
    while isinstance(constructor, functools.partial):
        constructor = constructor.func
    module = getattr(constructor, "__module__", None) or type(constructor).__module__
    package = str(module).partition(".")[0]
    spec = getattr(sys.modules.get(package), "__spec__", None)
    if spec is None or not spec.has_location or spec.origin is None:
        return None
    folder: str = os.path.dirname(os.path.abspath(spec.origin))
    if spec.submodule_search_locations is not None:
        folder = os.path.dirname(folder)
    if folder in sys.path or any(os.path.abspath(entry) == folder for entry in sys.path if isinstance(entry, str)):
        return None
    for finder in sys.meta_path:
        with suppress(Exception):
            if finder.find_spec(package, None) is not None:
                return None
    return folder


class SpawnedServer(mp_process.BaseProcess):
    """A model server that this process has started, as a child of `multiprocessing`."""

    def __init__(self, name: str, plan: ServerPlan, preparation: dict[str, Any], report: Connection) -> None:
        """Describe the server; `start()` starts it. report: where it reports, to be closed by the caller."""
        super().__init__(name=name, daemon=False)
        self.order = pickle.dumps((plan, preparation))
        self.report_fd = report.fileno()

    @staticmethod
    def _Popen(process: Any) -> popen_fork.Popen:
        return _SpawnedPopen(process)


class _SpawnedPopen(popen_fork.Popen):
    """What `BaseProcess` needs to know about a child process."""

    method = "mpmm-spawn"

    def _launch(self, process: Any) -> None:
        with fork_guard:
            # No child forked meanwhile may keep open the server's end of the second pipe, which signals its death.
            order, writer = os.pipe()
            try:
                with open(order, "rb"):
                    self.sentinel, life = os.pipe()
                    self.finalizer = util.Finalize(self, os.close, (self.sentinel,))
                    with open(life, "wb"):
                        command = command_line(__name__, str(order), str(process.report_fd))
                        self.pid = util.spawnv_passfds(
                            os.fsencode(command[0]), command, (order, process.report_fd, life)
                        )
            except BaseException:
                os.close(writer)
                raise
        # If the server has died at once, the process that waits for its report notices.
        with suppress(BrokenPipeError), without_sigpipe(), open(writer, "wb") as file:
            file.write(process.order)


def main(order: str, report: str) -> None:
    """Be the server, in a process that was just started for it; the arguments are descriptors."""
    order_fd, report_fd = int(order), int(report)
    # If the starter had files of its own under the numbers of standard streams, this process has none there, and its
    # pipes would get these numbers.
    keep_standard_descriptors()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    for fd in (order_fd, report_fd):
        os.set_inheritable(fd, False)
    call_this_process("mpmm-server")
    with open(order_fd, "rb") as file:
        plan, preparation = pickle.load(file)
    for name, value in plan.environment:
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    run_server(plan, Connection(report_fd), preparation)


def call_this_process(name: str) -> None:
    """Set the name that `ps` shows."""
    with suppress(OSError), open("/proc/self/comm", "w", encoding="utf-8") as file:
        file.write(name)
