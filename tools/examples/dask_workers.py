"""Dask workers that share one copy of a model. Needs distributed.

    python tools/examples/dask_workers.py

Each Dask worker process is a member of its host's namespace; several hosts have one copy each.
"""

# Dask's scheduler has no types.
# mypy: disable-error-code="no-untyped-call,misc"

from __future__ import annotations

import os

from distributed import Client, LocalCluster, Worker, WorkerPlugin, get_worker

from mpmm import ModelManager, MultiProcessShared


class Doubler:
    """Stands for a model: it takes memory, and a while to load."""

    def predict(self, number: int) -> tuple[int, int]:
        """Return the double of a number, and the pid of the process that computed it."""
        return 2 * number, os.getpid()


def load() -> str:
    """Start a server for the model; its tag is a handle that works in every process."""
    shared("doubler").acquire()
    return "doubler"


def shared(handle: str) -> MultiProcessShared[Doubler]:
    """Return the shared object for a handle."""
    return MultiProcessShared(Doubler, tag=handle, always_proxy=True, spawn_process=True)


class Models(WorkerPlugin):
    """Gives each worker a manager when it starts, and releases its models when it ends."""

    def setup(self, worker: Worker) -> None:
        """Run in each worker when it starts."""
        worker.models = ModelManager(namespace="dask", memory_source="booked", max_model_copies=1)

    def teardown(self, worker: Worker) -> None:
        """Run in each worker when it closes."""
        worker.models.shutdown()


def double(number: int) -> tuple[int, int, int]:
    """Run in a worker: borrow the copy, use it, give it back."""
    with get_worker().models.model("doubler", load) as handle, shared(handle).using() as model:
        doubled, server = model.predict(number)
    return doubled, server, os.getpid()


def main() -> None:
    """Double some numbers in three workers."""
    with LocalCluster(n_workers=3, threads_per_worker=2, dashboard_address=None) as cluster, Client(cluster) as client:
        client.register_plugin(Models())
        done = client.gather(client.map(double, range(60)))
    workers = {worker for _, _, worker in done}
    servers = {server for _, server, _ in done}
    print(f"the sum is {sum(one for one, _, _ in done)}; {len(workers)} workers, {len(servers)} copy")


if __name__ == "__main__":
    main()
