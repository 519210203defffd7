"""Pipelines of many shapes on managed models; `test_beam_shapes.py` runs them all in one program.

    python tests/beam_shapes.py FOLDER          writes the predictions of each shape to FOLDER/results.json

Each shape is a function that takes the pipeline and returns the collection of predictions. Each talk is a function that
calls Beam's DoFn directly, where the order of calls matters, and returns the predictions.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.metrics.execution import MetricsEnvironment
from apache_beam.metrics.metricbase import MetricName
from apache_beam.ml.inference.base import (
    KeyedModelHandler,
    KeyModelMapping,
    KeyModelPathMapping,
    MaybeKeyedModelHandler,
    ModelHandler,
    ModelMetadata,
    RemoteModelHandler,
    RunInference,
    _RunInferenceDoFn,
)
from apache_beam.pvalue import EmptySideInput

from mpmm.model_manager import ModelManager
from mpmm.multi_process_shared import MultiProcessShared
from mpmm.observability.inspect_screen import render
from mpmm.shared_state.snapshot import read_snapshot

MANAGED = {
    "memory_source": "booked",
    "fallback_memory_mb": 100_000.0,
    "default_estimate_mb": 10.0,
    "autoscaling_metric": "demand",
}
NAMESPACE = "mps.model_manager"
NUMBERS = [1, 5, 3, 10]
PAIRS = [("a", 1), ("b", 2), ("a", 3), ("c", 4)]
PATHS = [KeyModelPathMapping(["a"], "5.model", "five"), KeyModelPathMapping(["b", "c"], "6.model", "six")]
# How long the slow model takes to load, and how long a batch may take, including its load.
SLOW_LOAD_S, TIMEOUT_S = 1.5, 1

_collected: dict[str, list[Any]] = defaultdict(list)
_mutex = threading.Lock()
_shapes: dict[str, Callable[[Any], Any]] = {}
_talks: dict[str, Callable[[], Any]] = {}


def shape(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Register a function as a shape."""
    _shapes[function.__name__] = function
    return function


def talk(function: Callable[[], Any]) -> Callable[[], Any]:
    """Register a function as a talk."""
    _talks[function.__name__] = function
    return function


def collect(prediction: Any, name: str) -> None:
    """Note a prediction, in the process that runs the pipeline."""
    with _mutex:
        _collected[name].append(prediction)


class Model:
    """Multiplies."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def predict(self, numbers: Sequence[int]) -> list[int]:
        """Return the products."""
        return [number * self.factor for number in numbers]

    def stream(self, numbers: Sequence[int]) -> Iterator[int]:
        """Return a generator of the products, which cannot be pickled."""
        return (number * self.factor for number in numbers)

    def named(self, numbers: Sequence[int]) -> Any:
        """Return a view of a dictionary's values."""
        return {number: number * self.factor for number in numbers}.values()


class Handler(ModelHandler[int, int, Model]):  # type: ignore[misc]  # Beam has no types for mypy
    """Multiplies by the number in the model's path, such as `7.model`."""

    def __init__(self, path: str = "2.model", method: str = "predict", **options: Any) -> None:
        super().__init__(**options)
        self._path = path
        self._method = method

    def update_model_path(self, model_path: str | None = None) -> None:
        """Use another model from now on."""
        self._path = model_path or self._path

    def load_model(self) -> Model:
        """Make the model."""
        return Model(int(Path(self._path).stem))

    def run_inference(self, batch: Sequence[int], model: Any, inference_args: Any = None) -> Iterable[int]:
        """Return the predictions as a list."""
        return list(getattr(model, self._method)(list(batch)))


class GeneratorHandler(Handler):
    """Yields its predictions."""

    def run_inference(self, batch: Sequence[int], model: Any, inference_args: Any = None) -> Iterator[int]:
        """Yield one prediction after another, each from the model."""
        for number in batch:
            yield from model.predict([number])


class HeldHandler(Handler):
    """Predicts how many copies of its model are in use while Beam reads the predictions."""

    def run_inference(self, batch: Sequence[int], model: Any, inference_args: Any = None) -> Iterator[int]:
        """Yield the number for each element."""
        for _ in batch:
            yield sum(model.active for model in read_snapshot(NAMESPACE).models if model.tag == "held")


class ArgumentsHandler(Handler):
    """Adds a number from the inference arguments."""

    def run_inference(self, batch: Sequence[int], model: Any, inference_args: Any = None) -> Iterable[int]:
        """Return the predictions plus `inference_args["more"]`."""
        return [product + inference_args["more"] for product in model.predict(list(batch))]


class BatchHandler(Handler):
    """Predicts the length of the batch."""

    def run_inference(self, batch: Sequence[int], model: Any, inference_args: Any = None) -> Iterable[int]:
        """Return a list with the length for each element."""
        return [len(batch)] * len(model.predict(list(batch)))


class PickyHandler(Handler):
    """Fails for batches with odd numbers."""

    def run_inference(self, batch: Sequence[int], model: Any, inference_args: Any = None) -> Iterable[int]:
        """Return the predictions. Raises ValueError."""
        if any(number % 2 for number in batch):
            raise ValueError("odd")
        return super().run_inference(batch, model, inference_args)


class SlowHandler(Handler):
    """A handler whose first load takes longer than a batch may take."""

    def load_model(self) -> Model:
        """Make the model, slowly the first time. The folder's path comes from the client's environment."""
        try:
            Path(os.environ["MPMM_TEST_FOLDER"], "slow").touch(exist_ok=False)
            time.sleep(SLOW_LOAD_S)
        except FileExistsError:
            pass
        return super().load_model()


class Remote(RemoteModelHandler[int, int, Model]):  # type: ignore[misc]  # Beam has no types for mypy
    """Stands for a remote service, with a client for a model."""

    def create_client(self) -> Model:
        """Make the client."""
        return Model(3)

    def request(self, batch: Sequence[int], model: Any, inference_args: Any = None) -> Iterable[int]:
        """Ask the service."""
        return list(model.predict(list(batch)))


def infer(handler: Any, **options: Any) -> Any:
    """Return RunInference on the manager."""
    return RunInference(handler, use_model_manager=True, model_manager_args=MANAGED, **options)


def numbers(pipeline: Any, elements: Sequence[Any] = NUMBERS) -> Any:
    return pipeline | beam.Create(elements, reshuffle=False)


# ---- shapes ------------------------------------------------------------------------------------------------


@shape
def plain(pipeline: Any) -> Any:
    return numbers(pipeline) | infer(Handler())


@shape
def generator(pipeline: Any) -> Any:
    return numbers(pipeline) | infer(GeneratorHandler())


@shape
def model_streams(pipeline: Any) -> Any:
    return numbers(pipeline) | infer(Handler(method="stream"))


@shape
def model_returns_a_view(pipeline: Any) -> Any:
    return numbers(pipeline) | infer(Handler(method="named"))


@shape
def held_while_it_yields(pipeline: Any) -> Any:
    return numbers(pipeline) | infer(HeldHandler(), model_identifier="held")


@shape
def keyed(pipeline: Any) -> Any:
    return numbers(pipeline, PAIRS) | infer(KeyedModelHandler(GeneratorHandler("3.model")))


@shape
def maybe_keyed_without_keys(pipeline: Any) -> Any:
    return numbers(pipeline) | infer(MaybeKeyedModelHandler(Handler()))


@shape
def maybe_keyed_with_keys(pipeline: Any) -> Any:
    return numbers(pipeline, PAIRS) | infer(MaybeKeyedModelHandler(Handler()))


def _mapped(**options: Any) -> Any:
    mappings = [KeyModelMapping(["a", "b"], Handler("2.model")), KeyModelMapping(["c"], Handler("3.model"))]
    return KeyedModelHandler(mappings, **options)


@shape
def key_model_mapping(pipeline: Any) -> Any:
    return numbers(pipeline, PAIRS) | infer(_mapped())


@shape
def key_model_mapping_with_one_model_at_a_time(pipeline: Any) -> Any:
    return numbers(pipeline, PAIRS) | infer(_mapped(max_models_per_worker_hint=1))


@shape
def key_model_mapping_updated(pipeline: Any) -> Any:
    update = pipeline | "paths" >> beam.Create([PATHS])
    return numbers(pipeline, PAIRS) | infer(_mapped(), model_metadata_pcoll=update)


@shape
def processed(pipeline: Any) -> Any:
    handler = Handler().with_preprocess_fn(int).with_postprocess_fn(str)
    return numbers(pipeline, [str(number) for number in NUMBERS]) | infer(handler)


@shape
def processed_twice_and_keyed(pipeline: Any) -> Any:
    handler = KeyedModelHandler(Handler()).with_preprocess_fn(_swap).with_postprocess_fn(_swap)
    return numbers(pipeline, [_swap(pair) for pair in PAIRS]) | infer(handler)


def _swap(pair: tuple[Any, Any]) -> tuple[Any, Any]:
    return pair[1], pair[0]


@shape
def batched(pipeline: Any) -> Any:
    return numbers(pipeline, range(12)) | infer(BatchHandler(min_batch_size=3, max_batch_size=3))


@shape
def batched_by_length(pipeline: Any) -> Any:
    options: dict[str, Any] = {"max_batch_duration_secs": 1, "batch_length_fn": abs, "batch_bucket_boundaries": [100]}
    handler = BatchHandler(min_batch_size=2, max_batch_size=2, **options)
    return numbers(pipeline, [1, 1000, 2, 2000, 3, 3000]) | infer(handler)


@shape
def not_batched(pipeline: Any) -> Any:
    return numbers(pipeline, [[1, 2], [3]]) | infer(Handler().with_no_batching())


@shape
def arguments(pipeline: Any) -> Any:
    return numbers(pipeline) | infer(ArgumentsHandler(), inference_args={"more": 100})


@shape
def failures_set_aside(pipeline: Any) -> Any:
    handler = PickyHandler(min_batch_size=1, max_batch_size=1)
    good, other = numbers(pipeline) | infer(handler).with_exception_handling()
    bad = other.failed_inferences | beam.Map(_batch_that_failed)
    return (good, bad) | beam.Flatten()


def _batch_that_failed(failure: Any) -> Any:
    batch, (kind, *_) = failure
    return [kind.__name__ if isinstance(kind, type) else str(kind), *batch]


@shape
def in_a_subprocess(pipeline: Any) -> Any:
    good, _ = numbers(pipeline) | infer(Handler()).with_exception_handling(use_subprocess=True)
    return good


@shape
def slow_first_load(pipeline: Any) -> Any:
    handler = SlowHandler(min_batch_size=1, max_batch_size=1)
    good, other = numbers(pipeline) | infer(handler).with_exception_handling(timeout=TIMEOUT_S)
    bad = other.failed_inferences | beam.Map(lambda failure: list(failure[0]))
    return (good | beam.Map(lambda product: [product // 2]), bad) | beam.Flatten()


@shape
def two_copies(pipeline: Any) -> Any:
    return numbers(pipeline) | infer(Handler(model_copies=2))


@shape
def large(pipeline: Any) -> Any:
    return numbers(pipeline) | infer(Handler(large_model=True))


@shape
def updated(pipeline: Any) -> Any:
    update = pipeline | "path" >> beam.Create([ModelMetadata("7.model", "seven")])
    return numbers(pipeline) | infer(Handler(), model_metadata_pcoll=update)


@shape
def never_updated(pipeline: Any) -> Any:
    update = pipeline | "path" >> beam.Create([]) | beam.Map(lambda _: ModelMetadata("7.model", "seven"))
    return numbers(pipeline) | infer(GeneratorHandler(min_batch_size=1, max_batch_size=1), model_metadata_pcoll=update)


@shape
def one_model_in_two_steps(pipeline: Any) -> Any:
    products = numbers(pipeline) | "once" >> infer(Handler(), model_identifier="shared")
    return products | "twice" >> infer(Handler(), model_identifier="shared")


@shape
def remote(pipeline: Any) -> Any:
    return numbers(pipeline) | infer(Remote("test"))


@shape
def sklearn_numpy(pipeline: Any) -> Any:
    from apache_beam.ml.inference.sklearn_inference import ModelFileType, SklearnModelHandlerNumpy

    examples = [np.array([float(number)]) for number in NUMBERS]
    handler = SklearnModelHandlerNumpy(_sklearn_model(), ModelFileType.JOBLIB)
    return numbers(pipeline, examples) | infer(handler) | beam.Map(lambda result: round(float(result.inference)))


@shape
def sklearn_keyed(pipeline: Any) -> Any:
    from apache_beam.ml.inference.sklearn_inference import ModelFileType, SklearnModelHandlerNumpy

    examples = [(key, np.array([float(number)])) for key, number in PAIRS]
    handler = KeyedModelHandler(SklearnModelHandlerNumpy(_sklearn_model(), ModelFileType.JOBLIB))
    return (
        numbers(pipeline, examples)
        | infer(handler)
        | beam.MapTuple(lambda key, result: (key, round(float(result.inference))))
    )


@shape
def sklearn_pandas(pipeline: Any) -> Any:
    import pandas  # type: ignore[import-untyped, unused-ignore]  # has stubs of its own in some environments
    from apache_beam.ml.inference.sklearn_inference import ModelFileType, SklearnModelHandlerPandas

    examples = [pandas.DataFrame([[float(number)]]) for number in NUMBERS]
    handler = SklearnModelHandlerPandas(_sklearn_model(), ModelFileType.JOBLIB)
    return numbers(pipeline, examples) | infer(handler) | beam.Map(lambda result: round(float(result.inference)))


@shape
def onnx(pipeline: Any) -> Any:
    from apache_beam.ml.inference.onnx_inference import OnnxModelHandlerNumpy

    path = Path(os.environ["MPMM_TEST_FOLDER"], "four.onnx")
    path.write_text("4")
    examples = [np.array(float(number)) for number in NUMBERS]
    handler = OnnxModelHandlerNumpy(str(path))
    return numbers(pipeline, examples) | infer(handler) | beam.Map(lambda result: round(float(result.inference)))


def _sklearn_model() -> str:
    """Make a model that knows y = 4 x, once; return its path."""
    import joblib
    from sklearn.linear_model import LinearRegression

    path = Path(os.environ["MPMM_TEST_FOLDER"], "linear.joblib")
    if not path.exists():
        joblib.dump(LinearRegression(fit_intercept=False).fit([[1.0], [2.0]], [4.0, 8.0]), path)
    return str(path)


# ---- talks -------------------------------------------------------------------------------------------------


def _do_fn(handler: Any, tag: str) -> Any:
    do_fn = _RunInferenceDoFn(handler, time, "test", True, tag, True, MANAGED)
    do_fn.setup()
    return do_fn


def _evict_all() -> None:
    MultiProcessShared(ModelManager, tag="model_manager").acquire().force_reset()


@talk
def updated_while_no_copy_is_loaded() -> Any:
    do_fn = _do_fn(_mapped(), "evicted")
    before = do_fn.process(PAIRS, None, None)
    _evict_all()
    return before + do_fn.process(PAIRS, None, PATHS)


@talk
def updated_where_somebody_else_has_loaded() -> Any:
    before = _do_fn(_mapped(), "common").process(PAIRS, None, None)
    return before + _do_fn(_mapped(), "common").process(PAIRS, None, PATHS)


@talk
def nothing_to_update_while_no_copy_is_loaded() -> Any:
    do_fn = _do_fn(Handler(), "empty")
    before = do_fn.process(NUMBERS, None, None)
    _evict_all()
    return before + do_fn.process(NUMBERS, None, EmptySideInput())


@talk
def what_people_see_for_a_uuid() -> Any:
    tag = uuid.uuid4().hex
    _do_fn(KeyedModelHandler(Handler("7.model")), tag).process(PAIRS, None, None)
    snapshot = read_snapshot(NAMESPACE)
    names = [model.name for model in snapshot.models if model.tag == tag]
    return [*names, f"Handler 7.model [{tag[:8]}…]" in render(snapshot, everything=True)]


@talk
def demand_is_reported_as_it_rises_and_falls() -> Any:
    _do_fn(Handler(), "in demand").process(NUMBERS, None, None)
    name = MetricName("BeamML_ModelManager", "num_loaded_models_in demand")
    reported = MetricsEnvironment.process_wide_container().get_distribution(name).get_cumulative()
    # Before and after the acquire, after the release.
    return [reported.min, reported.max, reported.count]


# ---- the run -----------------------------------------------------------------------------------------------


def main(folder: str) -> None:
    """Run all talks, and all shapes in one pipeline; write the predictions to a file."""
    os.environ["MPMM_TEST_FOLDER"] = folder
    import mpmm.beam

    mpmm.beam.install()
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    for name, talk in _talks.items():
        _collected[name] = talk()
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        for name, build in _shapes.items():
            _ = pipeline | name >> _Shape(build) | f"collect {name}" >> beam.Map(collect, name)
    Path(folder, "results.json").write_text(json.dumps(_collected))


class _Shape(beam.PTransform):  # type: ignore[misc]  # Beam has no types for mypy
    """A shape as one step, so that the names of its inner steps do not clash."""

    def __init__(self, build: Callable[[Any], Any]) -> None:
        super().__init__()
        self._build = build

    def expand(self, pipeline: Any) -> Any:
        return self._build(pipeline)


if __name__ == "__main__":
    # Import it under its own name, so that workers, servers and this process have the same classes.
    sys.path.insert(0, os.path.dirname(__file__))
    import beam_shapes

    beam_shapes.main(sys.argv[1])
