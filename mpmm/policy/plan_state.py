"""The state of a plan in progress: the view, less what its earlier decisions have taken.

`Planner` (see `plan`) makes one for each plan. The modules that decide about one waiter (`loading`, `isolation`,
`backfill`, `quiet_start`) ask it what is left, and take from it what they decide to use.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import replace

from mpmm.policy.admission import free_mb, largest_limit_mb, limit_mb
from mpmm.policy.eviction import EvictionPlan
from mpmm.policy.fairness import may_be_leased_before
from mpmm.policy.sharing import seen_so_far
from mpmm.policy.view import (
    BusyInstance,
    DeviceView,
    Evict,
    IdleInstance,
    Load,
    ModelView,
    PlacedInstance,
    Reason,
    Resume,
    SuspendedInstance,
    TicketView,
    View,
    Wait,
    Why,
)

__all__ = ["PlanState", "as_resume", "can_use", "most_free_mb"]

LoadWanted = tuple[int, tuple[int, ...], tuple[int, ...], int, bool, bool]


class PlanState:
    """What is left of a view for later decisions. Room only shrinks: no decision gives anything back.

    devices: those where something may begin, by row. idle: idle instances, and places in some, by model; suspended:
    instances in host memory. models: with the loads that this plan allows. busy: instances in use or being loaded by
    device, with those that this plan adds. leases: those that are held, with those of this plan. head: the head of the
    line, the first waiter without room; `eviction_plan` tells where room is made for it, as far as that is known.
    overtaking_is_free: the time in which others may overtake it does not begin yet, see `fairness`.
    """

    def __init__(self, view: View) -> None:
        self.view = view
        self.slack = view.rules.slack_percentage
        # A device on which an instance runs alone, or is to, is left to that one.
        self.devices = {device.device: device for device in view.devices if not device.isolated}
        self.idle: defaultdict[int, list[IdleInstance]] = defaultdict(list)
        for instance in view.idle:
            if all(device in self.devices for device in instance.devices):
                self.idle[instance.model].append(instance)
        self.suspended = list(view.suspended)
        self.models = dict(view.models)
        # What the other models tell about models that have never been loaded.
        self.seen = seen_so_far(view.models.values())
        self.busy = Counter(device for instance in view.busy for device in instance.devices)
        # Instances that this plan has granted to waiters, and that are in use from then on.
        self.taken: list[IdleInstance] = []
        self.leases = list(view.leases)
        self.head: TicketView | None = None
        self.eviction_plan: EvictionPlan | None = None
        self.overtaking_is_free = False
        # Whether the room for the head of the line is coming, and for the waiters behind it that were decided so far;
        # see `room_ahead`.
        self.room_is_coming = False
        # Requests for loads that cannot be made beside the room for the head of the line, see `_load_wanted`. Each is
        # tried once, because room only shrinks, and most waiters behind the head want the same few.
        self.no_backfill: set[LoadWanted] = set()
        # Devices where something starts quietly, so that idle instances are used, but nothing is loaded or unloaded:
        # device -> its model.
        self.quiet = {device.device: device.steady for device in view.devices if device.steady is not None}
        # The devices where this plan loads or resumes something.
        self.begun: set[int] = set()
        # What it loads or resumes there, or keeps room for.
        self.coming: list[BusyInstance] = []
        # The answers that later waiters with the same request get, too; cleared as soon as something else is planned.
        self.repeated_waits: dict[tuple[object, ...], Wait] = {}
        # Whether requests wait for leases to end, so that not every further lease is granted; these waiters, and how
        # much each needs on each of its devices.
        self.lease_is_awaited = False
        self.awaiting_leases: list[tuple[TicketView, float]] = []

    def note_hopeless(self, ticket: TicketView) -> None:
        """Note that what a waiter wants cannot be loaded beside the room for the head of the line."""
        self.no_backfill.add(_load_wanted(ticket))

    def is_hopeless(self, ticket: TicketView) -> bool:
        """Tell whether that was noted of a waiter with the same request; not if there is an instance to resume."""
        return _load_wanted(ticket) in self.no_backfill and self.suspended_for(ticket) is None

    # ---- where ---------------------------------------------------------------------------------------------

    def open_to(self, ticket: TicketView) -> list[DeviceView]:
        """Return the devices on which a waiter may load now."""
        return [
            device
            for device in self.devices.values()
            if device.device not in self.quiet and (not ticket.loadable_on or device.device in ticket.loadable_on)
        ]

    def allowed_for(self, ticket: TicketView) -> list[DeviceView]:
        """Return the devices on which a waiter may load at all, including those where nothing may begin now."""
        return [device for device in self.view.devices if not ticket.loadable_on or device.device in ticket.loadable_on]

    def named(self, devices: Iterable[DeviceView]) -> tuple[int, ...]:
        """Return the devices for a reason; none if there is only one."""
        return tuple(device.device for device in devices) if len(self.view.devices) > 1 else ()

    def idle_on(self, devices: set[int]) -> list[IdleInstance]:
        """Return the unused instances that lie, at least in part, on some of these devices."""
        return [one for one in self.unused() if devices.intersection(one.devices)]

    def unused(self) -> Iterator[IdleInstance]:
        """Find the unused instances: those that may be unloaded."""
        return (one for instances in self.idle.values() for one in instances if one.place_in is None)

    def take_idle(self, instance: IdleInstance) -> None:
        """Give an idle instance, or a place in one, to a waiter."""
        idle = self.idle[instance.model]
        idle.remove(instance)
        self.busy.update(instance.devices)
        self.taken.append(instance)
        if instance.place_in is not None:
            # The instance of that place is in use from now on, so its own row is just one more place.
            idle[:] = [replace(one, mb=0.0, place_in=one.row) if one.row == instance.place_in else one for one in idle]

    def pinned_mb_on(self, device: int) -> float:
        """Return how much of a device pinned instances take, idle ones and those in use."""
        instances: list[IdleInstance | BusyInstance] = [*self.view.idle, *self.view.busy]
        return math.fsum(one.mb_on(device) for one in instances if one.pinned and device in one.devices)

    def count_fitting(
        self, where: Iterable[DeviceView], share_mb: float, external: bool = True, pinned: bool = False
    ) -> int:
        """Return on how many devices `share_mb` would fit if the manager unloaded all that it can.

        external: memory that is certainly not ours counts, too; leases always count. pinned: so do pinned instances. If
        only external memory counts on a device, a load may use that up to its total, see `admission.widened`.
        """
        count = 0
        for device in where:
            least_mb = max(0.0, device.external_least_mb) if external else 0.0
            kept_mb = device.leased_mb + (self.pinned_mb_on(device.device) if pinned else 0.0)
            limit = limit_mb(device, self.slack) - device.extra_mb
            fits = share_mb + kept_mb + least_mb <= limit
            count += fits or (share_mb <= limit and not kept_mb and share_mb + least_mb <= device.total_mb)
        return count

    def leasable(self, devices: list[DeviceView], model: ModelView, share_mb: float) -> list[DeviceView]:
        """Return where a lease of `share_mb` does not delay waiters for leases to end; a model delays none of them."""
        if not model.lease or not self.lease_is_awaited:
            return devices
        held_mb = {
            device.device: [lease.mb_on(device.device) for lease in self.leases if device.device in lease.devices]
            for device in devices
        }
        return [
            device
            for device in devices
            if all(
                may_be_leased_before(self.view, waiting, need_mb, device, share_mb, held_mb[device.device])
                for waiting, need_mb in self.awaiting_leases
            )
        ]

    # ---- models --------------------------------------------------------------------------------------------

    def must_run_alone(self, ticket: TicketView, model: ModelView) -> bool:
        """Tell whether a waiter's load has to run alone, to be measured."""
        return not model.known and self.view.rules.isolate_unknown and not ticket.nested

    def has_most_copies(self, model: ModelView) -> bool:
        """Tell whether there are as many copies of a model as there may be."""
        return model.copies >= self.view.rules.max_model_copies

    def usable_part(self, ticket: TicketView, model: ModelView) -> ModelView:
        """Return a model as a waiter that can use only some devices sees it: without instances on other devices."""
        if not ticket.usable_on:
            return model
        view = self.view
        there = (*view.busy, *self.coming)
        used = [one for one in there if one.model == model.model and one.is_within(ticket.usable_on)]
        busy = [one for one in used if not one.leaving]
        loaded_owners = Counter(one.owner for one in busy if not one.loading)
        idle = (one for one in view.idle if one.model == model.model and one.place_in is None)
        loaded_owners.update(one.owner for one in idle if one.is_within(ticket.usable_on))
        owned = {owner: count for owner, count in loaded_owners.items() if owner is not None}
        loading = Counter(one.owner for one in busy if one.loading and one.owner is not None)
        leaving = len(used) - len(busy)
        return replace(model, shared=loaded_owners[None], owned=owned, loading=loading, leaving=leaving)

    def need_mb(self, ticket: TicketView, model: ModelView) -> float:
        """Return how much memory a load needs. For an unknown model that is assumed, and must not rule the load out.

        So it is at most the largest part of a device that can become free, beside external memory and current leases,
        with nothing else of ours there.

        A measured estimate above the limit counts as the limit, because a copy has just run there: it took less when it
        was loaded, and grew into the slack while it was used, as caching allocators do. The limit depends on the
        settings and on the devices where the waiter may load, so the estimate itself stays as it was measured. The same
        holds for what was inferred from whole devices while copies were loaded: such a figure may also be too high, and
        if the model were refused for that, nothing could change it. What users say that a model takes is refused if it
        is above the limit.
        """
        if model.fitted:
            largest = largest_limit_mb(self.allowed_for(ticket), self.slack, ticket.span) * ticket.span
            return min(model.need_mb, largest) if largest > 0 else model.need_mb
        if model.known:
            return model.need_mb
        best = sorted(
            min(limit_mb(one, self.slack), one.total_mb - max(0.0, one.external_least_mb)) - one.leased_mb
            for one in self.allowed_for(ticket)
        )
        reach = best[-ticket.span] * ticket.span if len(best) >= ticket.span else 0.0
        return min(model.need_mb, reach) if reach > 0 else model.need_mb

    def model_for(self, ticket: TicketView) -> ModelView:
        """Return a waiter's model, with what its load needs instead of an estimate above the limit if copies fitted."""
        model = self.models[ticket.model]
        if not model.fitted:
            return model
        need_mb = self.need_mb(ticket, model)
        return model if need_mb == model.need_mb else replace(model, need_mb=need_mb)

    def suspended_for(self, ticket: TicketView) -> SuspendedInstance | None:
        """Return the suspended instance that a waiter can use soonest; None if there is none."""
        return next(iter(self.all_suspended_for(ticket)), None)

    def all_suspended_for(self, ticket: TicketView) -> list[SuspendedInstance]:
        """Return the suspended instances that a waiter can use: those that have room first, newest first among equals.

        Instances on a device that something else has to itself are left out.
        """
        # Usually nothing is suspended.
        if ticket.steady or not self.suspended:
            return []
        closed = {device.device for device in self.view.devices} - set(self.devices)
        return sorted((one for one in self.suspended if _can_resume(ticket, one, closed)), key=self.lacks_room)

    def lacks_room(self, instance: SuspendedInstance) -> bool:
        """Tell whether a suspended instance cannot be resumed at once."""
        return any(
            device in self.quiet or free_mb(self.devices[device], self.slack) < instance.mb_on(device)
            for device in instance.devices
        )

    def has_suspended_for(self, ticket: TicketView) -> bool:
        """Tell whether there is a suspended instance for a waiter, even if its device is closed."""
        return any(_can_resume(ticket, one, frozenset()) for one in self.suspended)

    # ---- what a decision takes -----------------------------------------------------------------------------

    def load_on(
        self,
        ticket: TicketView,
        devices: Sequence[DeviceView],
        need_mb: float,
        reason: Reason,
        other: int | None = None,
    ) -> Load:
        """Let a waiter load on these devices, and reserve the memory there."""
        self.repeated_waits.clear()
        self.begun.update(device.device for device in devices)
        share_mb = need_mb / len(devices)
        for device in devices:
            known = self.devices[device.device]
            self.devices[device.device] = replace(known, reserved_mb=known.reserved_mb + share_mb)
            self.busy[device.device] += 1
        model = self.models[ticket.model]
        if model.lease:
            first, *others = [device.device for device in devices]
            other_shares = tuple((device, share_mb) for device in others)
            self.leases.append(PlacedInstance(-1, model.model, first, share_mb, other_shares=other_shares))
        self.count_load(ticket, [device.device for device in devices])
        free = math.fsum(free_mb(device, self.slack) for device in devices)
        why = Why(reason, need_mb, free, other=other, devices=self.named(devices))
        return Load(ticket.row, tuple(device.device for device in devices), need_mb, False, why)

    def count_load(self, ticket: TicketView, devices: Sequence[int]) -> None:
        """Count a waiter's load on these devices, so that waiters behind it share it, and load no copy too many."""
        model = self.models[ticket.model]
        loading = {**model.loading, ticket.member: model.loading.get(ticket.member, 0) + 1}
        self.models[ticket.model] = replace(model, loading=loading, loading_for_s=0.0)
        first, *others = devices
        shares = tuple((device, 0.0) for device in others)
        # Its memory is counted as reserved on its devices.
        row, mb, whose = -1, 0.0, ticket.member
        load = BusyInstance(row, model.model, first, mb, math.inf, owner=whose, loading=True, other_shares=shares)
        self.coming.append(load)

    def resume_instead(self, load: Load, instance: SuspendedInstance) -> Resume:
        """Turn a load that was allowed into the resume of an instance on its device."""
        self.suspended.remove(instance)
        why = replace(load.why, reason=Reason.RESUMES, seconds=instance.resume_s, other=None)
        return Resume(load.ticket, instance.row, why)

    def evict_for(self, ticket: TicketView, instances: Sequence[IdleInstance], why: Why, first: bool = True) -> Evict:
        """Evict idle instances for a waiter, which becomes the head of the line if `first`."""
        for instance in instances:
            self.idle[instance.model].remove(instance)
        if first:
            self.head = ticket
        return Evict(ticket.row, tuple(instance.row for instance in instances), why, first)

    def keep_room_ahead(self, ticket: TicketView, device: int, left_mb: float) -> None:
        """Keep room on a device for a waiter behind the head of the line, too; `left_mb` is left for others."""
        head_plan = self.eviction_plan
        if head_plan is None:
            return
        left = {one.device: mb for one, mb in zip(head_plan.devices, head_plan.left_mb, strict=True)}
        left[device] = left_mb
        where = tuple(self.devices[row] for row in left)
        self.eviction_plan = replace(head_plan, devices=where, left_mb=tuple(left.values()))
        self.count_load(ticket, [device])

    def wait_at_head(self, ticket: TicketView, why: Why) -> Wait:
        """Let a waiter wait as the head of the line: waiters behind it get only what does not delay it."""
        self.head = ticket
        return Wait(ticket.row, why.reason, why, first=True)


def can_use(ticket: TicketView, instance: IdleInstance, closed: Set[int] = frozenset()) -> bool:
    """Tell whether a waiter's process can use an idle instance of its model, and it lies where the waiter wants it."""
    usable = instance.owner in (None, ticket.member) and instance.is_within(ticket.usable_on)
    return usable and not closed & set(instance.devices)


def as_resume(ticket: TicketView, model: ModelView, instance: SuspendedInstance) -> tuple[TicketView, ModelView]:
    """Return a waiter and its model as if it wanted to load what a resume of this instance takes, on its devices."""
    devices = instance.devices
    mb = math.fsum(instance.mb_on(device) for device in devices)
    return replace(ticket, loadable_on=devices, span=len(devices)), replace(model, known=True, need_mb=mb)


def _load_wanted(ticket: TicketView) -> LoadWanted:
    """Return what tells one request for a load from another behind the head of the line."""
    return ticket.model, ticket.loadable_on, ticket.usable_on, ticket.span, ticket.nested, ticket.resumes


def most_free_mb(devices: Iterable[DeviceView], slack_percentage: float) -> float:
    """Return how much is free on the device that has most free."""
    return max((free_mb(device, slack_percentage) for device in devices), default=0.0)


def _can_resume(ticket: TicketView, instance: SuspendedInstance, closed: Set[int]) -> bool:
    """Tell whether a waiter's process can use a suspended instance, and it lies where the waiter may load."""
    usable = instance.model == ticket.model and instance.owner in (None, ticket.member)
    return usable and instance.is_within(ticket.usable_on or ticket.loadable_on) and not closed & set(instance.devices)
