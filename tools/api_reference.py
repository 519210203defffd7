"""The API reference, made from the docstrings: `python tools/api_reference.py FOLDER`. Needs pdoc, the extra `docs`.

`mpmm` has what most programs use, under the names of its `__all__`. The other modules are those that a program imports
by itself. All else is not for use from outside, and may change with every version.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

MODULES = ("mpmm", "mpmm.beam", "mpmm.metrics", "mpmm.sources")


def build(folder: Path) -> None:
    """Write the reference as HTML files, of which index.html is the first."""
    import pdoc

    pdoc.render.configure(docformat="markdown", show_source=False, footer_text="mpmm")
    pdoc.pdoc(*MODULES, output_directory=folder)


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Write the API reference as HTML files.")
    parser.add_argument("folder", type=Path, help="made if it is not there")
    options = parser.parse_args()
    try:
        build(options.folder)
    except ImportError as error:
        print(f"{error}; pip install 'mpmm[docs]' brings pdoc", file=sys.stderr)
        return 2
    print(options.folder / "index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
