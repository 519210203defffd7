"""How to start another interpreter that finds the same modules as this one."""

from __future__ import annotations

import os
import sys
from multiprocessing import spawn, util

__all__ = ["command_line", "interpreter_flags"]

# With `-c`, Python looks for modules in the working directory first, where a file such as `json.py` may lie. So only
# built-in modules are imported before `sys.path` is set, and the list is a Python literal.
_CODE = (
    "import sys\n"
    "sys.path[:] = eval(sys.argv.pop())\n"
    "import importlib\n"
    "importlib.import_module(sys.argv[1]).main(*sys.argv[2:])\n"
)


def command_line(module: str, *arguments: str) -> list[str]:
    """Return the command of an interpreter that calls `main(*arguments)` of a module.

    It is the one of `multiprocessing.set_executable`, has the flags of this one, and finds modules where this one does.
    Raises FileNotFoundError if `sys.path` has the working directory, and that was removed.
    """
    # Not made absolute, because an entry may be a name that an import hook knows.
    path = [str(entry) or os.getcwd() for entry in sys.path if isinstance(entry, str)]
    executable = os.fsdecode(spawn.get_executable())
    return [executable, *interpreter_flags(), "-c", _CODE, module, *arguments, repr(path)]


def interpreter_flags() -> list[str]:
    """Return the flags with which this interpreter was started, as far as they matter to others."""
    flags: list[str] = util._args_from_interpreter_flags()  # type: ignore[attr-defined]  # not in typeshed
    return flags
