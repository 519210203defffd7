"""The old name of `mpmm.multi_process_shared.registry`."""

import warnings

from mpmm.multi_process_shared.registry import registry_for as room_for

__all__ = ["room_for"]

warnings.warn(
    "mpmm.proxy.room is now mpmm.multi_process_shared.registry, and room_for is registry_for",
    DeprecationWarning,
    stacklevel=2,
)
