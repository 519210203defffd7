"""Namespaces of the kernel, as containers have them."""

from __future__ import annotations

import os
import shutil

import pytest

__all__ = ["can_unshare"]

can_unshare = pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare(1) for namespaces of the kernel"
)
