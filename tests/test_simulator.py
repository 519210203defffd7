"""The simulator: it replays requests through the policy's functions, and shows that they beat the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import OncePerRun, scaled
from simulation.bounds import closed_loads
from simulation.manager import Outcome, Setting, simulate, simulate_clients
from simulation.policies import POLICIES
from simulation.traces import SIZES_MB, TRACES

TOOL = Path(__file__).resolve().parent.parent / "tools" / "simulate.py"


def simulated(*arguments: str) -> dict[str, dict[str, Any]]:
    """Run the tool; return its figures by trace and policy."""
    done = subprocess.run([sys.executable, TOOL, "--json", *arguments], capture_output=True, text=True, check=True)
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


Found = dict[str, dict[str, Any]]
# The numbers of requests with one client, and with 64: enough for all of them to queue.
ALONE, CROWDED = scaled(1000), scaled(400)
SEEDS = ("--seeds", *map(str, range(scaled(1))))


@pytest.fixture(scope="module")
def alone(once_per_run: OncePerRun) -> Found:
    """All made traces, one request at a time."""
    found: Found = once_per_run("alone", lambda: simulated("--requests", str(ALONE), *SEEDS))
    return found


@pytest.fixture(scope="module")
def crowded(once_per_run: OncePerRun) -> Found:
    """The same with 64 clients at once."""
    arguments = ("--requests", str(CROWDED), *SEEDS, "--clients", "64")
    found: Found = once_per_run("crowded", lambda: simulated(*arguments))
    return found


@pytest.mark.parametrize(("trace", "bound"), [("zipf", 1.3), ("drift", 1.5)])
def test_loads_stay_close_to_those_of_a_manager_that_knows_the_future(trace: str, bound: float) -> None:
    # Long, because the first loads of all models are no mistakes.
    found = simulated(trace, "--requests", "3000", "--seeds", "0", "1", "2", "--policies", "mpmm")
    assert len(found) == 3
    for one in found.values():
        assert one["mpmm"]["loads"] <= bound * one["offline"]["loads"]


def test_loads_are_never_more_than_those_of_lru_or_beam(alone: Found, crowded: Found) -> None:
    for trace, found in [*alone.items(), *crowded.items()]:
        assert found["mpmm"]["loads"] <= 1.02 * min(found["lru"]["loads"], found["beam"]["loads"]), trace


def test_with_many_clients_fewer_loads_are_needed_and_nobody_waits_longer_than_under_beams_rules(
    alone: Found, crowded: Found
) -> None:
    for trace, found in crowded.items():
        assert found["mpmm"]["loads"] / CROWDED < alone[trace]["mpmm"]["loads"] / ALONE
        assert found["mpmm"]["wait_p99_s"] <= found["beam"]["wait_p99_s"]
        assert found["mpmm"]["served"] == CROWDED


def test_the_workers_of_a_pipeline_need_few_more_loads_than_if_all_that_they_ask_for_was_known() -> None:
    # The requests of four Beam workers, 28 batches each; without loads before the first waiter's, there are 60 loads.
    sequences = [[int(model) for model in order * 7] for order in ("0213", "1032", "2103", "3120")]
    for load_s in (0.3, 1.0, 10.0):
        setting = Setting([4000.0] * 4, 4500.0, load_s, hold_s=0.012, unload_s=0.1)
        outcome = simulate_clients(setting, POLICIES["mpmm"], sequences, think_s=0.003)
        assert outcome.loads <= 1.3 * closed_loads(sequences), load_s
        assert (outcome.broken_bounds, outcome.endless_waits) == (0, 0)


def test_the_bound_on_overtaking_is_never_broken(crowded: Found, cycling: Found) -> None:
    for found in (crowded, cycling):
        assert {trace: one["mpmm"]["broken_bounds"] for trace, one in found.items()} == dict.fromkeys(found, 0)


def replayed(trace: str, seed: int, load_s: float, clients: int, budget_mb: float = 0.0) -> Outcome:
    """Replay 400 requests of a made trace for models of the usual sizes."""
    setting = Setting(SIZES_MB, load_s=load_s, suspend_budget_mb=budget_mb)
    return simulate(setting, POLICIES["mpmm"], TRACES[trace](400, len(SIZES_MB), seed), clients=clients)


@pytest.mark.parametrize(("trace", "seed"), [("zipf", 2), ("drift", 2)])
@pytest.mark.parametrize("budget_mb", [0.0, 12288.0])
def test_the_bound_on_overtaking_holds_where_loads_take_longer_than_it(trace: str, seed: int, budget_mb: float) -> None:
    assert [replayed(trace, seed, load_s, 8, budget_mb).broken_bounds for load_s in (5.0, 10.0)] == [0, 0]


@pytest.mark.parametrize(("trace", "seed"), [("bursts", 1), ("cycles", 0), ("cold", 2)])
@pytest.mark.parametrize(
    ("load_s", "budget_mb", "clients", "share"),
    [
        pytest.param(2.0, 49152.0, 64, 1.01, id="loads of 2 s: hardly any model gains"),
        pytest.param(5.0, 12288.0, 8, 1.0, id="loads of 5 s, with room for a third of the models"),
        pytest.param(5.0, 49152.0, 64, 0.95, id="loads of 5 s"),
    ],
)
def test_suspension_never_takes_longer_and_pays_where_loads_are_slow(
    trace: str, seed: int, load_s: float, budget_mb: float, clients: int, share: float
) -> None:
    with_it, without = (replayed(trace, seed, load_s, clients, mb) for mb in (budget_mb, 0.0))
    assert with_it.finished_s <= share * without.finished_s


@pytest.fixture(scope="module", params=[1.0, 10.0], ids=lambda load_s: f"loads of {load_s:.0f} s")
def cycling(request: pytest.FixtureRequest, once_per_run: OncePerRun) -> Found:
    """Four closed clients that cycle through four models with room for one, whose loads take less and more than the
    bound on overtaking."""
    room = ("--sizes-mb", *["4000"] * 4, "--device-mb", "4500", "--load-seconds", str(request.param))
    kinds = ("--cycling", "together", "apart", "own", "random")
    setting = (*kinds, "--clients", "4", "--requests", "96", "--seeds", "0", "1", "2", "--policies", "mpmm", *room)
    found: Found = once_per_run(f"cycling-{request.param:.0f}", lambda: simulated(*setting))
    return found


def test_closed_clients_that_cycle_share_their_loads(cycling: Found) -> None:
    shares = {trace: found["mpmm"]["loads"] / found["closed"]["loads"] for trace, found in cycling.items()}
    assert all(shares[f"{kind}-{seed}"] == 1.0 for kind in ("together", "apart") for seed in range(3)), shares
    in_any_order = [shares[f"{kind}-{seed}"] for kind in ("own", "random") for seed in range(3)]
    assert sum(in_any_order) <= 1.25 * len(in_any_order), shares
    assert max(in_any_order) <= 1.3, shares


def test_nobody_waits_where_nothing_is_active_or_being_loaded_or_unloaded(
    alone: Found, crowded: Found, cycling: Found
) -> None:
    for found in (alone, crowded, cycling):
        assert {trace: one["mpmm"]["endless_waits"] for trace, one in found.items()} == dict.fromkeys(found, 0)


@pytest.mark.parametrize(
    ("sequences", "room", "loads"),
    [
        pytest.param([[0, 0, 1, 0]], 1, 3, id="one client alone"),
        pytest.param([[0, 1], [0, 1], [0, 1]], 1, 2, id="in step"),
        pytest.param([[0, 1, 0, 1], [1, 0, 1, 0]], 1, 5, id="one model apart"),
        pytest.param([[0, 1, 2], [2, 1, 0]], 1, 5, id="against each other"),
        pytest.param([[0, 1, 2], [2, 1, 0]], 2, 4, id="against each other with room for two"),
        pytest.param([[0, 1, 2], [2, 1, 0]], 3, 3, id="with room for all"),
        pytest.param([[], []], 1, 0, id="nothing"),
    ],
)
def test_the_bound_of_closed_clients_is_what_the_best_order_of_loads_needs(
    sequences: list[list[int]], room: int, loads: int
) -> None:
    assert closed_loads(sequences, room) == loads


def test_a_trace_can_be_read_from_a_file_and_drawn(tmp_path: Path) -> None:
    trace = tmp_path / "day.csv"
    trace.write_text("time,model\n0.0,a\n2.0,b\n1.0,a\n3.0,c\n")
    arguments = (str(trace), "--sizes-mb", "8000", "--load-seconds", "0.5")
    found = simulated(*arguments)["day"]
    assert (found["mpmm"]["served"], found["mpmm"]["loads"], found["offline"]["loads"]) == (4, 3, 3)
    assert found["mpmm"]["wait_max_s"] == pytest.approx(0.52)
    done = subprocess.run([sys.executable, TOOL, "--plot", *arguments], capture_output=True, text=True, check=True)
    assert "day, mpmm: memory in use, top 8000 MB" in done.stdout
