"""Suspension by the driver's checkpoints: the simulated driver, its binding, the helper process, and all together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from devices.simulated_checkpoints import CHECKPOINTED, FAILED, LOCKED, RUNNING
from devices.simulated_gpu import Build, SimulatedGpus
from harness import (
    NewGpus,
    NewProcess,
    Process,
    Seat,
    acquire,
    copies_of,
    learn,
    model_of,
    open_descriptors,
    problems,
    release,
    shut_down,
    stop_process,
    wait_until,
)
from loaders import Loads, LoadsServer, MakesServed, served
from patience import DEADLINE_S
from sleepers import pretend_load_s

from mpmm.errors import ModelServerError, SuspendError
from mpmm.interpreter.new_interpreter import command_line
from mpmm.multi_process_shared.rpc import sockets
from mpmm.policy.suspension import Unsuspendable
from mpmm.shared_state.lock_file import LockFile
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.suspend import helper
from mpmm.suspend.driver import OUT_OF_MEMORY, CheckpointDriver, DriverError, State, driver_branch
from mpmm.suspend.helper import LOCK, SOCKET, TRIES, ask_helper
from mpmm.suspend.suspender import DYING_S

NOT_SUPPORTED = 801
LONG_S = 60.0

HOLDER = """
import sys
from pathlib import Path
from devices.simulated_gpu import SimulatedGpus
SimulatedGpus(Path(sys.argv[1])).allocate(float(sys.argv[2]), 0)
print("taken", flush=True)
sys.stdin.read()
"""


# ---- the binding, on the simulated driver -----------------------------------------------------------------------


@pytest.fixture
def gpus(new_gpus: NewGpus, built_gpu: Build, monkeypatch: pytest.MonkeyPatch) -> SimulatedGpus:
    """A GPU of 1000 MB with the checkpoint calls, which this process finds as well."""
    monkeypatch.setattr("mpmm.suspend.driver.LIBRARY", str(built_gpu.cuda))
    return new_gpus(1000, checkpoints=True)


@pytest.fixture
def target(gpus: SimulatedGpus) -> Iterator[int]:
    """A process that has 400 MB of the GPU."""
    command = [sys.executable, "-c", HOLDER, str(gpus.folder), "400"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent / "tools")}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None and process.stdout.readline()
    yield process.pid
    process.kill()
    process.communicate()


def soon() -> float:
    return time.monotonic() + 5.0


def test_memory_leaves_the_device_and_comes_back(gpus: SimulatedGpus, target: int) -> None:
    driver, moved = CheckpointDriver(), gpus.checkpoints
    driver.suspend(target, soon())
    assert (gpus.used_mb(0), moved.host_mb(), moved.state_of(target)) == (0.0, 400.0, CHECKPOINTED)
    assert driver.state(target) == State.CHECKPOINTED
    driver.suspend(target, soon())
    driver.resume(target, soon())
    assert (gpus.used_mb(0), moved.host_mb(), moved.state_of(target)) == (400.0, 0.0, RUNNING)
    driver.resume(target, soon())


@pytest.mark.parametrize(
    ("call", "error", "reason", "left"),
    [
        ("lock", 1, "no such process", RUNNING),
        ("lock", 3, "not initialised", RUNNING),
        ("lock", 401, "another state", RUNNING),
        ("lock", 600, "did not end in time", RUNNING),
        ("lock", NOT_SUPPORTED, "not supported", RUNNING),
        ("checkpoint", NOT_SUPPORTED, "not supported", RUNNING),
        ("state", 3, "not initialised", RUNNING),
    ],
)
def test_what_the_driver_says_is_an_error_with_its_reason_and_the_process_runs_on(
    gpus: SimulatedGpus, target: int, call: str, error: int, reason: str, left: int
) -> None:
    driver = CheckpointDriver()
    gpus.checkpoints.fail_call(call, error)
    with pytest.raises(DriverError, match=reason) as caught:
        driver.suspend(target, soon())
    assert caught.value.code == error
    gpus.checkpoints.fail_call(call, 0)
    assert (gpus.checkpoints.state_of(target), gpus.used_mb(0)) == (left, 400.0)


def test_a_restore_without_room_leaves_the_process_in_the_host(gpus: SimulatedGpus, target: int) -> None:
    driver = CheckpointDriver()
    driver.suspend(target, soon())
    gpus.pretend(1, 700.0, 0)
    with pytest.raises(DriverError, match="too little memory"):
        driver.resume(target, soon())
    assert (gpus.checkpoints.state_of(target), gpus.checkpoints.host_mb()) == (CHECKPOINTED, 400.0)
    gpus.pretend(1, 0.0, 0)
    driver.resume(target, soon())
    assert gpus.checkpoints.state_of(target) == RUNNING


def test_a_process_that_failed_is_lost(gpus: SimulatedGpus, target: int) -> None:
    driver = CheckpointDriver()
    gpus.checkpoints.kill_caller("checkpoint", 0.0, FAILED)
    assert run_in_helper(target, "suspend") == -signal.SIGKILL
    gpus.checkpoints.kill_caller("checkpoint", -1.0, 0)
    with pytest.raises(DriverError, match="is lost"):
        driver.suspend(target, soon())


def run_in_helper(target: int, what: str) -> int:
    pid = os.fork()
    if pid == 0:
        getattr(CheckpointDriver(), what)(target, soon())
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("left", [LOCKED, RUNNING])
def test_where_a_caller_died_the_next_one_goes_on(gpus: SimulatedGpus, target: int, left: int) -> None:
    gpus.checkpoints.kill_caller("checkpoint", 0.0, left)
    assert run_in_helper(target, "suspend") == -signal.SIGKILL
    gpus.checkpoints.kill_caller("checkpoint", -1.0, 0)
    CheckpointDriver().suspend(target, soon())
    assert (gpus.checkpoints.state_of(target), gpus.used_mb(0)) == (CHECKPOINTED, 0.0)


def test_a_library_without_the_calls_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpmm.suspend.driver.LIBRARY", "libm.so.6")
    with pytest.raises(DriverError, match=r"libm\.so\.6 has no checkpoint calls"):
        CheckpointDriver()


def test_the_driver_tells_its_branch(tmp_path: Path) -> None:
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Thu Aug  1 00:00:00 UTC 2026\n")
    assert driver_branch(version) == 580
    assert driver_branch(tmp_path / "none") is None


# ---- managers, servers and the helper ---------------------------------------------------------------------------


@pytest.fixture
def two(gpus: SimulatedGpus, new_process: NewProcess) -> tuple[Process, Process]:
    """Two processes of a namespace on that GPU; models a and b take 600 MB each, and never fit together."""
    chosen: dict[str, Any] = {"memory_source": "nvml", "suspend": "checkpoint", "suspend_budget_mb": 2000.0}
    first, second = new_process(**chosen), new_process(**chosen)
    first.call(learn, a=600.0, b=600.0)
    return first, second


def loads(gpus: SimulatedGpus, tag: str) -> LoadsServer:
    return LoadsServer(tag, MakesServed(gpus, 600.0))


def load(process: Process, gpus: SimulatedGpus, tag: str) -> int:
    """Have a process load a model in a server and release it; return the server's pid. Its loads take long."""
    process.call(acquire, tag, loads(gpus, tag))
    process.call(release)
    process.call(let_loads_take_long, tag)
    return int(served(tag).pid())


def let_loads_take_long(seat: Seat, tag: str) -> None:
    pretend_load_s(seat.manager, tag, LONG_S)


def suspend(seat: Seat, tag: str) -> int:
    return int(seat.manager.suspend(tag))


def states(namespace: str, tag: str) -> list[str]:
    return [copy.state for copy in copies_of(namespace, tag)]


def await_states(namespace: str, tag: str, *expected: str) -> None:
    wait_until(lambda: tuple(states(namespace, tag)) == expected, f"{tag} is {expected}")


def helper_pid(namespace: str, root: Path) -> int | None:
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "mpmm.suspend.helper" in command and str(root / namespace) in command:
            return int(process.pid)
    return None


def test_a_server_is_suspended_for_another_model_and_is_the_same_one_when_it_is_asked_for(
    namespace: str, gpus: SimulatedGpus, two: tuple[Process, Process]
) -> None:
    first, second = two
    pid = load(first, gpus, "a")
    second.call(acquire, "b", loads(gpus, "b"))
    assert states(namespace, "a") == ["suspended"] and gpus.checkpoints.state_of(pid) == CHECKPOINTED
    snapshot = read_snapshot(namespace)
    (copy,) = (copy for copy in snapshot.instances if copy.tag == "a")
    assert (copy.mb, copy.device_mb, copy.host_mb) == (0.0, 600.0, 600.0)
    assert model_of(namespace, "a").estimate_mb == 600.0
    second.call(release)
    second.call(let_loads_take_long, "b")
    assert first.call(acquire, "a", loads(gpus, "a")) == "a"
    assert (gpus.checkpoints.state_of(pid), served("a").pid()) == (RUNNING, pid)
    assert states(namespace, "b") == ["suspended"]
    assert gpus.highest_mb(0) <= 600.0 and gpus.checkpoints.host_mb() == 600.0
    snapshot = read_snapshot(namespace)
    assert (snapshot.loads, snapshot.suspends, snapshot.resumes, snapshot.written_off_mb) == (2, 2, 1, 0.0)
    assert problems(namespace) == []


@pytest.mark.parametrize("call", ["lock", "checkpoint"])
def test_what_the_driver_does_not_support_is_unloaded_and_not_tried_again(
    namespace: str, gpus: SimulatedGpus, two: tuple[Process, Process], call: str
) -> None:
    first, second = two
    gpus.checkpoints.fail_call(call, NOT_SUPPORTED)
    load(first, gpus, "a")
    second.call(acquire, "b", loads(gpus, "b"))
    assert states(namespace, "a") == []
    assert model_of(namespace, "a").unsuspendable == Unsuspendable.SUSPEND_FAILED
    assert read_snapshot(namespace).suspend_failures == 1
    assert gpus.checkpoints.host_mb() == 0.0 and problems(namespace) == []


def test_a_failed_restore_costs_the_copy_and_the_model_is_loaded_anew(
    namespace: str, gpus: SimulatedGpus, two: tuple[Process, Process]
) -> None:
    first, second = two
    pid = load(first, gpus, "a")
    assert first.call(suspend, "a") == 1
    gpus.checkpoints.fail_call("restore", NOT_SUPPORTED)
    assert second.call(acquire, "a", loads(gpus, "a")) == "a"
    assert served("a").pid() != pid
    assert model_of(namespace, "a").unsuspendable == Unsuspendable.RESUME_FAILED
    assert gpus.checkpoints.host_mb() == 0.0 and problems(namespace) == []


def test_a_restore_that_finds_no_memory_costs_the_copy_and_the_model_is_suspended_again(
    namespace: str, gpus: SimulatedGpus, two: tuple[Process, Process]
) -> None:
    first, second = two
    pid = load(first, gpus, "a")
    assert first.call(suspend, "a") == 1
    gpus.checkpoints.fail_call("restore", OUT_OF_MEMORY)
    assert second.call(acquire, "a", loads(gpus, "a")) == "a"
    assert served("a").pid() != pid
    second.call(release)
    assert second.call(suspend, "a") == 1
    assert problems(namespace) == []


@pytest.mark.parametrize("call", ["checkpoint", "restore"])
def test_the_death_of_the_helper_costs_the_operation_and_the_next_one_goes_on(
    namespace: str, gpus: SimulatedGpus, two: tuple[Process, Process], runtime_root: Path, call: str
) -> None:
    first, _ = two
    pid = load(first, gpus, "a")
    if call == "restore":
        assert first.call(suspend, "a") == 1
    # So slow that it has not ended by the time that a busy machine has found the helper.
    gpus.checkpoints.set_rates(150.0, 150.0)
    first.send(suspend if call == "checkpoint" else acquire, "a")
    moving = "suspending" if call == "checkpoint" else "resuming"
    await_states(namespace, "a", moving)
    await_middle(gpus)
    helper = helper_pid(namespace, runtime_root)
    assert helper is not None
    os.kill(helper, signal.SIGKILL)
    gpus.checkpoints.set_rates(0.0, 0.0)
    assert first.result() == (1 if call == "checkpoint" else "a")
    assert gpus.checkpoints.state_of(pid) == (CHECKPOINTED if call == "checkpoint" else RUNNING)
    assert helper_pid(namespace, runtime_root) not in (None, helper)
    assert problems(namespace) == []


def test_a_helper_that_has_ended_is_no_zombie_for_long(
    namespace: str, gpus: SimulatedGpus, two: tuple[Process, Process], runtime_root: Path
) -> None:
    load(two[0], gpus, "a")
    assert two[0].call(suspend, "a") == 1
    helper = helper_pid(namespace, runtime_root)
    assert helper is not None
    os.kill(helper, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(helper), "the process that has started it has noted its end")


def await_middle(gpus: SimulatedGpus) -> None:
    wait_until(lambda: 0.0 < gpus.checkpoints.host_mb() < 600.0, "part of it has moved")


def begin_to_resume(gpus: SimulatedGpus, suspends: Process, resumes: Process) -> int:
    """Have one process load and suspend a model, and another one begin to resume it; return the server's pid."""
    pid = load(suspends, gpus, "a")
    assert suspends.call(suspend, "a") == 1
    # So slow that it has not ended by the time that a busy machine has found the helper.
    gpus.checkpoints.set_rates(0.0, 150.0)
    resumes.send(acquire, "a", loads(gpus, "a"))
    await_middle(gpus)
    return pid


def expect_suspended_as_a_whole(namespace: str, gpus: SimulatedGpus, survivor: Process, pid: int) -> None:
    gpus.checkpoints.set_rates(0.0, 0.0)
    await_states(namespace, "a", "suspended")
    assert (gpus.checkpoints.state_of(pid), gpus.used_mb(0), gpus.checkpoints.host_mb()) == (CHECKPOINTED, 0.0, 600.0)
    assert survivor.call(acquire, "a", loads(gpus, "a")) == "a"
    assert (served("a").pid(), gpus.used_mb(0), gpus.checkpoints.host_mb()) == (pid, 600.0, 0.0)
    assert problems(namespace) == []


def test_a_server_whose_resume_has_lost_its_requester_is_suspended_as_a_whole(
    namespace: str, gpus: SimulatedGpus, two: tuple[Process, Process]
) -> None:
    first, second = two
    pid = begin_to_resume(gpus, suspends=first, resumes=second)
    second.kill()
    expect_suspended_as_a_whole(namespace, gpus, first, pid)


def test_a_server_that_was_half_resumed_when_helper_and_requester_died_is_suspended_as_a_whole(
    namespace: str, gpus: SimulatedGpus, two: tuple[Process, Process], runtime_root: Path
) -> None:
    first, second = two
    pid = begin_to_resume(gpus, suspends=first, resumes=second)
    helper = helper_pid(namespace, runtime_root)
    assert helper is not None
    second.stop()
    os.kill(helper, signal.SIGKILL)
    second.kill()
    expect_suspended_as_a_whole(namespace, gpus, first, pid)


def test_nothing_is_restored_for_a_requester_that_is_gone(
    namespace: str, gpus: SimulatedGpus, two: tuple[Process, Process], runtime_root: Path
) -> None:
    pid = load(two[0], gpus, "a")
    assert two[0].call(suspend, "a") == 1
    helper, folder = helper_pid(namespace, runtime_root), runtime_root / namespace
    assert helper is not None
    request = json.dumps({"what": "resume", "pid": pid, "limit_s": 10.0}).encode()
    with closing(sockets.dial(folder, SOCKET, (folder / "token").read_bytes())) as connection:
        # Stopped, so that the end of the connection is there before the helper looks.
        stop_process(helper)
        connection.send_bytes(request)
        # Half of an end, as a death is the whole of it: the answer can still be read.
        with socket.socket(fileno=os.dup(connection.fileno())) as ours:
            ours.shutdown(socket.SHUT_WR)
        os.kill(helper, signal.SIGCONT)
        assert "no process waits" in str(json.loads(connection.recv_bytes())["error"])
    assert (gpus.checkpoints.state_of(pid), gpus.checkpoints.host_mb()) == (CHECKPOINTED, 600.0)
    assert two[1].call(acquire, "a", loads(gpus, "a")) == "a"
    assert (gpus.checkpoints.state_of(pid), problems(namespace)) == (RUNNING, [])


def test_a_helper_of_a_folder_that_is_gone_ends_without_a_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = command_line("mpmm.suspend.helper", str(tmp_path / "gone"))
    assert subprocess.run(command, check=False).returncode == 0
    assert capfd.readouterr() == ("", "")


def test_a_driver_call_that_hangs_ends_the_server_and_holds_up_nobody_else(
    namespace: str, gpus: SimulatedGpus, new_process: NewProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Long enough for the other load where the machine is busy.
    monkeypatch.setattr("mpmm.suspend.suspender.limit_s", lambda mb: 4.0)
    chosen: dict[str, Any] = {"memory_source": "nvml", "suspend": "checkpoint", "suspend_budget_mb": 2000.0}
    first, second = new_process(**chosen), new_process(**chosen)
    first.call(learn, a=600.0, small=100.0)
    load(first, gpus, "a")
    gpus.checkpoints.hang_call("checkpoint", 20.0)
    first.send(suspend, "a")
    await_states(namespace, "a", "suspending")
    second.call(acquire, "small", Loads())
    assert states(namespace, "a") == ["suspending"]
    assert first.result() == 0
    await_states(namespace, "a")
    assert model_of(namespace, "a").unsuspendable == Unsuspendable.TIMED_OUT


def test_a_helper_that_is_stopped_costs_the_operation_and_another_one_takes_its_place(
    namespace: str,
    gpus: SimulatedGpus,
    new_process: NewProcess,
    runtime_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    stopped = tmp_path / "stopped"
    # In all processes, but not while a helper has to start.
    monkeypatch.setattr("mpmm.suspend.suspender.limit_s", lambda mb: 2.0 if stopped.exists() else DEADLINE_S)
    chosen: dict[str, Any] = {"memory_source": "nvml", "suspend": "checkpoint", "suspend_budget_mb": 2000.0}
    first, second = new_process(**chosen), new_process(**chosen)
    first.call(learn, a=600.0)
    load(first, gpus, "a")
    assert first.call(suspend, "a") == 1
    second.call(acquire, "a", loads(gpus, "a"))
    second.call(release)
    helper = helper_pid(namespace, runtime_root)
    assert helper is not None
    stop_process(helper)
    stopped.touch()
    # The copy, since it is unknown what the helper has done to it; but not the model.
    assert first.call(suspend, "a") == 0
    await_states(namespace, "a")
    assert model_of(namespace, "a").unsuspendable == 0
    wait_until(lambda: helper_pid(namespace, runtime_root) != helper, "it is not in the way of another one")
    stopped.unlink()
    load(second, gpus, "a")
    assert second.call(suspend, "a") == 1
    assert (gpus.used_mb(0), gpus.checkpoints.host_mb(), problems(namespace)) == (0.0, 600.0, [])


def test_who_asks_a_helper_too_late_asks_for_nothing(
    namespace: str, gpus: SimulatedGpus, two: tuple[Process, Process], runtime_root: Path
) -> None:
    pid, folder = load(two[0], gpus, "a"), runtime_root / namespace
    assert two[0].call(suspend, "a") == 1
    assert two[0].call(acquire, "a", Loads("never")) == "a"
    # By now the server may have been ended, and its pid be another's.
    with pytest.raises(TimeoutError, match="no helper could be asked within"):
        ask_helper(folder, "suspend", pid, 0.0, "a")
    assert gpus.checkpoints.state_of(pid) == RUNNING


def test_a_helper_touches_no_process_whose_number_is_one_of_another_container(
    namespace: str,
    gpus: SimulatedGpus,
    two: tuple[Process, Process],
    runtime_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pid, folder = load(two[0], gpus, "a"), runtime_root / namespace
    monkeypatch.setattr(helper, "pid_namespace", lambda: 1)
    with pytest.raises(ModelServerError, match="the helper is in another pid namespace"):
        ask_helper(folder, "suspend", pid, LONG_S, "a")
    assert gpus.checkpoints.state_of(pid) == RUNNING


def test_a_suspended_server_that_is_killed_leaves_nothing(
    namespace: str, gpus: SimulatedGpus, two: tuple[Process, Process]
) -> None:
    first, _ = two
    pid = load(first, gpus, "a")
    assert first.call(suspend, "a") == 1
    os.kill(pid, signal.SIGKILL)
    await_states(namespace, "a")
    assert (gpus.checkpoints.host_mb(), gpus.used_mb(0)) == (0.0, 0.0)
    assert sum(copy.host_mb for copy in read_snapshot(namespace).instances) == 0.0


def suspend_beside_a_dying_helper(seat: Seat, tag: str) -> int:
    """Suspend a model while a helper that was killed still takes connections, and resets them."""
    dial, resets = sockets.dial, iter(range(TRIES))

    def dial_later(*where: Any) -> Any:
        for _ in resets:
            raise ConnectionResetError
        return dial(*where)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sockets, "dial", dial_later)
        return suspend(seat, tag)


def test_a_helper_that_dies_before_it_is_asked_is_not_counted_among_those_that_died_of_a_model(
    gpus: SimulatedGpus, two: tuple[Process, Process]
) -> None:
    load(two[0], gpus, "a")
    assert two[0].call(suspend_beside_a_dying_helper, "a") == 1


def test_a_server_that_is_killed_in_mid_resume_and_takes_long_to_die_is_no_fault_of_its_model(
    namespace: str, gpus: SimulatedGpus, two: tuple[Process, Process]
) -> None:
    first, second = two
    pid = load(first, gpus, "a")
    served("a").outlive_by(2 * DYING_S)
    assert first.call(suspend, "a") == 1
    gpus.checkpoints.set_rates(0.0, 600.0)
    second.send(acquire, "a", loads(gpus, "a"))
    await_middle(gpus)
    os.kill(pid, signal.SIGKILL)
    assert second.result() == "a"
    assert served("a").pid() != pid
    assert model_of(namespace, "a").unsuspendable == 0
    assert problems(namespace) == []


def suspend_resume_and_unload(seat: Seat, tag: str, branch: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("mpmm.suspend.suspender.driver_branch", lambda: branch)
        assert seat.manager.suspend(tag) == seat.manager.resume(tag) == 1
        seat.manager.unload(tag)


@pytest.mark.parametrize(("branch", "checkpoints"), [(580, 1), (595, 2)])
def test_where_the_driver_asks_for_it_a_server_that_was_resumed_is_suspended_before_it_ends(
    gpus: SimulatedGpus, two: tuple[Process, Process], branch: int, checkpoints: int
) -> None:
    pid = load(two[0], gpus, "a")
    gpus.record_calls()
    two[0].call(suspend_resume_and_unload, "a", branch)
    assert [about for _, what, about in gpus.calls() if what == "checkpoint"] == [str(pid)] * checkpoints
    assert (gpus.used_mb(0), gpus.checkpoints.host_mb()) == (0.0, 0.0)


ASKS = """
import sys
from pathlib import Path
from mpmm.suspend.helper import ask_helper
try:
    ask_helper(Path(sys.argv[1]), "suspend", 2**22 + 1, 10.0, "model")
except Exception as error:
    print(type(error).__name__, error, flush=True)
"""


@pytest.fixture
def folder(gpus: SimulatedGpus, runtime_root: Path) -> Iterator[Path]:
    """The folder of a namespace that has a worker."""
    found = runtime_root / "stand-in"
    found.mkdir()
    (found / "token").write_bytes(b"0123456789abcdef")
    with closing(LockFile(found / "alive.lock")) as alive:
        assert alive.try_shared()
        yield found
    wait_until(lambda: helper_pid("stand-in", runtime_root) is None, "the helper has ended")
    shutil.rmtree(found)


def test_the_helper_keeps_no_output_of_its_starter_open(folder: Path, runtime_root: Path) -> None:
    asked = subprocess.run([sys.executable, "-c", ASKS, folder], capture_output=True, text=True, timeout=DEADLINE_S)
    assert helper_pid("stand-in", runtime_root) is not None
    assert (asked.stdout.partition(" ")[0], asked.stderr) == ("SuspendError", "")


def test_the_helper_finds_the_modules_that_its_starter_finds(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise RuntimeError('this is a module of the program')")
    (tmp_path / "elsewhere").mkdir()
    program = tmp_path / "elsewhere" / "program.py"
    # Only the program itself knows where mpmm is.
    program.write_text(f"import sys; sys.path[:0] = {[entry for entry in sys.path if entry]}\n{ASKS}")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    asked = subprocess.run(
        [sys.executable, "-S", program, folder],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        cwd=tmp_path,
        env=environment,
    )
    assert (asked.stdout.partition(" ")[0], asked.stderr) == ("SuspendError", "")


def test_the_helper_sees_the_devices_that_its_starter_hides(
    folder: Path, runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SuspendError):
        ask_helper(folder, "suspend", 2**22 + 1, 10.0, "model")
    pid = helper_pid("stand-in", runtime_root)
    assert pid is not None
    assert "CUDA_VISIBLE_DEVICES" not in psutil.Process(pid).environ()


def test_a_helper_that_does_not_start_is_given_up_soon_and_says_why(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def fails(module: str, *arguments: str) -> list[str]:
        started.append(module)
        return [sys.executable, "-c", "import sys; sys.exit('the interpreter\\nis broken')"]

    monkeypatch.setattr(helper, "command_line", fails)
    before = open_descriptors()
    with pytest.raises(ChildProcessError, match=r"does not start \(exit status 1\): is broken"):
        ask_helper(folder, "suspend", 2**22 + 1, 30.0, "model")
    assert started == ["mpmm.suspend.helper"] * TRIES
    assert open_descriptors() == before
    helper.reap_ended_helpers()


def suspend_without_helper(seat: Seat, tag: str) -> int:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(helper, "command_line", lambda *_: [sys.executable, "-c", "import sys; sys.exit('broken')"])
        return suspend(seat, tag)


def test_a_helper_that_does_not_start_is_no_fault_of_the_model(
    namespace: str, gpus: SimulatedGpus, two: tuple[Process, Process]
) -> None:
    load(two[0], gpus, "a")
    assert two[0].call(suspend_without_helper, "a") == 0
    await_states(namespace, "a")
    assert model_of(namespace, "a").unsuspendable == 0
    load(two[0], gpus, "a")
    assert two[0].call(suspend, "a") == 1


def test_the_helper_ends_with_the_last_worker(
    namespace: str, gpus: SimulatedGpus, two: tuple[Process, Process], runtime_root: Path
) -> None:
    load(two[0], gpus, "a")
    assert two[0].call(suspend, "a") == 1
    helper = helper_pid(namespace, runtime_root)
    assert helper is not None and (runtime_root / namespace / LOCK).exists()
    for process in two:
        process.call(shut_down)
    wait_until(lambda: helper_pid(namespace, runtime_root) is None, "the helper has ended")


def test_on_a_driver_that_nobody_has_tried_servers_are_not_suspended(
    namespace: str, gpus: SimulatedGpus, new_process: NewProcess
) -> None:
    process = new_process(memory_source="nvml", suspend_budget_mb=2000.0)
    process.call(learn, a=600.0)
    load(process, gpus, "a")
    assert process.call(suspend, "a") == 0 and states(namespace, "a") == ["idle"]
