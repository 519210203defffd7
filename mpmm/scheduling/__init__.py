"""Policy applied to shared state: read a view of the rows, ask for a plan, record it, wake the waiters it serves.

scheduler    `Scheduler`: carries out the policy's decisions, whenever something changes that waiters may wait for
views        the input of a plan; with `copies` (all instances in one pass) and `demand` (how often models are used)
shortcuts    a plan's decisions, where they are known without one
suspension   whether an evicted copy is suspended or unloaded
waiters      why a waiter waits, and for how long it will
table_rows   room in the tables themselves
wakes        waking the next user of a copy in time
"""

from mpmm.scheduling.copies import Copies
from mpmm.scheduling.scheduler import Scheduler
from mpmm.scheduling.shortcuts import CALLED_UP_FOR_NS
from mpmm.scheduling.wakes import SPIN_S

__all__ = ["CALLED_UP_FOR_NS", "SPIN_S", "Copies", "Scheduler"]
