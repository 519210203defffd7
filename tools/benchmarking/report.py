"""Show the benchmark's figures as a table, JSON or a picture, and describe the machine that they were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from benchmarking.rows import BEAM, IMPLEMENTATIONS, MPMM, Figure, Row, Summary, ratio, stands

__all__ = ["as_json", "header", "machine", "plot", "row_lines"]

# Takes a figure's name; returns its summaries by implementation.
Summaries = Callable[[str], Mapping[str, Summary]]
Problems = Mapping[str, list[str]]

_PACKAGES = ("mpmm", "apache-beam", "numpy", "scipy", "filelock")
_COLUMNS = "{:34} {:>7} {:>9} {:>9} {:>9} {:>9} {:>8} {:>7} {:>7}  {}"
_CPU_INFO = Path("/proc/cpuinfo")


def machine() -> dict[str, Any]:
    """Return what the figures depend on: the machine, its current load, and versions."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "machine": f"{os.cpu_count()} × {_processor()}, {psutil.virtual_memory().total / 2**30:.0f} GB, "
        f"{platform.system()} {platform.release()}",
        "load": "{:.1f} {:.1f} {:.1f}".format(*os.getloadavg()),
        "versions": ", ".join([f"Python {platform.python_version()}", *(f"{k} {v}" for k, v in versions.items())]),
    }


def _processor() -> str:
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def header() -> str:
    """Return the table's header line."""
    return _COLUMNS.format("row", "unit", "mpmm", "tail", "Beam", "tail", "ratio", "must", "reach", "stands")


def row_lines(row: Row, summaries: Summaries, problems: Problems) -> list[str]:
    """Return a row's lines of the table: one for each figure, and one for each problem."""
    lines = []
    for figure in row.figures:
        found = summaries(figure.name)
        times = ratio(figure, found.get(MPMM), found.get(BEAM))
        cells = []
        for implementation in IMPLEMENTATIONS:
            summary = found.get(implementation)
            missing = "-" if implementation in row.implementations else "n/a"
            if problems.get(implementation):
                missing = "failed"
            cells += [_number(summary.value), _number(summary.tail)] if summary else [missing, ""]
        lines.append(
            _COLUMNS.format(
                _title(row, figure),
                figure.unit,
                *cells,
                "" if times is None else _number(times),
                _wanted(figure, figure.must),
                _wanted(figure, figure.reach),
                stands(figure, found.get(MPMM), times),
            ).rstrip()
        )
    for implementation, texts in problems.items():
        lines += [f"    {implementation}: {text}" for text in texts]
    return lines


def as_json(results: Iterable[tuple[Row, Summaries, Problems]], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything as an object for JSON: `about` the run, and `rows` by name with their figures by name."""
    rows: dict[str, Any] = {}
    for row, summaries, problems in results:
        figures = {}
        for figure in row.figures:
            found = summaries(figure.name)
            times = ratio(figure, found.get(MPMM), found.get(BEAM))
            figures[figure.name or row.name] = {
                "unit": figure.unit,
                "must": figure.must,
                "reach": figure.reach,
                "statistic": "worst" if figure.of_worst else "median",
                "of_ratio": figure.against_beam,
                "more_is_better": figure.more_is_better,
                "ratio": times,
                "stands": stands(figure, found.get(MPMM), times),
                **{name: asdict(found[name]) if name in found else None for name in IMPLEMENTATIONS},
            }
        rows[row.name] = {
            "description": row.description,
            "figures": figures,
            "problems": {name: texts for name, texts in problems.items() if texts},
        }
    return {"about": dict(about), "rows": rows}


def plot(results: Iterable[tuple[Row, Summaries]], about: Mapping[str, Any], file: Path) -> None:
    """Draw how many times better than Beam mpmm is, how its figures compare with their targets, and how costs grow.

    The first two are ratios, so figures of all units can stand on one axis. Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = list(results)
    lines = [
        _Line(row, figure, summaries(figure.name))
        for row, summaries in results
        for figure in row.figures
        if figure.must is not None or len(row.implementations) > 1
    ]
    curves = [(row, summaries) for row, summaries in results if any(figure.size is not None for figure in row.figures)]
    heights = [1.0 + 0.32 * len(lines), 2.5 if curves else 0.01]
    drawing = pyplot.figure(figsize=(13, 1.0 + sum(heights)), layout="constrained")
    axes = drawing.subplot_mosaic([["beam", "must"], ["growth", "growth"]], height_ratios=heights)
    _draw_ratios(axes["beam"], axes["must"], lines)
    if curves:
        _draw_growth(axes["growth"], curves)
    else:
        axes["growth"].remove()
    drawing.suptitle(f"{about['machine']}, load {about['load']}\n{about['versions']}", fontsize=8)
    drawing.savefig(file, dpi=120)
    pyplot.close(drawing)


class _Line:
    """One figure as it is drawn: its title and its measured values."""

    def __init__(self, row: Row, figure: Figure, found: Mapping[str, Summary]) -> None:
        self.title = f"{_title(row, figure)} ({figure.unit})"
        self.figure = figure
        self.ours, self.beams = found.get(MPMM), found.get(BEAM)
        self.times = ratio(figure, self.ours, self.beams)


def _draw_ratios(against_beam: Any, against_must: Any, lines: Sequence[_Line]) -> None:
    """Draw a bar for each figure into two pairs of axes, the first figure at the top of both."""
    for place, line in enumerate(lines):
        figure, ours, beams, times = line.figure, line.ours, line.beams, line.times
        if ours and beams and times:
            against_beam.barh(place, times, color="tab:blue")
            text = f" {_number(ours.value)} against {_number(beams.value)} {figure.unit}"
            against_beam.annotate(text, (max(times, 1.0), place), va="center", fontsize=7)
        part = _share_of_must(figure, ours.value, times) if ours else None
        tail = _share_of_must(figure, ours.tail, times) if ours else None
        if ours and part is not None and tail is not None:
            against_must.barh(place, part, color="tab:blue" if part <= 1 else "tab:orange")
            against_must.plot([part, tail], [place] * 2, color="black", linewidth=1)
            text = f" {_number(ours.value)} {figure.unit}"
            against_must.annotate(text, (max(part, tail), place), va="center", fontsize=7)
        if figure.must and figure.reach:
            reach = figure.must / figure.reach if _is_at_least(figure) else figure.reach / figure.must
            against_must.plot([reach] * 2, [place - 0.4, place + 0.4], color="tab:green")
    against_beam.set_yticks(range(len(lines)), [line.title for line in lines], fontsize=8)
    against_must.set_yticks(range(len(lines)), [""] * len(lines))
    against_beam.set_title("times better than Beam", fontsize=9)
    against_must.set_title("mpmm against its limit (must = 1); green: reach; line: to the tail", fontsize=9)
    for axes in (against_beam, against_must):
        axes.set_xscale("log")
        # The same limits in both, so that a figure is at the same height; the first one on top.
        axes.set_ylim(max(len(lines), 1) - 0.5, -0.5)
        axes.axvline(1.0, color="tab:red", linewidth=1)
        axes.grid(axis="x", alpha=0.3)
        # Make room for the texts.
        axes.margins(x=0.3)


def _draw_growth(axes: Any, curves: Iterable[tuple[Row, Summaries]]) -> None:
    """Draw the series of figures that have a size, a curve for each row."""
    for row, summaries in curves:
        # 0 has no place on a logarithmic axis.
        points = [
            (figure.size, found[MPMM].value)
            for figure in row.figures
            if figure.size and MPMM in (found := summaries(figure.name))
        ]
        axes.plot([size for size, _ in points], [value for _, value in points], "o-", label=row.description)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylabel("µs", fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _share_of_must(figure: Figure, value: float, times: float | None) -> float | None:
    """Return a cost divided by its limit, or for a rate the required one divided by the measured one: good up to 1."""
    if figure.against_beam:
        return figure.must / times if figure.must and times else None
    if not figure.must or not value:
        return None
    return figure.must / value if figure.more_is_better else value / figure.must


def _is_at_least(figure: Figure) -> bool:
    return figure.more_is_better or figure.against_beam


def _title(row: Row, figure: Figure) -> str:
    return f"{row.name}: {figure.name}" if figure.name else row.name


def _number(value: float) -> str:
    """Return a number with three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _wanted(figure: Figure, value: float | None) -> str:
    if value is None:
        return ""
    sign = "≥" if _is_at_least(figure) else "≤"
    return f"{sign}{value:g}" + ("×" if figure.against_beam else "")
