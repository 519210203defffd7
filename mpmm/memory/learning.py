"""Learns about models from samples: readings of whole devices become observations, those of servers become estimates.

The leader calls it after each sample that it has waited for, or that came late. Later, and without the lock, the
estimators work out what the observations together say about each model; see `mpmm.memory.shared_estimator`.
"""

from __future__ import annotations

from collections import Counter

from mpmm.memory.estimator import smooth
from mpmm.shared_state.layout import Instance, Member
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.transaction import Transaction
from mpmm.shared_state.transitions.estimates import ESTIMATE_TOLERANCE

__all__ = ["Learning"]


class Learning:
    """Takes samples into a namespace's models, with what one process has to remember from sample to sample."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        # The state of each device (row) at its last reading: another reading in the same state says nothing new.
        self._seen: dict[int, tuple[int, int]] = {}
        # The estimates of models with measured servers, as last reported as metrics.
        self._reported: dict[str, float] = {}

    def learn(self, t: Transaction) -> dict[str, float]:
        """Put the figures of the last sample into the estimates, or into the observations for NNLS.

        Returns the estimates to report, in MB by tag.
        """
        namespace = self._namespace
        header = namespace.tables.header
        if header.source_accounting_only:
            return {}
        for device in namespace.tables.used_rows(namespace.segment.layout.devices):
            self._observe(t, device)
        return self._take_over_measurements(t) if header.source_measures_processes else {}

    def _observe(self, t: Transaction, device: int) -> None:
        """Record the peak of a device's configuration, unless that has changed since before the device's last sample.

        The memory of copies that are measured by themselves comes off the reading; the rest is the other copies'.
        """
        namespace, tables = self._namespace, self._namespace.tables
        here = tables.devices[device]
        if here.sampled < here.configured_at or here.isolated is not None:
            return
        copies: Counter[int] = Counter()
        measured_mb, uses = here.unrelated_mb, 0
        for row in tables.on_device(device):
            copy = tables.instances[row]
            if copy.state not in (Instance.ACTIVE, Instance.IDLE) or copy.devices != [device]:
                # The memory of loads, unloads and programs of leases goes up and down; and it is not known how much of
                # a copy that spans several devices is here.
                return
            uses += copy.uses
            if copy.server is not None and tables.header.source_measures_processes:
                measured_mb += copy.mb
            else:
                copies[tables.models[copy.model].generation] += 1
        seen = (here.configured_at, uses)
        if self._seen.get(device) == seen:
            return
        self._seen[device] = seen
        # The figures of single processes are those of the last sample, not those of the peak.
        peak_since = namespace.transitions.devices.peak_since
        whole_mb = here.used_mb if measured_mb else peak_since(device, here.configured_at)
        namespace.transitions.estimates.observe(t, list(copies.items()), max(0.0, whole_mb - measured_mb), device)

    def _take_over_measurements(self, t: Transaction) -> dict[str, float]:
        """Let a model's estimate follow the most that its servers were seen to take; return the estimates to report.

        Up at once, because the next copy will take as much (`Measurements.measure` does so with each sample); down
        slowly, because a copy that has not worked yet takes less than one that has.
        """
        namespace, tables = self._namespace, self._namespace.tables
        changed = {}
        for row, mb in self._highest().items():
            model = tables.models[row]
            if not model.known:
                continue
            old = model.estimate_mb
            new = mb if mb > old else smooth(old, mb, namespace.settings.smoothing_factor)
            if abs(new - old) > ESTIMATE_TOLERANCE * old or model.sd_mb:
                namespace.transitions.estimates.estimate(t, row, new, measured=True)
            tag, mb = tables.tag_of(row), model.estimate_mb
            if abs(mb - self._reported.get(tag, 0.0)) > ESTIMATE_TOLERANCE * mb:
                self._reported[tag] = changed[tag] = mb
        return changed

    def _highest(self) -> dict[int, float]:
        """Return the most that a server of each model (row) was seen to take, in MB."""
        tables = self._namespace.tables
        highest: dict[int, float] = {}
        for slot in tables.rows_where(self._namespace.segment.layout.members, Member.STATE, Member.SERVER):
            server = tables.members[slot]
            row = server.instance
            if row is None or tables.instances[row].server != slot:
                continue
            copy = tables.instances[row]
            if copy.state in (Instance.ACTIVE, Instance.IDLE) and server.peak_mb > 0:
                # If a copy spans several devices, each has to have room for the largest share.
                span = len(copy.devices)
                largest_mb = max(tables.server_shares_mb(slot, span)) if span > 1 else 0.0
                highest[copy.model] = max(highest.get(copy.model, 0.0), server.peak_mb, largest_mb * span)
        return highest
