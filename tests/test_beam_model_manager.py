"""All of Beam's own tests of the model manager, against mpmm's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from beam_wheel import load_beam_tests, names_of

beam_tests = load_beam_tests(
    "ml/inference/model_manager_test.py",
    {
        "from apache_beam.utils import multi_process_shared": "from mpmm import multi_process_shared",
        "apache_beam.ml.inference.model_manager.nnls": "mpmm.resource_estimator.nnls",
        "apache_beam.ml.inference.model_manager": "mpmm.model_manager",
        # Private names: both of Beam's are the public force_reset here, and the condition is the segment's lock.
        "._force_reset()": ".force_reset()",
        "._delete_all_models()": ".force_reset()",
        "._cv._is_owned()": "._cv.held_by_this_thread()",
    },
)
globals().update(names_of(beam_tests))


@pytest.fixture(autouse=True)
def own_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tests out of the user's namespaces, and let a patched nvidia-smi be the only GPU there is."""
    monkeypatch.setenv("MPMM_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setitem(sys.modules, "pynvml", None)


def test_the_tests_use_mpmm_and_not_beam() -> None:
    assert beam_tests.ModelManager.__module__ == "mpmm.model_manager"
    assert beam_tests.multi_process_shared.__name__ == "mpmm.multi_process_shared"
