"""Pipelines on Beam's handlers for PyTorch, Hugging Face, XGBoost and ONNX predict what plain Python computes.

The libraries take gigabytes, so this is left out by default:

    pip install -e '.[dev,large]' && python -m pytest -m large

Models are made on the spot, of random weights; nothing is downloaded. All shapes run once, in one program
(`large_shapes.py`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.large
TIMEOUT_S = 280.0

#: What each shape needs.
SHAPES = {
    "torch_tensor": ("torch",),
    "torch_keyed_tensor": ("torch",),
    "torch_by_key": ("torch",),
    # Beam's handlers for Hugging Face import TensorFlow, and names that transformers 5 has no longer.
    "hugging_face_pipeline": ("torch", "transformers", "tensorflow"),
    "hugging_face_keyed_tensor": ("torch", "transformers", "tensorflow"),
    "xgboost_numpy": ("xgboost", "datatable"),
    "onnx_numpy": ("onnx", "onnxruntime"),
}


def missing(shape: str) -> list[str]:
    """Return the modules that a shape lacks here."""
    return [name for name in ("apache_beam", *SHAPES[shape]) if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="module")
def results() -> Iterator[dict[str, list[Any]]]:
    """What each shape has predicted, and what it should have, by name."""
    # Not pytest's folder: the names of sockets may have no more than 107 characters.
    with tempfile.TemporaryDirectory(prefix="mpmm-t", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "run").mkdir(mode=0o700)
        environment = {
            **os.environ,
            "MPMM_RUNTIME_DIR": f"{folder}/run",
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "HF_HUB_OFFLINE": "1",
        }
        names = [name for name in SHAPES if not missing(name)]
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("large_shapes.py")), folder, *names],
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, done.stderr[-6000:]
        yield json.loads((Path(folder) / "results.json").read_text())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_large_library_predicts_what_plain_python_computes(request: pytest.FixtureRequest, shape: str) -> None:
    if lacks := missing(shape):
        pytest.skip(f"needs {', '.join(lacks)}")
    found, expected = request.getfixturevalue("results")[shape]
    assert expected
    # The order of a collection means nothing.
    assert sorted(map(str, found)) == sorted(map(str, expected))
