"""Pipelines on Beam's handlers for large libraries; `test_large_shapes.py` runs them all in one program.

    python tests/large_shapes.py FOLDER          writes the predictions of each shape to FOLDER/results.json

Each shape is a function that makes a small model in the folder, adds its steps to the pipeline, and returns a
collection of the predictions, and a list of what plain Python computes with the same model.
"""

# Beam and the libraries are only partly typed; elsewhere strictness would complain about them alone.
# mypy: disable-error-code="no-untyped-call,misc,no-any-return"

from __future__ import annotations

import json
import os
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.ml.inference.base import (
    KeyedModelHandler,
    KeyModelMapping,
    ModelMetadata,
    PredictionResult,
    RunInference,
)

MANAGED = {"memory_source": "booked", "fallback_memory_mb": 100_000.0, "default_estimate_mb": 10.0}
EXAMPLES = np.random.default_rng(1).normal(size=(12, 3)).astype(np.float32)
WORDS = ("to", "be", "or", "not")
TEXTS = ("to be", "or not to be", "be", "not or")

Outcome = tuple[Any, list[Any]]
_shapes: dict[str, Callable[[Any, Path], Outcome]] = {}
_collected: dict[str, list[Any]] = defaultdict(list)
_mutex = threading.Lock()


def shape(function: Callable[[Any, Path], Outcome]) -> Callable[[Any, Path], Outcome]:
    """Register a function as a shape."""
    _shapes[function.__name__] = function
    return function


def collect(prediction: Any, name: str) -> None:
    """Note a prediction, in the process that runs the pipeline."""
    with _mutex:
        _collected[name].append(prediction)


def infer(handler: Any, **options: Any) -> Any:
    """Return RunInference on the manager."""
    return RunInference(handler, use_model_manager=True, model_manager_args=MANAGED, **options)


def plain(found: Any) -> Any:
    """Return numbers of any library as lists of rounded floats, and everything else unchanged."""
    if isinstance(found, PredictionResult):
        return plain(found.inference)
    if isinstance(found, dict):
        return {str(key): plain(value) for key, value in found.items()}
    if isinstance(found, tuple | list):
        return [plain(value) for value in found]
    if isinstance(found, str):
        return found
    if hasattr(found, "detach"):
        found = found.detach().numpy()
    return np.asarray(found, dtype=float).round(4).reshape(-1).tolist()


def predicted(examples: Any, handler: Any) -> Any:
    """Return the predictions of a handler in the form in which they are compared."""
    return examples | infer(handler) | beam.Map(plain)


# ---- torch -------------------------------------------------------------------------------------------------


def linear(folder: Path, seed: int) -> tuple[Any, dict[str, Any]]:
    """Make a linear model; return it, and its description for Beam's handlers."""
    import torch

    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2).eval()
    path = folder / f"linear-{seed}.pt"
    torch.save(model.state_dict(), path)
    return model, {
        "state_dict_path": str(path),
        "model_class": torch.nn.Linear,
        "model_params": {"in_features": 3, "out_features": 2},
    }


@shape
def torch_tensor(pipeline: Any, folder: Path) -> Outcome:
    import torch
    from apache_beam.ml.inference.pytorch_inference import PytorchModelHandlerTensor

    model, described = linear(folder, 1)
    tensors = [torch.from_numpy(example) for example in EXAMPLES]
    found = predicted(pipeline | beam.Create(tensors), PytorchModelHandlerTensor(**described))
    return found, [plain(model(tensor)) for tensor in tensors]


@shape
def torch_keyed_tensor(pipeline: Any, folder: Path) -> Outcome:
    import torch
    from apache_beam.ml.inference.pytorch_inference import PytorchModelHandlerKeyedTensor

    model, described = linear(folder, 2)
    tensors = [{"input": torch.from_numpy(example)} for example in EXAMPLES]
    found = predicted(pipeline | beam.Create(tensors), PytorchModelHandlerKeyedTensor(**described))
    return found, [plain(model(**tensor)) for tensor in tensors]


@shape
def torch_updated(pipeline: Any, folder: Path) -> Outcome:
    import torch
    from apache_beam.ml.inference.pytorch_inference import PytorchModelHandlerTensor

    (_, described), (newer, its) = linear(folder, 6), linear(folder, 7)
    tensors = [torch.from_numpy(example) for example in EXAMPLES]
    update = pipeline | "path" >> beam.Create([ModelMetadata(its["state_dict_path"], "newer")])
    step = infer(PytorchModelHandlerTensor(**described), model_metadata_pcoll=update)
    return pipeline | beam.Create(tensors) | step | beam.Map(plain), [plain(newer(tensor)) for tensor in tensors]


@shape
def torch_by_key(pipeline: Any, folder: Path) -> Outcome:
    return by_key(pipeline, folder)


@shape
def torch_by_key_with_one_model_at_a_time(pipeline: Any, folder: Path) -> Outcome:
    return by_key(pipeline, folder, max_models_per_worker_hint=1)


def by_key(pipeline: Any, folder: Path, **hints: Any) -> Outcome:
    """Predict with two models, each for the examples of its key."""
    import torch
    from apache_beam.ml.inference.pytorch_inference import PytorchModelHandlerTensor

    models = {"a": linear(folder, 3), "b": linear(folder, 4)}
    mappings = [
        KeyModelMapping([key], PytorchModelHandlerTensor(**described)) for key, (_, described) in models.items()
    ]
    pairs = [("ab"[number % 2], torch.from_numpy(example)) for number, example in enumerate(EXAMPLES)]
    found = predicted(pipeline | beam.Create(pairs), KeyedModelHandler(mappings, **hints))
    return found, [[key, plain(models[key][0](tensor))] for key, tensor in pairs]


# ---- Hugging Face ------------------------------------------------------------------------------------------


def tiny_bert(folder: Path) -> tuple[Any, Any, str]:
    """Make a classifier with random weights and its tokenizer; return both, and their folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(5)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(vocabulary), **sizes)).eval()
    path = str(folder / "bert")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model, tokenizer, path


@shape
def hugging_face_pipeline(pipeline: Any, folder: Path) -> Outcome:
    from apache_beam.ml.inference.huggingface_inference import HuggingFacePipelineModelHandler
    from transformers import pipeline as hugging_face

    model, tokenizer, path = tiny_bert(folder)
    handler = HuggingFacePipelineModelHandler("text-classification", path, device="CPU")
    classify = hugging_face("text-classification", model=model, tokenizer=tokenizer)
    return predicted(pipeline | beam.Create(TEXTS), handler), [plain(one) for one in classify(list(TEXTS))]


@shape
def hugging_face_keyed_tensor(pipeline: Any, folder: Path) -> Outcome:
    import torch
    from apache_beam.ml.inference.huggingface_inference import HuggingFaceModelHandlerKeyedTensor
    from transformers import AutoModelForSequenceClassification

    model, tokenizer, path = tiny_bert(folder)
    encoded = tokenizer(list(TEXTS), padding="max_length", max_length=6, return_tensors="pt")
    names = ("input_ids", "attention_mask")
    tensors = [{name: encoded[name][number] for name in names} for number in range(len(TEXTS))]
    handler = HuggingFaceModelHandlerKeyedTensor(path, AutoModelForSequenceClassification, "pt")
    with torch.no_grad():
        expected = model(**{name: encoded[name] for name in names}).logits
    found = pipeline | beam.Create(tensors) | infer(handler) | beam.Map(lambda one: plain(one.inference["logits"]))
    return found, [plain(one) for one in expected]


# ---- others ------------------------------------------------------------------------------------------------


def trees(folder: Path) -> tuple[Any, str]:
    """Fit a model; return it, and its file."""
    import xgboost

    model = xgboost.XGBRegressor(n_estimators=5, max_depth=2).fit(EXAMPLES, EXAMPLES.sum(axis=1))
    path = str(folder / "trees.json")
    model.save_model(path)
    return model, path


@shape
def xgboost_pandas(pipeline: Any, folder: Path) -> Outcome:
    import pandas  # type: ignore[import-untyped, unused-ignore]  # has stubs of its own in some environments
    import xgboost
    from apache_beam.ml.inference.xgboost_inference import XGBoostModelHandlerPandas

    model, path = trees(folder)
    handler = XGBoostModelHandlerPandas(xgboost.XGBRegressor, path, max_batch_size=1)
    frames = [pandas.DataFrame(example.reshape(1, -1)) for example in EXAMPLES]
    return predicted(pipeline | beam.Create(frames), handler), [plain(model.predict(frame)) for frame in frames]


@shape
def xgboost_numpy(pipeline: Any, folder: Path) -> Outcome:
    import xgboost
    from apache_beam.ml.inference.xgboost_inference import XGBoostModelHandlerNumpy

    model, path = trees(folder)
    handler = XGBoostModelHandlerNumpy(xgboost.XGBRegressor, path, max_batch_size=1)
    batches = [example.reshape(1, -1) for example in EXAMPLES]
    return predicted(pipeline | beam.Create(batches), handler), [plain(model.predict(batch)) for batch in batches]


@shape
def onnx_numpy(pipeline: Any, folder: Path) -> Outcome:
    handler, weights = product(folder)
    return predicted(pipeline | beam.Create(list(EXAMPLES)), handler), [plain(one @ weights) for one in EXAMPLES]


@shape
def onnx_keyed(pipeline: Any, folder: Path) -> Outcome:
    handler, weights = product(folder)
    pairs = [(str(number), example) for number, example in enumerate(EXAMPLES)]
    found = predicted(pipeline | beam.Create(pairs), KeyedModelHandler(handler))
    return found, [[key, plain(example @ weights)] for key, example in pairs]


def product(folder: Path) -> tuple[Any, Any]:
    """Make a model that multiplies by weights; return Beam's handler for it, and the weights."""
    import onnx
    from apache_beam.ml.inference.onnx_inference import OnnxModelHandlerNumpy
    from onnx import TensorProto, helper

    weights = np.arange(6, dtype=np.float32).reshape(3, 2)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 2])],
        [helper.make_tensor("w", TensorProto.FLOAT, weights.shape, weights.reshape(-1).tolist())],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path = str(folder / "product.onnx")
    onnx.save(model, path)
    return OnnxModelHandlerNumpy(path, providers=["CPUExecutionProvider"]), weights


# ---- the run -----------------------------------------------------------------------------------------------


class _Shape(beam.PTransform):
    """A shape as one step, so that the names of its inner steps do not clash."""

    def __init__(self, build: Callable[[Any, Path], Outcome], folder: Path) -> None:
        super().__init__()
        self._build = build
        self._folder = folder
        self.expected: list[Any] = []

    def expand(self, pipeline: Any) -> Any:
        found, self.expected = self._build(pipeline, self._folder)
        return found


def main(folder: Path, names: Iterable[str]) -> None:
    """Run shapes in one pipeline; write the actual and the expected predictions to a file."""
    import mpmm.beam

    mpmm.beam.install()
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    shapes = {name: _Shape(_shapes[name], folder) for name in names or _shapes}
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        for name, one in shapes.items():
            _ = pipeline | name >> one | f"collect {name}" >> beam.Map(collect, name)
    results = {name: [_collected[name], one.expected] for name, one in shapes.items()}
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    # Import it under its own name, so that workers, servers and this process have the same classes.
    sys.path.insert(0, os.path.dirname(__file__))
    import large_shapes

    large_shapes.main(Path(sys.argv[1]), sys.argv[2:])
