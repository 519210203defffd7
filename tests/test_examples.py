"""The examples run as they stand, print what they promise, share one copy, and leave nothing behind.

Examples that need libraries outside the extra `dev` have a mark, and run with

    pip install -e '.[dev,examples]' && python -m pytest -m examples tests/test_examples.py
    pip install -e '.[dev,hosts]' && python -m pytest -m hosts tests/test_examples.py
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from harness import KEEP, NewManager, NewProcess, acquire, files_in, segments_of, wait_until

from mpmm.model_manager import ModelManager
from mpmm.shared_state.snapshot import read_snapshot

EXAMPLES = Path(__file__).resolve().parent.parent / "tools" / "examples"
TIMEOUT_S = 100.0


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def run(name: str) -> str:
    """Run an example in an environment of its own; return what it prints."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, timeout=TIMEOUT_S, cwd=EXAMPLES
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_pool_of_processes() -> None:
    printed = run("pool.py")
    assert re.fullmatch(r"counted 180 words with [12] copies; the most frequent is 'to'\n", printed)


@needs("joblib")
def test_workers_of_joblib() -> None:
    assert re.fullmatch(r"the sum is 1560; (several workers|one worker), 1 copy\n", run("joblib_workers.py"))


@needs("apache_beam")
def test_a_beam_pipeline() -> None:
    assert sorted(run("beam_pipeline.py").splitlines()) == ["times-2: 90", "times-3: 135"]


@contextlib.contextmanager
def running(command: list[str], ready: str, **environment: str) -> Iterator[re.Match[str]]:
    """Run a server of several processes until the block ends; yield what `ready` matches in its output.

    All of its processes have ended then: its output, which they have in common, was read to its end.
    """
    server = subprocess.Popen(
        [sys.executable, *command],
        cwd=EXAMPLES,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
    )
    try:
        assert server.stdout is not None
        said = ""
        for line in server.stdout:
            said += line
            found = re.search(ready, line)
            if found is not None:
                break
        else:
            pytest.fail(f"it ended before it began: {said}")
        with ThreadPoolExecutor(1) as drain:
            drain.submit(server.stdout.read)
            try:
                yield found
            finally:
                server.send_signal(signal.SIGTERM)
                server.wait(30)
    finally:
        server.kill()
        server.wait()


def ask(address: str) -> Any:
    """Return the body of an answer."""
    with urllib.request.urlopen(address, timeout=20) as answer:
        return answer.read().decode()


def ask_often(address: str) -> list[dict[str, Any]]:
    """Ask for the same prediction again and again, once it is there; return the answers."""

    def answers() -> bool:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            return bool(ask(address))
        return False

    wait_until(answers, "the service answers")
    with ThreadPoolExecutor(8) as clients:
        return list(clients.map(lambda _: json.loads(ask(address)), range(40)))


def has_ended(pid: int) -> bool:
    """Tell whether a process that is not our child has ended."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def one_server(found: list[dict[str, Any]], asked: int, workers: int) -> int:
    """Check that workers have answered with one copy; return the process that had it."""
    assert Counter(one["answer"] for one in found) == {"cba": asked}
    # Which worker answers is the kernel's choice, or the broker's.
    assert 1 <= len({one["worker"] for one in found}) <= workers
    [server] = {one["server"] for one in found}
    assert server not in {one["worker"] for one in found}
    return int(server)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_the_commands_of_an_example_name_what_there_is(path: Path) -> None:
    text = path.read_text()
    commands = re.findall(r"^    (?:\w.*)$", text.split('"""')[1], re.MULTILINE)
    assert any(path.stem in command for command in commands) or path.stem in text.split('"""')[1]
    for name in re.findall(rf"{path.stem}:(\w+)", "\n".join(commands)):
        assert re.search(rf"^(def {name}\(|{name}\b.* = )", text, re.MULTILINE), name


@needs("starlette", "uvicorn")
def test_an_http_service() -> None:
    command = ["-m", "uvicorn", "http_service:app", "--workers", "2", "--port", "0"]
    with running(command, r"running on (http://127\.0\.0\.1:\d+)") as ready:
        address = ready[1]
        found = ask_often(f"{address}/predict?text=abc")
        assert Counter(one["answer"] for one in found) == {"cba": 40}
        metrics = ask(f"{address}/metrics/")
    assert 'mpmm_model_hits_total{namespace="service",model="reverser"}' in metrics


@needs("starlette")
@pytest.mark.parametrize("bound", [{"wait_timeout_seconds": 0.1}, {"max_waiting": 0}], ids=["too late", "too many"])
def test_an_http_service_that_cannot_serve_in_time_says_when_to_try_again(
    new_manager: NewManager, new_process: NewProcess, monkeypatch: pytest.MonkeyPatch, bound: dict[str, float]
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    service = importlib.import_module("http_service")
    manager = new_manager(fallback_memory_mb=100, **bound)
    new_process().call(acquire, "in the way")
    app = SimpleNamespace(state=SimpleNamespace(manager=manager))
    answer = asyncio.run(service.predict(SimpleNamespace(app=app, query_params={"text": "abc"})))
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert ("max_waiting=0" if "max_waiting" in bound else "in the way") in json.loads(answer.body)["error"]


@needs("gunicorn")
def test_gunicorn_that_loads_before_it_forks(tmp_path: Path) -> None:
    command = ["-m", "gunicorn", "--preload", "--workers", "2", "--bind", "127.0.0.1:0", "gunicorn_service:make_app()"]
    with running(command, r"Listening at: (http://127\.0\.0\.1:\d+)", HOME=str(tmp_path)) as ready:
        server = one_server(ask_often(f"{ready[1]}/?text=abc"), asked=40, workers=2)
    wait_until(lambda: has_ended(server), "the copy is unloaded")


def test_an_inference_server_on_a_lease(new_manager: Callable[..., ModelManager], namespace: str) -> None:
    manager = new_manager(fallback_memory_mb=1000.0, default_estimate_mb=600.0)
    manager.preload("idle", lambda: "handle")
    command = [
        "-m",
        "mpmm",
        "run",
        "--mb",
        "700",
        "--namespace",
        namespace,
        "--",
        sys.executable,
        "leased_server.py",
        "0",
    ]
    with running(command, r"serving on (http://127\.0\.0\.1:\d+)") as ready:
        [server] = {(one["answer"], one["mb"], one["server"]) for one in ask_often(f"{ready[1]}/?text=abc")}
        assert server[:2] == ("cba", 700.0)
        assert manager.all_models() == {}, "the idle copy had to go"
        [lease] = [one for one in read_snapshot(namespace).instances if one.state == "leased"]
        assert lease.reserved_mb == 700.0
    assert has_ended(server[2])
    wait_until(lambda: not read_snapshot(namespace).instances, "the lease has ended")


@pytest.mark.examples
@needs("fastapi", "uvicorn")
def test_fastapi_with_several_workers() -> None:
    command = ["-m", "uvicorn", "fastapi_service:app", "--workers", "2", "--port", "0"]
    with running(command, r"running on (http://127\.0\.0\.1:\d+)") as ready:
        server = one_server(ask_often(f"{ready[1]}/predict?text=abc"), asked=40, workers=2)
    wait_until(lambda: has_ended(server), "the copy is unloaded")


ASKS_CELERY = """
import json
from celery import group
from celery_tasks import reverse

print(json.dumps(group(reverse.s("abc") for _ in range(20))().get(timeout=60)))
"""


@pytest.mark.examples
@needs("celery")
def test_celery_with_prefork_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKER_FOLDER", str(tmp_path))
    command = ["-m", "celery", "--app", "celery_tasks", "worker", "--concurrency", "3"]
    with running(command, r"concurrency: (3) \(prefork\)"):
        asked = subprocess.run(
            [sys.executable, "-c", ASKS_CELERY], cwd=EXAMPLES, capture_output=True, text=True, timeout=TIMEOUT_S
        )
        assert asked.returncode == 0, asked.stderr
        server = one_server(json.loads(asked.stdout), asked=20, workers=3)
    wait_until(lambda: has_ended(server), "the copy is unloaded")


@pytest.mark.examples
@needs("nbclient", "ipykernel", "cloudpickle")
def test_a_notebook_that_is_open_twice() -> None:
    import nbformat
    from nbclient import NotebookClient

    notebooks = [nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4) for _ in range(2)]
    opened = [NotebookClient(notebook, timeout=TIMEOUT_S, kernel_name="python3") for notebook in notebooks]
    with ExitStack() as kernels:
        for one in opened:
            kernels.enter_context(one.setup_kernel())
        for number, _ in enumerate(notebooks[0].cells):
            for one in opened:
                one.execute_cell(one.nb.cells[number], number)
    printed = [
        output["text"] for notebook in notebooks for cell in notebook.cells for output in cell.get("outputs", ())
    ]
    assert [text.rpartition(" ")[0] for text in printed] == ["eb ot ton ro eb ot"] * 2
    [server] = {int(text.split()[-1]) for text in printed}
    wait_until(lambda: has_ended(server), "the copy is unloaded")


@pytest.mark.hosts
@needs("distributed")
def test_workers_of_dask() -> None:
    assert re.fullmatch(r"the sum is 3540; [123] workers, 1 copy\n", run("dask_workers.py"))


@pytest.mark.hosts
@needs("ray")
def test_ray_actors(ray_folder: None) -> None:
    assert "counted 90 words in 3 actors" in run("ray_actors.py")


@pytest.fixture
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder for what Ray writes, whose sockets have names of 107 characters at most, too."""
    with tempfile.TemporaryDirectory(prefix="mpmm-t") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield


@pytest.fixture
def two_hosts(runtime_root: Path) -> Iterator[list[Path]]:
    """The runtime directories that the examples of many hosts use; afterwards nothing may be left on either."""
    roots = [runtime_root / "one", runtime_root / "two"]
    for root in roots:
        root.mkdir(mode=0o700)
        (root / KEEP).touch()
    yield roots
    wait_until(lambda: not any(segments_of(root) or files_in(root) for root in roots), "nothing is left on two hosts")
    for root in roots:
        (root / KEEP).unlink()
        root.rmdir()


@pytest.mark.hosts
@needs("ray")
def test_two_nodes_of_a_ray_cluster_share_a_copy_each(two_hosts: list[Path], ray_folder: None) -> None:
    said = [line for line in run("ray_hosts.py").splitlines() if "host" in line]
    assert said == ["a host with 2 actors and 1 copy"] * 2 + ["2 copies on 2 hosts"]


@pytest.mark.hosts
@needs("apache_beam", "distributed")
def test_beams_dask_runner_on_two_hosts_shares_a_copy_on_each(two_hosts: list[Path]) -> None:
    line = r"host (\w+): the sum of (\d+) numbers is (\d+), by 1 copy"
    said = [re.fullmatch(line, one) for one in run("dask_hosts.py").splitlines() if one.startswith("host")]
    hosts, counts, sums = zip(*(found.groups() for found in said if found is not None), strict=True)
    assert (sorted(hosts), sum(map(int, counts)), sum(map(int, sums))) == (["one", "two"], 40, 1560)
