"""`python -m mpmm`: the command line, as the command `mpmm` has it."""

import sys

from mpmm.cli import main

if __name__ == "__main__":
    sys.exit(main())
