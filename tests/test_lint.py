"""ruff and mypy, with the settings of this checkout, find nothing wrong with the code."""

from __future__ import annotations

import subprocess
import sys

import pytest
from harness import CHECKOUT

OTHER_TYPES = pytest.mark.skipif(sys.version_info < (3, 11), reason="the last NumPy for Python 3.10 has other types")


# Where the locale says how files are read, one of C fails at the first letter that is not ASCII.
ENCODINGS = "ruff check --preview --select PLW1514 mpmm"


@pytest.mark.parametrize(
    "command", ["ruff check .", "ruff format --check .", ENCODINGS, pytest.param("mypy", marks=OTHER_TYPES)]
)
def test_nothing_is_said_against_the_code(command: str) -> None:
    run = subprocess.run([sys.executable, "-m", *command.split()], cwd=CHECKOUT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
