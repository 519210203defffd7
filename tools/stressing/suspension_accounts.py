"""Check the accounts of the suspension run: the tables' figures of host and device against the simulated driver's."""

from __future__ import annotations

from devices.simulated_checkpoints import CHECKPOINTED, RUNNING
from devices.simulated_gpu import SimulatedGpus

from mpmm.shared_state.invariants import check_invariants
from mpmm.shared_state.snapshot import InstanceInfo, Snapshot
from stressing.models import is_dying
from stressing.suspended import mb_of
from stressing.suspension_worker import BUDGET_MB

__all__ = ["find_wrong", "remove_dead"]


def find_wrong(snapshot: Snapshot | None, gpus: SimulatedGpus) -> list[str]:
    """Return what is wrong in a namespace at rest: no process makes a call."""
    if snapshot is None:
        return ["there is no namespace"]
    wrong = check_invariants(snapshot)
    wrong += [f"ticket {ticket.number} of {ticket.tag} waits" for ticket in snapshot.tickets]
    barred = [model for model in snapshot.models if model.unsuspendable]
    wrong += [f"{model.tag} is not suspended any more: {model.unsuspendable}" for model in barred]
    return wrong + _wrong_members(snapshot) + _wrong_copies(snapshot, gpus) + _wrong_sums(snapshot, gpus)


def _wrong_members(snapshot: Snapshot) -> list[str]:
    wrong = [f"member {member.pid} ({member.kind}) is dead" for member in snapshot.members if not member.alive]
    serving = {copy.server for copy in snapshot.instances}
    return wrong + [
        f"server {member.pid} of {member.name} has no copy"
        for member in snapshot.members
        if member.kind == "server" and member.slot not in serving
    ]


def _wrong_copies(snapshot: Snapshot, gpus: SimulatedGpus) -> list[str]:
    members = {member.slot: member for member in snapshot.members}
    wrong = []
    for copy in snapshot.instances:
        server = members.get(-1 if copy.server is None else copy.server)
        text = _wrong_of(copy, None if server is None else server.pid, gpus)
        if text is not None:
            wrong.append(f"{copy.handle or copy.tag}: {text}")
    return wrong


def _wrong_of(copy: InstanceInfo, pid: int | None, gpus: SimulatedGpus) -> str | None:
    if copy.state not in ("idle", "suspended"):
        return f"it is {copy.state}, holder {copy.holder}"
    if pid is None:
        return "it has no server"
    size, moved = float(mb_of(copy.tag)), gpus.checkpoints
    truth = (gpus.device_mb_of(pid, 0), moved.host_mb_of(pid), moved.state_of(pid))
    expected = (size, 0.0, RUNNING) if copy.state == "idle" else (0.0, size, CHECKPOINTED)
    if truth != expected or (copy.mb, copy.host_mb) != expected[:2]:
        return f"it is {copy.state} with {copy.mb:g} and {copy.host_mb:g} MB; device, host, driver say {truth}"
    return None


def _wrong_sums(snapshot: Snapshot, gpus: SimulatedGpus) -> list[str]:
    wrong = []
    host_mb, taken_mb = sum(copy.host_mb for copy in snapshot.instances), gpus.checkpoints.host_mb()
    if host_mb != taken_mb or host_mb > snapshot.suspend_budget_mb or host_mb > BUDGET_MB:
        wrong.append(f"{host_mb:g} MB of the host accounted for, {taken_mb:g} MB taken")
    (device,) = snapshot.devices or (None,)
    mb, used_mb = sum(copy.mb for copy in snapshot.instances), gpus.used_mb(0)
    if device is None or mb != used_mb or device.returning_mb or device.used_mb != mb:
        shown = None if device is None else (device.used_mb, device.returning_mb)
        wrong.append(f"{mb:g} MB of the device accounted for, {used_mb:g} MB taken; shown {shown}")
    return wrong


def remove_dead(gpus: SimulatedGpus) -> None:
    """Remove the simulated driver's files of dead processes."""
    for folder in (gpus.folder / "host", gpus.folder / "gpu0" / "memory"):
        for path in folder.glob("*_*_*"):
            if is_dying(int(path.name.split("_")[1])):
                path.unlink(missing_ok=True)
