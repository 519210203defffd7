"""Suspended instances: between loaded and gone, in host memory, from where a copy is back in a second.

    books.py        which evicted copies are suspended, which suspended ones make way
    suspender.py    a process's part: it suspends and resumes what its books tell it to
    cooperative.py  by the object's own `sleep()` and `wake_up()`, and an adapter for torch
    helper.py       by the CUDA driver: the process that calls it, and how to ask that process
    driver.py       the driver's calls

An evicted copy is suspended if to suspend and to resume it is expected to take less time than to load it anew, which is
learnt for each model, and if the host has room for it within `suspend_budget_mb`, where copies that are worth less make
way. There are two ways:

- *cooperative*: the object that the loader has made, or that its server has, has methods `sleep()` and `wake_up()`.
- *checkpoint*: for any model server that was spawned, by the driver, which does not ask the object. Not under MIG or
  MPS, nor with managed memory. `suspend="auto"` takes this way only on drivers on which it was tried. On driver 595
  (open) others have seen a host hang when a process was killed that had been resumed, so there a server is suspended
  before it is ended; one that dies by itself, or is killed by somebody else, is not.

A copy that spans several devices, or stands for the same handle as another one, is not suspended. The first suspension
or resume of a model that fails costs the copy, and the model is not suspended any more.
"""

from mpmm.suspend.cooperative import TorchModule

__all__ = ["TorchModule"]
