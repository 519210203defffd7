"""Suspended instances: neither loaded nor gone, but in host memory, from where a copy is back in a second.

    suspender.py    each process's part: it suspends and resumes the copies that `scheduling.suspension` chooses
    cooperative.py  suspension by the object's own `sleep()` and `wake_up()`, and an adapter for torch
    helper.py       suspension by the CUDA driver: the process that calls it, and how to ask that process
    driver.py       the driver's calls

An evicted copy is suspended if suspending and resuming it is expected to take enough less time than another load, see
`policy.suspension`; mpmm learns these times for each model. The host must also have room for it within
`suspend_budget_mb`; copies that are worth less are dropped to make room. There are two ways:

- *cooperative*: the object that the loader made, here or in a server, has methods `sleep()` and `wake_up()`.
- *checkpoint*: the driver suspends any model server that is a process of its own (`spawn_process=True`), without asking
  the object. It cannot do so under MIG or MPS, nor with managed memory. `suspend="auto"` uses this way only with
  drivers on which it was tried. With driver 595 (open) others have seen a host hang when a resumed process was killed,
  so there mpmm suspends a server before it ends it; it cannot do so for a server that dies by itself, or that another
  program kills.

A copy that spans several devices, or has the same handle as another one, is not suspended. If a suspension or a resume
fails, the copy is unloaded, and its model is not suspended again, unless its server died meanwhile, the device had too
little memory for a resume, the helper could not be asked, or a process that had a part in it was stopped: these say
nothing about the model.
"""

from mpmm.suspend.cooperative import TorchModule

__all__ = ["TorchModule"]
