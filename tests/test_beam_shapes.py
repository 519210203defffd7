"""Pipelines of many shapes on managed models predict what plain Python computes.

All of them run once, in one program (`beam_shapes.py`), because importing Beam takes longer than most of them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from harness import OncePerRun, import_path

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("apache_beam", "pandas", "sklearn")),
    reason="needs Apache Beam, pandas and scikit-learn",
)

TIMEOUT_S = 500.0
ONNX = Path(__file__).with_name("onnx_stand_in")
NUMBERS = [1, 5, 3, 10]
PAIRS = [("a", 1), ("b", 2), ("a", 3), ("c", 4)]
FACTORS = {"a": 2, "b": 2, "c": 3}
UPDATED_FACTORS = {"a": 5, "b": 6, "c": 6}


def by(factor: int) -> list[int]:
    return [number * factor for number in NUMBERS]


def pairs_by(factors: dict[str, int]) -> list[list[Any]]:
    return [[key, number * factors[key]] for key, number in PAIRS]


SHAPES: dict[str, list[Any]] = {
    "plain": by(2),
    "generator": by(2),
    "held_while_it_yields": [1] * len(NUMBERS),
    "keyed": pairs_by(dict.fromkeys("abc", 3)),
    "maybe_keyed_without_keys": by(2),
    "maybe_keyed_with_keys": pairs_by(dict.fromkeys("abc", 2)),
    "key_model_mapping": pairs_by(FACTORS),
    "key_model_mapping_with_one_model_at_a_time": pairs_by(FACTORS),
    "key_model_mapping_updated": pairs_by(UPDATED_FACTORS),
    "processed": [str(number) for number in by(2)],
    "processed_twice_and_keyed": [[number, key] for key, number in pairs_by(dict.fromkeys("abc", 2))],
    "batched": [3] * 12,
    "not_batched": [2, 4, 6],
    "arguments": [number + 100 for number in by(2)],
    "failures_set_aside": [20, ["ValueError", 1], ["ValueError", 3], ["ValueError", 5]],
    "in_a_subprocess": by(2),
    "slow_first_load": [[number] for number in NUMBERS],
    "two_copies": by(2),
    "large": by(2),
    "updated": by(7),
    "never_updated": by(2),
    "one_model_in_two_steps": by(4),
    "remote": by(3),
    "model_streams": by(2),
    "model_returns_a_view": by(2),
    # Beam's own handler, on a stand-in for the library, whose objects do not pickle either.
    "onnx": by(4),
    "sklearn_numpy": by(4),
    "sklearn_keyed": pairs_by(dict.fromkeys("abc", 4)),
    "sklearn_pandas": by(4),
    "updated_while_no_copy_is_loaded": pairs_by(FACTORS) + pairs_by(UPDATED_FACTORS),
    "updated_where_somebody_else_has_loaded": pairs_by(FACTORS) + pairs_by(UPDATED_FACTORS),
    "demand_is_reported_as_it_rises_and_falls": [0, 1, 3],
    "what_people_see_for_a_uuid": ["Handler 7.model", True],
    "nothing_to_update_while_no_copy_is_loaded": by(2) + by(2),
}


@pytest.fixture(scope="module")
def predictions(once_per_run: OncePerRun) -> dict[str, list[Any]]:
    """Predictions of all shapes, by name."""
    found: dict[str, list[Any]] = once_per_run("beam_shapes", predict)
    return found


def predict() -> Any:
    """Run the program; return what it predicts."""
    # Not pytest's folder: the names of sockets may have no more than 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="mpmm-t"))
    (folder / "run").mkdir(mode=0o700)
    environment = {
        **os.environ,
        "MPMM_RUNTIME_DIR": str(folder / "run"),
        "PYTHONPATH": import_path(ONNX),
    }
    try:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("beam_shapes.py")), str(folder)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        assert "was released as" not in done.stderr, "a copy went back under another tag than it was acquired by"
        return json.loads((folder / "results.json").read_text())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_predicts_what_plain_python_computes(predictions: dict[str, list[Any]], shape: str) -> None:
    # The order of a collection means nothing.
    assert sorted(map(repr, predictions[shape])) == sorted(map(repr, SHAPES[shape]))


def test_length_aware_batches_keep_lengths_apart(predictions: dict[str, list[Any]]) -> None:
    assert len(predictions["batched_by_length"]) == 6
    assert set(predictions["batched_by_length"]) <= {1, 2}


def test_every_shape_is_looked_at(predictions: dict[str, list[Any]]) -> None:
    assert set(predictions) == {*SHAPES, "batched_by_length"}
