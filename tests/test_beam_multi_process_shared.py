"""All of Beam's own tests of MultiProcessShared, against mpmm's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from beam_wheel import load_beam_tests, names_of

from mpmm import multi_process_shared

beam_tests = load_beam_tests(
    "utils/multi_process_shared_test.py",
    {"from apache_beam.utils import multi_process_shared": "from mpmm import multi_process_shared"},
)
globals().update(names_of(beam_tests))


@pytest.fixture(scope="module", autouse=True)
def own_runtime_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what tests share per class out of the user's registry, until Beam's own fixture gives each test a path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPMM_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
        yield


@pytest.fixture(autouse=True)
def own_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test a folder of its own also where Beam has no fixture for that yet, up to 2.74 at least.

    Beam's tests release nothing, so what they share would be taken for something that mpmm has left behind.
    """
    if not hasattr(beam_tests, "isolate_multi_process_shared_tests"):
        monkeypatch.setenv("MPMM_RUNTIME_DIR", str(tmp_path / "run"))


def test_names_of_beam_that_tests_use_are_there() -> None:
    shared: Any = multi_process_shared.MultiProcessShared(dict, tag="names", always_proxy=True)
    proxy: Any = shared.acquire()
    assert proxy.get_auto_proxy_object() is proxy
    assert multi_process_shared.AUTH_KEY == b"mps"
    shared.release(proxy.get_auto_proxy_object())


def test_the_tests_use_mpmm_and_not_beam() -> None:
    assert beam_tests.multi_process_shared.__name__ == "mpmm.multi_process_shared"
