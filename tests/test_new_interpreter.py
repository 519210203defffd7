"""Another interpreter finds the modules that this one finds, wherever it is started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import CHECKOUT
from patience import DEADLINE_S

SERVES = """
from mpmm.multi_process_shared import MultiProcessShared
import model

if __name__ == "__main__":
    shared = MultiProcessShared(model.Model, "it", spawn_process=True)
    with shared.using() as it:
        print(it.name())
    shared.unsafe_hard_delete()
"""


@pytest.mark.parametrize("forks", ["0", "1"])
def test_modules_of_the_working_directory_are_not_taken_for_those_of_python(
    runtime_root: Path, tmp_path: Path, forks: str
) -> None:
    program, elsewhere = tmp_path / "program", tmp_path / "elsewhere"
    program.mkdir()
    elsewhere.mkdir()
    (program / "main.py").write_text(SERVES)
    (program / "model.py").write_text("class Model:\n    def name(self):\n        return __file__\n")
    for name in ("json", "importlib", "multiprocessing", "pickle", "model"):
        (elsewhere / f"{name}.py").write_text("raise RuntimeError('not this one')")
    found = subprocess.run(
        [sys.executable, program / "main.py"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        cwd=elsewhere,
        env={**os.environ, "MPMM_ZYGOTE": forks, "PYTHONPATH": str(CHECKOUT)},
    )
    assert (found.stdout, found.stderr) == (f"{program / 'model.py'}\n", "")
