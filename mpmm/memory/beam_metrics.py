"""Beam's metrics of its model manager, reported if Beam is imported.

Nothing here imports Beam: a process that has not imported it has no metrics container to report to. Names are
Beam's, with the tag unchanged, so that dashboards and autoscaling built on its model manager keep working.

`num_loaded_models_<tag>` is one of two figures, whichever the managers of this process were told to report:

    loaded      copies that are loaded, as in Beam: how much memory the model has been given
    demand      copies in use or being loaded, and requests that wait for one: how many the model could use.
                RunInference reports it before and after it acquires a copy, and after it releases one.
"""

from __future__ import annotations

import sys

from mpmm.errors import InvalidArgumentError
from mpmm.text.arguments import in_brief
from mpmm.text.printable import printable_logger

__all__ = ["choose_autoscaling_metric", "report_demand", "report_estimate", "report_model_count", "reports_demand"]

logger = printable_logger(__name__)

NAMESPACE = "BeamML_ModelManager"
AUTOSCALING_METRICS = ("loaded", "demand")

_chosen = AUTOSCALING_METRICS[0]


def choose_autoscaling_metric(name: str) -> None:
    """Choose what this process reports about each model from now on. Raises InvalidArgumentError."""
    global _chosen
    if name not in AUTOSCALING_METRICS:
        raise InvalidArgumentError(
            f"autoscaling_metric={in_brief(name)}: expected {' or '.join(map(repr, AUTOSCALING_METRICS))}"
        )
    _chosen = name


def reports_demand() -> bool:
    """Tell whether this process reports the demand."""
    return _chosen == "demand"


def report_model_count(tag: str, count: int) -> None:
    """Record that `count` copies of `tag` are loaded, if that is the metric. Never raises."""
    if not reports_demand():
        _update(f"num_loaded_models_{tag}", count)


def report_demand(tag: str, count: int) -> None:
    """Record how many copies of `tag` are in use, being loaded or waited for, if that is the metric. Never raises."""
    if reports_demand():
        _update(f"num_loaded_models_{tag}", count)


def report_estimate(tag: str, mb: float) -> None:
    """Record the estimate of `tag`, cut to whole MB, because Beam's distributions take no others. Never raises."""
    _update(f"memory_estimate_mb_{tag}", mb)


def _update(name: str, value: float) -> None:
    beam = sys.modules.get("apache_beam.metrics.metric")
    if beam is None:
        return
    try:
        beam.Metrics.distribution(NAMESPACE, name, process_wide=True).update(int(value))
    except Exception as error:  # a metric must not fail a model: an older Beam has no process_wide, say
        logger.debug("Beam did not take %s = %s: %r", name, value, error)
