"""`python -m mpmm`: the command line, as the command `mpmm` has it."""

import sys

from mpmm.cli import as_program

if __name__ == "__main__":
    sys.exit(as_program())
