"""Reads about devices: where a copy runs alone, and whether single processes can be measured."""

from __future__ import annotations

from mpmm.shared_state.layout import Header, Instance, device_bits
from mpmm.shared_state.tables import Tables

__all__ = ["DeviceReads"]


class DeviceReads:
    """Reads about devices."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._words = tables.segment.words
        self._devices = tables.segment.layout.devices

    def anything_runs_alone(self) -> bool:
        """Tell whether a copy runs alone on some device; without the lock."""
        return self._words[Header.ISOLATED] != 0

    def all_isolated(self) -> bool:
        """Tell whether a copy runs alone on every device. Needs the lock."""
        isolated = self._words[Header.ISOLATED]
        return isolated != 0 and isolated == device_bits(self._tables.used_rows(self._devices))

    def isolated_under(self, instance: int) -> bool:
        """Tell whether something runs alone on a device that a copy (row) lies on: the copy itself, or another one."""
        isolated = self._words[Header.ISOLATED]
        # While the header's word is 0, as it mostly is, the copy's row need not be read.
        return isolated != 0 and isolated & self._words[self._tables.instance(instance) + Instance.DEVICES] != 0

    def only_whole_devices_are_measured(self) -> bool:
        """Tell whether the source knows how much of a device is in use, but not by which process."""
        words = self._words
        return not (words[Header.SOURCE_ACCOUNTING_ONLY] or words[Header.SOURCE_MEASURES_PROCESSES])
