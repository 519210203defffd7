"""The demo's pipeline: one RunInference per model, as a user would write it. Started by beam_demo.py.

    PYTHONPATH=tools python tools/demo/pipeline.py PLAN.json

Two things make it run on mpmm: `mpmm.beam.install()`, and `model_manager_args` with the memory source and the
budget. On Beam's own manager it runs without both.

Every worker process appends its predictions to a file of its own, so that they can be counted while the
pipeline runs, and checked afterwards: the files prove that each model predicted each element exactly once.
"""

# Beam is only partly typed; elsewhere strictness would complain about Beam alone.
# mypy: disable-error-code="no-untyped-call,attr-defined,misc"

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np

from demo.plan import RECORD, RECORDS_SUFFIX, Plan, load_halves


class Record(beam.DoFn):
    """Append predictions to this process's file: one small write each, so no reader sees half of one."""

    def __init__(self, model_number: int, folder: str) -> None:
        self._model_number = model_number
        self._folder = folder

    def setup(self) -> None:
        path = os.path.join(self._folder, f"{os.getpid()}{RECORDS_SUFFIX}")
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def process(self, prediction: tuple[int, Any]) -> None:
        element, result = prediction
        os.write(self._file, np.array((self._model_number, result.inference, element), RECORD).tobytes())

    def teardown(self) -> None:
        os.close(self._file)


def keyed_features(data_set: str, count: int) -> Iterator[tuple[str, int, Any]]:
    """Yield `count` elements of a data set's second half, starting over at its end."""
    _, _, features, _ = load_halves(data_set)
    for element in range(count):
        yield data_set, element, features[element % len(features)]


def build(pipeline: Any, plan: Plan) -> None:
    """Write the pipeline: each model takes the elements of its data set.

    A Reshuffle spreads the elements over the workers and also ends a stage: everything up to the next one runs as
    a whole in each worker. With one Reshuffle for all models, every worker goes from model to model; with one for
    each, all workers use the same model, one model after another.
    """
    from apache_beam.ml.inference.base import KeyedModelHandler, RunInference
    from apache_beam.ml.inference.sklearn_inference import ModelFileType, SklearnModelHandlerNumpy

    everything = [row for data_set, count in plan.elements.items() for row in keyed_features(data_set, count)]
    elements = pipeline | beam.Create(everything, reshuffle=False)
    if plan.interleaved:
        elements |= beam.Reshuffle()
    for number, (name, wanted, file) in enumerate(plan.models):
        handler = SklearnModelHandlerNumpy(
            file, ModelFileType.JOBLIB, min_batch_size=plan.batch_size, max_batch_size=plan.batch_size
        )
        mine = (
            elements
            | f"take {wanted} for {name}" >> beam.Filter(lambda row, wanted: row[0] == wanted, wanted)
            | f"key for {name}" >> beam.Map(lambda row: (row[1], row[2]))
        )
        if not plan.interleaved:
            mine |= f"spread for {name}" >> beam.Reshuffle()
        _ = (
            mine
            | name
            >> RunInference(
                KeyedModelHandler(handler),
                model_identifier=name,
                use_model_manager=True,
                model_manager_args=plan.manager_args,
            )
            | f"record {name}" >> beam.ParDo(Record(number, plan.folder))
        )


def main() -> None:
    """Run the pipeline of the plan, and write the seconds that it took to `seconds` in the plan's folder."""
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    plan = Plan.load(Path(sys.argv[1]))
    if plan.manager_args is not None:
        import mpmm.beam

        mpmm.beam.install()
    options = PipelineOptions(direct_running_mode="multi_processing", direct_num_workers=plan.workers)
    # The local runner itself: DirectRunner would first try Prism, which fetches a binary from the network.
    pipeline = beam.Pipeline(runner=FnApiRunner(), options=options)
    build(pipeline, plan)
    started = time.monotonic()
    pipeline.run().wait_until_finish()
    Path(plan.folder, "seconds").write_text(str(time.monotonic() - started), encoding="utf-8")


if __name__ == "__main__":
    main()
