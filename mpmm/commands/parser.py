"""The parser of the command line: each command with its options, in the order in which `mpmm --help` lists them."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from mpmm import __version__
from mpmm.commands import changes, moves
from mpmm.commands.help_pages import TOPICS
from mpmm.errors import InvalidArgumentError
from mpmm.text.arguments import checked_size_mb, in_brief

__all__ = ["DEFAULT_NAMESPACE", "make_parser"]

# The namespace of `mpmm run` if the user names none and none exists.
DEFAULT_NAMESPACE = "default"
_RUNTIME_ROOT: Any = {
    "metavar": "FOLDER",
    "help": "folder of the runtime directories (default: $MPMM_RUNTIME_DIR, or /tmp/mpmm-<uid>)",
}

# What `add_subparsers` returns.
Commands = Any


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `mpmm`; `options.command` is the command."""
    parser = argparse.ArgumentParser(
        prog="mpmm", description="Inspect the model managers of this host, and change them."
    )
    parser.add_argument("--version", action="version", version=f"mpmm {__version__}")
    parser.add_argument("--runtime-root", **_RUNTIME_ROOT)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    _add_looking(commands)
    _add_exporting(commands)
    _add_changing(commands)
    _add_run(commands)
    _add_explaining(commands)
    for command in commands.choices.values():
        # Without a default, which would overwrite an option given before the command.
        command.add_argument("--runtime-root", default=argparse.SUPPRESS, **_RUNTIME_ROOT)
    return parser


def _add_looking(commands: Commands) -> None:
    """Add the commands that show a namespace at a terminal."""
    commands.add_parser("list", help="list the namespaces of this user")
    inspect = commands.add_parser(
        "inspect", help="one screen: problems, memory, waiting requests and why they wait, loaded copies, evictions"
    )
    inspect.add_argument("--json", action="store_true", help="print everything as one JSON object")
    inspect.add_argument("--all", action="store_true", help="show all rows and columns, not only the most important")
    inspect.add_argument(
        "--max-wait",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="exit with 1 if a request has waited longer",
    )
    top = commands.add_parser("top", help="the same as inspect, live; q quits, h shows the keys (needs mpmm[cli])")
    top.add_argument(
        "--interval", type=float, default=0.5, metavar="SECONDS", help="time between two updates (default: 0.5)"
    )
    ps = commands.add_parser("ps", help="one line for each copy and each lease")
    _add_namespace(ps, "all")
    ps.add_argument(
        "--format",
        metavar="FORMAT",
        help="json, or a Python format string such as '{tag} {mb:.0f}'; its fields are the keys of json",
    )
    events = commands.add_parser("events", help="past events and their reasons, one line each")
    events.add_argument(
        "-f", "--follow", action="store_true", help="print new events until the namespace ends, or Ctrl-C"
    )
    events.add_argument("--model", metavar="TAG", help="only events of this model, named as for `mpmm unload`")
    events.add_argument("--json", action="store_true", help="one JSON object for each event")
    events.add_argument(
        "-n", "--last", type=int, metavar="COUNT", help="only the last COUNT past events (default: all that are kept)"
    )
    top.add_argument(
        "--sort", default="state", metavar="KEY", help="sort copies and models by state, MB, age, name or uses"
    )
    top.add_argument(
        "--filter", default="", metavar="TEXT", help="only models whose tag contains this, or that this pid uses"
    )
    _add_namespace(inspect, "all, one line for each if there are several")
    for command in (top, events):
        _add_namespace(command)


def _add_exporting(commands: Commands) -> None:
    """Add the commands whose output other programs read: traces, pictures, metrics, a page; and `check`."""
    trace = commands.add_parser("trace", help="write the last events as a trace for https://ui.perfetto.dev")
    trace.add_argument("-o", "--output", type=Path, metavar="FILE", help="default, and -: the standard output")
    trace.add_argument(
        "--follow", action="store_true", help="wait for the namespace, then write until it ends, or Ctrl-C"
    )
    plot = commands.add_parser("plot", help="draw memory, limit, loads and evictions as a picture (needs mpmm[plot])")
    plot.add_argument(
        "-o", "--output", type=Path, metavar="FILE", required=True, help="a name that ends in .png, .svg or .pdf"
    )
    plot.add_argument("--trace", type=Path, metavar="FILE", help="draw a file that `mpmm trace` wrote")
    metrics = commands.add_parser("metrics", help="print metrics for Prometheus, or serve them by HTTP")
    _add_namespace(metrics, "all")
    metrics.add_argument(
        "--openmetrics", action="store_true", help="print OpenMetrics text (HTTP clients choose by their Accept header)"
    )
    metrics.add_argument("--serve", metavar="[HOST:]PORT", help="serve HTTP at this port (default host: 127.0.0.1)")
    check = commands.add_parser("check", help="verify the invariants of a namespace")
    check.add_argument(
        "--health", action="store_true", help="also fail for any ATTENTION; without a name, check all namespaces"
    )
    dashboard = commands.add_parser("dashboard", help="serve a live page for a browser, read-only (needs mpmm[web])")
    dashboard.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    dashboard.add_argument("--port", type=int, default=8717, help="port to listen on, 0 for any (default: 8717)")
    dashboard.add_argument(
        "--token", help="at least 8 letters, digits or . _ ~ - (default: $MPMM_DASHBOARD_TOKEN, or a random one)"
    )
    dashboard.add_argument("--namespace", help="show only this one, which need not exist yet (default: all)")
    for command in (trace, plot):
        _add_namespace(command)
    _add_namespace(check, "the only one there is; with --health, all")


def _add_changing(commands: Commands) -> None:
    """Add the commands that change a namespace, or clean up and check the host."""
    changes.add_commands(commands)
    reset = commands.add_parser("reset", help="unload everything and cancel all waiting requests")
    _add_namespace(reset, "none, it must be named")
    reset.add_argument("-y", "--yes", action="store_true", help="do not ask at a terminal")
    for command in moves.add_commands(commands):
        _add_namespace(command)
    prune = commands.add_parser("prune", help="remove segments and folders that crashed processes left behind")
    prune.add_argument("--dry-run", action="store_true", help="only list what would be removed")
    doctor = commands.add_parser(
        "doctor", help="check what this host offers, which limits it sets, and which problems there are"
    )
    doctor.add_argument("--bundle", type=Path, metavar="FILE", help="write a support bundle: .tar.gz, .tgz or .zip")


def _add_run(commands: Commands) -> None:
    """Add `mpmm run`."""
    run = commands.add_parser(
        "run",
        help="run a program on a lease of memory, once that much is free",
        usage="%(prog)s --mb SIZE [OPTION ...] -- PROGRAM [ARGUMENT ...]",
        epilog="The lease ends with the program. If `mpmm run` is killed by `kill -9`, the kernel kills the program, "
        "but not the processes that it has started: these may keep memory without a lease. SIGTERM is passed on.",
    )
    run.add_argument(
        "--mb",
        type=_size,
        required=True,
        metavar="SIZE",
        help="the most memory that the program takes: MB, or 5g, 5GiB",
    )
    run.add_argument("--namespace", help=f"default: the only one there is; if there is none, {DEFAULT_NAMESPACE!r}")
    run.add_argument("--name", help="name of the lease (default: the program's)")
    run.add_argument(
        "--priority",
        type=int,
        default=0,
        metavar="NUMBER",
        help="from -10 to 10; each step counts as 10 s of waiting",
    )
    run.add_argument(
        "--steady",
        type=_seconds,
        nargs="?",
        const=math.inf,
        default=0.0,
        metavar="SECONDS",
        help="keep other loads and unloads off its devices for this long, for engines that size themselves by the free "
        "memory (without a number: as long as it runs)",
    )
    run.add_argument(
        "--wait", type=float, default=math.inf, metavar="SECONDS", help="give up after this time (default: never)"
    )


def _add_explaining(commands: Commands) -> None:
    """Add the commands about the command line itself."""
    completion = commands.add_parser("completion", help="print a script that completes `mpmm` in a shell")
    completion.add_argument("shell", choices=("bash", "fish", "zsh"))
    topics = commands.add_parser(
        "help", help="explain a topic in detail: settings, errors, guarantees, limits, stall, …"
    )
    topics.add_argument("topic", nargs="?", choices=sorted(TOPICS), metavar="TOPIC", help=", ".join(TOPICS))
    commands.add_parser("man", help="print the manual page; `mpmm man | man -l -` shows it")


def _add_namespace(command: argparse.ArgumentParser, default: str = "the only one there is") -> None:
    command.add_argument("namespace", nargs="?", help=f"default: {default}")
    # As for commands with other arguments. Its own `dest`, or the form that is not given would overwrite the other.
    command.add_argument(
        "--namespace", dest="named", metavar="NAMESPACE", help=f"the namespace, as an option (default: {default})"
    )


def _seconds(text: str) -> float:
    """Return the number after an option whose number may be left out."""
    try:
        return float(text)
    except ValueError:
        # argparse takes the next word for the number, and that may be the program.
        raise argparse.ArgumentTypeError(
            f"{in_brief(text)}: expected seconds, or nothing; write the program and its arguments after `--`"
        ) from None


def _size(text: str) -> float:
    try:
        return checked_size_mb("--mb", text)
    except InvalidArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
