"""Make simulated GPUs by hand: `python tools/simulated_gpu.py FOLDER MB …`. Other programs import their names here."""

from __future__ import annotations

from devices.simulated_gpu import DIRECTORY_VARIABLE, Build, SimulatedGpus, build, main

__all__ = ["DIRECTORY_VARIABLE", "Build", "SimulatedGpus", "build", "main"]

if __name__ == "__main__":
    main()
