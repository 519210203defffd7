"""The models of the demo: their training data, recipes, and files.

The big ones are big because their half of the data set is multiplied by adding noise.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import sklearn
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from sklearn.svm import SVC

from demo.plan import load_halves


@dataclass(frozen=True)
class DemoModel:
    """One model: its name (also its tag at the model manager), its data set and how to make it.

    training_rows: number of rows drawn from the training half and blurred by `noise` standard
    deviations; 0 trains on the half as it is.
    """

    name: str
    data_set: str
    make: Callable[[], Any]
    training_rows: int = 0
    noise: float = 0.0


# The first three take 200 MB and more once loaded, the forest twice its file; the others are smaller.
MODELS = (
    DemoModel("digits-neighbours", "digits", lambda: KNeighborsClassifier(3, algorithm="brute"), 500_000, 0.2),
    DemoModel("digits-forest", "digits", lambda: ExtraTreesClassifier(230, n_jobs=2, random_state=0), 24_000, 0.3),
    DemoModel(
        "cancer-neighbours",
        "cancer",
        lambda: make_pipeline(StandardScaler(), KNeighborsClassifier(5, algorithm="brute")),
        900_000,
        0.2,
    ),
    DemoModel("wine-forest", "wine", lambda: ExtraTreesClassifier(60, n_jobs=2, random_state=0), 60_000, 0.3),
    DemoModel(
        "digits-polynomial",
        "digits",
        lambda: make_pipeline(PolynomialFeatures(2), StandardScaler(), RidgeClassifier(10.0)),
    ),
    DemoModel("digits-support-vectors", "digits", lambda: SVC(C=10.0), 6_000, 0.2),
    DemoModel("wine-logistic", "wine", lambda: make_pipeline(StandardScaler(), LogisticRegression())),
    DemoModel("iris-bayes", "iris", GaussianNB),
)
SMALL_MODELS = MODELS[-4:-1]


def train(model: DemoModel) -> Any:
    """Train one model."""
    features, labels, _, _ = load_halves(model.data_set)
    if model.training_rows:
        random = np.random.default_rng(seed=11)
        rows = random.integers(len(features), size=model.training_rows)
        blur = random.standard_normal((model.training_rows, features.shape[1])) * (model.noise * features.std(axis=0))
        features, labels = features[rows] + blur, labels[rows]
    return model.make().fit(features, labels)


def model_file(model: DemoModel, cache: Path) -> Path:
    """Return the trained model's file. Another scikit-learn version, or another recipe, gets another file."""
    fingerprint = [sklearn.__version__, np.__version__, model.data_set, model.training_rows, model.noise]
    recipe = json.dumps([*fingerprint, repr(model.make())])
    return cache / "models" / f"{model.name}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}.joblib"


def train_missing(models: Iterable[DemoModel], cache: Path, report: Callable[[str], None]) -> dict[str, Path]:
    """Train the models that are not in the cache yet; return the file of each.

    A file appears under its name only when it is complete, so an interrupted run leaves no broken file, and two
    runs at once do the work twice with the same result.
    """
    files = {model.name: model_file(model, cache) for model in models}
    (cache / "models").mkdir(parents=True, exist_ok=True)
    for model in models:
        file = files[model.name]
        if file.exists():
            continue
        unfinished = file.with_name(f"{file.name}.{os.getpid()}")
        try:
            joblib.dump(train(model), unfinished)
            os.replace(unfinished, file)
        finally:
            unfinished.unlink(missing_ok=True)
        report(f"trained {model.name} ({file.stat().st_size / 2**20:.0f} MB)")
    return files
