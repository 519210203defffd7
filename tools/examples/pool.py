"""A pool of processes without a GPU library: a worker that finds the model loaded reuses it.

    python tools/examples/pool.py

The model lives in a process of its own, so that all workers can use it; four of them count words with two copies.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter

from mpmm import ModelManager, MultiProcessShared

TEXTS = ("to be or not to be", "the rest is silence", "words words words", "to sleep perchance to dream")


class WordCounter:
    """Stands for a model: it takes memory, and a while to load."""

    def __init__(self) -> None:
        self.vocabulary = sorted({word for text in TEXTS for word in text.split()})

    def predict(self, text: str) -> dict[str, int]:
        """Return how often each known word occurs in a text."""
        return {word: count for word, count in Counter(text.split()).items() if word in self.vocabulary}


def load() -> str:
    """Start a server for the model; its tag is a handle that works in every process."""
    tag = f"counter-{os.getpid()}"
    MultiProcessShared(WordCounter, tag=tag, always_proxy=True, spawn_process=True).acquire()
    return tag


manager: ModelManager


def count(text: str) -> dict[str, int]:
    """Run in a worker: borrow a copy, use it, give it back."""
    with manager.model("counter", load) as handle:
        shared = MultiProcessShared(WordCounter, tag=handle, always_proxy=True, spawn_process=True)
        with shared.using() as counter:
            found: dict[str, int] = counter.predict(text)
            return found


def join(namespace: str) -> None:
    """Run once in each worker."""
    global manager
    manager = ModelManager(namespace=namespace, memory_source="booked", max_model_copies=2)


def main() -> None:
    """Share the models between four workers."""
    with ModelManager(namespace="pool", memory_source="booked", max_model_copies=2) as manager:
        with multiprocessing.get_context("spawn").Pool(4, join, (manager.namespace,)) as pool:
            total = sum((Counter(found) for found in pool.map(count, TEXTS * 10)), Counter[str]())
        copies = len(manager.all_models("counter"))
    print(f"counted {total.total()} words with {copies} copies; the most frequent is {total.most_common(1)[0][0]!r}")


if __name__ == "__main__":
    main()
