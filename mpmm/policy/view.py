"""The input of a decision, and the kinds of decisions.

Indices (`row`, `model`, `device`) are those of the tables in the segment, but nothing here depends on that.
Memory is in MB, times are seconds on one monotonic clock.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import IntEnum, unique

__all__ = [
    "BusyInstance",
    "Decision",
    "DeviceView",
    "Evict",
    "Grant",
    "IdleInstance",
    "Load",
    "ModelView",
    "PlacedInstance",
    "Reason",
    "Refuse",
    "Resume",
    "Rules",
    "Satisfied",
    "SuspendedInstance",
    "TicketView",
    "View",
    "Wait",
    "Why",
]


@unique
class Reason(IntEnum):
    """Why something was decided, see `reasons` for the sentences. The numbers are stored in segments, so they stay."""

    # A ticket waits:
    BEHIND = 0  # a request before it in the queue must not be overtaken, or an unknown model runs alone
    DRAINING = 1  # its own model is unknown: waits for the others to finish
    MEMORY = 2  # unloading all that could be unloaded would not make enough room
    UNLOADING = 3  # room is being made
    RETURNING = 4  # unloaded memory has not come back yet
    NO_DEVICE = 5  # no device is known yet
    SHARING = 6  # a copy that is busy or being loaded will be free sooner than another one could be loaded
    PINNED = 7  # pinned copies leave too little room, even if everything else were unloaded
    COPIES = 8  # there are as many copies of its model as there may be
    LEASED = 9  # leases leave too little room, even if everything else were unloaded
    IN_USE = 10  # room is reserved for it where copies are still in use
    EXTERNAL = 11  # like LEASED, with external memory as well: the driver's, and that of other programs
    TABLE_FULL = 12  # it could load, but the table of copies has no row for it
    OUTRANKED = 13  # a request that came later, and is more urgent, waits for room before it
    BACKING_OFF = 14  # its loads fail, so nothing is evicted for it for a while
    SUSPENDING = 15  # a copy of its model is being suspended, and will then be resumed
    # It gets an idle copy:
    IDLE_COPY = 16
    OVERTAKES = 17  # past a request that waits for room, which this does not delay
    # It gets a suspended copy:
    RESUMES = 20
    # It may load:
    FITS = 24
    ALONE = 25  # to be measured
    BACKFILL = 26  # beside the room that is reserved for a request before it
    ANOTHER_COPY = 27  # sooner than a copy that is in use would be free
    # If several devices could take it, see `placement`:
    LEAST_FULL = 28
    TIGHTEST = 29  # of equally full ones
    ONLY_ONE = 30  # that has room
    # Copies are unloaded for it:
    LOWEST_SCORE = 32  # in Beam's order, as long as the costs are not known
    CHEAPEST_RELOAD = 33
    FLUSHED = 34  # so that it runs alone
    NO_ROW = 35  # the table of copies, or that of models, is full
    EXCHANGED = 36  # there are as many copies of the model as there may be, and none that the waiter could use
    ASKED = 37  # a call asks for it
    EXPIRED = 38  # it has not been used for as long as it is kept
    RESET = 39  # a reset unloads everything
    # It is refused:
    TOO_LARGE = 40
    # A ticket waits:
    QUIET = 41  # where it could load, something that sizes itself by the free memory is starting
    RESTLESS = 42  # it sizes itself so, and something is being loaded or unloaded there
    ONLY_COPY = 43  # for a copy that is in use, because another one would fit on no device
    # It is suspended, or unloaded from host memory:
    BY_HAND = 44
    HOST_FULL = 45  # so that another copy can be suspended
    HOST_SHORT = 46  # the host has hardly any memory left
    # Copies are unloaded:
    OUT_OF_MEMORY = 47  # a load, or a use, ran out of memory on their devices
    # A ticket is turned away:
    NOT_FREE = 48  # it does not wait, so nothing is evicted for it


@dataclass(frozen=True)
class Why:
    """A reason and its figures, as far as they matter for it.

    need_mb: how much the load needs. free_mb: how much is free. coming_mb: how much is coming back, or will be when
    copies in use become idle. seconds: a time on which the decision is based. other: the other model that it is about.
    devices: those that it is about, if there are several.
    """

    reason: Reason
    need_mb: float = 0.0
    free_mb: float = 0.0
    coming_mb: float = 0.0
    seconds: float = 0.0
    other: int | None = None
    devices: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rules:
    """Parameters of the decisions; see `ModelManager` for their meaning."""

    slack_percentage: float
    eviction_cooldown_seconds: float
    min_model_copies: int
    max_overtake_seconds: float
    isolate_unknown: bool
    max_model_copies: float = math.inf


@dataclass(frozen=True)
class ModelView:
    """One model that a request waits for or that is loaded.

    need_mb: the estimate, or the default. shared: loaded copies that any member can use. owned: loaded copies that only
    one member can use, by member. loading: copies being loaded, by the member that loads them; shares: the copies being
    loaded will have a handle, as far as known. load_s, hold_s: how long a load and a hold take, 0 unknown.
    loading_for_s: how long ago the newest load began. held_for_s: how long the copy that was handed out last has been
    held; held_in_all_s: how long all copies in use have been held, in sum. rate: expected requests per second. lease:
    it is a lease, not a model. failures: loads that have failed since the last one that succeeded; failed_ago_s: how
    long ago the last of them failed. leaving: copies in use, or being loaded, that will be unloaded when they are given
    back, so that no request waits for them; in no other count. superseded: another model has taken its place, so it is
    not expected to be requested again. suspending: copies that are being suspended. resume_s: how long a resume takes,
    0 unknown. coming_s: how long the newest load takes in all if it resumes a suspended copy; 0 if it is a load.
    bound_mb: a load has run out of memory with this much free, 0 if none has. users: how many may use a copy at a time,
    on average over the loaded ones. fitted: a copy was seen to take what the estimate says, so it fitted.
    """

    model: int
    known: bool
    need_mb: float
    shared: int
    owned: Mapping[int, int]
    waiting: int
    loading: Mapping[int, int] = field(default_factory=dict)
    shares: bool = False
    load_s: float = 0.0
    hold_s: float = 0.0
    loading_for_s: float = 0.0
    held_for_s: float = 0.0
    held_in_all_s: float = 0.0
    rate: float = 0.0
    lease: bool = False
    failures: int = 0
    failed_ago_s: float = math.inf
    leaving: int = 0
    superseded: bool = False
    suspending: int = 0
    resume_s: float = 0.0
    coming_s: float = 0.0
    bound_mb: float = 0.0
    fitted: bool = False
    users: float = 1.0

    @property
    def copies(self) -> int:
        """All copies that are loaded or being loaded, even those that will be unloaded when they are given back."""
        return self.loaded + sum(self.loading.values()) + self.leaving

    @property
    def loaded(self) -> int:
        """All loaded copies."""
        return self.shared + sum(self.owned.values())

    def usable_by(self, member: int) -> int:
        """Return how many loaded copies a member can use."""
        return self.shared + self.owned.get(member, 0)

    def coming_for(self, member: int) -> int:
        """Return how many copies are being loaded that a member will be able to use."""
        return sum(self.loading.values()) if self.shares else self.loading.get(member, 0)


@dataclass(frozen=True)
class PlacedInstance:
    """An instance and its devices: it takes `mb` on one device, and perhaps more on others, (device, MB) each."""

    row: int
    model: int
    device: int
    mb: float
    other_shares: tuple[tuple[int, float], ...] = field(default=(), kw_only=True)

    @property
    def devices(self) -> tuple[int, ...]:
        """All devices on which it lies."""
        return (self.device, *(device for device, _ in self.other_shares))

    def mb_on(self, device: int) -> float:
        """Return how much it takes of a device, which must be one of its devices."""
        return self.mb if device == self.device else dict(self.other_shares)[device]

    def is_within(self, devices: Collection[int]) -> bool:
        """Tell whether all of it lies on these devices; empty stands for all devices."""
        return not devices or all(device in devices for device in self.devices)


@dataclass(frozen=True)
class IdleInstance(PlacedInstance):
    """An idle instance. owner: the only member that can use it, None if any can. A pinned one is not evicted.

    place_in: if this is only a place for one more user in an instance that several may use at a time, the row of that
    instance; a place has no memory of its own, and is not evicted by itself. None for a whole instance that is unused.
    suspendable: if it were evicted, it would be suspended in host memory instead of being unloaded.
    """

    idle_since_s: float
    owner: int | None = None
    pinned: bool = False
    place_in: int | None = None
    suspendable: bool = False


@dataclass(frozen=True)
class SuspendedInstance(PlacedInstance):
    """An instance in host memory, which takes `mb` of its device once it is resumed. owner: as in `IdleInstance`.

    since_s: when it was suspended. resume_s: how long a resume is expected to take.
    """

    since_s: float
    owner: int | None = None
    resume_s: float = 0.0


@dataclass(frozen=True)
class BusyInstance(PlacedInstance):
    """An instance that is in use or being loaded, and when it is expected to be idle; `inf` if that is not known.

    owner: the only member that can use it, or that is loading it; None if any can. leaving: it will be unloaded when it
    is given back, so no request can use it.
    """

    free_in_s: float
    pinned: bool = False
    owner: int | None = None
    loading: bool = False
    leaving: bool = False


@dataclass(frozen=True)
class TicketView:
    """A waiter. `row` identifies it.

    preload: above 0, it does not wait for an instance to use, but for `preload` copies that its member can use.
    head_since_s: since when it has been the head of the line, None if it has never been. loadable_on: the devices where
    it may load; usable_on: those where it can use an instance; empty for all. span: how many devices its load takes.
    nested: its thread holds or loads something else, so it would wait for itself if it waited to run alone. passed: a
    later one's load was let past it. rank: its place among waiters of the same `priority`, see `fairness.rank_ns`.
    steady: nothing else may be loaded or unloaded where it loads. resumes: a preload that only resumes suspended
    instances, and loads nothing.
    """

    row: int
    number: int
    priority: int
    model: int
    member: int
    enqueued_s: float
    preload: int = 0
    head_since_s: float | None = None
    loadable_on: tuple[int, ...] = ()
    usable_on: tuple[int, ...] = ()
    span: int = 1
    nested: bool = False
    passed: bool = False
    rank: int = 0
    steady: bool = False
    resumes: bool = False


@dataclass(frozen=True)
class DeviceView:
    """One device, from its ledger (`policy.ledger`): `used_mb` and `reserved_mb` together are committed.

    used_mb: the memory that is believed to be in use, or coming back. reserved_mb: how much loads in progress and
    leases may take. unloading_mb: what copies in mid-unload still take, returning_mb: what unloads have not given back
    yet; both are part of `used_mb`. leased_mb: the memory of leases, part of `reserved_mb`. external_mb: memory that is
    not ours, part of `used_mb`; external_least_mb: the part of it that is certain. extra_mb: by how much the limit is
    raised for a copy that has the device to itself, see `admission.widened`. isolated: a copy runs alone on it.
    unloading: copies in mid-unload; suspending: those of them that are being suspended. steady: the model that is
    starting on it and must not be disturbed.
    """

    device: int
    total_mb: float
    used_mb: float
    reserved_mb: float
    unloading_mb: float
    returning_mb: float
    leased_mb: float = 0.0
    external_mb: float = 0.0
    external_least_mb: float = 0.0
    extra_mb: float = 0.0
    isolated: bool = False
    unloading: int = 0
    suspending: int = 0
    steady: int | None = None


@dataclass(frozen=True)
class View:
    """The input of a plan. `idle` lists instances, newest first; `busy` those in use or being loaded.

    tickets: waiters in any order; at least the first ones of the queue, for each model with idle copies the first ones
        of that model, and the first ones of other kinds.
    leases: those that are held, with the memory of each. suspended: instances in host memory, newest first.
    host_free_mb: how much host memory is left for further ones; also 0 if no idle instance would be suspended.
    """

    now_s: float
    rules: Rules
    models: Mapping[int, ModelView]
    idle: tuple[IdleInstance, ...]
    tickets: tuple[TicketView, ...]
    devices: tuple[DeviceView, ...]
    busy: tuple[BusyInstance, ...] = ()
    leases: tuple[PlacedInstance, ...] = ()
    suspended: tuple[SuspendedInstance, ...] = ()
    host_free_mb: float = 0.0


@dataclass(frozen=True)
class Grant:
    """Hand an idle instance to a ticket."""

    ticket: int
    instance: int
    why: Why = field(default=Why(Reason.IDLE_COPY), compare=False)


@dataclass(frozen=True)
class Load:
    """Let a ticket load a copy on these devices, an equal share on each; `alone` begins isolation."""

    ticket: int
    devices: tuple[int, ...]
    need_mb: float
    alone: bool
    why: Why = field(default=Why(Reason.FITS), compare=False)


@dataclass(frozen=True)
class Resume:
    """Let a ticket resume a suspended instance; the memory that it had on its devices is reserved for that."""

    ticket: int
    instance: int
    why: Why = field(default=Why(Reason.RESUMES), compare=False)


@dataclass(frozen=True)
class Evict:
    """Unload idle instances, in this order, for a ticket that waits meanwhile. `first`, `passed`: as in `Wait`."""

    ticket: int
    instances: tuple[int, ...]
    why: Why = field(default=Why(Reason.LOWEST_SCORE), compare=False)
    first: bool = field(default=True, compare=False)
    passed: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Wait:
    """A ticket waits, and why. `first`: it is the head of the line. `passed`: a later one's load is let past it."""

    ticket: int
    reason: Reason
    why: Why = field(default=Why(Reason.BEHIND), compare=False)
    first: bool = field(default=False, compare=False)
    passed: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Refuse:
    """A ticket's model can never fit on any device."""

    ticket: int
    why: Why = field(default=Why(Reason.TOO_LARGE), compare=False)


@dataclass(frozen=True)
class Satisfied:
    """A preload has nothing to do, or nothing left to do."""

    ticket: int


Decision = Grant | Resume | Load | Evict | Wait | Refuse | Satisfied
