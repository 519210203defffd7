"""Make the API reference from the docstrings: `python tools/api_reference.py FOLDER`. Needs pdoc, the extra `docs`.

`mpmm` has what most programs use, the names in its `__all__`. A program imports the other modules listed here by
name. Everything else is private and may change in any version.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

MODULES = ("mpmm", "mpmm.beam", "mpmm.metrics", "mpmm.sources", "mpmm.suspend")


def build(folder: Path) -> None:
    """Write the reference as HTML files, starting at index.html."""
    import pdoc

    pdoc.render.configure(docformat="markdown", show_source=False, footer_text="mpmm")
    pdoc.pdoc(*MODULES, output_directory=folder)


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Write the API reference as HTML files.")
    parser.add_argument("folder", type=Path, help="output folder, created if it does not exist")
    options = parser.parse_args()
    try:
        build(options.folder)
    except ImportError as error:
        print(f"{error}; pip install 'mpmm[docs]' installs pdoc", file=sys.stderr)
        return 2
    print(options.folder / "index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
