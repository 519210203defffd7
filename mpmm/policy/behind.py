"""The obstacle of a waiter that was told only that it waits behind others (`Reason.BEHIND`), for people.

A plan decides nothing about such a waiter, so its ticket names neither a model nor a device. When a ticket is shown,
these are found from the queue at that moment, and from the models that run alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeVar

from mpmm.policy.view import Reason

__all__ = ["Before", "Behind", "Obstacle", "in_the_way", "obstacle"]

# Waits for which a plan keeps room, so that waiters behind get only what does not delay them.
_OF_THE_HEAD = frozenset({Reason.IN_USE, Reason.UNLOADING, Reason.RETURNING, Reason.MEMORY})
_IN_THE_WAY = _OF_THE_HEAD | {Reason.DRAINING, Reason.LEASED}
T = TypeVar("T")


class Behind(Enum):
    """The kind of obstacle that holds up a waiter."""

    RUNS_ALONE = auto()
    IS_TO_RUN_ALONE = auto()
    LEASE = auto()
    HEAD = auto()
    QUEUE = auto()


@dataclass(frozen=True)
class Before:
    """A waiter before the one in question. on: the devices that its reason is about, empty for all."""

    tag: str
    reason: int
    on: tuple[int, ...] = ()


@dataclass(frozen=True)
class Obstacle:
    """The kind of an obstacle, and the model that it is about. on: its devices, empty if there is only one device."""

    what: Behind
    tag: str
    on: tuple[int, ...] = ()


def in_the_way(queue: Sequence[T], reason_of: Callable[[T], int]) -> list[tuple[int, T]]:
    """Return the waiters that may hold up others, with their places: those that `obstacle` has to know."""
    return [(place, one) for place, one in enumerate(queue) if not place or reason_of(one) in _IN_THE_WAY]


def obstacle(
    devices: Collection[int],
    loadable_on: Collection[int],
    span: int,
    lease: bool,
    alone: Mapping[int, str],
    before: Iterable[Before],
) -> Obstacle | None:
    """Return what holds up a waiter that was told `Reason.BEHIND`; None if there is nothing to name.

    devices: all rows. loadable_on: those where it may load, empty for all; span: how many of them it needs. lease: it
    waits for a lease. alone: the model that runs alone, by device. before: the waiters before it, in the order of the
    queue, as far as they may be `in_the_way`.
    """
    queue = list(before)
    places = [device for device in devices if not loadable_on or device in loadable_on]

    def named(*on: int) -> tuple[int, ...]:
        return on if len(devices) > 1 else ()

    closed = [device for device in places if device in alone]
    if closed and len(places) - len(closed) < span:
        return Obstacle(Behind.RUNS_ALONE, alone[closed[0]], named(closed[0]))
    for one in queue:
        # Devices that are drained for it are closed to all others, like those where a model runs alone.
        drained = set(one.on or devices) if one.reason == Reason.DRAINING else set()
        if drained and len([device for device in places if device not in alone and device not in drained]) < span:
            return Obstacle(Behind.IS_TO_RUN_ALONE, one.tag, named(*one.on))
    if lease:
        for one in queue:
            if one.reason == Reason.LEASED:
                return Obstacle(Behind.LEASE, one.tag)
    for one in queue:
        if one.reason in _OF_THE_HEAD:
            return Obstacle(Behind.HEAD, one.tag)
    return Obstacle(Behind.QUEUE, queue[0].tag) if queue else None
