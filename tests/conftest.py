"""Give every test a runtime directory of its own, and check that it leaves no file, segment, process or thread."""

from __future__ import annotations

import compileall
import gc
import json
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from _pytest.assertion import rewrite
from containers import NOBODY
from device import SimulatedDevice
from devices.simulated_gpu import Build, SimulatedGpus, build
from filelock import FileLock
from harness import (
    CHECKOUT,
    CRASH_POINTS,
    FORK_POINTS,
    KEEP,
    LEFT_OVER,
    OWN_LEFT_OVER,
    SMALL,
    NewManager,
    NewProcess,
    Process,
    acquire,
    attach,
    files_in,
    segments_of,
    wait_until,
    waiting,
)
from loaders import Gate, Loads, LoadsObject

from mpmm.model_manager import ModelManager
from mpmm.multi_process_shared.registry import leave_all_registries, registry_for
from mpmm.shared_state import prune
from mpmm.shared_state.runtime_dir import RUNTIME_DIR_VARIABLE
from mpmm.shared_state.segment import segment_name

# Model servers notice within two seconds that no client is left.
LEAVE_TIMEOUT_S = 10.0
# The files that take longest, such as tests in real pipelines, at every store, and of whole tools; the longest first.
TAKE_LONGEST = (
    "test_beam_pipeline",
    "test_workload",
    "test_interrupt_points",
    "test_life_interrupt_points",
    "test_simulator",
    "test_crash_points",
    "test_bad_ground",
    "test_gpu_check",
    "test_beam_shapes",
    "test_call_crash_points",
    "test_fork_points",
    "test_beam_run_inference",
    "test_model_of_promises",
    "test_stress",
    "test_ledger",
    "test_beam_install",
    "test_packaging",
    "test_templates",
    "test_source_failures",
    "test_zygote",
    "test_examples",
    "test_lint",
)
# Helpers of the interpreter that tests start on purpose; they end with the test process.
HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


def pytest_configure(config: pytest.Config) -> None:
    """Let SIGINT interrupt, and compile everything once, even if PYTHONDONTWRITEBYTECODE is set.

    With that variable, each of the thousand interpreters that the tests start would compile the package anew, which
    takes a third of its start.
    """
    # A shell makes background programs ignore SIGINT, and all processes that tests start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        for folder in ("mpmm", "tests", "tools"):
            compileall.compile_dir(CHECKOUT / folder, quiet=2)
        if config.getoption("numprocesses", None):
            rewrite_assertions(config)


def rewrite_assertions(config: pytest.Config) -> None:
    """Rewrite the assertions of all test files, once, on all processors.

    Otherwise each of the processes that share the tests would do so in a new checkout, which takes longer than all
    else that it does before its first test. pytest has no public way to this; where a version has another one, the
    tests only start later.
    """
    files = sorted((CHECKOUT / "tests").glob("test_*.py"))
    count = os.cpu_count() or 1
    helpers = []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            try:
                for file in files[number::count]:
                    cached = rewrite.get_cache_dir(file) / f"{file.stem}{rewrite.PYC_TAIL}"
                    if rewrite._read_pyc(file, cached) is None:
                        stamp, code = rewrite._rewrite_test(file, config)
                        rewrite._write_pyc(config.stash[rewrite.assertstate_key], code, stamp, cached)
            finally:
                os._exit(0)
        helpers.append(pid)
    for pid in helpers:
        os.waitpid(pid, 0)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """If several processes share the tests, begin with the files that take longest, dealt out evenly.

    Each process gets a contiguous part of the tests, and takes from the end of another's part when it has none left.
    The last test to end should be a short one.
    """
    if not hasattr(config, "workerinput"):
        return
    count = int(config.workerinput["workercount"])
    parts: list[list[pytest.Item]] = [[] for _ in range(count)]
    for number, name in enumerate(TAKE_LONGEST):
        parts[number % count] += [item for item in items if item.path.stem == name]
    rest = [item for item in items if item.path.stem not in TAKE_LONGEST]
    total = len(items)
    for number, part in enumerate(parts):
        # The sizes of the parts are those that xdist deals out.
        wanted = max(0, total // (count - number) - len(part))
        part += rest[:wanted]
        del rest[:wanted]
        total -= len(part)
    items[:] = [*(item for part in parts for item in part), *rest]


def pytest_collection_finish() -> None:
    """Exclude what pytest, Beam and the test files have allocated from garbage collection.

    Each unload collects garbage, and a collection of all these objects takes longer than most tests.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, None, None]:
    """After the tests of a file, exclude what they have left, too, such as the modules that they have imported."""
    yield
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


def children() -> set[psutil.Process]:
    """Return the living children of this process."""
    found = set()
    for child in psutil.Process().children():
        try:
            helper = any(name in " ".join(child.cmdline()) for name in HELPERS)
            if child.status() != psutil.STATUS_ZOMBIE and not helper:
                found.add(child)
        except psutil.NoSuchProcess:
            pass
    return found


def _background_threads() -> set[str]:
    """Return the names of the background threads of this process's managers.

    CPython lists a thread for ever that never began because an exception ended `Thread.start`.
    """
    threads = [thread for thread in threading.enumerate() if thread.ident is not None]
    return {thread.name for thread in threads if thread.name.startswith("mpmm-background")}


@pytest.fixture(autouse=True)
def runtime_root() -> Iterator[Path]:
    """The runtime directory of this test, which must leave nothing behind."""
    # Not pytest's folder: paths of sockets may have at most 107 characters.
    root = Path(tempfile.mkdtemp(prefix="mpmm-t"))
    # With a file in it, mpmm does not remove the folder, whose identity is part of segment names.
    (root / KEEP).touch()
    # Leftovers of an earlier test are that test's failure.
    before, threads = children(), _background_threads()
    # The command line changes the level for its process.
    level = logging.getLogger("mpmm").level
    # A context of its own, because what a test has patched must be restored before the check below.
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(RUNTIME_DIR_VARIABLE, str(root))
        names, why_foreign, prefix = prune._names, prune._why_foreign, segment_name(root, "")

        def why_foreign_but_for_other_tests(name: str, roots: tuple[Path, ...]) -> str | None:
            """Leave alone what the processes of other tests have not finished yet, or will never finish."""
            return why_foreign(name, roots) if name.startswith(prefix) or OWN_LEFT_OVER in name else None

        patched.setattr(prune, "_why_foreign", why_foreign_but_for_other_tests)
        patched.setattr(
            prune, "_names", lambda: (name for name in names() if LEFT_OVER not in name or OWN_LEFT_OVER in name)
        )
        yield root
    logging.getLogger("mpmm").setLevel(level)
    leave_all_registries()
    try:
        left: dict[str, Any] = {}

        def nothing_is_left() -> bool:
            left["processes"] = [child.pid for child in children() - before]
            left["segments"] = segments_of(root)
            left["files"] = files_in(root)
            left["threads"] = sorted(_background_threads() - threads)
            return not any(left.values())

        try:
            wait_until(nothing_is_left, "nothing is left behind", LEAVE_TIMEOUT_S)
        except AssertionError:
            pytest.fail(f"left behind: { {what: found for what, found in left.items() if found} }")
    finally:
        for name in segments_of(root):
            os.unlink(f"/dev/shm/{name}")
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def nobodys_folder() -> Iterator[Path]:
    """A folder of another user, which that user reaches, unlike `tmp_path`."""
    folder = Path(tempfile.mkdtemp(prefix="mpmm-t"))
    os.chown(folder, NOBODY, -1)
    yield folder
    folder.chmod(0o700)
    shutil.rmtree(folder)


@pytest.fixture
def namespace(runtime_root: Path) -> str:
    """A name that no process uses yet."""
    return "test"


@pytest.fixture
def new_manager(namespace: str) -> Iterator[Callable[..., ModelManager]]:
    """Makes managers in this process, and shuts them down at the end."""
    with ExitStack() as stack:

        def make(**arguments: Any) -> ModelManager:
            manager = ModelManager(**{"namespace": namespace, **SMALL, **arguments})
            stack.callback(manager.shutdown)
            return manager

        yield make


@pytest.fixture
def new_process(namespace: str, runtime_root: Path) -> Iterator[Callable[..., Process]]:
    """Makes processes, each with a manager unless `attached=False`."""
    made: list[Process] = []

    def make(attached: bool = True, **arguments: Any) -> Process:
        process = Process()
        made.append(process)
        if attached:
            process.call(attach, **{"namespace": namespace, **SMALL, **arguments})
        return process

    yield make
    with ExitStack() as stack:
        for process in made:
            stack.callback(process.end)
    if any(process.killed for process in made):
        # If all processes were killed, the next one to attach and leave cleans up.
        if (runtime_root / namespace).exists():
            ModelManager(namespace=namespace, **SMALL).shutdown()
        registry_for(None).join()
        leave_all_registries()


@pytest.fixture
def new_gate(tmp_path: Path) -> Iterator[Callable[[], Gate]]:
    """Makes gates."""
    made: list[Gate] = []

    def make() -> Gate:
        made.append(Gate(tmp_path / f"gate{len(made)}"))
        return made[-1]

    yield make
    for gate in made:
        gate.close()


@pytest.fixture(scope="session")
def once_per_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[], Any]], Any]:
    """Makes something slow only once, although several processes run the tests: `once_per_run(name, make)`.

    The result of `make()` must be JSON values.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    def get(name: str, make: Callable[[], Any]) -> Any:
        made = folder / f"{name}.json"
        with FileLock(folder / f"{name}.lock"):
            if not made.exists():
                made.write_text(json.dumps(make()))
            return json.loads(made.read_text())

    return get


@pytest.fixture(scope="session")
def built_gpu(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The simulated driver, built and loaded once in this process, for all tests that use `new_gpus`."""
    built = build(tmp_path_factory.mktemp("simulated-driver"))
    built.load()
    return built


@pytest.fixture
def new_gpus(tmp_path: Path, built_gpu: Build, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SimulatedGpus]:
    """Makes simulated GPUs that this process and its children find; see `SimulatedGpus.create`."""

    def make(*totals_mb: float, **arguments: Any) -> SimulatedGpus:
        checkpoints = arguments.pop("checkpoints", False)
        gpus = SimulatedGpus.create(tmp_path / "gpus", *totals_mb, **arguments)
        for variable, value in gpus.environment(built_gpu, checkpoints=checkpoints).items():
            monkeypatch.setenv(variable, value)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.delenv("MPMM_MEMORY_SOURCE", raising=False)
        return gpus

    return make


@pytest.fixture
def new_device(tmp_path: Path) -> Callable[..., SimulatedDevice]:
    """Makes simulated devices."""

    def make(*totals_mb: float, linger_s: float = 0.0) -> SimulatedDevice:
        return SimulatedDevice(tmp_path / "device", *totals_mb, linger_s=linger_s)

    return make


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print at how many stores operations were killed or interrupted; with `-v`, for each operation."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    counted = [
        (report.nodeid.partition("::")[2], int(value), report)
        for report in reports
        if report.when == "call"
        for name, value in report.user_properties
        if name == CRASH_POINTS
    ]
    forked = [
        [int(number) for number in str(value).split()]
        for report in reports
        if report.when == "call"
        for name, value in report.user_properties
        if name == FORK_POINTS
    ]
    if forked:
        terminalreporter.write_line(
            f"fork points: {len(forked)} operations, {sum(forks for forks, _ in forked)} forks before and after calls "
            f"to the kernel, {sum(guarded for _, guarded in forked)} such moments at which no thread can fork"
        )
    if not counted:
        return
    if terminalreporter.verbosity > 0:
        for name, stores, report in sorted(counted, key=lambda entry: entry[0]):
            terminalreporter.write_line(f"{stores:6} stores  {report.duration:6.1f} s  {report.outcome}  {name}")
    stores = sum(count for _, count, _ in counted)
    failed = sum(report.failed for *_, report in counted)
    seconds = sum(report.duration for *_, report in counted)
    terminalreporter.write_line(
        f"crash points: {len(counted)} operations at {stores} stores, {failed} failures, {seconds:.0f} s"
    )


@pytest.fixture
def busy(namespace: str, new_manager: NewManager, new_process: NewProcess) -> ModelManager:
    """A namespace with an idle copy, an object in use, and a waiter."""
    manager = new_manager(fallback_memory_mb=250)
    manager._estimator.set_initial_estimate("big", 250)
    manager.release_model("idle", manager.acquire_model("idle", Loads("handle")))
    manager.acquire_model("object", LoadsObject())
    waiter = new_process()
    waiter.send(acquire, "big")
    wait_until(lambda: waiting(namespace, "big"), "a request waits")
    return manager
