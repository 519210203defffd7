"""Run many models on several simulated GPUs, and show how `placement` spreads them.

Processes acquire models of 150 to 750 MB at random, popular ones more often, each in a model server that takes its
memory where `CUDA_VISIBLE_DEVICES` sends it. The output shows for each device the most memory ever in use, by the
device's own record, the mean share of its limit that was accounted for, and the loads; and how far apart the devices
are.

    tools/many_gpus.py              24 models, 32 processes; 1, 2 and 8 GPUs, one of which is cut into two slices
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

GPU_MB = 6144.0
#: GPUs, and the slices of the first one.
LAYOUTS: dict[str, tuple[int, tuple[float, ...]]] = {
    "1 GPU": (1, ()),
    "2 GPUs": (2, ()),
    "8 GPUs, one of them two slices": (8, (3072.0, 3072.0)),
}


def main() -> int:
    """Measure all layouts and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", type=int, default=24)
    parser.add_argument("--processes", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=30.0)
    options = parser.parse_args()
    # Not at the top: every model server imports this module again, as its `__main__`.
    from devices.many_gpus_crew import Setting, measure
    from devices.simulated_gpu import SimulatedGpus, build

    setting = Setting(options.models, options.processes, options.seconds)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        built = build(Path(folder) / "driver")
        built.load()
        for number, (layout, (count, slices)) in enumerate(LAYOUTS.items()):
            sizes = {0: slices} if slices else None
            gpus = SimulatedGpus.create(Path(folder) / f"gpus{number}", *[GPU_MB] * count, slices_mb=sizes)
            os.environ.update(gpus.environment(built))
            report = measure(gpus, setting, f"many{number}", Path(folder) / "run")
            print(f"{layout}: {report.acquires} acquires, {report.reasons}")
            for unit, highest, mean, loads in zip(gpus.units(), report.highest, report.mean, report.loads, strict=True):
                print(f"  {unit:42} at most {highest:6.1%} of its limit, {mean:6.1%} in the mean, {loads} loads")
            print(f"  furthest apart in the mean: {report.spread:.1%}; broken invariants: {len(report.problems)}")
            failed |= bool(report.problems) or max(report.highest) > 1 or report.spread > 0.1
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
