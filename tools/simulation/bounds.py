"""The loads of a manager that knows all requests beforehand, as bounds for a simulation's loads."""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from collections.abc import Iterable, Sequence

from simulation.manager import Setting

__all__ = ["closed_loads", "offline_loads"]


def closed_loads(sequences: Sequence[Sequence[int]], room: int = 1) -> int:
    """Return the fewest loads that can serve closed clients if `room` models are loaded at a time.

    A closed client asks for a model only after it has been served the one before. So a load can serve only those
    requests of each client that are next in turn; with room for one model, the result is the length of the shortest
    common supersequence of the clients' requests, without repeats. The search goes through all positions that can be
    reached with 0, 1, 2, … loads, and drops those that others are ahead of.
    """

    def served(at: tuple[int, ...], loaded: frozenset[int]) -> tuple[int, ...]:
        ahead = []
        for one, sequence in zip(at, sequences, strict=True):
            while one < len(sequence) and sequence[one] in loaded:
                one += 1
            ahead.append(one)
        return tuple(ahead)

    ends = tuple(len(sequence) for sequence in sequences)
    reached = {(frozenset[int](), (0,) * len(sequences))}
    for loads in itertools.count():
        if any(at == ends for _, at in reached):
            return loads
        further: defaultdict[frozenset[int], set[tuple[int, ...]]] = defaultdict(set)
        for loaded, at in reached:
            for model in {sequence[one] for one, sequence in zip(at, sequences, strict=True) if one < len(sequence)}:
                kept = itertools.combinations(loaded, room - 1) if len(loaded) == room else [tuple(loaded)]
                for others in kept:
                    after = frozenset((*others, model))
                    further[after].add(served(at, after))
        reached = {(loaded, at) for loaded, found in further.items() for at in _foremost(found)}
    raise AssertionError("not reached")


def _foremost(found: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the positions that no other position is ahead of or equal to for every client."""
    foremost: list[tuple[int, ...]] = []
    for at in sorted(found, key=sum, reverse=True):
        if not any(all(map(operator.le, at, other)) for other in foremost):
            foremost.append(at)
    return foremost


def offline_loads(setting: Setting, models: Sequence[int]) -> int:
    """Return the loads of a manager that serves one request at a time and knows the future.

    Belady's rule for weighted items, the better of two: evict the copy that is wanted last, or the one whose memory
    times that distance is largest; victims that turn out to be unnecessary stay.
    """
    limit_mb = setting.total_mb * (1 - setting.rules.slack_percentage)
    following = [len(models)] * len(models)
    seen: dict[int, int] = {}
    for at in range(len(models) - 1, -1, -1):
        following[at] = seen.get(models[at], 2 * len(models))
        seen[models[at]] = at
    return min(_belady(setting.sizes_mb, limit_mb, models, following, by_mb) for by_mb in (False, True))


def _belady(
    sizes_mb: Sequence[float], limit_mb: float, models: Sequence[int], following: Sequence[int], by_mb: bool
) -> int:
    wanted_at: dict[int, int] = {}
    used = 0.0
    loads = 0
    for at, model in enumerate(models):
        if model not in wanted_at:
            loads += 1
            missing = used + sizes_mb[model] - limit_mb
            order = sorted(
                wanted_at,
                key=lambda one: -(wanted_at[one] - at) * (sizes_mb[one] if by_mb else 1.0),
            )
            victims: list[int] = []
            for victim in order:
                if missing <= 0:
                    break
                victims.append(victim)
                missing -= sizes_mb[victim]
            for victim in reversed(victims[:-1]):
                if missing + sizes_mb[victim] <= 0:
                    victims.remove(victim)
                    missing += sizes_mb[victim]
            for victim in victims:
                used -= sizes_mb[victim]
                del wanted_at[victim]
            used += sizes_mb[model]
        wanted_at[model] = following[at]
    return loads
