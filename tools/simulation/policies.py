"""The policies that a simulation compares: mpmm's own, LRU, and Beam's rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mpmm.policy.admission import free_mb
from mpmm.policy.eviction import eviction_order
from mpmm.policy.plan import Plan, make_plan
from mpmm.policy.view import Decision, DeviceView, Evict, Grant, IdleInstance, Load, Reason, TicketView, View, Wait

__all__ = ["POLICIES", "Policy"]


@dataclass(frozen=True)
class Policy:
    """A way to make decisions.

    barges: a newcomer takes an idle copy even if others wait. blocks: a load stops all others, as under Beam's lock.
    """

    name: str
    plan: Callable[[View], Plan]
    barges: bool = False
    blocks: bool = False


def beam_plan(view: View) -> Plan:
    """Beam's rules: first come, first served, and only the first; Beam's eviction score; all victims at once."""
    return _first_come(view, lambda ticket: eviction_order(view, view.idle, ticket), only_first=True)


def lru_plan(view: View) -> Plan:
    """First come, first served for loads, reuse for all; the copy that has been idle longest is evicted first."""
    return _first_come(view, lambda _: sorted(view.idle, key=lambda copy: copy.idle_since_s), only_first=False)


def _first_come(view: View, order: Callable[[TicketView], list[IdleInstance]], only_first: bool) -> Plan:
    decisions: list[Decision] = []
    idle = list(view.idle)
    [device] = view.devices
    held_up = False
    for ticket in sorted(view.tickets, key=lambda ticket: ticket.number):
        copy = next((copy for copy in idle if copy.model == ticket.model), None)
        if copy is not None and not (held_up and only_first):
            idle.remove(copy)
            decisions.append(Grant(ticket.row, copy.row))
        elif not held_up:
            decision = _make_fit(view, device, ticket, [copy for copy in order(ticket) if copy in idle])
            decisions.append(decision)
            if isinstance(decision, Evict):
                idle = [copy for copy in idle if copy.row not in decision.instances]
            # The next plan, after this change, serves the others.
            held_up = True
    return Plan(tuple(decisions), held_up)


def _make_fit(view: View, device: DeviceView, ticket: TicketView, order: list[IdleInstance]) -> Decision:
    need_mb = view.models[ticket.model].need_mb
    free = free_mb(device, view.rules.slack_percentage)
    if free >= need_mb:
        return Load(ticket.row, (device.device,), need_mb, alone=False)
    missing = need_mb - free - device.unloading_mb
    victims = []
    for copy in order:
        if missing <= 0:
            break
        victims.append(copy.row)
        missing -= copy.mb
    if missing <= 0 and victims:
        return Evict(ticket.row, tuple(victims))
    return Wait(ticket.row, Reason.MEMORY)


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("mpmm", make_plan),
        Policy("lru", lru_plan),
        Policy("beam", beam_plan, barges=True, blocks=True),
    )
}
