"""What is released: a source distribution and a wheel, built, checked, and installed in a fresh environment."""

from __future__ import annotations

import email.message
import email.parser
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import mpmm

build = pytest.importorskip("build", reason="needs the extra dev")
CHECKOUT = Path(__file__).resolve().parent.parent
FOLDERS = ("mpmm", "tests", "tools", ".ci")
TOP = ("setup.cfg", "setup.py", "README.md", "LICENSE", ".ruff.toml", ".gitignore")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")


def run(*command: object, cwd: Path) -> str:
    """Run a command that must succeed; return what it has printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the checkout, so that nothing is built in it."""
    copied = tmp_path / "checkout"
    for folder in FOLDERS:
        shutil.copytree(CHECKOUT / folder, copied / folder, ignore=LEFT_OUT)
    for name in TOP:
        shutil.copy(CHECKOUT / name, copied / name)
    return copied


def files_of(folder: Path) -> set[str]:
    """Return the paths of all files below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_release_is_built_checked_and_installed(checkout: Path, tmp_path: Path) -> None:
    wanted = files_of(checkout)
    dist = tmp_path / "dist"
    # The wheel is built from the source distribution.
    run(sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "-o", dist, checkout, cwd=tmp_path)
    [source], [wheel] = dist.glob("*.tar.gz"), dist.glob("*.whl")

    with tarfile.open(source) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert wanted - inside == set(), "what the tests need is all there"
    assert not any("__pycache__" in name for name in inside)

    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [metadata] = [archive.read(name).decode() for name in names if name.endswith("METADATA")]
    # The compiled core, where it could be built.
    ours = {name for name in names if name.startswith("mpmm/") and not name.endswith(".so")}
    assert {name for name in wanted if name.startswith("mpmm/")} == ours
    assert not any(name.startswith(("tests", "tools")) for name in names)
    expect_sound(email.parser.Parser().parsestr(metadata))

    if twine_is_there():
        checked = run(sys.executable, "-m", "twine", "check", "--strict", source, wheel, cwd=tmp_path)
        assert checked.count("PASSED") == 2

    python = install(wheel, tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = run(python, "-c", "import mpmm, mpmm.cli; print(mpmm.__file__)", cwd=elsewhere)
    assert Path(where.strip()).is_relative_to(python.parent.parent)
    assert run(python.parent / "mpmm", "--version", cwd=elsewhere) == f"mpmm {mpmm.__version__}\n"
    use = "import mpmm; one = mpmm.ModelManager(memory_source='booked'); print(one.acquire_model('a', lambda: 'b'))"
    assert run(python, "-c", use, cwd=elsewhere) == "b\n"


def expect_sound(metadata: email.message.Message) -> None:
    """Assert that an index shows what it should."""
    assert metadata["Version"] == mpmm.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    classifiers = metadata.get_all("Classifier") or []
    assert not any(classifier.startswith("License ::") for classifier in classifiers)
    assert any(classifier.startswith("Development Status ::") for classifier in classifiers)
    assert str(metadata.get_payload()).startswith("# mpmm")
    assert metadata["Keywords"] and metadata["Description-Content-Type"] == "text/markdown"
    extras = metadata.get_all("Provides-Extra") or []
    assert {"all", "beam", "cli", "metrics", "plot", "web"} <= set(extras)
    # Everything in it is needed, and nothing else.
    needed = {line.split(">=")[0] for line in metadata.get_all("Requires-Dist") or [] if "extra" not in line}
    assert needed == {"filelock", "numpy", "nvidia-ml-py", "psutil", "scipy"}


def twine_is_there() -> bool:
    """Tell whether the extra dev has brought twine."""
    return subprocess.run([sys.executable, "-c", "import twine"], capture_output=True).returncode == 0


def install(wheel: Path, folder: Path) -> Path:
    """Install a wheel in an environment of its own, which has our libraries but not us; return its interpreter."""
    home = folder / "fresh"
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "-q", "--no-index", "--no-deps", "--no-compile", wheel, cwd=folder)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    # By their paths alone: files there that would lead to this checkout are not obeyed.
    libraries = home / "lib" / version / "site-packages" / "libraries.pth"
    libraries.write_text("".join(f"{path}\n" for path in sys.path if path.endswith("-packages")))
    return python


def test_the_changelog_has_this_version() -> None:
    assert f"\n## {mpmm.__version__}" in (CHECKOUT / "mpmm" / "CHANGELOG.md").read_text()
