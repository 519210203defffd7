"""Large payloads, and a shared object and a connection to send them through."""

from __future__ import annotations

import gc
import socket
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
from payload_store import Store

from mpmm.multi_process_shared import MultiProcessShared, unload
from mpmm.multi_process_shared.client import forget_link, known_link
from mpmm.multi_process_shared.registry import registry_for
from mpmm.multi_process_shared.rpc.channel import LARGE_BYTES, Channel
from mpmm.multi_process_shared.rpc.shared_buffer import SHARED_BUFFER_BYTES

TAG = "payloads"
LARGE = 3 * LARGE_BYTES // 8  # numbers of 8 bytes
NUMBERS = np.random.default_rng(7).random((300, 400))
LARGER_THAN_A_BUFFER = np.arange(3 * SHARED_BUFFER_BYTES // 8 + 5)


def acquired(spawn: bool = True) -> Any:
    """Acquire the object, in a process of its own or in this one."""
    return MultiProcessShared(Store, tag=TAG, always_proxy=True, spawn_process=spawn).acquire()


@pytest.fixture
def in_room(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Delete the shared object at the end."""
    # Payloads do not depend on how the server was started, and a single server starts fastest without a zygote.
    monkeypatch.setenv("MPMM_ZYGOTE", "0")
    yield
    unload(TAG)
    # Dropping the last link closes the connection, and with it the shared buffer.
    if (link := known_link(registry_for(None), TAG)) is not None:
        forget_link(link)
        del link
    gc.collect()


@pytest.fixture
def spawned(in_room: None) -> Any:
    """The object, in a process of its own."""
    return acquired()


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    """Two ends of a connection in this process."""
    ours, theirs = (Channel(Connection(end.detach())) for end in socket.socketpair())
    yield ours, theirs
    ours.close()
    theirs.close()


def assert_same(found: Any, expected: Any) -> None:
    """Fail unless an array equals the one that a plain pickle returns."""
    assert type(found) is type(expected)
    np.testing.assert_array_equal(found, expected)
    if isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        for flag in ("writeable", "c_contiguous", "f_contiguous", "aligned"):
            assert getattr(found.flags, flag) == getattr(expected.flags, flag), flag
