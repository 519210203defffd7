"""Demand: how often a model is requested, as a mean that forgets.

The demand is kept as the mean time between two requests, because that needs no time constant: it forgets by requests
and not by seconds, so it suits models that are wanted a hundred times a second as well as those that are wanted once an
hour. Requests are counted anyway, so many can be added at once, at no cost for a reuse.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MEMORY", "Demand"]

# How many requests are remembered, and how many of them are weighed against a silence. In the simulator's traces, one
# request at a time, (4, 2) needs 1.25 times the loads of a manager that knows the future on Zipf, and 1.45 on bursts
# (LRU: 1.61 and 1.48). Longer memories gain 0.02 on Zipf, but are worse than LRU on bursts: (8, 8) 1.80. Shorter ones,
# (2, 1), are the opposite: 1.30 and 1.39.
MEMORY = 4
WEIGHT = 2
# A request that has just come says nothing yet about when the next one comes.
SHORTEST_S = 1e-3


@dataclass(frozen=True)
class Demand:
    """The requests for one model.

    mean_interarrival_s: decayed mean time between two requests, 0 before the second. requests: how many there were when
    they were last counted. counted_s: when the count last rose.
    """

    mean_interarrival_s: float = 0.0
    requests: int = 0
    counted_s: float = 0.0

    def counted(self, requests: int, now_s: float) -> Demand:
        """Return the demand after `requests` requests in all; this one if there have been none since."""
        new = requests - self.requests
        if new <= 0:
            # A load that has failed is no longer counted.
            return self if not new else Demand(self.mean_interarrival_s, requests, self.counted_s)
        if not self.requests:
            return Demand(0.0, requests, now_s)
        mean_s = (now_s - self.counted_s) / new
        kept = (1.0 - 1.0 / MEMORY) ** new if self.mean_interarrival_s else 0.0
        return Demand(kept * self.mean_interarrival_s + (1.0 - kept) * mean_s, requests, now_s)

    def per_second(self, now_s: float) -> float:
        """Return the expected rate of requests; silence since the last one lowers it.

        It is the mean of the Gamma posterior after `seen` requests in the time they took plus the time since: if
        requests stop it falls as 1 / silence, in the order of least recent use.
        """
        if not self.requests:
            return 0.0
        seen = min(self.requests, WEIGHT)
        return seen / max(seen * self.mean_interarrival_s + now_s - self.counted_s, SHORTEST_S)
