"""A Beam pipeline of two models on mpmm. Needs Apache Beam; the handler could be any of Beam's.

python tools/examples/beam_pipeline.py
"""

# Beam is only partly typed; elsewhere strictness would complain about Beam alone.
# mypy: disable-error-code="no-untyped-call,attr-defined,misc,type-arg"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import apache_beam as beam
from apache_beam.ml.inference.base import ModelHandler, RunInference
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

import mpmm.beam


class Times:
    """Stands for a model."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def predict(self, number: int) -> int:
        """Return a multiple."""
        return number * self.factor


class TimesHandler(ModelHandler):
    """Tells Beam how to load and use the model."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self._factor = factor

    def load_model(self) -> Times:
        """Load the model."""
        return Times(self._factor)

    def run_inference(self, batch: Sequence[int], model: Times, inference_args: Any = None) -> list[int]:
        """Use the model for a batch."""
        return [model.predict(number) for number in batch]


def main() -> None:
    """Run both models on the same numbers, and print the results."""
    mpmm.beam.install()  # once, in the program that builds the pipeline
    # `RunInference` passes these to the manager; here there is no device to measure.
    manager_args = {"memory_source": "booked", "fallback_memory_mb": 8000}
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        numbers = pipeline | beam.Create(range(10))
        for factor in (2, 3):
            name = f"times-{factor}"
            _ = (
                numbers
                | name
                >> RunInference(
                    TimesHandler(factor),
                    model_identifier=name,
                    use_model_manager=True,
                    model_manager_args=manager_args,
                )
                | f"sum of {name}" >> beam.CombineGlobally(sum)
                | f"print {name}" >> beam.Map(lambda total, name=name: print(f"{name}: {total}"))
            )


if __name__ == "__main__":
    main()
