"""Policy applied to shared state: read a view of the rows, ask for a plan, write it down, wake up who is served.

scheduler    `Scheduler`: carries out what the policy says, whenever something changes that waiters may wait for
views        what a plan is made of; with `copies` (all instances in one pass) and `demand` (who is asked for)
shortcuts    what a plan would decide, where that is known without one
suspension   whether an evicted copy is suspended or unloaded
waiters      why a waiter waits, and how long it will
table_rows   room in the tables themselves
wakes        having the next user of a copy awake in time
"""

from mpmm.scheduling.copies import Copies
from mpmm.scheduling.scheduler import Scheduler
from mpmm.scheduling.shortcuts import CALLED_UP_FOR_NS
from mpmm.scheduling.wakes import SPIN_S

__all__ = ["CALLED_UP_FOR_NS", "SPIN_S", "Copies", "Scheduler"]
