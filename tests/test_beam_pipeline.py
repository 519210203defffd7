"""Real pipelines on mpmm: Beam's local multi-process runner, and Beam's worker pool as cluster runners use it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from harness import import_path

from mpmm.shared_state.segment import segment_name

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None or importlib.util.find_spec("sklearn") is None,
    reason="needs Apache Beam and scikit-learn",
)

ROOT = Path(__file__).resolve().parent.parent
MARK = "MPMM_TEST_RUN"
TIMEOUT_S = 500.0
LEAVE_TIMEOUT_S = 15.0
WORKERS, ELEMENTS = 2, 80


@pytest.fixture
def surroundings() -> Iterator[dict[str, str]]:
    """An environment for subprocesses with a runtime directory of its own; afterwards nothing of them may be left."""
    # Not pytest's folder: the names of sockets may have no more than 107 characters.
    runtime = Path(tempfile.mkdtemp(prefix="mpmm-t"))
    segment = Path("/dev/shm", segment_name(runtime, "mps.model_manager"))
    mark = uuid.uuid4().hex
    python = os.path.dirname(sys.executable)
    environment = {
        **os.environ,
        MARK: mark,
        "MPMM_RUNTIME_DIR": os.fspath(runtime),
        "PYTHONPATH": import_path(ROOT),
        # Beam's worker pool starts its workers as `python`.
        "PATH": os.pathsep.join([python, os.environ.get("PATH", "")]),
    }
    try:
        yield environment
        deadline = time.monotonic() + LEAVE_TIMEOUT_S
        while (left := marked_processes(mark)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, f"still running: {[process.cmdline() for process in left]}"
        assert not list(runtime.rglob("*")), "left in the runtime directory"
        assert not segment.exists(), "left in shared memory"
    finally:
        for process in marked_processes(mark):
            with contextlib.suppress(psutil.Error):
                process.kill()
        shutil.rmtree(runtime, ignore_errors=True)


def marked_processes(mark: str) -> list[psutil.Process]:
    """The living processes that were started with the mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_three_models_run_on_the_local_multi_process_runner(surroundings: dict[str, str], tmp_path: Path) -> None:
    demo = os.fspath(ROOT / "tools" / "beam_demo.py")
    # A budget for one server or few: the models have to make room for each other.
    sizes = ["--workers", str(WORKERS), "--elements", str(ELEMENTS), "--small", "--no-interleaved", "--budget", "260"]
    options = [*sizes, "--json", "--cache", os.fspath(tmp_path)]
    done = subprocess.run(
        [sys.executable, demo, *options],
        env=surroundings,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads(done.stdout.splitlines()[-1])["runs"][0]
    assert run["problems"] == []
    assert len(run["worker_pids"]) == WORKERS
    assert [model["predictions"] for model in run["models"]] == [ELEMENTS] * 3
    for model in run["models"]:
        assert model["exactly_once"] and model["accuracy"] > 0.9
        assert model["loads"] >= 1
        # Batches of 8, five for each of the workers, and every acquire either loads or reuses. A worker may load it
        # ahead, too; so may one that starts so late that the first one's copy has made room already.
        assert 5 * WORKERS <= model["loads"] + model["reuses"] <= 5 * WORKERS + WORKERS
    assert sum(model["evictions"] for model in run["models"]) >= 1
    assert 0 < run["peak_held_mb"] <= run["budget_mb"]
    assert not list((tmp_path / "runs").iterdir())


# Two pipelines in one program, each with a worker of its own from the pool. The first one predicts, then the second
# one; both workers stay until the state they share has been looked at.
TWO_PIPELINES = """
    import json, os, sys, threading, time
    from pathlib import Path

    import joblib
    import numpy as np
    from sklearn.neighbors import KNeighborsClassifier

    import mpmm.beam
    mpmm.beam.install()
    import apache_beam as beam
    from apache_beam.ml.inference.base import RunInference
    from apache_beam.ml.inference.sklearn_inference import ModelFileType, SklearnModelHandlerNumpy
    from apache_beam.options.pipeline_options import PipelineOptions
    from mpmm.shared_state.snapshot import read_snapshot

    FOLDER, POOL = sys.argv[1:]
    MODEL = os.path.join(FOLDER, "model.joblib")

    def wait_for(name):
        path, deadline = Path(FOLDER, name), time.monotonic() + 60
        while not path.exists():
            assert time.monotonic() < deadline, name
            time.sleep(0.02)
        return path.read_text()

    def note(name, text=""):
        unfinished = Path(FOLDER, f"{name}.unfinished")
        unfinished.write_text(text)
        unfinished.rename(Path(FOLDER, name))

    def hold_back(element, awaited):
        if awaited:
            wait_for(awaited)
        return element

    def stay(result, name):
        note(name, json.dumps({"pid": os.getpid(), "label": int(result.inference)}))
        wait_for("looked")

    def run(name, awaited):
        options = PipelineOptions(
            runner="PortableRunner", job_endpoint="embed", environment_type="EXTERNAL", environment_config=POOL
        )
        with beam.Pipeline(options=options) as pipeline:
            _ = (
                pipeline
                | beam.Create([np.array([2.9])])
                | "wait" >> beam.Map(hold_back, awaited)
                | RunInference(
                    SklearnModelHandlerNumpy(MODEL, ModelFileType.JOBLIB),
                    model_identifier="near",
                    use_model_manager=True,
                    model_manager_args={"memory_source": "host", "memory_budget_mb": 2000.0},
                )
                | "stay" >> beam.Map(stay, name)
            )

    joblib.dump(KNeighborsClassifier(1).fit([[0.0], [3.0]], [7, 8]), MODEL)
    threads = [threading.Thread(target=run, args=way, daemon=True) for way in (("first", ""), ("second", "first"))]
    for thread in threads:
        thread.start()
    workers = [json.loads(wait_for(name)) for name in ("first", "second")]
    snapshot = read_snapshot("mps.model_manager")
    note("looked")
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    print(json.dumps({
        "workers": workers,
        "members": [member.pid for member in snapshot.members],
        "models": [[model.tag, model.loads, model.hits] for model in snapshot.models],
    }))
"""


def test_two_pipelines_on_the_worker_pool_share_one_state(surroundings: dict[str, str], tmp_path: Path) -> None:
    program = tmp_path / "two_pipelines.py"
    program.write_text(textwrap.dedent(TWO_PIPELINES))
    with worker_pool(surroundings, tmp_path / "pool.log") as address:
        done = subprocess.run(
            [sys.executable, os.fspath(program), os.fspath(tmp_path), address],
            env=surroundings,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    assert done.returncode == 0, done.stderr + (tmp_path / "pool.log").read_text()
    seen = json.loads(done.stdout.splitlines()[-1])
    first, second = seen["workers"]
    assert first["label"] == second["label"] == 8
    assert first["pid"] != second["pid"]
    assert {first["pid"], second["pid"]} <= set(seen["members"])
    # The first worker had the model loaded, maybe ahead of its batch, and the second one found it.
    assert seen["models"] in ([["near", 1, 1]], [["near", 1, 2]])


# Two workers of one pipeline. Each stays in its first batch until both are in one, and have looked at the state.
SHARED_COPY = """
    import json, sys, time
    from pathlib import Path

    import mpmm.beam
    mpmm.beam.install()
    import apache_beam as beam
    from apache_beam.ml.inference.base import KeyedModelHandler, ModelHandler, RunInference
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    class Doubles(ModelHandler):
        mpmm_users = 2
        mpmm_expect_mb = 850
        mpmm_priority = 1

        def __init__(self, folder):
            super().__init__(max_batch_size=1)
            self._folder = folder

        def load_model(self):
            return len

        def run_inference(self, batch, model, inference_args=None):
            self.meet("inside")
            from mpmm.shared_state.snapshot import read_snapshot
            copies = [[copy.state, copy.held, copy.mb] for copy in read_snapshot("mps.model_manager").copies]
            self.meet("looked", json.dumps(copies))
            return [model(text) for text in batch]

        def meet(self, what, text=""):
            import os
            mine, deadline = Path(self._folder, f"{what}-{os.getpid()}"), time.monotonic() + 60
            if not mine.exists():
                mine.write_text(text)
            while len(list(Path(self._folder).glob(f"{what}-*"))) < 2:
                assert time.monotonic() < deadline, what
                time.sleep(0.02)

    def main(folder):
        options = PipelineOptions(direct_running_mode="multi_processing", direct_num_workers=2)
        arguments = {"memory_source": "booked", "fallback_memory_mb": 1000.0, "default_estimate_mb": 100.0}
        with beam.Pipeline(runner=FnApiRunner(), options=options) as pipeline:
            _ = (
                pipeline
                | beam.Create([(number, "x" * number) for number in range(40)], reshuffle=False)
                | beam.Reshuffle()
                | RunInference(
                    KeyedModelHandler(Doubles(folder)), use_model_manager=True, model_manager_args=arguments
                )
                | beam.Map(lambda pair: Path(folder, f"found-{pair[0]}").write_text(str(pair[1])))
            )

    if __name__ == "__main__":
        import shared_copy
        shared_copy.main(sys.argv[1])
"""


def test_two_workers_of_a_pipeline_use_one_copy_at_a_time(surroundings: dict[str, str], tmp_path: Path) -> None:
    program = tmp_path / "shared_copy.py"
    program.write_text(textwrap.dedent(SHARED_COPY))
    done = subprocess.run(
        [sys.executable, os.fspath(program), os.fspath(tmp_path)],
        env={**surroundings, "PYTHONPATH": os.pathsep.join([os.fspath(tmp_path), surroundings["PYTHONPATH"]])},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # There is room for one copy of the size that the handler says, which both workers had while they looked.
    assert [json.loads(path.read_text()) for path in tmp_path.glob("looked-*")] == [[["active", 2, 850.0]]] * 2
    found = {int(path.name.removeprefix("found-")): int(path.read_text()) for path in tmp_path.glob("found-*")}
    assert found == {number: number for number in range(40)}


@contextlib.contextmanager
def worker_pool(environment: dict[str, str], log: Path) -> Iterator[str]:
    """Beam's worker pool with worker processes; yields its address."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with log.open("w") as output:
        pool = subprocess.Popen(
            [sys.executable, "-m", "apache_beam.runners.worker.worker_pool_main", f"--service_port={port}"],
            env=environment,
            stdout=output,
            stderr=output,
        )
    try:
        yield f"localhost:{port}"
    finally:
        # On this signal it ends its workers too.
        pool.send_signal(signal.SIGINT)
        try:
            pool.wait(20)
        except subprocess.TimeoutExpired:
            pool.kill()
            pool.wait()
