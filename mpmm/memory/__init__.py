"""How much device memory is in use, and how much a model takes.

    monitor.py           GPUMonitor: when to measure, and what was measured last
    monitor_source.py    a caller's own monitor, in its place
    sampler.py           the thread that measures, so that a source that hangs holds up no other thread
    samples.py           where the samples of all processes of a namespace are kept: in shared memory
    listed_pids.py       tells to whom the pids belong that a source lists
    estimator.py         ResourceEstimator: from readings of whole devices to the memory of each model
    shared_estimator.py  the same on shared memory, for all processes of a namespace
    estimates_file.py    the file that keeps estimates from run to run
    placement.py         tells a loader on which devices to load

`mpmm.sources`, below this package, measures. `mpmm.model_manager`, above it, decides when figures are needed; there the
elected leader samples for all processes, and solves for the estimates.
"""
