"""This release and a later one with another layout and protocol: what is refused, what still works, and the remedy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from counters import Counter
from harness import CHECKOUT, NewManager, NewProcess, acquire, problems
from loaders import Loads

from mpmm.multi_process_shared import MultiProcessShared
from mpmm.multi_process_shared.rpc.sockets import PROTOCOL_VERSION
from mpmm.shared_state.layout import LAYOUT_VERSION
from mpmm.shared_state.snapshot import read_snapshot

TIMEOUT_S = 100.0
RAISED = {"shared_state/layout.py": "LAYOUT_VERSION", "multi_process_shared/rpc/sockets.py": "PROTOCOL_VERSION"}
USE_A_MODEL = """
import sys
from mpmm import ModelManager

with ModelManager(namespace=sys.argv[1], memory_source="booked", fallback_memory_mb=1000) as manager:
    with manager.model("later", lambda: "handle of the later one") as handle:
        print(handle)
"""
CALL_A_SERVER = """
from counters import Counter
from mpmm import MultiProcessShared

print(MultiProcessShared(Counter, tag="served", always_proxy=True).acquire().increment())
"""


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a release that differs from this one in both versions."""
    folder = tmp_path_factory.mktemp("later")
    # The compiled core knows the layout, too.
    shutil.copytree(CHECKOUT / "mpmm", folder / "mpmm", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for path, name in RAISED.items():
        file = folder / "mpmm" / path
        text = file.read_text()
        [found] = re.findall(rf"^{name} = (\d+)$", text, re.MULTILINE)
        file.write_text(text.replace(f"\n{name} = {found}\n", f"\n{name} = {int(found) + 1}\n"))
    return folder


def run(later: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the interpreter on the later release."""
    path = os.pathsep.join([str(later), str(Path(__file__).parent)])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        cwd=later,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def expect_refused(done: subprocess.CompletedProcess[str]) -> None:
    """Assert that both layouts were named."""
    assert done.returncode != 0
    assert f"found layout version {LAYOUT_VERSION}, expected layout version {LAYOUT_VERSION + 1}" in done.stderr


def test_a_later_release_waits_until_this_one_is_drained_or_takes_another_namespace(
    later: Path, namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager()
    taken = manager.acquire_model("ours", Loads())
    refused = run(later, "-c", USE_A_MODEL, namespace)
    expect_refused(refused)
    assert "LayoutMismatchError" in refused.stderr
    for command in ("inspect", "check", "reset --yes", "unload ours --namespace"):
        expect_refused(run(later, "-m", "mpmm", *command.split(), namespace))
    # None of this has changed anything for the attached processes.
    assert [(copy.tag, copy.state) for copy in read_snapshot(namespace).instances] == [("ours", "active")]
    manager.release_model("ours", taken)
    with manager.model("ours", Loads()):
        assert problems(namespace) == []
    beside = run(later, "-c", USE_A_MODEL, f"{namespace}-later")
    assert beside.stdout == "handle of the later one\n", beside.stderr
    # Drained: the last one leaves, and the namespace is the later release's.
    manager.shutdown()
    after = run(later, "-c", USE_A_MODEL, namespace)
    assert after.stdout == "handle of the later one\n", after.stderr


def test_what_killed_processes_of_this_release_have_left_is_in_no_later_ones_way(
    later: Path, namespace: str, new_process: NewProcess
) -> None:
    process = new_process()
    process.call(acquire, "ours")
    process.kill()
    after = run(later, "-c", USE_A_MODEL, namespace)
    assert after.stdout == "handle of the later one\n", after.stderr


def test_a_later_client_of_our_model_server_is_told_both_versions_of_the_protocol(
    later: Path, namespace: str, new_manager: NewManager
) -> None:
    shared = MultiProcessShared(Counter, tag="served", always_proxy=True, spawn_process=True)
    served: Any = shared.acquire()
    assert served.increment() == 1
    refused = run(later, "-c", CALL_A_SERVER)
    assert refused.returncode != 0
    assert re.search(
        rf"ModelServerError: .*version {PROTOCOL_VERSION} of the protocol, this process version {PROTOCOL_VERSION + 1}",
        refused.stderr,
    ), refused.stderr
    assert served.increment() == 2
    shared.unsafe_hard_delete()
