"""The invariants of `layout.py`, checked on a snapshot. Tests, the stress tool and `mpmm check` call this."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping

from mpmm.policy.fairness import HIGHEST_URGENCY
from mpmm.shared_state.layout import MOST_USERS
from mpmm.shared_state.snapshot import InstanceInfo, ModelInfo, Snapshot, TicketInfo

__all__ = ["check_invariants"]


def check_invariants(snapshot: Snapshot) -> list[str]:
    """Return the broken invariants of a state, a line for each that begins with its name; empty if all hold."""
    checks = (_header, _members, _models, _instances, _tickets, _pins, _devices)
    return [line for check in checks for line in check(snapshot)]


def _header(snapshot: Snapshot) -> Iterator[str]:
    if snapshot.change % 2:
        yield f"H1 the change counter {snapshot.change} is odd"
    states = Counter(instance.state for instance in snapshot.instances)
    waiting = sum(ticket.state == "waiting" for ticket in snapshot.tickets)
    for name, counted, found in (
        ("WAITING", snapshot.waiting, waiting),
        ("ACTIVE", snapshot.active, states["active"]),
        ("LOADING", snapshot.loading, states["loading"] + states["resuming"]),
    ):
        if counted != found:
            yield f"H2 {name} is {counted}, the rows say {found}"
    alone = tuple(device.row for device in snapshot.devices if device.isolated is not None)
    if snapshot.isolated_devices != alone:
        yield f"H3 ISOLATED names devices {snapshot.isolated_devices}, the rows say {alone}"
    for ticket in snapshot.tickets:
        if ticket.number >= snapshot.next_ticket:
            yield f"H4 ticket {ticket.number} is not below the next number {snapshot.next_ticket}"
    used = {
        "members": [member.slot for member in snapshot.members],
        "models": [model.row for model in snapshot.models],
        "instances": [instance.row for instance in snapshot.instances],
        "tickets": [ticket.row for ticket in snapshot.tickets],
        "pins": [pin.row for pin in snapshot.pins],
    }
    for table, end in snapshot.table_ends.items():
        if max(used[table], default=-1) >= end:
            yield f"H5 {table}: row {max(used[table])} is in use, the table ends at {end}"


def _members(snapshot: Snapshot) -> Iterator[str]:
    generations = Counter(member.generation for member in snapshot.members)
    for generation, count in generations.items():
        if count > 1:
            yield f"B1 {count} members have generation {generation}"


def _models(snapshot: Snapshot) -> Iterator[str]:
    instances: dict[int, list[InstanceInfo]] = {model.row: [] for model in snapshot.models}
    for instance in snapshot.instances:
        instances.setdefault(instance.model, []).append(instance)
    waiting = Counter(ticket.model for ticket in snapshot.tickets if ticket.state == "waiting")
    pins = Counter(pin.model for pin in snapshot.pins)
    tags = Counter(model.tag for model in snapshot.models if model.kind == "model")
    for model in snapshot.models:
        states = Counter(instance.state for instance in instances[model.row])
        if model.loaded != model.active + model.idle:
            yield f"M1 {model.tag}: loaded {model.loaded} is not active {model.active} + idle {model.idle}"
        states["loading"] += states["resuming"]
        states["suspended"] += states["suspending"]
        for name in ("active", "idle", "loading", "unloading", "suspended"):
            if getattr(model, name) != states[name]:
                invariant = "M1" if name in ("active", "idle") else "M3"
                yield f"{invariant} {model.tag}: {name} is {getattr(model, name)}, the rows say {states[name]}"
        if model.waiting != waiting[model.row]:
            yield f"M3 {model.tag}: waiting is {model.waiting}, the tickets say {waiting[model.row]}"
        if model.kind == "model" and tags[model.tag] > 1:
            yield f"M4 {model.tag} has {tags[model.tag]} rows"
        if model.pins != pins[model.row]:
            yield f"M5 {model.tag}: pins is {model.pins}, the rows say {pins[model.row]}"
        going = sum(
            copy.unload_on_release and copy.seat_of is None
            for copy in instances[model.row]
            if copy.state in ("active", "loading", "resuming")
        )
        seats = sum(copy.seat_of is not None for copy in instances[model.row])
        too_many = model.loaded - seats + model.loading - going > snapshot.settings.max_model_copies
        # After a change of the settings, copies that were pinned at that time may have stayed.
        if too_many and snapshot.settings_changed_ago_s is None:
            yield f"M6 {model.tag}: {model.loaded} loaded and {model.loading} loading are more than max_model_copies"
        if model.seats != seats or model.users > MOST_USERS:
            yield f"M10 {model.tag}: seats is {model.seats}, the rows say {seats}; {model.users} users at a time"
        if model.kind == "lease":
            yield from _lease(model, instances[model.row], [t for t in snapshot.tickets if t.model == model.row])
        for name in (
            "load_s",
            "hold_s",
            "mean_interarrival_s",
            "suspend_s",
            "resume_s",
            *(("sd_mb",) if model.estimate_mb is not None else ()),
        ):
            if not 0 <= getattr(model, name) < math.inf:
                yield f"M8 {model.tag}: {name} is {getattr(model, name)}"
        if not 0 <= model.at_least_mb < math.inf:
            yield f"M8 {model.tag}: at_least_mb is {model.at_least_mb}"
        if model.expect_mb is not None and not 0 <= model.expect_mb < math.inf:
            yield f"M8 {model.tag}: expect_mb is {model.expect_mb}"
        if (model.failures > 0) != (model.failed_ago_s is not None):
            yield f"M9 {model.tag}: {model.failures} failures, the last one {model.failed_ago_s} s ago"
        yield from _idle_list(model, instances[model.row])


def _lease(model: ModelInfo, instances: list[InstanceInfo], tickets: list[TicketInfo]) -> Iterator[str]:
    if model.estimate_mb is None:
        yield f"M7 lease {model.tag}: its size is unknown"
    if max(len(instances), len(tickets)) != 1:
        yield f"M7 lease {model.tag} has {len(tickets)} tickets and {len(instances)} instances"


def _idle_list(model: ModelInfo, instances: list[InstanceInfo]) -> Iterator[str]:
    by_row = {instance.row: instance for instance in instances}
    expected = {instance.row for instance in instances if instance.state == "idle" and instance.owner is None}
    seen: list[int] = []
    row, previous = model.idle_head, None
    while row is not None:
        if row in seen or row not in by_row:
            what = "again" if row in seen else "not of this model"
            yield f"M2 {model.tag}: the idle list leads to row {row}, {what}"
            return
        if by_row[row].previous != previous:
            yield f"M2 {model.tag}: row {row} follows {previous} but names {by_row[row].previous}"
        seen.append(row)
        row, previous = by_row[row].next, row
    if set(seen) != expected:
        yield f"M2 {model.tag}: the idle list has {sorted(seen)}, idle are {sorted(expected)}"


def _instances(snapshot: Snapshot) -> Iterator[str]:
    models = {model.row: model.kind for model in snapshot.models}
    members = {member.slot for member in snapshot.members}
    devices = {device.row for device in snapshot.devices}
    by_row = {instance.row: instance for instance in snapshot.instances}
    seats = Counter(instance.seat_of for instance in snapshot.instances)
    for instance in snapshot.instances:
        what = f"instance {instance.row} ({instance.tag}, {instance.state})"
        if (instance.holder is None) != (instance.state in ("idle", "suspended")):
            yield f"I1 {what}: holder is {instance.holder}"
        if instance.state != "unloading" and (instance.unload_late or instance.handed_over_s is not None):
            yield f"I1 {what}: its unload is late ({instance.unload_late}) or was handed over"
        if instance.steady and instance.state not in ("loading", "leased"):
            yield f"I9 {what}: it is steady"
        if instance.model not in models:
            yield f"I2 {what}: no model row {instance.model}"
        for name in ("holder", "owner", "server"):
            slot = getattr(instance, name)
            if slot is not None and slot not in members:
                yield f"I2 {what}: {name} {slot} is no member"
        moves = instance.state in ("unloading", "suspending", "resuming")
        if moves and instance.owner is not None and instance.holder != instance.owner:
            yield f"I1 {what}: its owner {instance.owner} should do that, not {instance.holder}"
        may, must = instance.state in ("loading", "resuming", "leased"), instance.state == "leased"
        if not instance.reserved_mb >= 0 or not must <= (instance.reserved_mb > 0) <= may:
            yield f"I3 {what}: {instance.reserved_mb} MB reserved"
        shares = instance.shares_mb
        if not shares or not set(shares) <= devices or not math.isclose(math.fsum(shares.values()), instance.mb):
            yield f"I5 {what}: {instance.mb} MB, by device {shares}; devices are {sorted(devices)}"
        yield from _suspended(instance, what)
        yield from _seat(instance, what, by_row)
        if instance.seats != seats[instance.row]:
            yield f"I10 {what}: seats is {instance.seats}, the rows say {seats[instance.row]}"
        if (instance.state == "leased") != (models.get(instance.model) == "lease"):
            yield f"I6 {what}: its model row {instance.model} is a {models.get(instance.model)}"
        if instance.state == "leased" and (instance.owner, instance.server) != (None, None):
            yield f"I6 {what}: it has owner {instance.owner}, server {instance.server}"
    twins = Counter(
        copy.handle
        for copy in snapshot.instances
        if copy.handle and copy.state in ("active", "idle") and copy.mb + copy.reserved_mb > 0
    )
    for handle, count in twins.items():
        if count > 1:
            yield f"I7 {count} instances stand for the memory of {handle}"
    steady = sorted(device for copy in snapshot.instances if copy.steady for device in copy.shares_mb)
    if steady != sorted(set(steady)):
        yield f"I9 several instances are steady on one device: {steady}"
    if steady != list(snapshot.steady_devices):
        yield f"H3 steady devices are {snapshot.steady_devices}, the rows say {steady}"
    generations = Counter(instance.generation for instance in snapshot.instances)
    for generation, count in generations.items():
        if count > 1:
            yield f"I4 {count} instances have generation {generation}"


def _seat(seat: InstanceInfo, what: str, by_row: Mapping[int, InstanceInfo]) -> Iterator[str]:
    if seat.seat_of is None:
        return
    if seat.state not in ("active", "idle") or seat.mb or seat.reserved_mb or seat.server is not None or seat.way:
        yield f"I10 {what}: a seat that has {seat.mb} MB, server {seat.server}, way {seat.way}"
    copy = by_row.get(seat.seat_of)
    if copy is None or copy.seat_of is not None or copy.state not in ("active", "idle", "unloading"):
        yield f"I10 {what}: it is a seat of {copy}"
        return
    if (copy.model, copy.owner, *copy.shares_mb) != (seat.model, seat.owner, *seat.shares_mb):
        yield f"I10 {what}: it is a seat of {copy}, which differs"
    goes = copy.unload_on_release or copy.state == "unloading"
    if seat.unload_on_release != goes or (goes and seat.state != "active"):
        said = f"unload_on_release is {seat.unload_on_release}, and {copy.unload_on_release} of its copy"
        yield f"I10 {what}: {said}, which is {copy.state}"


def _suspended(instance: InstanceInfo, what: str) -> Iterator[str]:
    suspended = instance.state in ("suspending", "suspended", "resuming")
    if suspended and not instance.way:
        yield f"I8 {what}: there is no way to suspend it"
    if instance.device_mb < 0 or (instance.device_mb and not suspended):
        yield f"I8 {what}: {instance.device_mb} MB to come back to its device"
    if instance.host_mb < 0 or (instance.host_mb and not suspended and instance.state != "unloading"):
        yield f"I8 {what}: {instance.host_mb} MB of the host"


def _tickets(snapshot: Snapshot) -> Iterator[str]:
    members = {member.slot for member in snapshot.members}
    models = {model.row for model in snapshot.models}
    by_row = {instance.row: instance for instance in snapshot.instances}
    numbers = Counter(ticket.number for ticket in snapshot.tickets)
    for ticket in snapshot.tickets:
        what = f"ticket {ticket.number} ({ticket.tag}, {ticket.state})"
        if numbers[ticket.number] > 1:
            yield f"T1 {what}: {numbers[ticket.number]} tickets have this number"
        if ticket.member not in members:
            yield f"T1 {what}: {ticket.member} is no member"
        if ticket.model not in models:
            yield f"T1 {what}: no model row {ticket.model}"
        if ticket.head_of_line_for_s is not None and ticket.head_of_line_for_s > ticket.waited_s:
            yield f"T3 {what}: first for {ticket.head_of_line_for_s} s, though it waits for {ticket.waited_s} s"
        if ticket.called_up_ago_s is not None and ticket.called_up_ago_s > ticket.waited_s:
            yield f"T3 {what}: called up {ticket.called_up_ago_s} s ago, though it waits for {ticket.waited_s} s"
        if abs(ticket.urgency) > HIGHEST_URGENCY:
            yield f"T4 {what}: {ticket.urgency} steps of a head start"
        if (ticket.instance is not None) != (ticket.state in ("granted", "load")):
            yield f"T2 {what}: instance is {ticket.instance}"
        if ticket.state in ("granted", "load") and ticket.instance is not None:
            instance = by_row.get(ticket.instance)
            expected = ("active", "leased") if ticket.state == "granted" else ("loading", "resuming")
            if instance is None or instance.state not in expected or instance.holder != ticket.member:
                yield f"T2 {what}: promised {instance}"


def _pins(snapshot: Snapshot) -> Iterator[str]:
    members = {member.slot for member in snapshot.members}
    models = {model.row for model in snapshot.models if model.kind == "model"}
    counts = Counter((pin.model, pin.member) for pin in snapshot.pins)
    for pin in snapshot.pins:
        if pin.model not in models or pin.member not in (None, *members) or counts[pin.model, pin.member] > 1:
            yield f"P1 pin {pin.row}: model row {pin.model}, member {pin.member}, {counts[pin.model, pin.member]} times"


def _devices(snapshot: Snapshot) -> Iterator[str]:
    for device in snapshot.devices:
        if not device.returning_mb >= 0 or not math.isclose(device.returning_mb, math.fsum(device.returns_mb)):
            yield f"D2 {device.name}: {device.returning_mb} MB returning, the returns are {device.returns_mb}"
        if not device.unrelated_mb >= 0:
            yield f"D2 {device.name}: {device.unrelated_mb} MB of others"
        if device.isolated is not None:
            here = [copy for copy in snapshot.instances if device.row in copy.shares_mb]
            alone = [copy.row for copy in here if copy.state in ("active", "loading", "resuming")]
            if alone != [device.isolated]:
                yield f"D3 {device.name}: instance {device.isolated} is to run alone, in use are {alone}"
        if device.sample_age_s is not None and device.sample_age_s < -1:
            yield f"D1 {device.name}: the last sample is from the future"
