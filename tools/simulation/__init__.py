"""A manager in virtual time, and the requests that it is given: see `simulate.py`."""
