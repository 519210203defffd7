"""ResourceEstimator and the pure functions that it uses; estimates reported to Beam."""

from __future__ import annotations

import importlib
import logging
import math
import subprocess
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpmm.errors import InvalidArgumentError
from mpmm.memory.beam_metrics import choose_autoscaling_metric, report_demand, report_estimate, report_model_count
from mpmm.memory.estimator import (
    Estimate,
    Observation,
    ResourceEstimator,
    reconcile,
    smooth,
    solve_footprints,
)

TAGS = ["a", "b", "c"]

configurations = st.dictionaries(
    st.tuples(*(st.integers(0, 4) for _ in TAGS)),
    st.lists(st.floats(0.0, 20000.0), min_size=1, max_size=20),
    min_size=4,
    max_size=12,
)


def scipy_nnls(rows: np.ndarray, readings: np.ndarray) -> tuple[np.ndarray, float]:
    """Return what scipy makes of it. Imported late, because all tests of this process fork more slowly from then on."""
    from scipy.optimize import nnls

    return nnls(rows, readings)  # type: ignore[no-any-return]  # scipy has no types


def observations_of(history: dict[tuple[int, ...], list[float]]) -> list[Observation]:
    return [
        Observation(dict(zip(TAGS, counts, strict=True)), sum(readings) / len(readings), len(readings))
        for counts, readings in history.items()
    ]


@settings(max_examples=200, deadline=None)
@given(configurations)
def test_one_weighted_row_per_configuration_solves_like_one_row_per_reading(
    history: dict[tuple[int, ...], list[float]],
) -> None:
    raw_rows = np.array([[*counts, 1] for counts, readings in history.items() for _ in readings], dtype=float)
    raw_readings = np.array([reading for readings in history.values() for reading in readings])
    raw, residual = scipy_nnls(raw_rows, raw_readings)
    found = solve_footprints(observations_of(history), TAGS, min_data_points=0)
    assert found is not None
    if np.linalg.matrix_rank(raw_rows) == len(TAGS) + 1:  # the best fit is unique
        assert found.model_mb == pytest.approx(dict(zip(TAGS, raw[:-1], strict=True)), rel=1e-6, abs=1e-3)
        assert found.bias_mb == pytest.approx(raw[-1], rel=1e-6, abs=1e-3)
    assert residual >= 0


@settings(max_examples=100, deadline=None)
@given(configurations, st.tuples(*(st.floats(0.0, 8000.0) for _ in range(len(TAGS) + 1))))
def test_whatever_is_solved_from_exact_readings_is_the_truth(
    history: dict[tuple[int, ...], list[float]], truth: tuple[float, ...]
) -> None:
    exact = [
        Observation(dict(zip(TAGS, counts, strict=True)), float(np.dot([*counts, 1], truth)), len(readings))
        for counts, readings in history.items()
    ]
    found = solve_footprints(exact, TAGS, min_data_points=0)
    assert found is not None
    for tag, mb in found.model_mb.items():
        assert mb == pytest.approx(truth[TAGS.index(tag)], rel=1e-5, abs=0.05)


def test_models_that_cannot_be_told_apart_are_left_out() -> None:
    together = [Observation({"a": n, "b": n, "c": c}, 100.0 * n + 50.0 * c + 10, 5) for n in (1, 2) for c in (0, 1)]
    found = solve_footprints(together, TAGS, min_data_points=5)
    assert found is not None
    assert found.model_mb == pytest.approx({"c": 50.0})


def test_a_model_that_is_always_there_is_not_called_free() -> None:
    always = [Observation({"a": 1, "b": n}, 1000.0 + 50.0 * n, 5) for n in (0, 1, 2)]
    found = solve_footprints(always, ["a", "b"], min_data_points=5)
    assert found is not None
    assert found.model_mb == pytest.approx({"b": 50.0})


def test_a_model_that_was_never_observed_is_left_out() -> None:
    found = solve_footprints([Observation({"a": n}, 100.0 * n, 3) for n in (1, 2)], ["a", "b"], min_data_points=5)
    assert found is not None
    assert found.model_mb == pytest.approx({"a": 100.0})


@pytest.mark.parametrize(("configurations", "readings", "solved"), [(2, 5, False), (3, 1, False), (3, 2, True)])
def test_too_few_configurations_or_readings_give_nothing(configurations: int, readings: int, solved: bool) -> None:
    rows = [Observation({"a": n, "b": n * n}, 100.0 * n, readings) for n in range(1, configurations + 1)]
    assert (solve_footprints(rows, ["a", "b"], min_data_points=5) is not None) is solved


def two_models(*, readings: int = 4, spread: float = 100.0, wrong_mb: float = 0.0) -> list[Observation]:
    """Readings of a = 1000 MB, b = 500 MB, and 100 MB in use regardless; the last configuration is off by something."""
    counts, means = [{"a": 1}, {"b": 1}, {"a": 1, "b": 1}, {"a": 2}], [1100.0, 600.0, 1600.0, 2100.0 + wrong_mb]
    return [Observation(one, mb, readings, spread) for one, mb in zip(counts, means, strict=True)]


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(("readings", "spread", "wrong_mb"), [(4, 100.0, 0.0), (4, 0.0, 60.0), (2, 100.0, 60.0)])
def test_the_more_readings_agree_the_more_certain_is_their_solution(
    relative: bool, readings: int, spread: float, wrong_mb: float
) -> None:
    """The figures are those of the textbook, with a row for each reading of its own."""
    observed = two_models(readings=readings, spread=spread, wrong_mb=wrong_mb)
    found = solve_footprints(observed, ["a", "b"], 5, relative=relative)
    assert found is not None
    # Readings of a configuration lie in pairs at a standard deviation from their mean.
    rows = np.array([[one.counts.get("a", 0), one.counts.get("b", 0), 1] for one in observed for _ in range(readings)])
    values = np.array([one.mean_mb + spread**0.5 * sign for one in observed for sign in (-1, 1) * (readings // 2)])
    weights = np.array([1 / one.mean_mb if relative else 1.0 for one in observed for _ in range(readings)])
    weighted = rows * weights[:, None]
    expected = np.linalg.lstsq(weighted, values * weights, rcond=None)[0]
    assert [found.model_mb["a"], found.model_mb["b"], found.bias_mb] == pytest.approx(list(expected))
    variance = float(((weighted @ expected - values * weights) ** 2).sum()) / (len(values) - 3)
    deviations = np.sqrt(variance * np.diag(np.linalg.inv(weighted.T @ weighted)))
    assert [found.sd_mb["a"], found.sd_mb["b"]] == pytest.approx(list(deviations[:2]))


@pytest.mark.parametrize(("last", "certain"), [(1, False), (2, True)])
def test_as_many_readings_as_unknowns_leave_a_solution_uncertain(last: int, certain: bool) -> None:
    observed = [*two_models(readings=1)[:2], Observation({"a": 1, "b": 1}, 1600.0, last, 100.0)]
    found = solve_footprints(observed, ["a", "b"], 0)
    assert found is not None
    assert found.model_mb == pytest.approx({"a": 1000.0, "b": 500.0})
    assert found.bias_mb == pytest.approx(100.0)
    assert {np.isfinite(sd_mb) for sd_mb in found.sd_mb.values()} == {certain}


def test_each_device_has_something_in_use_of_its_own() -> None:
    observed = [
        *(Observation({"a": n}, 1000.0 * n + 100.0, 3, device=0) for n in (1, 2)),
        *(Observation({"a": n, "b": 1}, 1000.0 * n + 700.0, 3, device=1) for n in (1, 2)),
        Observation({"b": 2}, 1100.0, 3, device=1),
    ]
    found = solve_footprints(observed, ["a", "b"], 5)
    assert found is not None
    assert found.model_mb == pytest.approx({"a": 1000.0, "b": 400.0})
    assert found.bias_mb == pytest.approx(400.0)


def test_small_readings_count_for_more_than_large_ones_down_to_one_mb() -> None:
    observed = [Observation({"a": n}, mb, 5) for n, mb in ((1, 0.0), (2, 0.5), (3, 1.0), (4, 1000.0))]
    found = solve_footprints(observed, ["a"], 5, relative=True)
    assert found is not None
    # As if all but the last one were of 1 MB.
    weights = np.sqrt(5.0) / np.array([1.0, 1.0, 1.0, 1000.0])
    rows, readings = np.array([[n, 1.0] for n in (1, 2, 3, 4)]), np.array([0.0, 0.5, 1.0, 1000.0])
    expected, _ = scipy_nnls(rows * weights[:, None], readings * weights)
    assert [found.model_mb["a"], found.bias_mb] == pytest.approx(list(expected), abs=1e-9)


@pytest.mark.parametrize(
    ("old", "new", "factor", "mb", "sd_mb"),
    [
        # The first figure is as certain as it says, within reason.
        *((None, (100.0, 2.0), 0.2, 100.0, 2.0), (None, (100.0, 0.1), 0.2, 100.0, 0.5)),
        *((None, (100.0, 200.0), 0.2, 100.0, 100.0), (None, (100.0, math.inf), 0.2, 100.0, 100.0)),
        # One that was read from a process stays, and so does every one where nothing is to count.
        *(((80.0, 0.0), (100.0, 0.0), 0.5, 80.0, 0.0), ((80.0, 0.0), (100.0, 1.0), 0.5, 80.0, 0.0)),
        *(((80.0, 3.0), (100.0, 1.0), 0.0, 80.0, 3.0), ((80.0, 3.0), (100.0, math.inf), 0.5, 80.0, 3.0)),
        # The factor counts for one that is as certain, and for one that is more certain.
        *(((80.0, 4.0), (100.0, 4.0), 0.5, 90.0, math.hypot(2.0, 2.0)), ((80.0, 4.0), (100.0, 1.0), 0.5, 90.0, 2.0616)),
        *(((80.0, 4.0), (100.0, 0.0), 0.5, 90.0, 2.0), ((80.0, 0.1), (100.0, 0.1), 1.0, 100.0, 0.5)),
        # One that is less certain counts by the ratio of the variances.
        ((80.0, 4.0), (100.0, 8.0), 0.8, 84.0, math.hypot(0.8 * 4.0, 0.2 * 8.0)),
    ],
)
def test_of_two_figures_the_more_certain_one_counts_for_more(
    old: tuple[float, float] | None, new: tuple[float, float], factor: float, mb: float, sd_mb: float
) -> None:
    found = reconcile(None if old is None else Estimate(*old), Estimate(*new), factor)
    assert [found.mb, found.sd_mb] == pytest.approx([mb, sd_mb], rel=1e-4)


def test_smoothing_moves_by_the_factor_and_starts_at_the_first_value() -> None:
    assert smooth(None, 80.0, 0.2) == 80.0
    assert smooth(100.0, 200.0, 0.2) == pytest.approx(120.0)


def feed(estimator: ResourceEstimator, rounds: int = 5) -> None:
    """Readings of a = 1000 MB, b = 500 MB and 100 MB in use regardless."""
    for _ in range(rounds):
        estimator.add_observation({"a": 1}, 1100.0)
        estimator.add_observation({"b": 1}, 600.0)
        estimator.add_observation({"a": 1, "b": 1}, 1600.0)


def test_estimates_come_from_the_readings() -> None:
    estimator = ResourceEstimator()
    assert estimator.is_unknown("a")
    assert estimator.get_estimate("a") == 4000.0
    assert estimator.get_estimate("a", 7.0) == 7.0
    feed(estimator)
    assert not estimator.is_unknown("a")
    assert estimator.get_estimate("a") == pytest.approx(1000.0)
    assert estimator.get_estimate("b") == pytest.approx(500.0)


def test_an_initial_estimate_moves_slowly_towards_the_readings() -> None:
    estimator = ResourceEstimator(smoothing_factor=0.5)
    estimator.set_initial_estimate("a", 3000.0)
    feed(estimator, rounds=2)  # solutions at the 5th and the 6th reading
    assert estimator.get_estimate("a") == pytest.approx(1500.0)


def test_an_initial_estimate_without_readings_is_not_worn_away_by_the_others() -> None:
    estimator = ResourceEstimator()
    estimator.set_initial_estimate("rare", 3000.0)
    feed(estimator)
    assert estimator.get_estimate("rare") == 3000.0


def test_a_configuration_is_known_by_the_copies_that_are_there() -> None:
    estimator = ResourceEstimator()
    estimator.add_observation({"b": 2, "a": 1, "c": 0}, 500.0)
    estimator.add_observation({"a": 1, "b": 2}, 600.0)
    estimator.add_observation({"a": 0}, 50.0)
    assert {one: list(readings) for one, readings in estimator.history.items()} == {
        (("a", 1), ("b", 2)): [500.0, 600.0],
        (): [50.0],
    }
    assert estimator.known_models == {"a", "b", "c"}


@pytest.mark.parametrize("least", [None, 5, 6])
def test_the_first_solution_comes_with_the_least_number_of_readings(least: int | None) -> None:
    estimator = ResourceEstimator() if least is None else ResourceEstimator(min_data_points=least)
    solved_at = []
    for number in range(1, 8):
        feed(estimator, rounds=1) if number == 1 else estimator.add_observation({"a": 1}, 1100.0)
        solved_at.append(not estimator.is_unknown("a"))
    # The first turn has three readings.
    assert solved_at.index(True) + 3 == (least or 5)


def test_a_solution_moves_an_estimate_by_a_fifth() -> None:
    estimator = ResourceEstimator(min_data_points=3)
    estimator.set_initial_estimate("a", 2000.0)
    feed(estimator, rounds=1)
    assert estimator.get_estimate("a") == pytest.approx(1800.0)


@pytest.mark.parametrize(
    ("counts", "is_taken"),
    [({"a": 0}, True), ({"a": 2**16 - 1}, True), ({"a": 2**16}, False), ([("a", 1)], False), (None, False)],
)
def test_counts_are_whole_numbers_that_a_segment_has_room_for(counts: Any, is_taken: bool) -> None:
    estimator = ResourceEstimator()
    with nullcontext() if is_taken else pytest.raises(InvalidArgumentError):
        estimator.add_observation(counts, 0.0)
    assert bool(estimator.history) is is_taken


def test_an_empty_snapshot_is_ignored() -> None:
    estimator = ResourceEstimator()
    estimator.add_observation({}, 500.0)
    assert not estimator.history


def test_only_the_latest_twenty_readings_of_a_configuration_count() -> None:
    estimator = ResourceEstimator(smoothing_factor=1.0)
    feed(estimator, rounds=10)
    for _ in range(20):
        estimator.add_observation({"a": 1}, 2100.0)
        estimator.add_observation({"a": 1, "b": 1}, 2600.0)
    assert estimator.get_estimate("a") == pytest.approx(2000.0)


def test_history_is_bounded_and_drops_what_was_seen_longest_ago() -> None:
    estimator = ResourceEstimator(min_data_points=10**9)
    estimator.add_observation({"a": 1000}, 1.0)
    for copies in range(1, 259):
        estimator.add_observation({"a": 1}, 1.0)
        estimator.add_observation({"a": copies}, 1.0)
    assert len(estimator.history) == 256
    assert len(estimator.history[(("a", 1),)]) == 20
    assert (("a", 1000),) not in estimator.history
    assert (("a", 2),) not in estimator.history
    assert (("a", 5),) in estimator.history


@pytest.mark.parametrize(
    "answer",
    [
        {"side_effect": RuntimeError("Maximum number of iterations reached.")},
        {"return_value": ([float("nan")] * 3, 0.0)},
        {"return_value": ([1.0], 0.0)},
    ],
    ids=["raises", "nan", "wrong length"],
)
def test_numeric_trouble_is_logged_and_keeps_the_estimates(
    answer: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    estimator = ResourceEstimator()
    feed(estimator)
    before = dict(estimator.estimates)
    with patch("mpmm.memory.estimator.nnls", **answer):
        estimator.add_observation({"a": 2}, 9999.0)
    assert estimator.estimates == before
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


@pytest.mark.parametrize(
    ("snapshot", "peak_mb"),
    [({"a": 1}, -1.0), ({"a": 1}, float("nan")), ({"a": -1}, 5.0), ({"a": 1.5}, 5.0), ({"b": 1, 7: 1}, 5.0)],
)
def test_bad_observations_are_refused_and_change_nothing(snapshot: dict[Any, Any], peak_mb: float) -> None:
    estimator = ResourceEstimator()
    with pytest.raises(InvalidArgumentError):
        estimator.add_observation(snapshot, peak_mb)
    assert not estimator.history and not estimator.known_models


@pytest.mark.parametrize(("tag", "cost"), [("a", -1.0), ("a", float("inf")), ("a", "many"), (7, 5.0)])
def test_bad_initial_estimates_are_refused_and_change_nothing(tag: Any, cost: Any) -> None:
    estimator = ResourceEstimator()
    with pytest.raises(InvalidArgumentError):
        estimator.set_initial_estimate(tag, cost)
    assert not estimator.estimates and not estimator.known_models


def test_what_is_no_tag_is_refused_wherever_one_is_asked_for() -> None:
    estimator, wrong = ResourceEstimator(), cast(Any, 7)
    for ask in (estimator.is_unknown, estimator.get_estimate):
        with pytest.raises(InvalidArgumentError, match="model tag 7"):
            ask(wrong)


def test_a_model_with_an_initial_estimate_is_known_and_may_take_nothing() -> None:
    estimator = ResourceEstimator()
    estimator.set_initial_estimate("a", 0.0)
    assert (estimator.known_models, estimator.get_estimate("a"), estimator.is_unknown("a")) == ({"a"}, 0.0, False)


def test_another_solver_counts_where_it_is_put_here_or_where_beams_manager_has_it() -> None:
    def solves(a: Any, b: Any) -> tuple[list[float], float]:
        return [7.0, 8.0, 9.0], 0.0

    here, of_beam = "mpmm.memory.estimator.nnls", SimpleNamespace(nnls=solves)
    for patched in (patch(here, solves), patch.dict(sys.modules, {"mpmm.model_manager": of_beam})):
        with patched:
            found = solve_footprints(two_models(), ["a", "b"], 5)
        assert found is not None
        assert (found.model_mb, found.bias_mb) == ({"a": 7.0, "b": 8.0}, 9.0)


def test_numpy_numbers_are_numbers() -> None:
    estimator = ResourceEstimator()
    estimator.add_observation({"a": np.int64(1)}, np.float32(100.0))
    estimator.set_initial_estimate("a", np.float32(100.0))
    assert estimator.get_estimate("a") == 100.0


def test_settings_at_the_ends_of_their_ranges_are_taken() -> None:
    for factor, least in ((0.0, 0), (1.0, 1), (0.5, sys.maxsize)):
        estimator = ResourceEstimator(factor, least)
        assert (estimator.smoothing_factor, estimator.min_data_points) == (factor, least)


@pytest.mark.parametrize("arguments", [{"smoothing_factor": 1.5}, {"smoothing_factor": -0.1}, {"min_data_points": -1}])
def test_settings_out_of_range_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(arguments))):
        ResourceEstimator(**arguments)


def test_verbose_logging_tells_and_is_silent_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        feed(ResourceEstimator())
        assert not caplog.records
        feed(ResourceEstimator(verbose_logging=True))
    assert any("1000.0 MB" in record.getMessage() for record in caplog.records)


def test_importing_the_estimator_loads_neither_scipy_nor_beam() -> None:
    code = (
        "import sys, mpmm.memory.estimator as r; r.report_estimate('a', 1.0);"
        "print([m for m in ('scipy', 'numpy', 'apache_beam') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


class FakeMetrics:
    """Beam's metrics as far as they are used: whole numbers only, as in Beam."""

    def __init__(self) -> None:
        self.updates: list[tuple[str, str, int]] = []

    def distribution(self, namespace: str, name: str, *, process_wide: bool) -> SimpleNamespace:
        assert process_wide

        def update(value: int) -> None:
            assert type(value) is int
            self.updates.append((namespace, name, value))

        return SimpleNamespace(update=update)


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> FakeMetrics:
    module = ModuleType("apache_beam.metrics.metric")
    fake = FakeMetrics()
    module.Metrics = fake  # type: ignore[attr-defined]  # a module made up
    monkeypatch.setitem(sys.modules, "apache_beam.metrics.metric", module)
    return fake


def test_estimates_are_reported_to_beam_as_whole_mb(metrics: FakeMetrics) -> None:
    estimator = ResourceEstimator()
    estimator.set_initial_estimate("a", 1000.5)
    assert metrics.updates == [("BeamML_ModelManager", "memory_estimate_mb_a", 1000)]
    feed(estimator)
    assert "memory_estimate_mb_b" in {name for _, name, _ in metrics.updates}


def test_model_counts_are_reported_to_beam(metrics: FakeMetrics) -> None:
    report_model_count("a", 3)
    assert metrics.updates == [("BeamML_ModelManager", "num_loaded_models_a", 3)]


def test_the_demand_takes_the_place_of_the_count_under_the_same_name(
    metrics: FakeMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    report_demand("a", 7)
    assert metrics.updates == [], "not chosen"
    monkeypatch.setattr("mpmm.memory.beam_metrics._chosen", "loaded")
    choose_autoscaling_metric("demand")
    report_model_count("gs://bucket/a model", 3)
    report_demand("gs://bucket/a model", 7)
    assert metrics.updates == [("BeamML_ModelManager", "num_loaded_models_gs://bucket/a model", 7)]


def test_nothing_that_beam_does_reaches_the_caller(metrics: FakeMetrics, monkeypatch: pytest.MonkeyPatch) -> None:
    report_estimate("a", float("nan"))
    monkeypatch.delattr(sys.modules["apache_beam.metrics.metric"], "Metrics")
    report_model_count("a", 3)
    monkeypatch.delitem(sys.modules, "apache_beam.metrics.metric")
    report_model_count("a", 3)
    assert metrics.updates == []


def test_real_beam_takes_the_metrics() -> None:
    pytest.importorskip("apache_beam", reason="needs Apache Beam")
    execution: Any = importlib.import_module("apache_beam.metrics.execution")
    metricbase: Any = importlib.import_module("apache_beam.metrics.metricbase")
    report_estimate("mpmm-test", 1000.9)
    name = metricbase.MetricName("BeamML_ModelManager", "memory_estimate_mb_mpmm-test")
    container = execution.MetricsEnvironment.process_wide_container()
    assert container.get_distribution(name).get_cumulative().max == 1000
