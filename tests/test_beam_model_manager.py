"""Runs `beam_model_manager_cases.py`, Beam's own tests of the model manager, in a process of their own.

They import Beam. A process that has done so takes several times as long to fork, and other tests fork all the time.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest
from harness import CHECKOUT


def test_beams_own_tests_pass_on_mpmm() -> None:
    if importlib.util.find_spec("apache_beam") is None:
        pytest.skip("apache_beam is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/beam_model_manager_cases.py"],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    # Beam 2.77 has 22 of them; three are the file's own.
    assert passed and int(passed[1]) >= 25, done.stdout[-3000:]
