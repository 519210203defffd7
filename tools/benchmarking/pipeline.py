"""Rows about Beam's RunInference: what one batch costs, and a whole pipeline."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarking.rows import Figure, Measured, Row, Task
from benchmarking.stage import modules, timed

__all__ = ["ROWS"]

BATCH_SIZE = 8


def run_inference_batch(task: Task) -> Measured:
    """Measure what the model manager adds to a batch of RunInference.

    RunInference's DoFn is driven as a worker drives it: set up once, then called for each batch. With the
    manager, a batch is an acquire, access to the model's server, the model's own call in that server, and a
    release. The time of the same batch with the model in the process, without any manager, is subtracted.
    """
    modules(task.implementation)
    if task.is_mpmm:
        import mpmm.beam

        mpmm.beam.install()
    plain = statistics.median(_batch_seconds(managed=False, count=200))
    managed = _batch_seconds(managed=True, count=300 if task.is_mpmm else 12)
    return {"": [seconds - plain for seconds in managed]}


def _batch_seconds(managed: bool, count: int) -> list[float]:
    from apache_beam.ml.inference.base import _RunInferenceDoFn

    from benchmarking.handler import TrivialHandler

    inference: Any = _RunInferenceDoFn(
        TrivialHandler(), clock=time, metrics_namespace="benchmark", model_tag="trivial", use_model_manager=managed
    )
    inference.setup()
    batch = list(range(BATCH_SIZE))
    if inference.process(batch, None, None) != batch:
        raise ValueError("the predictions are wrong")
    return timed(lambda: inference.process(batch, None, None), count, warm_up=3)


def pipeline(task: Task) -> Measured:
    """Run the demo's small pipeline: 3 models, 200 elements each, 3 workers. Raises RuntimeError when it fails."""
    demo = Path(__file__).resolve().parent.parent / "beam_demo.py"
    command = [sys.executable, str(demo), "--small", "--json", "--cache", str(task.folder / "cache")]
    if not task.is_mpmm:
        command.append("--stock")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    _, found, last_line = done.stdout.rpartition("\n{")
    if not found:
        raise RuntimeError(f"the demo ended with exit code {done.returncode}")
    report = json.loads("{" + last_line)["runs"][0]
    if report["problems"]:
        raise RuntimeError(f"after {report['seconds']:.1f} s: " + "; ".join(report["problems"]).replace("\n", " "))
    return {"": [report["seconds"]]}


ROWS = (
    Row(
        "run-inference",
        "a warm batch of RunInference with a trivial model: what the model manager adds",
        (Figure("", "ms", must=1, reach=0.3),),
        run_inference_batch,
        repeats_at_most=2,
    ),
    Row(
        "pipeline",
        "a Beam pipeline with 3 models, 200 elements, 3 workers",
        (Figure("", "s", must=15, reach=11),),
        pipeline,
        repeats_at_most=1,
        timeout_s=180.0,
    ),
)
