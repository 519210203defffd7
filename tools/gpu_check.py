"""Check mpmm on a real GPU: `python tools/gpu_check.py [--only CHECK,…] [--minutes 5] [--device 0]`

Needs mpmm, installed or on PYTHONPATH, and torch with CUDA; with `--simulated` it runs on a simulated GPU, to test this
tool. Several processes load models of 1 to 8 GB, modules with CUDA tensors, into model servers through mpmm, and one
table shows

    figures      NVML's figure of a process next to torch's, and of the device next to the sum of its processes
    attribution  what mpmm accounts for a copy, and estimates after one load, next to NVML's figure of its process
    learning     the estimate of a model whose first load ran out of memory and whose second succeeded
    isolation    the estimates if mpmm sees only the whole device, as without NVML
    recovery     how long after an unload the device's memory is free again
    turns        some minutes of loads and evictions in turn, by several processes, with more models than memory
    suspend      the driver's checkpoints: how long models take to host memory and back, what mpmm accounts for them,
                 models that are suspended for each other in turn, and what a killed helper process leaves behind
    pipeline     models behind Beam's RunInference, where Apache Beam is installed

with the expected values. The exit code is 0 if all of them are met.

NVML counts what the driver reserves as used (480 MB on the H100), and CUDA counts it neither as used nor as part of the
device. The check reports this difference without judging it. It does judge that NVML's figure less all processes is the
same as on the empty device.

One run on an NVIDIA H100 80GB HBM3 (driver 580.159.04, NVML, 16 processors, torch 2.11, Apache Beam 2.77), everything
expected met, with `--minutes 0.7` of turns and `--suspend-minutes 0.8`:

    process, NVML less torch     610 to 610 MB
    device less processes        +50 MB
    accounted, estimated         0.00 % off
    out of memory, learnt        once, 0.00 % off; 0 times later
    estimate, alone              +0.5 %
    3072 MB back                 0.12 s after an unload
    turns                        27 models of 120832 MB, 6 processes, 43 s: 482 uses, 118 loads, 106 evictions
    wait for a model             0.3 ms in the median, longest 5.29 s
    out of memory                0
    highest use                  98.9 % of the limit
    pipeline                     3 models, 2 workers, 3 loads, 144 of 144 predictions, out of memory 0

    model                        1 GB          8 GB          32 GB
    suspended in                 1.3 s         5.8 s         19 s
    resumed in                   0.67 s        2.4 s         7.3 s
    first use after that         5 ms          41 ms         119 ms (before: 7, 41 and 117)
    host memory of it            +1.9 GB       +8.8 GB       +33 GB, accounted within 3.4, 0.7 and 0.6 %
    left on the device           3 MB          3 MB          3 MB
    weights, CUDA graph, pid     the same after each of 3 rounds

    suspended in turn            6 models of 8472 MB in 5425, 50 s: 71 uses, 6 loads, 26 suspended, 24 resumed
    helper killed as it moves    6 times, 6 served on; decided after 2.02 s at most
    killed while suspended       nothing is left on the device or in host memory
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from devices.gpu_check_models import Loader
from devices.gpu_check_suspend import check_suspend
from devices.gpu_check_table import CONTEXT_AT_MOST_MB, PATIENCE_S, PAUSE_S, Check, at_work, settled_mb
from devices.simulated_gpu import DIRECTORY_VARIABLE, Build, SimulatedGpus, build

from mpmm import ModelManager
from mpmm.policy.out_of_memory import is_out_of_memory
from mpmm.shared_state.runtime_dir import RUNTIME_DIR_VARIABLE
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.sources import DeviceInfo, DeviceSample
from mpmm.sources.nvml import NvmlSource

SIMULATED_MB, SIMULATED_RESERVED_MB, SIMULATED_LINGER_S = 24576.0, 400.0, 0.2
# The models of the turns together, as a multiple of the memory that may be used.
CROWDING = 1.6
RECOVERIES = 5
# Models, workers, elements.
PIPELINE, PIPELINE_QUICK = (3, 2, 48), (2, 1, 16)
PIPELINE_TIMEOUT_S = 300.0


class WholeDevice:
    """NVML as a source that does not measure single processes."""

    name = "nvml, whole devices only"
    measures_processes = False
    frees_late = True
    cheap = True

    def __init__(self) -> None:
        self._source = NvmlSource()

    def devices(self) -> tuple[DeviceInfo, ...]:
        """Return the devices."""
        return self._source.devices()

    def sample(self, server_pids: Sequence[int]) -> tuple[DeviceSample, ...]:
        """Measure, without the figures of processes."""
        return tuple(DeviceSample(s.index, s.used_mb, s.taken_ns) for s in self._source.sample(server_pids))

    def close(self) -> None:
        """Close NVML."""
        self._source.close()


def check_figures_and_attribution(check: Check) -> None:
    """Load models of each size until the device is full; compare NVML's, CUDA's, torch's and mpmm's figures."""
    empty_mb = check.used_mb()
    overheads, differences, accounted, estimated = [], [], [], []
    tensors_mb = total_mb = 0.0
    with ModelManager(namespace="figures", memory_source="nvml") as manager:
        for number, mb in enumerate(sorted(check.sizes_mb())):
            if check.used_mb() + 1.2 * mb > 0.85 * check.device.total_mb:
                break
            tag, loader = f"model-{number}", check.loader(mb)
            handle = manager.acquire_model(tag, loader)
            figures = loader.served(handle).figures()
            sample = check.sample([figures.pid])
            manager.release_model(tag, handle)
            tensors_mb += figures.tensors_mb
            assert sample.used_mb is not None
            differences.append(sample.used_mb - figures.device_used_mb)
            process_mb = sample.process_mb.get(figures.pid)
            if process_mb is not None:
                overheads.append(process_mb - figures.taken_mb)
                total_mb += process_mb
                snapshot = read_snapshot("figures")
                copy = next(copy for copy in snapshot.instances if copy.handle == handle)
                model = next(model for model in snapshot.models if model.tag == tag)
                accounted.append(abs(copy.mb / process_mb - 1))
                estimated.append(abs((model.estimate_mb or 0.0) / process_mb - 1))
        grown_mb = check.used_mb() - empty_mb
    worst = max(differences, key=abs)
    # No expectation: NVML's figure includes the driver's reserve, and CUDA's does not.
    check.say("figures", "device, NVML less CUDA", f"{worst:+.0f} MB at most")
    if not overheads:
        check.say("figures", "single processes", "not listed by NVML here")
        check.say("attribution", "of copies", "not possible")
        return
    is_context = 0 <= min(overheads) <= max(overheads) <= CONTEXT_AT_MOST_MB
    spread = f"{min(overheads):.0f} to {max(overheads):.0f} MB"
    check.say("figures", "process, NVML less torch", spread, f"0 to {CONTEXT_AT_MOST_MB:.0f} MB", is_context)
    rest = grown_mb - total_mb
    check.say("figures", "device less processes", f"{rest:+.0f} MB", "±300 MB", abs(rest) <= 300)
    check.say("figures", "tensors", f"{tensors_mb:.0f} MB in {len(overheads)} models")
    check.say(
        "attribution", "accounted for a copy", f"{max(accounted):.2%} off at most", "≤ 2 %", max(accounted) <= 0.02
    )
    check.say("attribution", "estimate, one load", f"{max(estimated):.2%} off at most", "≤ 2 %", max(estimated) <= 0.02)


def check_learning(check: Check) -> None:
    """Let an unknown model run out of memory next to another; check its estimate after its second load."""
    mb = round(check.device.total_mb / 2)
    loaders = {tag: check.loader(mb) for tag in ("first", "second")}
    # The estimates of both are so small that they load together, and need more memory than there is.
    with ModelManager(namespace="learning", memory_source="nvml", default_estimate_mb=mb / 8) as manager:
        for tag in ("first", "second"):
            before_mb = settled_mb(check)
            handle = manager.acquire_model(tag, loaders[tag])
            figures = loaders[tag].served(handle).figures()
            sample = check.sample([figures.pid])
            manager.release_model(tag, handle)
        ran_out = read_snapshot("learning").out_of_memory
        assert sample.used_mb is not None
        truth_mb = sample.process_mb.get(figures.pid, sample.used_mb - before_mb)
        model = next(model for model in read_snapshot("learning").models if model.tag == "second")
        off = abs((model.estimate_mb or 0.0) / truth_mb - 1)
        for tag in ("first", "second"):
            manager.release_model(tag, manager.acquire_model(tag, loaders[tag]))
        again = read_snapshot("learning").out_of_memory - ran_out
    check.say(
        "learning", "ran out of memory", f"{ran_out} times, {again} more later", "1, 0", (ran_out, again) == (1, 0)
    )
    check.say("learning", "out of memory, learnt", f"{off:.2%} off", "≤ 2 %", off <= 0.02)


def check_isolation(check: Check) -> None:
    """Have unknown models measured alone, by the whole device; compare the estimates with their processes' memory."""
    errors = []
    with ModelManager(namespace="isolation", memory_source=WholeDevice()) as manager:
        for number, mb in enumerate(check.sizes_mb()[:3]):
            tag, loader = f"model-{number}", check.loader(mb)
            before_mb = settled_mb(check)
            handle = manager.acquire_model(tag, loader)
            loader.served(handle).infer()
            figures = loader.served(handle).figures()
            sample = check.sample([figures.pid])
            manager.release_model(tag, handle)
            assert sample.used_mb is not None
            truth_mb = sample.process_mb.get(figures.pid, sample.used_mb - before_mb)
            model = next(model for model in read_snapshot("isolation").models if model.tag == tag)
            errors.append((model.estimate_mb or 0.0) / truth_mb - 1)
    worst = max(errors, key=abs)
    check.say("isolation", "estimate, alone", f"{worst:+.1%} at most", "−2 % to +10 %", -0.02 <= worst <= 0.1)


def check_recovery(check: Check) -> None:
    """Unload a model several times; measure how long it takes until its memory is free again."""
    seconds = []
    mb = check.sizes_mb()[0]
    for _ in range(2 if check.options.quick else RECOVERIES):
        with ModelManager(namespace="recovery", memory_source="nvml") as manager:
            before_mb = settled_mb(check)
            manager.release_model("model", manager.acquire_model("model", check.loader(mb)))
            began = time.monotonic()
            manager.force_reset()
            while check.used_mb() > before_mb + 0.05 * mb and time.monotonic() - began < PATIENCE_S:
                time.sleep(PAUSE_S)
            seconds.append(time.monotonic() - began)
    text = f"{statistics.median(seconds):.2f} s, longest {max(seconds):.2f} s"
    check.say("recovery", f"{mb:.0f} MB back after an unload", text, "≤ 5 s", max(seconds) <= 5.0)


@dataclass
class Turns:
    """What one process of the turns has done. `waits_s` of acquires; `errors` as text."""

    waits_s: list[float] = field(default_factory=list)
    out_of_memory: int = 0
    errors: list[str] = field(default_factory=list)


def take_turns(connection: Connection, sizes_mb: Sequence[float], gpus: SimulatedGpus | None, seed: int) -> None:
    """Use one model after another until told to stop; runs in a process of its own."""
    done = Turns()
    chance = random.Random(seed)
    weights = [1 / (1 + number) for number in range(len(sizes_mb))]
    # The models are unknown at first, so the default estimate is above the size of each.
    unknown_mb = max(sizes_mb) + CONTEXT_AT_MOST_MB
    with ModelManager(
        namespace="turns", memory_source="nvml", default_estimate_mb=unknown_mb, wait_timeout_seconds=120.0
    ) as manager:
        connection.send("attached")
        while not connection.poll(0):
            number = chance.choices(range(len(sizes_mb)), weights)[0]
            loader, tag = Loader(sizes_mb[number], gpus), f"model-{number}"
            began = time.monotonic()
            try:
                with manager.model(tag, loader) as handle:
                    done.waits_s.append(time.monotonic() - began)
                    loader.served(handle).infer()
            except Exception as error:
                done.out_of_memory += is_out_of_memory(error)
                done.errors.append("".join(traceback.format_exception_only(error)).strip())
        connection.send(done)
        connection.recv()


def check_turns(check: Check) -> None:
    """Let several processes load and evict models in turn, and watch the device meanwhile."""
    sizes_mb = crowd(check)
    options = check.options
    arguments = [(sizes_mb, check.gpus, options.seed + number) for number in range(options.processes)]
    with at_work(take_turns, *arguments) as connections:
        highest_mb, began = 0.0, time.monotonic()
        end = began + 60 * options.minutes
        # On a busy machine, the device may not be full at the end.
        while (now := time.monotonic()) < end or (now < end + PATIENCE_S and not read_snapshot("turns").evictions):
            highest_mb = max(highest_mb, check.used_mb())
            time.sleep(PAUSE_S)
        for connection in connections:
            connection.send("stop")
        done: list[Turns] = [connection.recv() for connection in connections]
        took_s = time.monotonic() - began
        snapshot = read_snapshot("turns")
    waits_s = sorted(wait for turns in done for wait in turns.waits_s)
    errors = [error for turns in done for error in turns.errors]
    crowded = f"{len(sizes_mb)} models of {sum(sizes_mb):.0f} MB, {options.processes} processes, {took_s:.0f} s"
    check.say("turns", "what", crowded)
    check.say("turns", "uses, loads, evictions", f"{len(waits_s)}, {snapshot.loads}, {snapshot.evictions}")
    middle, longest = (waits_s[len(waits_s) // 2], waits_s[-1]) if waits_s else (0.0, 0.0)
    check.say("turns", "wait for a model", f"{middle * 1000:.1f} ms, longest {longest:.2f} s")
    short = snapshot.out_of_memory + sum(turns.out_of_memory for turns in done)
    check.say("turns", "out of memory", str(short), "0", short == 0)
    check.say("turns", "other failures", str(len(errors)), "0", not errors)
    for error in errors[:3]:
        check.say("turns", "failure", error)
    limit_mb = snapshot.devices[0].limit_mb
    share = f"{highest_mb:.0f} MB, {highest_mb / limit_mb:.1%} of the limit"
    check.say("turns", "highest use", share, "≤ 101 %", highest_mb <= 1.01 * limit_mb)
    check.say("turns", "evicted at all", "yes" if snapshot.evictions else "no", "yes", snapshot.evictions > 0)


def check_pipeline(check: Check) -> None:
    """Run models behind RunInference; count predictions, loads, and loads that ran out of memory."""
    if importlib.util.find_spec("apache_beam") is None:
        check.say("pipeline", "with Beam", "not possible: apache-beam is not installed")
        return
    from devices.gpu_check_pipeline import LOADED, PREDICTED, RAN_OUT, PipelinePlan

    models, workers, elements = PIPELINE_QUICK if check.options.quick else PIPELINE
    sizes_mb = sorted(check.sizes_mb())[:models]
    with tempfile.TemporaryDirectory(prefix="mpmm-g") as folder:
        record = Path(folder) / "record"
        gpus = None if check.gpus is None else str(check.gpus.folder)
        plan = PipelinePlan(sizes_mb, workers, elements, str(record), gpus)
        done = subprocess.run(
            [sys.executable, "-c", "from devices.gpu_check_pipeline import main; main()", plan.as_json()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            timeout=PIPELINE_TIMEOUT_S,
            check=False,
        )
        lines = record.read_text().splitlines() if record.exists() else []
    what = f"{len(sizes_mb)} models of {sum(sizes_mb):.0f} MB, {workers} workers"
    check.say("pipeline", "what", f"{what}, {lines.count(LOADED)} loads")
    wanted = len(sizes_mb) * elements
    made = lines.count(PREDICTED)
    check.say("pipeline", "predictions", str(made), str(wanted), made == wanted and done.returncode == 0)
    ran_out = lines.count(RAN_OUT)
    check.say("pipeline", "out of memory in Beam", str(ran_out), "0", ran_out == 0)
    if done.returncode:
        check.say("pipeline", "failure", done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no reason")


def crowd(check: Check) -> list[float]:
    """Return the sizes of models that together take `CROWDING` times the memory that may be used."""
    there = check.sizes_mb()
    sizes_mb: list[float] = []
    while sum(sizes_mb) < CROWDING * 0.9 * check.device.total_mb:
        sizes_mb.append(there[len(sizes_mb) % len(there)])
    return sizes_mb


# In the order in which they run.
CHECKS: dict[str, Callable[[Check], None]] = {
    "figures": check_figures_and_attribution,
    "attribution": check_figures_and_attribution,
    "learning": check_learning,
    "isolation": check_isolation,
    "recovery": check_recovery,
    "turns": check_turns,
    "suspend": check_suspend,
    "pipeline": check_pipeline,
}


def chosen_checks(text: str) -> list[Callable[[Check], None]]:
    """Return the checks of a list of names, in the order of CHECKS. Raises ArgumentTypeError for an unknown name."""
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no check {unknown[0]!r}; there are {', '.join(CHECKS)}")
    return list(dict.fromkeys(check for name, check in CHECKS.items() if name in names))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if an expected value was not met, 2 if the checks cannot run."""
    parser = argparse.ArgumentParser(description="Check mpmm on a real GPU, with torch.")
    parser.add_argument(
        "--only", type=chosen_checks, metavar="CHECK[,CHECK]", help=f"any of {', '.join(CHECKS)} (default: all)"
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="how long models are loaded in turn (default: 5)")
    parser.add_argument("--processes", type=int, default=6, help="processes that use them (default: 6)")
    parser.add_argument(
        "--suspend-minutes",
        type=float,
        default=2.0,
        help="at most this long, models are suspended in turn (default: 2)",
    )
    parser.add_argument("--suspend-turns", type=int, default=200, help="and at most this often (default: 200)")
    parser.add_argument(
        "--device", default="0", help="the device's number, or the uuid of a device or slice (default: 0)"
    )
    parser.add_argument("--seed", type=int, default=1, help="for the order in which processes use models (default: 1)")
    parser.add_argument("--json", action="store_true", help="print the table as JSON instead")
    parser.add_argument("--simulated", action="store_true", help="run on a simulated GPU, to test this tool")
    parser.add_argument(
        "--quick", action="store_true", help="fewer and smaller steps in all checks but turns, to test this tool"
    )
    options = parser.parse_args(arguments)
    # The output is the table, without log lines.
    logging.getLogger("mpmm").setLevel(logging.ERROR)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mpmm-g", ignore_cleanup_errors=True)))
        os.environ[RUNTIME_DIR_VARIABLE] = str(folder / "run")
        gpus, built = None, None
        if options.simulated:
            gpus, built = simulate(folder)
        elif importlib.util.find_spec("torch") is None:
            print("gpu_check needs torch with CUDA; --simulated does without", file=sys.stderr)
            return 2
        # All processes see only this device, as their first.
        os.environ["CUDA_VISIBLE_DEVICES"] = options.device
        try:
            source = NvmlSource()
        except Exception as error:
            print(f"gpu_check: {error}", file=sys.stderr)
            return 2
        stack.callback(source.close)
        check = Check(source, source.devices()[0], gpus, built, options)
        run(check)
    failed = [row for row in check.rows if row.met is False]
    if options.json:
        print(json.dumps({"met": not failed, "rows": [asdict(row) for row in check.rows]}))
    return 1 if failed else 0


def simulate(folder: Path) -> tuple[SimulatedGpus, Build]:
    """Make a simulated GPU that this process and its children find."""
    built = build(folder / "driver")
    built.load()
    gpus = SimulatedGpus.create(
        folder / "gpus", SIMULATED_MB, reserved_mb=SIMULATED_RESERVED_MB, linger_s=SIMULATED_LINGER_S
    )
    os.environ.update(gpus.environment(built))
    assert os.environ[DIRECTORY_VARIABLE]
    return gpus, built


def run(check: Check) -> None:
    """Run the checks one after another; if one raises, report that and continue with the others."""
    device = check.device
    check.say("device", "name", f"{device.name}, {device.total_mb:.0f} MB")
    check.say("device", "used by others", f"{check.used_mb():.0f} MB")
    for inspect in check.options.only or dict.fromkeys(CHECKS.values()):
        try:
            inspect(check)
        except Exception as error:
            check.say(inspect.__name__, "failed", "".join(traceback.format_exception_only(error)).strip(), "", False)
            if not check.options.json:
                traceback.print_exc()


if __name__ == "__main__":
    sys.exit(main())
