"""The code is what ruff and mypy, with the settings of this checkout, have nothing to say against."""

from __future__ import annotations

import subprocess
import sys

import pytest
from harness import CHECKOUT

OTHER_TYPES = pytest.mark.skipif(sys.version_info < (3, 11), reason="the last NumPy for Python 3.10 has other types")


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", pytest.param("mypy", marks=OTHER_TYPES)])
def test_nothing_is_said_against_the_code(command: str) -> None:
    run = subprocess.run([sys.executable, "-m", *command.split()], cwd=CHECKOUT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
