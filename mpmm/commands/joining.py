"""How a command joins a namespace that other processes have created."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpmm.model_manager.manager import ModelManager

__all__ = ["join"]


def join(name: str, root: Path | None) -> ModelManager:
    """Return a manager of a namespace, and log only errors: the command itself prints what it does.

    A warning that the defaults of a manager without arguments differ from the settings would be noise, too.
    """
    from mpmm.model_manager import ModelManager

    logging.getLogger("mpmm").setLevel(logging.ERROR)
    return ModelManager(namespace=name, runtime_root=root)
