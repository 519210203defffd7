"""Beam's DaskRunner on many hosts: the workers of each host share one copy of a model. Needs Beam and distributed.

    dask scheduler                            # on one host, and on each host, once per worker process:
    dask worker tcp://SCHEDULER:8786 --nthreads 1
    python tools/examples/dask_hosts.py tcp://SCHEDULER:8786
    python tools/examples/dask_hosts.py       # without an address: a cluster of two times two workers on this machine

Dask gives a bundle to a worker on any host; mpmm decides there by the memory of that host, and shares nothing between
hosts. The two simulated hosts on one machine have a runtime directory each, which keeps them as separate as real
hosts; real hosts need no setting for that.
"""

# Beam is only partly typed, and Dask's scheduler not at all.
# mypy: disable-error-code="no-untyped-call,attr-defined,misc,type-arg"

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.ml.inference.base import ModelHandler, RunInference
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.dask.dask_runner import DaskRunner
from distributed import Nanny, Scheduler, SpecCluster

import mpmm.beam

WORKERS_ON_A_HOST = 2


class Doubler:
    """Stands for a model: it takes memory, and a while to load."""

    def predict(self, numbers: Sequence[int]) -> list[tuple[int, int]]:
        """Return the doubles of numbers, each with the pid of the process that computed it."""
        return [(2 * number, os.getpid()) for number in numbers]


class DoublerHandler(ModelHandler):
    """Tells Beam how to load and use the model."""

    def load_model(self) -> Doubler:
        """Load the model."""
        return Doubler()

    def run_inference(self, batch: Sequence[int], model: Doubler, inference_args: Any = None) -> list[Any]:
        """Use the model for a batch; return each result with this host's name."""
        host = Path(os.environ.get("MPMM_RUNTIME_DIR", "/" + socket.gethostname())).name
        return [(host, one) for one in model.predict(list(batch))]


def report(host: str, doubled: Iterable[tuple[int, int]]) -> None:
    """Print what one host has done; it appears in the output of the worker that runs this."""
    numbers, servers = zip(*doubled, strict=True)
    print(f"host {host}: the sum of {len(numbers)} numbers is {sum(numbers)}, by {len(set(servers))} copy", flush=True)


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[str]:
    """Run a cluster on this machine whose workers each see one of two runtime directories; yield its address."""
    workers = {}
    for host in ("one", "two"):
        (folder / host).mkdir(mode=0o700, exist_ok=True)
        for number in range(WORKERS_ON_A_HOST):
            options = {
                "nthreads": 1,
                "env": {"MPMM_RUNTIME_DIR": str(folder / host)},
                "local_directory": tempfile.gettempdir(),
            }
            workers[f"{host}-{number}"] = {"cls": Nanny, "options": options}
    with SpecCluster(workers, {"cls": Scheduler, "options": {"dashboard": False}}) as cluster:
        yield cluster.scheduler_address


def main(address: str) -> None:
    """Double some numbers, on whichever hosts Dask chooses."""
    mpmm.beam.install()
    manager_args = {"memory_source": "booked", "fallback_memory_mb": 8000, "max_model_copies": 1}
    options = PipelineOptions([f"--dask_client_address={address}", "--dask_npartitions=8"])
    with beam.Pipeline(DaskRunner(), options) as pipeline:
        _ = (
            pipeline
            | beam.Create([list(range(first, first + 5)) for first in range(0, 40, 5)])
            | RunInference(
                # Beam 2.77's DaskRunner loses what a step emits at the end of a bundle, and Beam's batching emits the
                # last batch there. So these elements are batches already.
                DoublerHandler().with_no_batching(),
                model_identifier="doubler",
                use_model_manager=True,
                model_manager_args=manager_args,
            )
            | beam.GroupByKey()
            | beam.MapTuple(report)
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with (
            tempfile.TemporaryDirectory(prefix="mpmm-", ignore_cleanup_errors=True) as temporary,
            two_hosts(Path(os.environ.get("MPMM_RUNTIME_DIR", temporary))) as scheduler,
        ):
            main(scheduler)
