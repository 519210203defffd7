"""What a namespace exports, as families of metrics in Prometheus's sense; in bytes and seconds."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mpmm.observability.findings import longest_wait_s
from mpmm.observability.formatting import copies_counter, devices_of
from mpmm.observability.histograms import BOUNDS_S, Histogram, Histograms
from mpmm.shared_state.snapshot import Snapshot

__all__ = ["Family", "families", "text"]

MIB = 2**20
Labels = tuple[tuple[str, str], ...]


@dataclass
class Family:
    """One metric. kind: counter, gauge or histogram. samples: (suffix of the name, labels, value) each."""

    name: str
    kind: str
    help: str
    samples: list[tuple[str, Labels, float]] = field(default_factory=list)


_COUNTERS = {
    "loads": "Loads that succeeded.",
    "hits": "Acquires that were given a loaded copy.",
    "evictions": "Idle copies that were evicted.",
    "failed_loads": "Loads that failed.",
    "timeouts": "Waits that timed out.",
    "reaps": "Processes that died and were cleaned up.",
    "rollbacks": "Transactions rolled back because their process died.",
    "leaders": "Changes of the leader, including the first.",
    "resets": "Resets by force.",
    "out_of_memory": "Loads and uses that ran out of memory.",
    "suspends": "Evicted copies that were suspended in host memory.",
    "resumes": "Suspended copies that were resumed.",
    "suspend_failures": "Suspensions and resumes that failed, so that the copy was unloaded.",
}
_DEVICE_GAUGES = {
    "used": ("used_mb", "Memory in use, by the last figure."),
    "peak": ("peak_mb", "Highest figure of memory in use in peak_window_seconds."),
    "external": ("external_mb", "Memory in use by the driver and by other programs, not by copies or leases."),
    "unrelated": ("unrelated_mb", "Memory in use by processes that are not mpmm's, as far as the source knows."),
    "foreign": ("unrelated_mb", "The old name of mpmm_device_unrelated_bytes, until the next minor version."),
    "reserved": ("reserved_mb", "Memory reserved for loads and leases that the figure does not show yet."),
    "returning": ("returning_mb", "Unloaded memory that the figure still shows."),
    "limit": ("limit_mb", "Memory that may be filled."),
    "size": ("total_mb", "Total memory."),
}
_MODEL_COUNTERS = {
    "loads": "Loads of a model.",
    "hits": "Acquires of a model that were given a loaded copy.",
    "evictions": "Idle copies of a model that were evicted.",
    "suspends": "Copies of a model that were suspended.",
    "resumes": "Suspended copies of a model that were resumed.",
}
_COPY_STATES = ("active", "idle", "loading", "unloading", "suspended")


class _Families:
    """Families by name, in the order in which they were first met."""

    def __init__(self) -> None:
        self.found: dict[str, Family] = {}

    def add(
        self, name: str, kind: str, description: str, value: float | None, labels: Mapping[str, str], suffix: str = ""
    ) -> None:
        """Add one sample; a value of None adds only the family."""
        family = self.found.setdefault(name, Family(f"mpmm_{name}", kind, description))
        if value is not None:
            family.samples.append((suffix, tuple((label, _utf8(text)) for label, text in labels.items()), float(value)))


def _utf8(text: str) -> str:
    r"""Return a text with bytes that are not UTF-8 as `\udce9`, because both formats of metrics are UTF-8.

    A tag from `os.fsdecode` has such bytes. `prometheus_client` fails for all metrics of its program if one label
    cannot be encoded; `?` instead of each byte would give several models the same labels.
    """
    return text.encode("utf-8", "backslashreplace").decode()


def families(looked_at: Iterable[tuple[Snapshot, Histograms]]) -> list[Family]:
    """Return the metrics of some namespaces."""
    into = _Families()
    for snapshot, counted in looked_at:
        labels = {"namespace": snapshot.namespace}
        _totals(into, snapshot, counted, labels)
        _state(into, snapshot, labels)
        _devices(into, snapshot, labels)
        _models(into, snapshot, labels)
        for name, histograms, description in (
            ("wait_seconds", counted.waits, "Time that requests spent in the queue, if they had to queue."),
            ("hold_seconds", counted.holds, "Time from acquire to release."),
            ("load_seconds", counted.loads, "Time that loads took."),
            ("suspend_seconds", counted.suspends, "Time that suspensions took."),
            ("resume_seconds", counted.resumes, "Time that resumes took."),
        ):
            _histograms(into, name, description, histograms, labels)
    return list(into.found.values())


def _totals(into: _Families, snapshot: Snapshot, counted: Histograms, labels: Mapping[str, str]) -> None:
    for name, description in _COUNTERS.items():
        into.add(name, "counter", description, getattr(snapshot, name), labels, "_total")
    written_off = snapshot.written_off_mb * MIB
    into.add("written_off_bytes", "counter", "Unloaded memory that never came back.", written_off, labels, "_total")
    into.add("events", "counter", "Events written into the ring.", snapshot.events_written, labels, "_total")
    unseen = "Events that were overwritten before the histograms could count them."
    into.add("events_unseen", "counter", unseen, counted.lost, labels, "_total")


def _state(into: _Families, snapshot: Snapshot, labels: Mapping[str, str]) -> None:
    kinds = Counter(member.kind for member in snapshot.members)
    for kind in ("worker", "server"):
        into.add("members", "gauge", "Attached processes.", kinds[kind], {**labels, "kind": kind})
    dead = sum(member.alive is False for member in snapshot.members)
    gauges = (
        ("dead_members", "Processes that are dead and not cleaned up yet.", dead),
        ("waiting", "Waiters in the queue.", snapshot.waiting),
        ("oldest_wait_seconds", "How long the oldest waiter has waited.", longest_wait_s(snapshot)),
        ("active", "Uses of copies: one that several share counts once for each of them.", snapshot.active),
        ("loading", "Copies being loaded.", snapshot.loading),
        ("leader_age_seconds", "How long the present leader has been the leader.", snapshot.leader_for_s),
        ("poll_age_seconds", "Time since the leader, or a process in its place, last polled.", snapshot.polled_ago_s),
        ("host_suspended_bytes", "Host memory of suspended copies.", _host_mb(snapshot) * MIB),
        ("host_budget_bytes", "Host memory that suspended copies may take.", snapshot.suspend_budget_mb * MIB),
        ("lock_holder_stopped", "1 while the process that holds the lock is stopped.", snapshot.lock.holder_stopped),
    )
    for name, description, value in gauges:
        into.add(name, "gauge", description, value, labels)


def _host_mb(snapshot: Snapshot) -> float:
    return sum(copy.host_mb for copy in snapshot.copies)


def _devices(into: _Families, snapshot: Snapshot, labels: Mapping[str, str]) -> None:
    leased: dict[int, float] = defaultdict(float)
    for copy in snapshot.copies:
        if copy.state == "leased":
            for row in devices_of(copy):
                leased[row] += copy.reserved_mb / len(copy.shares_mb)
    for device in snapshot.devices:
        here = {**labels, "device": str(device.row), "uuid": device.uuid, "name": device.name}
        for name, (attribute, description) in _DEVICE_GAUGES.items():
            mb: float | None = getattr(device, attribute)
            into.add(f"device_{name}_bytes", "gauge", description, None if mb is None else mb * MIB, here)
        into.add("device_leased_bytes", "gauge", "Memory given away as leases.", leased[device.row] * MIB, here)
        into.add("device_sample_age_seconds", "gauge", "Age of the last figure.", device.sample_age_s, here)


def _models(into: _Families, snapshot: Snapshot, labels: Mapping[str, str]) -> None:
    held: dict[int, float] = defaultdict(float)
    count = copies_counter(snapshot)
    for copy in snapshot.copies:
        held[copy.model] += copy.mb
    for model in snapshot.models:
        if model.kind != "model":
            continue
        mine = {**labels, "model": model.tag}
        for name, description in _MODEL_COUNTERS.items():
            into.add(f"model_{name}", "counter", description, getattr(model, name), mine, "_total")
        for state in _COPY_STATES:
            into.add("model_copies", "gauge", "Copies of a model.", count(model, state), {**mine, "state": state})
        into.add("model_waiting", "gauge", "Waiters for a model.", model.waiting, mine)
        into.add("model_bytes", "gauge", "Memory of all copies of a model.", held[model.row] * MIB, mine)
        estimate = None if model.estimate_mb is None else model.estimate_mb * MIB
        into.add("model_estimate_bytes", "gauge", "What a copy of a model is expected to take.", estimate, mine)


def _histograms(
    into: _Families, name: str, description: str, histograms: Mapping[str, Histogram], labels: Mapping[str, str]
) -> None:
    for tag, histogram in histograms.items():
        mine = {**labels, "model": tag}
        below = 0
        for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), histogram.counts, strict=True):
            below += count
            into.add(name, "histogram", description, below, {**mine, "le": bound}, "_bucket")
        into.add(name, "histogram", description, below, mine, "_count")
        into.add(name, "histogram", description, histogram.sum_s, mine, "_sum")


def text(found: Iterable[Family], *, openmetrics: bool = False) -> str:
    """Return families in Prometheus's text format, version 0.0.4, or as OpenMetrics 1.0 text."""
    lines = []
    for family in found:
        # In the older format a counter's family has the name of its samples.
        name = family.name + ("_total" if family.kind == "counter" and not openmetrics else "")
        lines += [f"# HELP {name} {_escaped(family.help)}", f"# TYPE {name} {family.kind}"]
        for suffix, labels, value in family.samples:
            pairs = ",".join(f'{label}="{_escaped(given, quotes=True)}"' for label, given in labels)
            lines.append(f"{family.name}{suffix}{{{pairs}}} {_number(value)}")
    return "\n".join([*lines, "# EOF", ""] if openmetrics else [*lines, ""])


def _escaped(given: str, quotes: bool = False) -> str:
    escaped = given.replace("\\", r"\\").replace("\n", r"\n")
    return escaped.replace('"', r"\"") if quotes else escaped


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
