"""The rows of `benchmark.py`: what each measures, on mpmm and on Beam's own manager, and how they are reported."""
