"""Replay requests in virtual time through the policy's own functions: `python tools/simulate.py [TRACE ...]`.

TRACE is one of the generated traces (zipf, bursts, cycles, drift, cold) or a CSV file of `time,model` lines, seconds
and names. Each is replayed with mpmm's policy, LRU and Beam's rules, and one request at a time by a manager that knows
the future. Models have the sizes of `tools/workload.py`, unless `--sizes-mb` says otherwise. With
`--suspend-budget-mb`, evicted models are suspended in host memory where that pays, at the speeds of an H100.

With `--cycling`, each client instead goes through all models again and again, like the workers of a Beam pipeline, and
asks for the next one only after it has been served; the bound is then that of such clients:

    python tools/simulate.py --cycling apart own --clients 4 --requests 112 --sizes-mb 4000 4000 4000 4000 \
        --device-mb 4500 --load-seconds 10
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from simulation.bounds import closed_loads, offline_loads
from simulation.manager import Outcome, Setting, simulate, simulate_clients
from simulation.policies import POLICIES
from simulation.traces import CYCLING, SIZES_MB, TRACES, cycling, read_csv


def figures(outcome: Outcome, seconds: float) -> dict[str, Any]:
    """Return the figures of one simulation."""
    waits = np.array([wait for waits in outcome.waits.values() for wait in waits])
    return {
        "served": len(waits),
        "loads": outcome.loads,
        "evictions": outcome.evictions,
        "suspends": outcome.suspends,
        "resumes": outcome.resumes,
        "wait_p50_s": _quantile(waits, 0.5),
        "wait_p99_s": _quantile(waits, 0.99),
        "wait_max_s": _quantile(waits, 1.0),
        "wait_p99_s_by_model": {
            model: _quantile(np.array(waits), 0.99) for model, waits in sorted(outcome.waits.items())
        },
        "used_mean_mb": _mean_mb(outcome),
        "broken_bounds": outcome.broken_bounds,
        "endless_waits": outcome.endless_waits,
        "virtual_s": outcome.finished_s,
        "took_s": seconds,
    }


def _quantile(waits: npt.NDArray[np.float64], share: float) -> float:
    return float(np.quantile(waits, share)) if len(waits) else 0.0


def _mean_mb(outcome: Outcome) -> float:
    if not outcome.used_mb or not outcome.finished_s:
        return 0.0
    times = np.array([at for at, _ in outcome.used_mb] + [outcome.finished_s])
    return float(np.sum(np.diff(times) * [mb for _, mb in outcome.used_mb]) / outcome.finished_s)


def plot(named: dict[str, Outcome], title: str, width: int = 64, height: int = 8) -> str:
    """Return each policy's memory in use over time, as text."""
    lines = []
    for name, outcome in named.items():
        if not outcome.used_mb:
            continue
        times = np.array([at for at, _ in outcome.used_mb])
        used = np.array([mb for _, mb in outcome.used_mb])
        at = np.searchsorted(times, np.linspace(times[0], outcome.finished_s, width), side="right") - 1
        column = used[np.maximum(at, 0)]
        top = float(used.max())
        lines.append(f"{title}, {name}: memory in use, top {top:.0f} MB, {outcome.finished_s:.0f} s")
        for level in range(height, 0, -1):
            lines.append("".join("█" if mb >= top * (level - 0.5) / height else " " for mb in column).rstrip())
        lines.append("─" * width)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Replay requests in virtual time, for several policies.")
    parser.add_argument("traces", nargs="*", metavar="TRACE", help=f"{', '.join(TRACES)}, or a CSV file (default: all)")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=1, help="concurrent clients, each with one request at a time")
    parser.add_argument("--cycling", nargs="+", choices=CYCLING, help="replay cycling clients instead of traces")
    parser.add_argument("--think-seconds", type=float, default=0.005, help="between two requests of such a client")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--policies", nargs="+", choices=sorted(POLICIES), default=list(POLICIES))
    parser.add_argument("--sizes-mb", type=float, nargs="+", default=list(SIZES_MB))
    parser.add_argument("--device-mb", type=float, default=16000.0)
    parser.add_argument("--load-seconds", type=float, default=0.3)
    parser.add_argument("--hold-seconds", type=float, default=0.01)
    parser.add_argument("--suspend-budget-mb", type=float, default=0.0, help="host memory for suspended copies")
    parser.add_argument("--plot", action="store_true", help="draw the memory in use")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    setting = Setting(
        options.sizes_mb,
        options.device_mb,
        options.load_seconds,
        options.hold_seconds,
        suspend_budget_mb=options.suspend_budget_mb,
    )
    found: dict[str, Any] = {}
    if not options.json:
        waits = " ".join(f"{name:>7}" for name in ("p50 s", "p99 s", "max s"))
        counts = " ".join(f"{name:>7}" for name in ("loads", "evicted", "resumed"))
        print(f"{'trace':12} {'policy':8} {counts} {waits} {'MB':>6} {'wall s':>7} {'took s':>6}")
    for kind in options.cycling or ():
        for seed in options.seeds:
            found[f"{kind}-{seed}"] = _replay_clients(kind, seed, setting, options)
    for name in options.traces or (TRACES if not options.cycling else ()):
        for seed in options.seeds if name in TRACES else [0]:
            trace = f"{name}-{seed}" if name in TRACES else Path(name).stem
            found[trace] = _replay(name, seed, trace, setting, options)
    if options.json:
        print(json.dumps(found))
    return 0


def _line(trace: str, policy: str, one: dict[str, Any]) -> str:
    waits = " ".join(f"{one[name]:7.2f}" for name in ("wait_p50_s", "wait_p99_s", "wait_max_s"))
    line = f"{trace:12} {policy:8} {one['loads']:7} {one['evictions']:7} {one['resumes']:7} {waits}"
    line += f" {one['used_mean_mb']:6.0f} {one['virtual_s']:7.1f}"
    line += f" {one['took_s']:6.1f}"
    if policy == "mpmm" and one["broken_bounds"]:
        line += f"  the bound on overtaking was broken {one['broken_bounds']} times"
    if policy == "mpmm" and one["endless_waits"]:
        line += f"  a request waited {one['endless_waits']} times for nothing"
    return line


def _replay_clients(kind: str, seed: int, setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    models = len(setting.sizes_mb)
    sequences = cycling(kind, options.clients, models, options.requests // (options.clients * models), seed)
    found = {}
    for policy in options.policies:
        began = time.perf_counter()
        outcome = simulate_clients(setting, POLICIES[policy], sequences, options.think_seconds)
        found[policy] = figures(outcome, time.perf_counter() - began)
        if not options.json:
            print(_line(f"{kind}-{seed}", policy, found[policy]))
    limit_mb = setting.total_mb * (1 - setting.rules.slack_percentage)
    bound = closed_loads(sequences, max(1, int(limit_mb // max(setting.sizes_mb))))
    found["closed"] = {"loads": bound}
    if not options.json:
        print(f"{kind + f'-{seed}':12} {'closed':8} {bound:7}   clients that wait for each answer, knowing the future")
    return found


def _replay(name: str, seed: int, trace: str, setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    times_s = None
    if name in TRACES:
        models = TRACES[name](options.requests, len(setting.sizes_mb), seed)
    else:
        times_s, names = read_csv(Path(name))
        numbers = {model: number for number, model in enumerate(dict.fromkeys(names))}
        models = [numbers[model] for model in names]
        sizes = [setting.sizes_mb[number % len(setting.sizes_mb)] for number in range(len(numbers))]
        setting = replace(setting, sizes_mb=sizes)
    outcomes, found = {}, {}
    for policy in options.policies:
        began = time.perf_counter()
        outcomes[policy] = simulate(setting, POLICIES[policy], models, times_s, options.clients)
        found[policy] = figures(outcomes[policy], time.perf_counter() - began)
        if not options.json:
            print(_line(trace, policy, found[policy]))
    bound = offline_loads(setting, models)
    found["offline"] = {"loads": bound}
    if options.json:
        return found
    print(f"{trace:12} {'offline':8} {bound:7}   one request at a time, knowing the future")
    if options.plot:
        print(plot(outcomes, trace))
    return found


if __name__ == "__main__":
    sys.exit(main())
