"""Ray actors that share the models of their node. Needs ray, which the extra `hosts` installs.

    pip install 'mpmm[hosts]' && python tools/examples/ray_actors.py

Ray places actors by the GPU shares that they ask for, and knows nothing of the models they load. Actors that each ask
for a small share (`num_gpus=0.1`) and attach to one namespace share their device by what the models really take. This
example does without GPUs; `mpmm help hosts` says what an actor sees that asks for none.
"""

# Ray may be missing where types are checked.
# mypy: disable-error-code="attr-defined,untyped-decorator"

from __future__ import annotations

import os

import ray
from pool import WordCounter, load

from mpmm import ModelManager, MultiProcessShared

NAMESPACE = "ray"


@ray.remote(num_cpus=0)
class Counting:
    """One actor; each is a process of its own."""

    def __init__(self) -> None:
        self._manager = ModelManager(namespace=NAMESPACE, memory_source="booked", max_model_copies=2)

    def count(self, text: str) -> tuple[int, int]:
        """Return the number of words, and this actor's pid."""
        with self._manager.model("counter", load) as handle:
            shared = MultiProcessShared(WordCounter, tag=handle, always_proxy=True, spawn_process=True)
            with shared.using() as counter:
                return sum(counter.predict(text).values()), os.getpid()

    def leave(self) -> None:
        """Release the models: Ray ends actors by a signal."""
        self._manager.shutdown()


def main() -> None:
    """Have three actors count words with two copies."""
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    try:
        actors = [Counting.remote() for _ in range(3)]
        counted = ray.get([actor.count.remote("to be or not to be") for actor in actors * 5])
        ray.get([actor.leave.remote() for actor in actors])
    finally:
        ray.shutdown()
    print(f"counted {sum(words for words, _ in counted)} words in {len({pid for _, pid in counted})} actors")


if __name__ == "__main__":
    main()
