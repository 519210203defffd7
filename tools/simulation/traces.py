"""Requests to replay: generated traces, cycling clients, and files of recorded requests."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np

__all__ = ["CYCLING", "SIZES_MB", "TRACES", "cycle_requests", "cycling", "draw_requests", "read_csv"]

# Twelve models of 1.2 to 5 GB, 36.9 GB in all; the most wanted one first. Size and demand are unrelated.
SIZES_MB = (3100, 1200, 4800, 2500, 3900, 1600, 4400, 2200, 5000, 1900, 3500, 2800)


def draw_requests(count: int, models: int, exponent: float, seed: int) -> list[int]:
    """Return the model of each request, by a Zipf distribution over the models."""
    weights = 1.0 / np.arange(1, models + 1) ** exponent
    drawn: list[int] = np.random.default_rng(seed).choice(models, size=count, p=weights / weights.sum()).tolist()
    return drawn


def cycle_requests(count: int, models: int, clients: int) -> list[int]:
    """Return the model of each request; request r is client r % clients's, which goes through the models in order.

    Clients begin at different models, evenly spread.
    """
    return [(number // clients + number % clients) % models for number in range(count)]


def zipf(count: int, models: int, seed: int) -> list[int]:
    """Zipf's law with exponent 1: the popular stay popular."""
    return draw_requests(count, models, 1.0, seed)


def bursts(count: int, models: int, seed: int) -> list[int]:
    """One model is wanted 5 to 50 times in a row, mixed with others drawn by Zipf's law."""
    rng = np.random.default_rng(seed)
    background = iter(zipf(2 * count, models, seed + 1))
    found: list[int] = []
    while len(found) < count:
        model, length = int(rng.integers(models)), int(rng.integers(5, 51))
        for _ in range(length):
            found.append(model)
            if rng.random() < 0.3:
                found.append(next(background))
    return found[:count]


def cycles(count: int, models: int, seed: int) -> list[int]:
    """All models in turn, as a nightly job does, with one request in ten drawn by Zipf's law."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(models)
    background = zipf(count, models, seed + 1)
    return [int(order[at % models]) if rng.random() > 0.1 else background[at] for at in range(count)]


def drift(count: int, models: int, seed: int) -> list[int]:
    """Zipf's law over ranks that change: every fiftieth of the trace, two neighbours swap and one is drawn anew."""
    rng = np.random.default_rng(seed)
    ranks = zipf(count, models, seed + 1)
    order = rng.permutation(models)
    found = []
    for at, rank in enumerate(ranks):
        if at % max(1, count // 50) == 0:
            first, second = rng.integers(models, size=2)
            order[[first, second]] = order[[second, first]]
        found.append(int(order[rank]))
    return found


def cold(count: int, models: int, seed: int) -> list[int]:
    """No model is known at first: models appear one after another, and one request in twenty is for a rare one."""
    rng = np.random.default_rng(seed)
    found = []
    for at in range(count):
        up = min(models, 2 + at * models * 2 // count)
        weights = 1.0 / np.arange(1, up + 1)[::-1]
        chosen = rng.integers(up) if rng.random() < 0.05 else rng.choice(up, p=weights / weights.sum())
        found.append(int(chosen))
    return found


TRACES: dict[str, Callable[[int, int, int], list[int]]] = {
    trace.__name__: trace for trace in (zipf, bursts, cycles, drift, cold)
}


def cycling(kind: str, clients: int, models: int, rounds: int, seed: int) -> list[list[int]]:
    """Return the sequence of models that each client asks for: all models in each round.

    kind: `together`, all in the same order; `apart`, each one model further; `own`, each in its own order; `random`, in
    another order each round.
    """
    rng = np.random.default_rng(seed)

    def one(client: int) -> list[int]:
        if kind == "random":
            return [int(model) for _ in range(rounds) for model in rng.permutation(models)]
        order = rng.permutation(models) if kind == "own" else np.arange(models) + (client if kind == "apart" else 0)
        return [int(model) % models for model in order] * rounds

    return [one(client) for client in range(clients)]


CYCLING = ("together", "apart", "own", "random")


def read_csv(path: Path) -> tuple[list[float], list[str]]:
    """Return the times and model names in a file; a first line without a number is a heading."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    if rows and not _is_number(rows[0][0]):
        rows = rows[1:]
    rows.sort(key=lambda row: float(row[0]))
    return [float(row[0]) for row in rows], [row[1].strip() for row in rows]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
