"""joblib (loky) workers that share one loaded model: each task uses the copy that is already loaded.

    python tools/examples/joblib_workers.py

joblib pickles the manager with the task; in each worker, its copy is a member of the same namespace.
"""

from __future__ import annotations

import os
from collections import Counter

from joblib import Parallel, delayed

from mpmm import ModelManager, MultiProcessShared


class Doubler:
    """Stands for a model: it takes memory, and a while to load."""

    def __init__(self) -> None:
        self.factor = 2

    def predict(self, number: int) -> tuple[int, int]:
        """Return the double of a number, and the pid of the process that computed it."""
        return self.factor * number, os.getpid()


def load() -> str:
    """Start a server for the model; its tag is a handle that works in every process."""
    MultiProcessShared(Doubler, tag="doubler", always_proxy=True, spawn_process=True).acquire()
    return "doubler"


def double(manager: ModelManager, number: int) -> tuple[int, int, int]:
    """Run in a worker: borrow a copy, use it, give it back."""
    with manager.model("doubler", load) as handle:
        shared = MultiProcessShared(Doubler, tag=handle, always_proxy=True, spawn_process=True)
        with shared.using() as model:
            doubled, server = model.predict(number)
    return doubled, server, os.getpid()


def main() -> None:
    """Double some numbers in four workers, with one copy of the model."""
    with ModelManager(namespace="joblib", memory_source="booked", max_model_copies=1) as manager:
        done = Parallel(n_jobs=4)(delayed(double)(manager, number) for number in range(40))
    workers = Counter(worker for _, _, worker in done)
    servers = {server for _, server, _ in done}
    total = sum(doubled for doubled, _, _ in done)
    print(f"the sum is {total}; {'several workers' if len(workers) > 1 else 'one worker'}, {len(servers)} copy")


if __name__ == "__main__":
    main()
