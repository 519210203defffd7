"""What the demo's two programs share: the plan of a run, the data sets, and the format of a prediction.

The data sets are four small ones that scikit-learn ships. Each is split in two halves: models are
trained on the first and the pipeline predicts the second, so the accuracies are real.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from sklearn.model_selection import train_test_split

Features = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

DATA_SETS: dict[str, Callable[..., Any]] = {
    "digits": load_digits,
    "cancer": load_breast_cancer,
    "wine": load_wine,
    "iris": load_iris,
}

# One prediction: the model, the predicted label, and the element of the model's data set.
RECORD = np.dtype([("model", "<u2"), ("label", "<i2"), ("element", "<u4")])
RECORDS_SUFFIX = ".predictions"


@dataclass
class Plan:
    """Everything that the pipeline needs to know; stored as JSON.

    models: name, data set and file of each; elements: their number by data set; interleaved: every worker goes
    from model to model, instead of one model after another for all workers; manager_args: `model_manager_args`
    for mpmm, or None for Beam's own manager.
    """

    folder: str
    models: list[tuple[str, str, str]]
    workers: int
    batch_size: int
    interleaved: bool
    elements: dict[str, int]
    manager_args: dict[str, Any] | None = None

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Plan:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def load_halves(data_set: str) -> tuple[Features, Labels, Features, Labels]:
    """Return the features and labels to train on, and those to predict; always the same split."""
    features, labels = DATA_SETS[data_set](return_X_y=True)
    train, test, train_labels, test_labels = train_test_split(
        features.astype(np.float64), labels, test_size=0.5, random_state=7, stratify=labels
    )
    return train, train_labels, test, test_labels
