"""A manager in virtual time: the policy's own functions, with events in a heap instead of processes.

A `Simulation` does what `ModelManager` and `Scheduler` do with the segment: it counts requests, keeps the queue and the
copies, makes views, and carries out what a policy decides about them. So a day is replayed in seconds, and every policy
sees the same requests. Copies are handles (any client can use any), and loads, holds and unloads take a fixed time.
With a budget of host memory, evicted copies are suspended there, as `mpmm.scheduling.suspension` decides; how long
suspending and resuming one takes depends on its size.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from mpmm.policy.demand import Demand
from mpmm.policy.fairness import overtaking_over
from mpmm.policy.plan import make_plan
from mpmm.policy.sharing import remaining_s
from mpmm.policy.suspension import HostRoom, Kept, Movable, Way, pays, resume_s, saved_share
from mpmm.policy.view import (
    BusyInstance,
    Decision,
    DeviceView,
    Evict,
    Grant,
    IdleInstance,
    Load,
    ModelView,
    Refuse,
    Resume,
    Rules,
    SuspendedInstance,
    TicketView,
    View,
    Wait,
)
from simulation.policies import Policy

__all__ = ["Outcome", "Setting", "simulate", "simulate_clients"]

ARRIVE, LOADED, RELEASE, UNLOADED, SUSPENDED = range(5)


@dataclass(frozen=True)
class Setting:
    """The simulated setting: models' sizes in MB, times in seconds, one device.

    suspend_budget_mb: host memory for suspended copies, 0 for none. suspend_mb_s, resume_mb_s: rates of a move, which
    takes `moving_s` in addition.
    """

    sizes_mb: Sequence[float]
    total_mb: float = 16000.0
    load_s: float = 0.3
    hold_s: float = 0.01
    unload_s: float = 0.02
    suspend_budget_mb: float = 0.0
    suspend_mb_s: float = 2300.0
    resume_mb_s: float = 6000.0
    moving_s: float = 0.05
    rules: Rules = field(
        default=Rules(
            slack_percentage=0.1,
            eviction_cooldown_seconds=10.0,
            min_model_copies=1,
            max_overtake_seconds=2.0,
            isolate_unknown=False,
        )
    )


@dataclass
class Outcome:
    """The result of a simulation; waits in seconds, by model. used_mb: (time, MB) at every change.

    broken_bounds: how often a request overtook one that may no longer be overtaken. endless_waits: how often a request
    waited while no instance was active, loading or unloading. Only our own instances take memory in a simulation, so
    such a wait never ends.
    """

    loads: int = 0
    evictions: int = 0
    suspends: int = 0
    resumes: int = 0
    refused: int = 0
    broken_bounds: int = 0
    endless_waits: int = 0
    finished_s: float = 0.0
    waits: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    used_mb: list[tuple[float, float]] = field(default_factory=list)


@dataclass
class _Copy:
    row: int
    model: int
    state: int
    since_s: float
    request: int


@dataclass
class _Ticket:
    request: int
    view: TicketView


class _Simulation:
    LOADING, ACTIVE, IDLE, UNLOADING, SUSPENDING, SUSPENDED, RESUMING = range(7)

    def __init__(self, setting: Setting, policy: Policy) -> None:
        self._IN_HOST = (self.SUSPENDING, self.SUSPENDED, self.RESUMING)
        self.setting, self.policy = setting, policy
        self.now_s = 0.0
        self.outcome = Outcome()
        self.finished: Callable[[int], None] = lambda _: None
        self._events: list[tuple[float, int, int, int]] = []
        self._made = 0
        self._copies: dict[int, _Copy] = {}
        self._tickets: dict[int, _Ticket] = {}
        self._waiting: Counter[int] = Counter()
        self._demand: defaultdict[int, Demand] = defaultdict(Demand)
        self._known_load: dict[int, float] = {}
        self._known_hold: dict[int, float] = {}
        self._known_suspend: dict[int, float] = {}
        self._known_resume: dict[int, float] = {}
        self._share = (0, 0.0)
        self._arrived: list[float] = []
        self._models: list[int] = []
        self._frozen_until_s = 0.0
        self._used_mb = 0.0

    def post(self, at_s: float, kind: int, what: int) -> None:
        """Schedule an event."""
        self._made += 1
        heapq.heappush(self._events, (at_s, self._made, kind, what))

    def request(self, at_s: float, model: int) -> int:
        """Let a client ask for a model; return the request's number."""
        self._models.append(model)
        self._arrived.append(at_s)
        self.post(at_s, ARRIVE, len(self._models) - 1)
        return len(self._models) - 1

    def run(self) -> Outcome:
        """Run all events; return the result."""
        handlers = (self._arrive, self._loaded, self._release, self._unloaded, self._suspended)
        at_rest = (self.IDLE, self.SUSPENDED)
        while self._events:
            at_s, _, kind, what = heapq.heappop(self._events)
            if at_s < self._frozen_until_s:
                self.post(self._frozen_until_s, kind, what)
                continue
            self.now_s = at_s
            handlers[kind](what)
            if self._tickets and not any(copy.state not in at_rest for copy in self._copies.values()):
                self.outcome.endless_waits += 1
        self.outcome.finished_s = self.now_s
        return self.outcome

    def _arrive(self, request: int) -> None:
        model = self._models[request]
        demand = self._demand[model]
        self._demand[model] = demand.counted(demand.requests + 1, self.now_s)
        if self.policy.barges or not self._tickets:
            copy = next((copy for copy in self._of(self.IDLE) if copy.model == model), None)
            if copy is not None:
                self._serve(copy, request)
                return
        self._made += 1
        self._tickets[self._made] = _Ticket(request, TicketView(self._made, self._made, 1, model, 0, self.now_s))
        self._waiting[model] += 1
        self._advance()

    def _loaded(self, row: int) -> None:
        copy = self._copies[row]
        if copy.state == self.RESUMING:
            self._known_resume[copy.model] = self._moving_s(copy, self.setting.resume_mb_s)
        else:
            self._known_load[copy.model] = self.setting.load_s
        self._serve(copy, copy.request)
        self._advance()

    def _release(self, row: int) -> None:
        copy = self._copies[row]
        self._known_hold[copy.model] = self.setting.hold_s
        copy.state, copy.since_s = self.IDLE, self.now_s
        request = copy.request
        user = self._first_user(copy.model)
        if user is not None:
            self._grant(user, copy)
        elif self._tickets:
            self._advance()
        self.finished(request)

    def _first_user(self, model: int) -> _Ticket | None:
        """Return the request that gets a released copy without a plan; see `Scheduler.hand_over`."""
        first = next(iter(self._tickets.values()), None)
        if first is None or first.view.model == model:
            return first
        if self.policy.plan is not make_plan or not self._waiting[model]:
            return None
        bound_s = self.setting.rules.max_overtake_seconds
        user: _Ticket | None = None
        for ticket in self._tickets.values():
            since_s = ticket.view.head_since_s
            if since_s is not None and self.now_s - since_s >= bound_s:
                return None
            if user is None and ticket.view.model == model:
                user = ticket
        return user

    def _suspended(self, row: int) -> None:
        copy = self._copies[row]
        self._known_suspend[copy.model] = self._moving_s(copy, self.setting.suspend_mb_s)
        copy.state, copy.since_s = self.SUSPENDED, self.now_s
        self._take_mb(-self.setting.sizes_mb[copy.model])
        self._advance()

    def _unloaded(self, row: int) -> None:
        self._take_mb(-self.setting.sizes_mb[self._copies.pop(row).model])
        self._advance()

    def _serve(self, copy: _Copy, request: int) -> None:
        copy.state, copy.since_s, copy.request = self.ACTIVE, self.now_s, request
        self.outcome.waits[copy.model].append(self.now_s - self._arrived[request])
        self.post(self.now_s + self.setting.hold_s, RELEASE, copy.row)

    def _grant(self, ticket: _Ticket, copy: _Copy) -> None:
        self._leave(ticket)
        self._serve(copy, ticket.request)

    def _leave(self, ticket: _Ticket) -> None:
        del self._tickets[ticket.view.row]
        self._waiting[ticket.view.model] -= 1

    def _take_mb(self, mb: float) -> None:
        self._used_mb += mb
        self.outcome.used_mb.append((self.now_s, self._used_mb))

    def _advance(self) -> None:
        while self._tickets:
            if self.now_s < self._frozen_until_s:
                return
            view = self._view()
            changed = [self._carry_out(decision, view) for decision in self.policy.plan(view).decisions]
            if self.policy.plan is make_plan or not any(changed):
                return

    def _carry_out(self, decision: Decision, view: View) -> bool:
        ticket = self._tickets[decision.ticket]
        match decision:
            case Grant(_, row):
                self._check_bound(ticket, view)
                self._grant(ticket, self._copies[row])
            case Load():
                self._check_bound(ticket, view)
                self._leave(ticket)
                self._made += 1
                self._copies[self._made] = _Copy(
                    self._made, ticket.view.model, self.LOADING, self.now_s, ticket.request
                )
                self._take_mb(self.setting.sizes_mb[ticket.view.model])
                self.outcome.loads += 1
                self.post(self.now_s + self.setting.load_s, LOADED, self._made)
                if self.policy.blocks:
                    self._frozen_until_s = self.now_s + self.setting.load_s
            case Evict(_, rows, first=first, passed=passed):
                self._check_bound(ticket, view)
                self._let_pass(ticket, passed)
                if first:
                    self._block(ticket)
                for row in rows:
                    self.outcome.evictions += 1
                    self._evict(self._copies[row])
            case Resume(_, row):
                resumed = self._copies.get(row)
                if resumed is None:
                    # Dropped to make room in host memory for another copy.
                    return False
                self._check_bound(ticket, view)
                self._leave(ticket)
                resumed.state, resumed.since_s, resumed.request = self.RESUMING, self.now_s, ticket.request
                self._take_mb(self.setting.sizes_mb[resumed.model])
                self.outcome.resumes += 1
                self.post(self.now_s + self._moving_s(resumed, self.setting.resume_mb_s), LOADED, row)
            case Wait(first=first, passed=passed):
                self._let_pass(ticket, passed)
                if first:
                    self._block(ticket)
                return False
            case Refuse():
                self._leave(ticket)
                self.outcome.refused += 1
                self.finished(ticket.request)
            case _:
                return False
        return True

    def _evict(self, copy: _Copy) -> None:
        """Suspend a copy if that pays and host memory suffices, else unload it."""
        moved = self._movable(copy.model)
        dropped = self._host_room().dropped_for(moved.mb, moved.worth_suspending) if self._can_suspend(moved) else None
        if dropped is not None:
            for row in dropped:
                del self._copies[row]
            copy.state = self.SUSPENDING
            self.outcome.suspends += 1
            self.post(self.now_s + self._moving_s(copy, self.setting.suspend_mb_s), SUSPENDED, copy.row)
            return
        copy.state = self.UNLOADING
        self.post(self.now_s + self.setting.unload_s, UNLOADED, copy.row)

    def _can_suspend(self, moved: Movable) -> bool:
        return self.setting.suspend_budget_mb > 0 and pays(moved, self._saved_share())

    def _saved_share(self) -> float:
        # Known figures of a model never change here, so the share changes only when more figures become known.
        known = len(self._demand) + len(self._known_load) + len(self._known_suspend) + len(self._known_resume)
        if self._share[0] != known:
            self._share = (known, saved_share(self._movable(model) for model in self._demand))
        return self._share[1]

    def _host_room(self) -> HostRoom:
        setting = self.setting
        kept = [
            Kept(one.row, setting.sizes_mb[one.model], one.since_s, self._movable(one.model).worth)
            for one in self._of(self.SUSPENDED)
        ]
        in_host = (one for one in self._copies.values() if one.state in self._IN_HOST)
        used_mb = math.fsum(setting.sizes_mb[one.model] for one in in_host)
        return HostRoom(kept, setting.suspend_budget_mb - used_mb, setting.suspend_budget_mb)

    def _is_kept(self, copy: _Copy) -> bool:
        moved = self._movable(copy.model)
        return self._can_suspend(moved) and self._host_room().dropped_for(moved.mb, moved.worth_suspending) is not None

    def _movable(self, model: int) -> Movable:
        return Movable(
            self.setting.sizes_mb[model],
            Way.CHECKPOINT,
            self._known_load.get(model, 0.0),
            self._known_suspend.get(model, 0.0),
            self._known_resume.get(model, 0.0),
            self._demand[model].per_second(self.now_s),
        )

    def _moving_s(self, copy: _Copy, mb_s: float) -> float:
        return self.setting.moving_s + self.setting.sizes_mb[copy.model] / mb_s

    def _block(self, ticket: _Ticket) -> None:
        if ticket.view.head_since_s is None:
            ticket.view = replace(ticket.view, head_since_s=self.now_s)

    @staticmethod
    def _let_pass(ticket: _Ticket, passed: bool) -> None:
        if passed:
            ticket.view = replace(ticket.view, passed=True, head_since_s=None)

    def _check_bound(self, ticket: _Ticket, view: View) -> None:
        """Count a request that overtakes the head of the line after twice the bound; see `fairness`."""
        self.outcome.broken_bounds += any(
            other.row < ticket.view.row and other.row in self._tickets and overtaking_over(view, other)
            for other in view.tickets
        )

    def _of(self, state: int) -> Iterator[_Copy]:
        return (copy for copy in self._copies.values() if copy.state == state)

    def _view(self) -> View:
        setting, now_s = self.setting, self.now_s
        idle: list[IdleInstance] = []
        busy: list[BusyInstance] = []
        suspended: list[SuspendedInstance] = []
        suspending: Counter[int] = Counter()
        loaded: Counter[int] = Counter()
        loading: Counter[int] = Counter()
        newest_load: dict[int, float] = {}
        coming_s: dict[int, float] = {}
        held_for: dict[int, float] = {}
        held_in_all: dict[int, float] = {}
        used = reserved = unloading_mb = 0.0
        for copy in self._copies.values():
            mb, state, model = setting.sizes_mb[copy.model], copy.state, copy.model
            if state == self.SUSPENDED:
                needed_s = resume_s(self._movable(model))
                suspended.append(SuspendedInstance(copy.row, model, 0, mb, copy.since_s, resume_s=needed_s))
                continue
            if state in (self.LOADING, self.RESUMING):
                loading[model] += 1
                if copy.since_s >= newest_load.get(model, 0.0):
                    newest_load[model] = copy.since_s
                    coming_s[model] = resume_s(self._movable(model)) if state == self.RESUMING else 0.0
                reserved += mb
                elapsed_s = now_s - copy.since_s
                known = self._known_load if state == self.LOADING else self._known_resume
                free_in_s = remaining_s(known.get(model, 0.0), elapsed_s) + self._known_hold.get(model, 0.0)
                busy.append(BusyInstance(copy.row, model, 0, mb, free_in_s, loading=True))
                continue
            used += mb
            if state in (self.UNLOADING, self.SUSPENDING):
                unloading_mb += mb
                suspending[model] += state == self.SUSPENDING
                continue
            loaded[model] += 1
            if state == self.IDLE:
                idle.append(IdleInstance(copy.row, model, 0, mb, copy.since_s, suspendable=self._is_kept(copy)))
            else:
                held = now_s - copy.since_s
                held_for[model] = min(held, held_for.get(model, math.inf))
                held_in_all[model] = held_in_all.get(model, 0.0) + held
                busy.append(BusyInstance(copy.row, model, 0, mb, remaining_s(self._known_hold.get(model, 0.0), held)))
        idle.sort(key=lambda copy: -copy.idle_since_s)
        models = {
            model: ModelView(
                model,
                True,
                setting.sizes_mb[model],
                loaded[model],
                {},
                self._waiting[model],
                loading={0: loading[model]} if loading[model] else {},
                shares=True,
                load_s=self._known_load.get(model, 0.0),
                hold_s=self._known_hold.get(model, 0.0),
                loading_for_s=now_s - newest_load.get(model, now_s),
                held_for_s=held_for.get(model, 0.0),
                held_in_all_s=held_in_all.get(model, 0.0),
                rate=self._demand[model].per_second(now_s),
                suspending=suspending[model],
                resume_s=self._known_resume.get(model, 0.0),
                coming_s=coming_s.get(model, 0.0),
            )
            for model in {
                *loaded,
                *loading,
                *(one.model for one in suspended),
                *(ticket.view.model for ticket in self._tickets.values()),
            }
        }
        return View(
            now_s,
            setting.rules,
            models,
            tuple(idle),
            tuple(ticket.view for ticket in self._tickets.values()),
            (DeviceView(0, setting.total_mb, used, reserved, unloading_mb, 0.0, suspending=suspending.total()),),
            tuple(busy),
            suspended=tuple(sorted(suspended, key=lambda copy: -copy.since_s)),
            host_free_mb=self._host_room().free_mb if setting.suspend_budget_mb else 0.0,
        )


def simulate(
    setting: Setting, policy: Policy, models: Sequence[int], times_s: Sequence[float] | None = None, clients: int = 1
) -> Outcome:
    """Replay requests: at their times if these are given, else by `clients`, each with one request at a time."""
    simulation = _Simulation(setting, policy)
    if times_s is not None:
        for at_s, model in zip(times_s, models, strict=True):
            simulation.request(at_s, model)
        return simulation.run()
    left = iter(models)

    def next_request(_: int) -> None:
        model = next(left, None)
        if model is not None:
            simulation.request(simulation.now_s, model)

    simulation.finished = next_request
    for _ in range(clients):
        next_request(0)
    return simulation.run()


def simulate_clients(
    setting: Setting, policy: Policy, sequences: Sequence[Sequence[int]], think_s: float = 0.0
) -> Outcome:
    """Replay a sequence of requests per client, which asks for the next model `think_s` after its last release."""
    simulation = _Simulation(setting, policy)
    left = [iter(sequence) for sequence in sequences]
    client_of: dict[int, int] = {}

    def next_request(client: int, at_s: float) -> None:
        model = next(left[client], None)
        if model is not None:
            client_of[simulation.request(at_s, model)] = client

    simulation.finished = lambda request: next_request(client_of[request], simulation.now_s + think_s)
    for client in range(len(sequences)):
        next_request(client, 0.0)
    return simulation.run()
