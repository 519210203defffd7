"""Run test files of the installed Apache Beam against mpmm.

The tests read them from the wheel when they run, so this repository contains no copy of Beam's code, and replace
nothing but module paths.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_folder: Path | None = None


def load_beam_tests(relative_path: str, replacements: Mapping[str, str]) -> ModuleType:
    """Import `apache_beam/<relative_path>` with texts replaced, and return the module.

    replacements: old text to new text, applied in order. Each must occur, so that a new Beam with other names fails
    here instead of testing itself.
    The module has a name of its own in a folder on `sys.path`, where spawned children find its classes, too.
    Skips the calling test file when Beam is not installed.
    """
    spec = importlib.util.find_spec("apache_beam")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("apache_beam is not installed", allow_module_level=True)
    text = Path(spec.submodule_search_locations[0], relative_path).read_text()
    for old, new in replacements.items():
        assert old in text, f"{relative_path} of the installed Beam does not contain {old!r}"
        text = text.replace(old, new)
    name = f"mpmm_runs_beam_{Path(relative_path).stem}"
    (_module_folder() / f"{name}.py").write_text(text)
    importlib.invalidate_caches()
    return importlib.import_module(name)


def names_of(module: ModuleType) -> dict[str, Any]:
    """Return what a test file must add to its globals so that pytest finds the module's tests and fixtures."""
    return {name: thing for name, thing in vars(module).items() if not name.startswith("__")}


def _module_folder() -> Path:
    global _folder
    if _folder is None:
        _folder = Path(tempfile.mkdtemp(prefix="mpmm-beam-tests-"))
        atexit.register(shutil.rmtree, _folder, ignore_errors=True)
        sys.path.insert(0, str(_folder))
    return _folder
