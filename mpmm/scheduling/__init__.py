"""The policy applied to the shared state: what waits is looked at, decided upon, and carried out, under the lock.

view_reader     what the policy may look at, read from the rows
shortcuts       what is known without a plan, from a few rows (Q1 to Q5)
scheduler       carries out what the policy decides; wakes those whom it concerns
"""

from mpmm.scheduling.scheduler import Scheduler
from mpmm.scheduling.shortcuts import CALLED_UP_FOR_NS
from mpmm.scheduling.view_reader import Copies

__all__ = ["CALLED_UP_FOR_NS", "Copies", "Scheduler"]
