"""How the benchmark's figures are shown: a table for the terminal, JSON, a picture; and the machine they are of."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from benchmark_rows import BEAM, IMPLEMENTATIONS, MPMM, Figure, Row, Summary, ratio, stands

__all__ = ["as_json", "header", "machine", "plot", "row_lines"]

# Returns the summaries of a figure, which is given by its name, by implementation.
Summaries = Callable[[str], Mapping[str, Summary]]
Problems = Mapping[str, list[str]]

_PACKAGES = ("mpmm", "apache-beam", "numpy", "scipy", "filelock")
_COLUMNS = "{:34} {:>7} {:>9} {:>9} {:>9} {:>9} {:>8} {:>7} {:>7}  {}"
_CPU_INFO = Path("/proc/cpuinfo")


def machine() -> dict[str, Any]:
    """Return what the figures depend on: the machine, how busy it is now, and versions."""
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
    """Return the table's first line."""
    return _COLUMNS.format("row", "unit", "mpmm", "tail", "Beam", "tail", "ratio", "must", "reach", "stands")


def row_lines(row: Row, summaries: Summaries, problems: Problems) -> list[str]:
    """Return the lines of the table that a row fills: one for each figure, and one for each problem."""
    lines = []
    for figure in row.figures:
        found = summaries(figure.name)
        times = ratio(figure, found.get(MPMM), found.get(BEAM))
        cells = []
        for implementation in IMPLEMENTATIONS:
            summary = found.get(implementation)
            missing = "failed" if problems.get(implementation) else "-" if implementation in problems else "n/a"
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
    """Draw all figures as bars on a logarithmic axis, with their targets, into `file` (PNG, SVG, PDF).

    Raises ImportError without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [(row, figure, summaries(figure.name)) for row, summaries in results for figure in row.figures]
    drawing, axes = pyplot.subplots(figsize=(11, 1.5 + 0.42 * len(lines)), layout="constrained")
    for number, (_, figure, found) in enumerate(lines):
        for offset, implementation, colour in ((-0.2, MPMM, "tab:blue"), (0.2, BEAM, "tab:orange")):
            if (summary := found.get(implementation)) and summary.value > 0:
                axes.barh(number + offset, summary.value, 0.38, color=colour)
                axes.plot([summary.value, max(summary.tail, 1e-9)], [number + offset] * 2, color="black", linewidth=1)
                axes.annotate(f" {_number(summary.value)}", (summary.value, number + offset), va="center", fontsize=7)
        for value, style in ((figure.must, "-"), (figure.reach, ":")):
            if value is not None and not figure.against_beam:
                axes.plot([value] * 2, [number - 0.45, number + 0.45], style, color="tab:red")
    axes.set_xscale("log")
    axes.set_yticks(
        range(len(lines)), [f"{_title(row, figure)} ({figure.unit})" for row, figure, _ in lines], fontsize=8
    )
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    for name, colour in (("mpmm", "tab:blue"), ("Beam", "tab:orange")):
        axes.barh([0], [0], color=colour, label=name)
    axes.plot([], [], "-", color="tab:red", label="must")
    axes.plot([], [], ":", color="tab:red", label="reach")
    axes.plot([], [], "-", color="black", linewidth=1, label="to the tail")
    axes.legend(loc="lower right", fontsize=8)
    axes.set_title(f"{about['machine']}\n{about['versions']}", fontsize=8)
    drawing.savefig(file, dpi=120)
    pyplot.close(drawing)


def _title(row: Row, figure: Figure) -> str:
    return f"{row.name}: {figure.name}" if figure.name else row.name


def _number(value: float) -> str:
    """Return a number with three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _wanted(figure: Figure, value: float | None) -> str:
    if value is None:
        return ""
    sign = "≥" if figure.more_is_better or figure.against_beam else "≤"
    return f"{sign}{value:g}" + ("×" if figure.against_beam else "")
