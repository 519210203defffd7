"""What samples say about models: readings of whole devices become observations, those of servers become estimates.

The leader calls it after each sample that it has waited for, or that came late. What the observations together say of
each model, the estimators work out later, and without the lock; see `mpmm.memory.shared_estimator`.
"""

from __future__ import annotations

from collections import Counter

from mpmm.memory.estimator import smooth
from mpmm.shared_state.layout import Device, Header, Instance, Member, Model
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.transaction import Transaction
from mpmm.shared_state.transitions.estimates import ESTIMATE_TOLERANCE

__all__ = ["Learning"]


class Learning:
    """What one process has learnt from the samples of its namespace, as far as the next look needs it."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        # What was seen of each device (row) when its last reading was taken: a reading of the same says nothing new.
        self._seen: dict[int, tuple[int, int]] = {}
        # The estimates of models with measured servers that were reported as metrics last.
        self._reported: dict[str, float] = {}

    def learn(self, t: Transaction) -> dict[str, float]:
        """Take the figures of the last sample into the estimates, or into the observations for NNLS."""
        namespace = self._namespace
        words = namespace.segment.words
        if words[Header.SOURCE_BOOKS_ONLY]:
            return {}
        for device in namespace.tables.used_rows(namespace.segment.layout.devices):
            self._observe(t, device)
        return self._take_over_measurements(t) if words[Header.SOURCE_MEASURES_PROCESSES] else {}

    def _observe(self, t: Transaction, device: int) -> None:
        """Record the peak of a configuration that nothing has changed since before the last sample of a device.

        What is measured by itself is no riddle: it comes off the reading, and what remains is that of the other copies.
        """
        namespace = self._namespace
        words, floats, tables = namespace.segment.words, namespace.segment.floats, namespace.tables
        at = tables.device(device)
        if words[at + Device.SAMPLED] < words[at + Device.CONFIGURED_AT] or words[at + Device.ISOLATED]:
            return
        copies: Counter[int] = Counter()
        measured_mb, uses = floats[at + Device.FOREIGN_MB], 0
        for row in tables.on_device(device):
            copy = tables.instance(row)
            if words[copy] not in (Instance.ACTIVE, Instance.IDLE) or words[copy + Instance.DEVICES] != 1 << device:
                # What loads or unloads, and what a lease's program takes, goes up and down; and of a copy that spans
                # several devices nobody knows how much is here.
                return
            uses += words[copy + Instance.USES]
            if words[copy + Instance.SERVER] and words[Header.SOURCE_MEASURES_PROCESSES]:
                measured_mb += floats[copy + Instance.MB]
            else:
                copies[words[tables.model(words[copy + Instance.MODEL]) + Model.GENERATION]] += 1
        seen = (words[at + Device.CONFIGURED_AT], uses)
        if not copies or self._seen.get(device) == seen:
            return
        self._seen[device] = seen
        # The figures of single processes are those of the last sample, not those of the peak.
        whole_mb = (
            floats[at + Device.USED_MB]
            if measured_mb
            else namespace.transitions.devices.peak_since(device, words[at + Device.CONFIGURED_AT])
        )
        namespace.transitions.estimates.observe(t, list(copies.items()), max(0.0, whole_mb - measured_mb), device)

    def _take_over_measurements(self, t: Transaction) -> dict[str, float]:
        """Let a model's estimate follow what its servers were seen to take at most; return those to be reported.

        Up at once, because the next copy will take as much (`Measurements.measure` does so with each sample); down
        slowly, because a copy that has not worked yet takes less than one that has.
        """
        namespace = self._namespace
        words, floats, tables = namespace.segment.words, namespace.segment.floats, namespace.tables
        highest: dict[int, float] = {}
        for slot in tables.rows_where(namespace.segment.layout.members, Member.STATE, Member.SERVER):
            at = tables.member(slot)
            row = words[at + Member.INSTANCE]
            if not row or words[tables.instance(row - 1) + Instance.SERVER] != slot + 1:
                continue
            copy = tables.instance(row - 1)
            if words[copy] in (Instance.ACTIVE, Instance.IDLE) and floats[at + Member.PEAK_MB] > 0:
                # Of what spans several devices each has to have room for the largest share.
                span = words[copy + Instance.DEVICES].bit_count()
                largest_mb = max(floats[at + Member.SHARES : at + Member.SHARES + span]) if span > 1 else 0.0
                model = words[copy + Instance.MODEL]
                highest[model] = max(highest.get(model, 0.0), floats[at + Member.PEAK_MB], largest_mb * span)
        changed = {}
        for model, mb in highest.items():
            at = tables.model(model)
            if not words[at + Model.KNOWN]:
                continue
            old = floats[at + Model.ESTIMATE_MB]
            new = mb if mb > old else smooth(old, mb, namespace.settings.smoothing_factor)
            if abs(new - old) > ESTIMATE_TOLERANCE * old or floats[at + Model.SD_MB]:
                namespace.transitions.estimates.estimate(t, model, new, measured=True)
            tag, mb = tables.tag_of(model), floats[at + Model.ESTIMATE_MB]
            if abs(mb - self._reported.get(tag, 0.0)) > ESTIMATE_TOLERANCE * mb:
                self._reported[tag] = changed[tag] = mb
        return changed
