"""Pipelines on Beam's handlers for PyTorch, Hugging Face, XGBoost and ONNX predict what plain Python computes.

The libraries take gigabytes, so this is left out by default:

    pip install -e '.[dev,large]' && python -m pytest -m large

With the CPU build of torch, from its own index, that is 4 GB; with PyPI's build, which contains CUDA, 8 GB. The latter
brings triton, which crashes in a process that has imported TensorFlow, so tests that need both are then left out.

The tests make models with random weights; nothing is downloaded. All shapes run once, in one program
(`large_shapes.py`).
"""

from __future__ import annotations

import importlib
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

from mpmm.suspend import TorchModule

TIMEOUT_S = 900.0
large = pytest.mark.large

#: The libraries that each shape needs.
SHAPES = {
    "torch_tensor": ("torch",),
    "torch_keyed_tensor": ("torch",),
    "torch_updated": ("torch",),
    "torch_by_key": ("torch",),
    "torch_by_key_with_one_model_at_a_time": ("torch",),
    # Beam's handlers for Hugging Face import TensorFlow, and names that transformers 5 has no longer.
    "hugging_face_pipeline": ("torch", "transformers", "tensorflow"),
    "hugging_face_keyed_tensor": ("torch", "transformers", "tensorflow"),
    "xgboost_numpy": ("xgboost", "datatable"),
    "xgboost_pandas": ("xgboost", "datatable", "pandas"),
    "onnx_numpy": ("onnx", "onnxruntime"),
    "onnx_keyed": ("onnx", "onnxruntime"),
}


def missing(shape: str) -> list[str]:
    """Return what a shape lacks here."""
    lacks = [name for name in ("apache_beam", *SHAPES[shape]) if importlib.util.find_spec(name) is None]
    if "tensorflow" in SHAPES[shape] and importlib.util.find_spec("triton") is not None:
        lacks.append("a build of torch without triton")
    return lacks


@pytest.fixture(scope="module")
def results() -> Iterator[dict[str, list[Any]]]:
    """The actual and the expected predictions of each shape, by name."""
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


@large
@pytest.mark.timeout(TIMEOUT_S + 60)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_large_library_predicts_what_plain_python_computes(request: pytest.FixtureRequest, shape: str) -> None:
    if lacks := missing(shape):
        pytest.skip(f"needs {', '.join(lacks)}")
    found, expected = request.getfixturevalue("results")[shape]
    assert expected
    # The order of a collection means nothing.
    assert sorted(map(str, found)) == sorted(map(str, expected))


@pytest.mark.parametrize("brought", [(), ("triton",)], ids=["without triton", "with triton"])
def test_what_crashes_beside_tensorflow_is_left_out_and_the_reason_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, brought: tuple[str, ...]
) -> None:
    for name in ("apache_beam", "torch", "transformers", "tensorflow", *brought):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise AssertionError('it is only looked for')")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("apache_beam", "torch", "transformers", "tensorflow", "triton"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()
    assert missing("torch_tensor") == []
    assert missing("xgboost_numpy") == ["xgboost", "datatable"]
    reason = ["a build of torch without triton"] if brought else []
    assert missing("hugging_face_pipeline") == missing("hugging_face_keyed_tensor") == reason


@large
def test_a_torch_module_sleeps_and_computes_the_same_when_it_wakes() -> None:
    torch = pytest.importorskip("torch", reason="needs the extra large")
    layers = torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3)
    layers[2].weight = layers[0].weight  # one tensor
    module, example = TorchModule(torch.nn.Sequential(*layers).eval(), "cpu"), torch.ones(2, 3)
    before = module(example)
    for _ in range(2):
        module.sleep()
        with pytest.raises(RuntimeError, match="asleep"):
            module(example)
        module.wake_up()
        assert torch.equal(module(example), before)
    with torch.no_grad():
        layers[0].weight += 1
    changed = module(example)
    module.sleep()
    module.wake_up()
    assert layers[2].weight is layers[0].weight
    assert torch.equal(module(example), changed) and not torch.equal(changed, before)
