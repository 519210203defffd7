"""The API reference is made from the docstrings, and has the whole API."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from api_reference import MODULES

import mpmm

pytest.importorskip("pdoc", reason="needs the extra docs")


def test_the_reference_has_every_public_name(tmp_path: Path) -> None:
    tool = Path(__file__).resolve().parent.parent / "tools" / "api_reference.py"
    done = subprocess.run([sys.executable, str(tool), str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'index.html'}\n"
    pages = {module: tmp_path / f"{module.replace('.', '/')}.html" for module in MODULES}
    # No other pages: private modules are not documented.
    assert set(tmp_path.rglob("*.html")) == {*pages.values(), tmp_path / "index.html"}
    text = pages["mpmm"].read_text()
    documented = set(re.findall(r'<section id="(\w+)">', text))
    assert set(mpmm.__all__) - {"__version__"} <= documented
    for method in ("acquire_model", "release_model", "model", "preload", "pin", "reserve", "unload", "force_reset"):
        assert f'id="ModelManager.{method}"' in text, method
