"""Beam's metrics of model manager, reported when Beam is there.

Nothing here imports Beam: a process that has not done so has no metrics container to report to. Names
are Beam's, so that dashboards built on its model manager go on working.
"""

from __future__ import annotations

import sys

from mpmm.printable import printable_logger

__all__ = ["report_estimate", "report_model_count"]

logger = printable_logger(__name__)

NAMESPACE = "BeamML_ModelManager"


def report_model_count(tag: str, count: int) -> None:
    """Record that `count` copies of `tag` are loaded. Never raises."""
    _update(f"num_loaded_models_{tag}", count)


def report_estimate(tag: str, mb: float) -> None:
    """Record the estimate of `tag`, cut to whole MB, since Beam's distributions take no others. Never raises."""
    _update(f"memory_estimate_mb_{tag}", mb)


def _update(name: str, value: float) -> None:
    beam = sys.modules.get("apache_beam.metrics.metric")
    if beam is None:
        return
    try:
        beam.Metrics.distribution(NAMESPACE, name, process_wide=True).update(int(value))
    except Exception as error:  # a metric is not worth a model: an older Beam knows no process_wide, say
        logger.debug("Beam did not take %s = %s: %r", name, value, error)
