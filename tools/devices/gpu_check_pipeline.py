"""The pipeline of `gpu_check.py`: models on a GPU behind RunInference, with mpmm as Beam's model manager.

    python -c 'from devices.gpu_check_pipeline import main; main()' PLAN

PLAN is a `PipelinePlan` as JSON. Each load, and each one that runs out of memory, adds a line to the plan's record,
because the namespace no longer exists when the pipeline has ended.
"""

# Beam is only partly typed; elsewhere strictness would complain about Beam alone.
# mypy: disable-error-code="no-untyped-call,attr-defined,misc"

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.ml.inference.base import ModelHandler, PredictionResult, RunInference
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

import mpmm.beam
from devices.gpu_check_models import CheckedModel, Loader
from devices.simulated_gpu import SimulatedGpus
from mpmm.policy.out_of_memory import is_out_of_memory

__all__ = ["BATCH", "LOADED", "PREDICTED", "RAN_OUT", "CheckedHandler", "PipelinePlan", "main"]

BATCH = 8
LOADED, PREDICTED, RAN_OUT = "loaded", "predicted", "ran out"


@dataclass(frozen=True)
class PipelinePlan:
    """Each model predicts each of `elements` numbers. gpus: folder of the simulated GPUs, None for a real one."""

    sizes_mb: list[float]
    workers: int
    elements: int
    record: str
    gpus: str | None

    def as_json(self) -> str:
        """Return the plan as an argument for the command line."""
        return json.dumps(asdict(self))

    def note(self, what: str) -> None:
        """Add a line to the record; another process's append cannot split so small a write."""
        with open(self.record, "ab", buffering=0) as record:
            record.write(f"{what}\n".encode())


class CheckedHandler(ModelHandler):
    """Lets RunInference use one of the models that `gpu_check.py` loads."""

    def __init__(self, plan: PipelinePlan, mb: float) -> None:
        self._plan = plan
        self._mb = mb

    def load_model(self) -> CheckedModel:
        """Load the model; runs in its server."""
        gpus = None if self._plan.gpus is None else SimulatedGpus(Path(self._plan.gpus))
        try:
            model = Loader(self._mb, gpus).make()
        except Exception as error:
            if is_out_of_memory(error):
                self._plan.note(RAN_OUT)
            raise
        self._plan.note(LOADED)
        return model

    def run_inference(
        self, batch: Sequence[int], model: CheckedModel, inference_args: dict[str, Any] | None = None
    ) -> Iterable[PredictionResult]:
        """Work on the weights once, and predict the pid of the process that has done so."""
        pid = model.infer()
        return [PredictionResult(number, pid) for number in batch]

    def batch_elements_kwargs(self) -> dict[str, int]:
        """Make all batches the same size."""
        return {"min_batch_size": BATCH, "max_batch_size": BATCH}


class Note(beam.DoFn):
    """Note every prediction in the record."""

    def __init__(self, plan: PipelinePlan) -> None:
        self._plan = plan

    def process(self, prediction: PredictionResult) -> None:
        """Note a prediction if another process than this one made it."""
        if prediction.inference != os.getpid():
            self._plan.note(PREDICTED)


def main() -> None:
    """Run the pipeline of the plan on the command line."""
    plan = PipelinePlan(**json.loads(sys.argv[1]))
    mpmm.beam.install()
    options = PipelineOptions(direct_running_mode="multi_processing", direct_num_workers=plan.workers)
    # The local runner itself: DirectRunner would first try Prism, which fetches a binary from the network.
    pipeline = beam.Pipeline(runner=FnApiRunner(), options=options)
    elements = pipeline | beam.Create(range(plan.elements)) | beam.Reshuffle()
    for number, mb in enumerate(plan.sizes_mb):
        inference = RunInference(
            CheckedHandler(plan, mb),
            model_identifier=f"model-{number}",
            use_model_manager=True,
            model_manager_args={"memory_source": "nvml"},
        )
        _ = elements | f"model-{number}" >> inference | f"note {number}" >> beam.ParDo(Note(plan))
    pipeline.run().wait_until_finish()
