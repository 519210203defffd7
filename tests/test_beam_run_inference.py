"""The model-manager cases of Beam's own tests of RunInference, unmodified, with mpmm installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

# A plugin for the inner pytest: what a user's program does, and the proof that the tests ran on it.
PLUGIN = """
import mpmm.beam

mpmm.beam.install()


def pytest_sessionfinish(session):
    from apache_beam.ml.inference import base
    print("manager of RunInference:", base.ModelManager.__module__)
    print("shared objects of RunInference:", base.multi_process_shared.__name__)
"""


def test_beams_own_run_inference_cases_pass_on_mpmm(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("apache_beam")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("apache_beam is not installed")
    (tmp_path / "mpmm_in_beam.py").write_text(PLUGIN)
    beams_tests = Path(spec.submodule_search_locations[0], "ml/inference/base_test.py")
    checkout = str(Path(__file__).resolve().parent.parent)
    options = ["-q", "-s", "-c", os.devnull, "--rootdir", str(tmp_path), "-p", "no:cacheprovider", "-p", "mpmm_in_beam"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(beams_tests), "-k", "ModelManagerTest"],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join([checkout, str(tmp_path)])),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "3 passed" in done.stdout
    assert "manager of RunInference: mpmm.model_manager" in done.stdout
    assert "shared objects of RunInference: mpmm.multi_process_shared" in done.stdout
