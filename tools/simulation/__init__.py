"""A manager in virtual time, its policies, its requests, and bounds: see `simulate.py`."""
