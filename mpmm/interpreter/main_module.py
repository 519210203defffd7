"""Whether a new process can import the main module of this program, like every process that `multiprocessing` spawns.

It cannot import code that was typed in, given by `python -c`, or read from standard input, because there is no file;
and it does not import the `__main__` of a package, a folder or a zip archive, which usually has no main guard.
What such a module defines reaches the new process only by value (cloudpickle).
"""

from __future__ import annotations

import os
import sys
from multiprocessing import process as mp_process

__all__ = ["is_main_importable", "main_file"]


def is_main_importable() -> bool:
    """Tell whether a new process gets what this one's main module defines."""
    name = getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", None)
    if name is not None:
        return not (name == "__main__" or name.endswith(".__main__"))
    path = main_file()
    return path is not None and os.path.exists(path)


def main_file() -> str | None:
    """Return the path from which `multiprocessing` would import a main module without a name; None if there is none."""
    path = getattr(sys.modules.get("__main__"), "__file__", None)
    # Like multiprocessing, relative to the folder in which the program was started.
    folder = mp_process.ORIGINAL_DIR  # type: ignore[attr-defined]  # not in typeshed
    return os.path.join(folder or "", path) if isinstance(path, str) else None
