"""A model handler for RunInference whose model does nothing. Workers and model servers import it; it needs Beam."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from apache_beam.ml.inference.base import ModelHandler

__all__ = ["TrivialHandler", "TrivialModel"]


class TrivialModel:
    """Predicts each number as itself."""

    def predict(self, batch: Sequence[int]) -> list[int]:
        """Return the batch."""
        return list(batch)


class TrivialHandler(ModelHandler):  # type: ignore[misc]  # Beam is untyped where it is not installed
    """Lets RunInference use a `TrivialModel`."""

    def load_model(self) -> TrivialModel:
        """Return a model."""
        return TrivialModel()

    def run_inference(
        self, batch: Sequence[int], model: TrivialModel, inference_args: dict[str, Any] | None = None
    ) -> Iterable[int]:
        """Ask the model, or a proxy of it."""
        return model.predict(batch)
