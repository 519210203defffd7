"""Run the demo's pipeline in a process of its own and watch it: progress, memory, and what it leaves behind.

The watcher finds processes by a mark in their environment, which every child inherits. So it sees those of Beam's
own manager, those of mpmm, and orphans of both alike.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from demo.plan import RECORD, RECORDS_SUFFIX, Plan

TOOLS = Path(__file__).resolve().parent.parent
MARK = "MPMM_DEMO_RUN"
MIB = 2**20
SHARED_MEMORY = Path("/dev/shm")
# The namespace that follows from Beam's tag for its manager.
NAMESPACE = "mps.model_manager"
# Within this time, model servers notice that they are no longer needed, and exit.
LEAVE_TIMEOUT_S = 15.0
# Reading a big process's unique memory takes the kernel milliseconds, which the models should have.
SAMPLE_INTERVAL_S = 0.4
TORCH_STAND_IN = '''"""Stands in for torch in Beam's own model manager, which calls torch.cuda.empty_cache() only."""


class Tensor:
    """Libraries that see a torch module ask whether their input is one of these."""


class cuda:
    @staticmethod
    def empty_cache():
        pass
'''


@dataclass
class ModelReport:
    """The result of one model. Beam's own manager counts nothing: loads, reuses, evictions, size_mb are None then."""

    name: str
    data_set: str
    expected: int
    predictions: int = 0
    exactly_once: bool = False
    accuracy: float = 0.0
    loads: int | None = None
    reuses: int | None = None
    evictions: int | None = None
    size_mb: float | None = None


@dataclass
class RunReport:
    """The result of one run.

    seconds: the pipeline's own time, from its start to the end of its last worker.
    peak_held_mb: unique memory of all model servers together, measured by this program from outside;
    peak_sampled_mb: measured by mpmm's leader.
    """

    manager: str
    budget_mb: float | None
    models: list[ModelReport]
    seconds: float = 0.0
    peak_held_mb: float = 0.0
    peak_sampled_mb: float | None = None
    most_servers: int = 0
    worker_pids: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Watcher:
    """Starts the pipeline's process and watches it to the end."""

    def __init__(self, manager: str, plan: Plan, identity: str, timeout_s: float) -> None:
        self._plan = plan
        self._folder = Path(plan.folder)
        self._timeout_s = timeout_s
        self._processes = Processes(identity)
        self._view = SharedStateView(plan.manager_args) if plan.manager_args is not None else None
        self._report = RunReport(
            manager=manager,
            budget_mb=None if plan.manager_args is None else plan.manager_args["memory_budget_mb"],
            models=[ModelReport(name, data_set, plan.elements[data_set]) for name, data_set, _ in plan.models],
        )
        self._environment = self._make_environment(identity)

    def _make_environment(self, identity: str) -> dict[str, str]:
        environment = dict(os.environ)
        environment[MARK] = identity
        # What Beam leaves in its temporary folder is removed with the run's folder.
        environment["TMPDIR"] = str(self._folder / "tmp")
        search = [str(TOOLS)]
        if self._view is not None:
            environment["MPMM_RUNTIME_DIR"] = str(self._view.root)
        elif importlib.util.find_spec("torch") is None:
            stand_in = self._folder / "stand_in"
            stand_in.mkdir()
            (stand_in / "torch.py").write_text(TORCH_STAND_IN, encoding="utf-8")
            search.append(str(stand_in))
        if "PYTHONPATH" in environment:
            search += [os.path.abspath(path) for path in environment["PYTHONPATH"].split(os.pathsep) if path]
        environment["PYTHONPATH"] = os.pathsep.join(search)
        return environment

    def run(self) -> RunReport:
        """Run the pipeline and return the report, which also holds the problems; none is raised."""
        report = self._report
        if self._view is not None:
            self._view.join()
        try:
            with open(self._folder / "log", "w", encoding="utf-8") as log:
                command = [sys.executable, str(TOOLS / "demo" / "pipeline.py"), str(self._folder / "plan.json")]
                # The working directory comes first on the workers' import path: an empty one hides no module.
                child = subprocess.Popen(
                    command, env=self._environment, cwd=self._folder / "tmp", stdout=log, stderr=subprocess.STDOUT
                )
            try:
                self._watch(child)
            finally:
                if child.poll() is None:
                    child.terminate()
                    child.wait()
        finally:
            if self._view is not None:
                self._view.leave(report)
            left = self._processes.wait_until_gone(LEAVE_TIMEOUT_S)
            report.problems += [f"left behind: process {process.pid}" for process in left]
            self._processes.end()
        if self._view is not None:
            report.problems += [f"left behind: {path}" for path in self._view.left_behind()]
        if child.returncode != 0:
            tail = (self._folder / "log").read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            report.problems.append("\n      ".join([f"the pipeline ended with exit code {child.returncode}:", *tail]))
        seconds = self._folder / "seconds"
        report.seconds = float(seconds.read_text(encoding="utf-8")) if seconds.exists() else 0.0
        if report.budget_mb is not None:
            highest = max(report.peak_held_mb, report.peak_sampled_mb or 0.0)
            if highest > report.budget_mb:
                report.problems.append(f"models held {highest:.0f} MB, the budget is {report.budget_mb:.0f} MB")
        return report

    def _watch(self, child: subprocess.Popen[bytes]) -> None:
        """Show a line about every second and a half until the pipeline's process ends."""
        report = self._report
        started = shown = time.monotonic()
        while child.poll() is None:
            servers, held_mb = self._processes.held_mb()
            report.peak_held_mb = max(report.peak_held_mb, held_mb)
            report.most_servers = max(report.most_servers, servers)
            now = time.monotonic()
            if now - started > self._timeout_s:
                report.problems.append(f"aborted after {self._timeout_s:.0f} s")
                return
            if now - shown >= 1.5:
                shown = now
                state = self._view.summary() if self._view is not None else f"{held_mb:.0f} MB held"
                say(f"  {now - started:5.1f} s  {self._progress()} · {state}")
            time.sleep(SAMPLE_INTERVAL_S)

    def _progress(self) -> str:
        files = list(self._folder.glob(f"*{RECORDS_SUFFIX}"))
        done = sum(file.stat().st_size for file in files) // RECORD.itemsize
        total = sum(self._plan.elements[data_set] for _, data_set, _ in self._plan.models)
        if not files:
            return "Beam starts its workers"
        return f"{done}/{total} predictions by {len(files)} workers{', Beam ends them' if done == total else ''}"


class SharedStateView:
    """The run as mpmm's shared state shows it. This process is a member, so that the state outlives the workers."""

    def __init__(self, manager_args: dict[str, Any]) -> None:
        from mpmm.shared_state.runtime_dir import RUNTIME_DIR_VARIABLE, default_root

        self._manager_args = manager_args
        self._manager: Any = None
        self._segment = SHARED_MEMORY / "none"
        self.root = default_root()
        if (self.root / NAMESPACE).exists():
            # Another pipeline of this user runs or has crashed. Its budget differs, so use another runtime directory.
            self.root = Path(tempfile.mkdtemp(prefix="mpmm-demo-"))
            say(f"  the namespace {NAMESPACE} is in use; this run has its own, below {self.root}")
        self._root_is_ours = not self.root.exists() or not any(self.root.iterdir())
        os.environ[RUNTIME_DIR_VARIABLE] = str(self.root)

    def join(self) -> None:
        """Create the namespace, exactly as the first worker would."""
        from mpmm.model_manager import ModelManager

        self._manager = ModelManager(namespace=NAMESPACE, **self._manager_args)
        self._segment = SHARED_MEMORY / self._snapshot().segment

    def summary(self) -> str:
        """Return one line about the models and their waiters."""
        snapshot = self._snapshot()
        loaded = [model.loaded for model in snapshot.models if model.loaded]
        held = sum(device.used_mb or 0.0 for device in snapshot.devices)
        total = sum(device.total_mb for device in snapshot.devices)
        copies = f"{sum(loaded)} {'copy' if sum(loaded) == 1 else 'copies'}"
        return (
            f"{held:.0f} of {total:.0f} MB held · {len(loaded)} model{'s' * (len(loaded) != 1)} loaded ({copies}), "
            f"{snapshot.loading} loading, {snapshot.waiting} waiting, {snapshot.evictions} evicted"
        )

    def leave(self, report: RunReport) -> None:
        """Read the counters, then leave: the last process to leave unloads everything."""
        snapshot = self._snapshot()
        self._manager.shutdown()
        counted = {model.tag: model for model in snapshot.models}
        for model in report.models:
            if model.name in counted:
                row = counted[model.name]
                model.loads, model.reuses, model.evictions = row.loads, row.hits, row.evictions
                model.size_mb = row.estimate_mb
        report.peak_sampled_mb = max(device.peak_since_start_mb for device in snapshot.devices)

    def left_behind(self) -> list[Path]:
        """Return what should be gone: the segment, the namespace's folder, and the runtime directory if it was new."""
        places = [self._segment, self.root / NAMESPACE]
        if self._root_is_ours:
            places.append(self.root)
        return [place for place in places if place.exists() and not _is_in_use(place)]

    def _snapshot(self) -> Any:
        from mpmm.shared_state.snapshot import read_snapshot

        return read_snapshot(NAMESPACE, events=False)


class Processes:
    """The processes of the run whose mark is `mark`."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._marked: dict[psutil.Process, bool] = {}

    def alive(self) -> list[psutil.Process]:
        """Return those that run now, without zombies."""
        seen: dict[psutil.Process, bool] = {}
        for process in psutil.process_iter():
            try:
                # Remembered: reading every process's environment each time would be most of the work.
                known = self._marked.get(process)
                seen[process] = process.environ().get(MARK) == self._mark if known is None else known
            except psutil.Error:
                continue
        self._marked = seen
        return [process for process, marked in seen.items() if marked and _runs(process)]

    def model_servers(self) -> list[psutil.Process]:
        """Return those that are neither a Beam worker, nor the program that runs the pipeline, nor a helper."""
        others = ("sdk_worker_main", "demo/pipeline.py", "resource_tracker")
        servers = []
        for process in self.alive():
            with contextlib.suppress(psutil.Error):
                command = " ".join(process.cmdline())
                # A forked server has the command line of the zygote, but not its name.
                if process.name() != "mpmm-zygote" and not any(word in command for word in others):
                    servers.append(process)
        return servers

    def held_mb(self) -> tuple[int, float]:
        """Return the number of model servers, and the MB that would be freed if all ended: their unique memory."""
        servers, held = self.model_servers(), 0.0
        for process in servers:
            with contextlib.suppress(psutil.Error):
                held += process.memory_full_info().uss / MIB
        return len(servers), held

    def wait_until_gone(self, timeout_s: float) -> list[psutil.Process]:
        """Wait until none is left, and return those that still run after the timeout."""
        deadline = time.monotonic() + timeout_s
        while (left := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def end(self) -> None:
        """Terminate the remaining processes; kill those that stay."""
        for process in self.alive():
            with contextlib.suppress(psutil.Error):
                process.terminate()
        for process in self.wait_until_gone(5.0):
            with contextlib.suppress(psutil.Error):
                process.kill()


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _is_in_use(path: Path) -> bool:
    """Tell whether a living process has the file, or one below the folder, open or mapped: another program uses it."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            names = [file.path for file in process.open_files()]
            names += [mapped.path for mapped in process.memory_maps()]
            if any(Path(name) == path or path in Path(name).parents for name in names):
                return True
    return False


def say(text: str) -> None:
    """Print at once: progress must not wait in a buffer."""
    print(text, flush=True)
