"""Suspended instances: between loaded and gone, in host memory, from where a copy is back in a second.

books.py        which evicted copies are suspended, which suspended ones make way
suspender.py    a process's part: it suspends and resumes what its books tell it to
cooperative.py  by the object's own `sleep()` and `wake_up()`, and an adapter for torch
"""

from mpmm.suspend.cooperative import TorchModule

__all__ = ["TorchModule"]
