"""An exception at any bytecode of a load that starts a model server leaves no server behind.

See `test_interrupt_points`, which also says how to try every point.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import psutil
import pytest
from interrupt_points import Sweep
from interrupt_points import sweep as sweep  # the fixture
from loaders import LoadsServer, served

from mpmm.multi_process_shared.forkserver.client import SWITCH_VARIABLE, zygote_pid
from mpmm.multi_process_shared.registry import registry_for

# An exception in a finalizer, such as that of a lock file, does not reach the program; Python reports it as such.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SERVER_NAME = "mpmm-server"


def running_servers() -> set[int]:
    """Return the pids of the model servers that this process has started, or its zygote."""
    zygote = zygote_pid(registry_for(None))
    children = psutil.Process().children()
    if zygote is not None:
        # A template of the zygote forks servers, too.
        children += psutil.Process(zygote).children(recursive=True)
    found = set()
    for child in children:
        try:
            if child.name() == SERVER_NAME and child.status() != psutil.STATUS_ZOMBIE:
                found.add(child.pid)
        except psutil.NoSuchProcess:
            pass
    return found


class ServerSweep(Sweep):
    """The points of loads that start a model server, each with a handle of its own."""

    _numbers = itertools.count()
    _handle = "none"

    def start(self) -> None:
        """Have a copy in a new server."""
        self._handle = f"server-{next(self._numbers)}"
        with self.manager.model("served", LoadsServer(self._handle)):
            pass

    def unload(self) -> None:
        """Have the next request load."""
        self.manager.unload("served")

    def go_on(self) -> None:
        """Use another model, and load a copy in another server, which answers."""
        super().go_on()
        self.unload()
        handle = f"server-{next(self._numbers)}"
        with self.manager.model("served", LoadsServer(handle)):
            assert served(handle).pid() in running_servers()

    def left(self) -> list[str]:
        """Return, in addition, servers and members that no copy names, and the lock of the last handle."""
        snapshot = self.snapshot()
        members = {member.slot: member.pid for member in snapshot.members if member.kind == "server"}
        named = {members.pop(instance.server, -1) for instance in snapshot.instances if instance.server is not None}
        wrong = [f"pid {pid} is a server without a copy" for pid in running_servers() - named]
        wrong += [f"pid {pid} is a member without a copy" for pid in members.values()]
        try:
            with registry_for(None).tag_lock(self._handle, 0.0):
                pass
        except TimeoutError as error:
            wrong.append(str(error))
        return [*super().left(), *wrong]


# To load a copy in a spawned server takes half a second.
@pytest.mark.parametrize(("zygote", "step"), [(True, 1987), (False, 9973)], ids=["forked", "spawned"])
def test_load_that_starts_server(
    sweep: Callable[..., ServerSweep], zygote: bool, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not zygote:
        monkeypatch.setenv(SWITCH_VARIABLE, "0")
    one = sweep(step, ServerSweep)
    one.start()
    one(one.start, one.unload)
