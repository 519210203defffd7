"""A manager in virtual time, its policies, the requests that it is given, and bounds: see `simulate.py`."""
