"""Run mpmm's main job for real: eight models, one Beam pipeline, four workers, memory for half of the models.

    python tools/beam_demo.py              on mpmm
    python tools/beam_demo.py --stock      the same pipeline on Beam's own model manager
    python tools/beam_demo.py --compare    both, and the ratio of their times
    python tools/beam_demo.py --small      three small models, 200 elements, three workers

The first run trains the models (scikit-learn, on the data sets that it ships) into a cache folder. Then
a second process runs the pipeline (demo/pipeline.py) and this one watches it: it shows the progress,
measures the memory of the model servers, and checks at the end that every element was predicted exactly
once by each model, that the memory budget was kept, and that nothing was left behind. The exit code is 0
only if all of this holds.

Beam's own manager imports torch for one GPU function. Where torch is not installed, the `--stock` run
uses a stand-in of a few lines.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from demo.models import MODELS, SMALL_MODELS, DemoModel, train_missing
from demo.plan import RECORD, RECORDS_SUFFIX, Plan, load_halves
from demo.watch import MIB, RunReport, Watcher, say

# What a model server holds before its model: Python, Beam and scikit-learn. Measured; only for the default budget.
SERVER_BASE_MB = 150


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit code."""
    options = parse(arguments)
    # A process ended by SIGTERM cleans up as well.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    models = choose_models(options)
    say(f"{len(models)} models, kept in {options.cache}")
    files = train_missing(models, options.cache, lambda text: say(f"  {text}"))
    names = ["mpmm", "stock"] if options.compare else ["stock" if options.stock else "mpmm"]
    reports = [run(name, models, files, options) for name in names]
    ratio = None
    if options.compare:
        ratio = reports[1].seconds / reports[0].seconds
        say(f"\nBeam's own manager took {reports[1].seconds:.1f} s, mpmm {reports[0].seconds:.1f} s: ratio {ratio:.1f}")
    if options.json:
        say(json.dumps({"runs": [asdict(report) for report in reports], "ratio": ratio}))
    return 1 if any(report.problems for report in reports) else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; `--small` only changes the defaults."""
    parser = argparse.ArgumentParser(description="One Beam pipeline over many models, on mpmm or on Beam's manager.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--stock", action="store_true", help="run on Beam's own model manager")
    what.add_argument("--compare", action="store_true", help="run on both and print the ratio of the times")
    parser.add_argument("--small", action="store_true", help="3 small models, 200 elements each, 3 workers")
    parser.add_argument("--models", help="names of models, separated by commas (default: all)")
    parser.add_argument("--workers", type=int, help="SDK harness processes (default: 4)")
    parser.add_argument("--elements", type=int, help="elements per data set (default: half of the data set)")
    parser.add_argument("--batch", type=int, help="elements per prediction call (default: 64, with --small 8)")
    parser.add_argument(
        "--interleaved",
        action=argparse.BooleanOptionalAction,
        help="let each worker use all models by turns, not one model after another for all (default: with --small)",
    )
    parser.add_argument("--budget", type=float, help="memory budget in MB (default: about half of all models)")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "mpmm-demo", help="cache folder")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds after which a run is aborted")
    parser.add_argument("--json", action="store_true", help="print everything once more as JSON, on the last line")
    options = parser.parse_args(arguments)
    options.cache = options.cache.expanduser().resolve()
    options.workers = options.workers or (3 if options.small else 4)
    options.batch = options.batch or (8 if options.small else 64)
    options.interleaved = options.small if options.interleaved is None else options.interleaved
    options.elements = options.elements or (200 if options.small else None)
    return options


def choose_models(options: argparse.Namespace) -> list[DemoModel]:
    """Return the models that the command line asks for; an unknown name ends the program."""
    if options.models is None:
        return list(SMALL_MODELS if options.small else MODELS)
    known = {model.name: model for model in MODELS}
    wanted = options.models.split(",")
    for name in wanted:
        if name not in known:
            raise SystemExit(f"there is no model {name!r}; there are {', '.join(known)}")
    return [known[name] for name in wanted]


def run(manager: str, models: list[DemoModel], files: dict[str, Path], options: argparse.Namespace) -> RunReport:
    """Run the pipeline once, on "mpmm" or on "stock", in a folder of its own below the cache."""
    identity = uuid.uuid4().hex[:12]
    folder = options.cache / "runs" / identity
    (folder / "tmp").mkdir(parents=True)
    elements = {model.data_set: options.elements or len(load_halves(model.data_set)[2]) for model in models}
    plan = Plan(
        folder=str(folder),
        models=[(model.name, model.data_set, str(files[model.name])) for model in models],
        workers=options.workers,
        batch_size=options.batch,
        interleaved=options.interleaved,
        elements=elements,
    )
    if manager == "mpmm":
        budget_mb = options.budget or default_budget_mb(files, options.small)
        plan.manager_args = {
            "memory_source": "host",
            "memory_budget_mb": budget_mb,
            # No model takes half of the budget. Without this, a model not measured yet would be given all of it.
            "default_estimate_mb": budget_mb / 2,
        }
        say(f"\nmpmm: {options.workers} workers, a budget of {budget_mb:.0f} MB for models and their servers")
    else:
        say(f"\nBeam's own manager: {options.workers} workers, no budget (it knows GPU memory only)")
    plan.save(folder / "plan.json")

    report = Watcher(manager, plan, identity, options.timeout).run()
    check_predictions(report, folder)
    print_report(report)
    if report.problems:
        say(f"  the run's folder is kept: {folder}")
    else:
        shutil.rmtree(folder)
    return report


def default_budget_mb(files: dict[str, Path], small: bool) -> float:
    """Return about half of the memory of all models, each loaded once; with `small`, more than they need."""
    together = sum(file.stat().st_size / MIB + SERVER_BASE_MB for file in files.values())
    return float(round(together * 4 if small else together / 2))


def check_predictions(report: RunReport, folder: Path) -> None:
    """Count the predictions per model and compare them with the elements and their labels."""
    records = np.zeros(0, RECORD)
    for file in sorted(folder.glob(f"*{RECORDS_SUFFIX}")):
        report.worker_pids.append(int(file.name.removesuffix(RECORDS_SUFFIX)))
        records = np.concatenate([records, np.fromfile(file, RECORD)])
    for number, model in enumerate(report.models):
        mine = records[records["model"] == number]
        counts = np.bincount(mine["element"], minlength=model.expected)
        labels = load_halves(model.data_set)[3]
        model.predictions = len(mine)
        model.exactly_once = len(counts) == model.expected and bool((counts == 1).all())
        model.accuracy = float((mine["label"] == labels[mine["element"] % len(labels)]).mean()) if len(mine) else 0.0
        if not model.exactly_once:
            wrong = int((counts != 1).sum())
            report.problems.append(f"{model.name}: {wrong} of {model.expected} elements were not predicted once")


def print_report(report: RunReport) -> None:
    """Print the result of a run for people."""
    say(f"\n  {'model':24}{'predictions':>14}{'accuracy':>10}{'loads':>8}{'reuses':>8}{'evictions':>11}{'size':>10}")
    for model in report.models:
        size = "-" if model.size_mb is None else f"{model.size_mb:.0f} MB"
        counters = [("-" if count is None else count) for count in (model.loads, model.reuses, model.evictions)]
        say(
            f"  {model.name:24}{f'{model.predictions}/{model.expected}':>14}{model.accuracy:>10.1%}"
            f"{counters[0]:>8}{counters[1]:>8}{counters[2]:>11}{size:>10}"
        )
    budget = "no budget" if report.budget_mb is None else f"a budget of {report.budget_mb:.0f} MB"
    say(f"  peak of held memory: {report.peak_held_mb:.0f} MB in {report.most_servers} model servers, of {budget}")
    pids = ", ".join(str(pid) for pid in report.worker_pids)
    say(f"  workers that predicted: {len(report.worker_pids)} (pids {pids})")
    say(f"  pipeline time: {report.seconds:.1f} s")
    if report.problems:
        for problem in report.problems:
            say(f"  PROBLEM: {problem}")
    else:
        say("  every element was predicted exactly once by each model, and nothing was left behind")


if __name__ == "__main__":
    sys.exit(main())
