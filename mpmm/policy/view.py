"""What a decision may look at, and what it can come to.

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
    """Why something was decided. The sentences are in `reasons`; the numbers stand in segments, so they stay."""

    # A ticket waits:
    BEHIND = 0  # a request before it in the queue must not be overtaken, or an unknown model runs alone
    DRAINING = 1  # its own model is unknown: waits for the others to finish
    MEMORY = 2  # nothing that could be unloaded makes enough room
    UNLOADING = 3  # room is being made
    RETURNING = 4  # unloaded memory has not come back yet
    NO_DEVICE = 5  # no device is known yet
    SHARING = 6  # a copy that is busy or being loaded will be free sooner than another one could be loaded
    PINNED = 7  # what is pinned leaves too little room, even if everything else went
    COPIES = 8  # there are as many copies of its model as there may be
    LEASED = 9  # leases that are held leave too little room, even if everything else went
    IN_USE = 10  # room is reserved for it where copies are still in use
    EXTERNAL = 11  # as LEASED, with external memory as well: the driver's, and that of other programs
    TABLE_FULL = 12  # it could load, but the table of copies has no row for it
    OUTRANKED = 13  # one that came later, and is more urgent, waits for room before it
    BACKING_OFF = 14  # its loads fail, so nothing is evicted for it for a while
    SUSPENDING = 15  # a copy of its model is being suspended, and is resumed then
    # It gets an idle copy:
    IDLE_COPY = 16
    OVERTAKES = 17  # past one that waits for room, which this does not delay
    # It gets a suspended copy:
    RESUMES = 20
    # It may load:
    FITS = 24
    ALONE = 25  # to be measured
    BACKFILL = 26  # where that leaves what is reserved for one before it
    ANOTHER_COPY = 27  # sooner than a copy that is in use could be had
    # Where several devices could take it, see `placement`:
    LEAST_FULL = 28
    TIGHTEST = 29  # of those that are as full
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
    QUIET = 41  # something starts where it could load that sizes itself by what is free
    RESTLESS = 42  # it does so itself, and something is being loaded or unloaded there
    ONLY_COPY = 43  # for a copy that is in use, as another one would fit on no device
    # It is suspended, or unloaded from host memory:
    BY_HAND = 44
    HOST_FULL = 45  # so that another copy can be suspended
    HOST_SHORT = 46  # the host has hardly any memory left
    # Copies are unloaded:
    OUT_OF_MEMORY = 47  # a load, or a use, ran out of memory where they lie
    # A ticket is turned away:
    NOT_FREE = 48  # it does not wait, so nothing is evicted for it


@dataclass(frozen=True)
class Why:
    """A reason and its figures, as far as they matter for it.

    need_mb: what the load needs. free_mb: what is free. coming_mb: what is on its way back, or will be when copies that
    are in use become idle. seconds: a time that the decision rests on. other: the model that it is about, besides one's
    own. devices: those that it is about, where there are several.
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
    one member can use, by member. loading: copies being loaded, by the member that loads them; shares: what is being
    loaded will be a handle, as far as known. load_s, hold_s: how long a load and a hold take, 0 unknown. loading_for_s:
    how long the newest load has been going on. held_for_s: how long the copy that was handed out last is held;
    held_in_all_s: how long those in use have been held, all together. rate: expected requests a second. lease: it is no
    model, but a lease. failures: loads that failed since the last one that did not, and how long ago the last of them
    was. leaving: copies in use, or being loaded, that are unloaded when they are given back, so that no request waits
    for them; in no other count. superseded: another model has taken its place, so it is not expected to be asked for
    again. suspending: copies that are being suspended. resume_s: how long a resume takes, 0 unknown. coming_s: how long
    the newest load takes in all if it is the resume of a suspended copy; 0 where it is a load. bound_mb: with so much
    free a load has run out of memory, 0 if none has. users: how many may use a copy at a time, the mean of those that
    are loaded.
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
    users: float = 1.0

    @property
    def copies(self) -> int:
        """All copies that are loaded or being loaded, also those that are unloaded when they are given back."""
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
    """An instance and where it lies: with `mb` on one device, and perhaps on others, (device, MB) each."""

    row: int
    model: int
    device: int
    mb: float
    other_shares: tuple[tuple[int, float], ...] = field(default=(), kw_only=True)

    @property
    def devices(self) -> tuple[int, ...]:
        """All devices that it lies on."""
        return (self.device, *(device for device, _ in self.other_shares))

    def mb_on(self, device: int) -> float:
        """Return what it takes of a device, which must be one of its devices."""
        return self.mb if device == self.device else dict(self.other_shares)[device]

    def is_within(self, devices: Collection[int]) -> bool:
        """Tell whether all of it lies on some of these devices; empty stands for all there are."""
        return not devices or all(device in devices for device in self.devices)


@dataclass(frozen=True)
class IdleInstance(PlacedInstance):
    """An idle instance. owner: the only member that can use it, None when any can. A pinned one is not evicted.

    place_in: of an instance that several may use at a time, the row of that: this is a place for one more user, has no
    memory of its own, and is not evicted by itself. None for a whole instance, which nobody uses.
    suspendable: if it were evicted it would be suspended in host memory instead of unloaded.
    """

    idle_since_s: float
    owner: int | None = None
    pinned: bool = False
    place_in: int | None = None
    suspendable: bool = False


@dataclass(frozen=True)
class SuspendedInstance(PlacedInstance):
    """An instance in host memory, which takes `mb` of its device once it is resumed. owner: as with `IdleInstance`.

    since_s: when it was suspended. resume_s: how long a resume is expected to take.
    """

    since_s: float
    owner: int | None = None
    resume_s: float = 0.0


@dataclass(frozen=True)
class BusyInstance(PlacedInstance):
    """An instance that is in use or being loaded, and when it is expected to be idle; `inf` if that is not known.

    owner: the only member that can use it, or that is loading it; None when any can.
    """

    free_in_s: float
    pinned: bool = False
    owner: int | None = None
    loading: bool = False


@dataclass(frozen=True)
class TicketView:
    """A waiter. `row` identifies it.

    preload: above 0, it does not wait for an instance to use, but for `preload` copies that its member can use.
    head_since_s: since when it is the head of the line, None if it has never been. loadable_on: the devices where it
    may load; usable_on: those where an instance is of use for it; empty for all. span: how many devices its load takes.
    nested: its thread holds or loads something else, so it would wait for itself if it waited to run alone. passed: a
    load was let past it. rank: its place among those of the same `priority`, see `fairness.rank_ns`. steady: nothing
    else may be loaded or unloaded where it loads. resumes: a preload that is for a suspended instance alone, and has
    nothing loaded.
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
    """One device, as its ledger says (`policy.ledger`): `used_mb` and `reserved_mb` together are what is committed.

    used_mb: what is believed to be in use, or to be coming back. reserved_mb: what loads in progress and leases may
    take. unloading_mb: what copies in mid-unload still take, returning_mb: what unloads have not given back yet; both
    are part of `used_mb`. leased_mb: what leases are for, part of `reserved_mb`. external_mb: what is not ours, part
    of `used_mb`; external_least_mb: so much of that is certain. extra_mb: by how much the limit is raised for one that
    has the device to itself, see `admission.widened`. isolated: a copy runs alone on it. unloading: copies in
    mid-unload; suspending: those of them that are being suspended. steady: the model of what starts on it and must not
    be disturbed.
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
    """The state that a plan is made from. `idle` lists instances newest first; `busy` those in use or being loaded.

    tickets: waiters in any order; at least the first ones of the queue, and for each model with idle copies
        the first ones of that model.
    leases: those that are held, with what each is for. suspended: instances in host memory, newest first.
    host_free_mb: what is left of the host's memory for further ones; 0 also where no idle instance would be suspended.
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
    """Let a ticket resume a suspended instance, for which what it had of its devices is reserved."""

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
    """A ticket waits, and why. `first`: it is the head of the line. `passed`: a load is let past
    it."""

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
    """A preload has nothing to do, or nothing any more."""

    ticket: int


Decision = Grant | Resume | Load | Evict | Wait | Refuse | Satisfied
