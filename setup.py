"""Everything is declared in setup.cfg, but for the compiled core, the description, and what an sdist has beside us.

Without the core, where there is no C compiler, everything works, too.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.sdist import sdist

# What the tests, and the commands of README.md, need; MANIFEST.in would be one more file at the top.
FOLDERS = ("tests", "tools", ".ci")
FILES = (".ruff.toml", ".gitignore")
# No fused multiply-add: Python's floats know none, and the core has to store the same words.
CORE = Extension(
    "mpmm.shared_state._core",
    ["mpmm/shared_state/_core.c"],
    extra_compile_args=["-std=c11", "-O2", "-ffp-contract=off"],
    optional=True,
)


class SourceDistribution(sdist):
    """A source distribution from which the tests can be run."""

    def make_distribution(self) -> None:
        """Add what is beside the package, and write the archive."""
        here = Path(__file__).resolve().parent
        found = [path for folder in FOLDERS for path in (here / folder).rglob("*") if "__pycache__" not in path.parts]
        files = [*sorted(path for path in found if path.is_file()), *(here / name for name in FILES)]
        self.filelist.extend([str(path.relative_to(here)) for path in files if path.exists()])
        super().make_distribution()


def for_an_index(readme: str) -> str:
    """Return README.md for a package index, which has none of our files: without the picture, links to them as text."""
    without_picture = re.sub(r"!\[[^\]]*\]\([^)]*\)\n\n|The picture is [^.]*\. ", "", readme)
    return re.sub(r"\[([^\]]*)\]\((?!https:)[^)]*\)", r"\1", without_picture)


README = (Path(__file__).resolve().parent / "README.md").read_text(encoding="utf-8")
setup(long_description=for_an_index(README), cmdclass={"sdist": SourceDistribution}, ext_modules=[CORE])
