"""The examples run as they stand, print what they promise, and leave nothing behind."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from harness import wait_until

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


@needs("ray")
def test_ray_actors() -> None:
    assert "counted 90 words in 3 actors" in run("ray_actors.py")


@contextlib.contextmanager
def service(workers: int) -> Iterator[str]:
    """Run the HTTP service on a free port; yield its address."""
    server = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "http_service:app", "--workers", str(workers), "--port", "0"],
        cwd=EXAMPLES,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert server.stderr is not None
        for line in server.stderr:
            found = re.search(r"running on (http://127\.0\.0\.1:\d+)", line)
            if found is not None:
                break
        else:
            pytest.fail("it ended before it began")
        with ThreadPoolExecutor(1) as drain:
            drain.submit(server.stderr.read)
            try:
                yield found[1]
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


@needs("starlette", "uvicorn")
def test_an_http_service() -> None:
    with service(workers=2) as address:

        def answers() -> bool:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                return bool(ask(f"{address}/predict?text=x"))
            return False

        wait_until(answers, "the service answers")
        with ThreadPoolExecutor(8) as clients:
            found = list(clients.map(lambda _: json.loads(ask(f"{address}/predict?text=abc")), range(40)))
        assert Counter(one["answer"] for one in found) == {"cba": 40}
        metrics = ask(f"{address}/metrics/")
    assert 'mpmm_model_hits_total{namespace="service",model="reverser"}' in metrics
