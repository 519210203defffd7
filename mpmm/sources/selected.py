"""Only some of a source's devices, for `ModelManager(devices=…)`."""

from __future__ import annotations

from collections.abc import Sequence

from mpmm.errors import InvalidArgumentError
from mpmm.sources.base import (
    DeviceInfo,
    DeviceSample,
    MemorySource,
    counts_named_only,
    frees_late,
    ignores_names,
    is_accounting_only,
    process_knowledge,
)
from mpmm.sources.visible_devices import server_setting

__all__ = ["SelectedDevices"]


class SelectedDevices:
    """A source that shows the chosen devices of another one, in the source's order."""

    def __init__(self, source: MemorySource, chosen: Sequence[int | str]) -> None:
        """chosen: indices or uuids. Raises InvalidArgumentError for one that the source does not have."""
        self._source = source
        self.name = source.name
        self.frees_late = frees_late(source)
        self.cheap = source.cheap
        self.accounting_only = is_accounting_only(source)
        self.counts_named_only = counts_named_only(source)
        self.ignores_names = ignores_names(source)
        there = source.devices()
        for wanted in chosen:
            if not any(wanted in (info.index, info.uuid) for info in there):
                has = ", ".join(f"{info.index} ({info.uuid})" for info in there) or "none"
                raise InvalidArgumentError(f"devices: {wanted!r} is not among the devices of {source.name}: {has}")
        self._devices = tuple(info for info in there if info.index in chosen or info.uuid in chosen)

    @property
    def measures_processes(self) -> bool:
        """Whether the source measures processes now."""
        return self._source.measures_processes

    @property
    def process_knowledge(self) -> bool | None:
        """See `mpmm.sources.base.process_knowledge`."""
        return process_knowledge(self._source)

    def devices(self) -> tuple[DeviceInfo, ...]:
        """Return the chosen devices."""
        return self._devices

    def server_setting(self, uuids: Sequence[str]) -> tuple[str, str] | None:
        """Return the source's answer, see `mpmm.sources.visible_devices.server_setting`."""
        return server_setting(self._source, uuids)

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Measure, and keep the chosen devices' samples."""
        indices = {info.index for info in self._devices}
        return tuple(sample for sample in self._source.sample(server_pids) if sample.index in indices)

    def close(self) -> None:
        """Close the source."""
        self._source.close()
