"""`mpmm inspect` from a checkout, with all of its options: `python tools/inspect_state.py [NAMESPACE] [--json] …`."""

from __future__ import annotations

import sys

from mpmm.cli import main

if __name__ == "__main__":
    sys.exit(main(["inspect", *sys.argv[1:]]))
