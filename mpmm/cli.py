"""The command line: look into a namespace, follow it, check it, change it, run a program in it.

    mpmm list                     the namespaces of this user
    mpmm inspect [NAMESPACE]      one screen: problems, memory, waiting requests and why they wait, loaded copies and
                                  their holders, last evictions; with several namespaces, one line for each
    mpmm inspect --json           everything as one JSON object
    mpmm inspect --max-wait 60    exit status 1 if a request has waited longer than that
    mpmm ps [NAMESPACE]           one line for each copy and lease; --format json or '{tag} {mb:.0f}' for scripts
    mpmm top [NAMESPACE]          the same as inspect, live, with the memory of each device over time; q quits, h helps
    mpmm events [NAMESPACE]       past events and their reasons, one line each (wrapped on a terminal); --follow prints
                                  new ones as they happen
    mpmm trace [NAMESPACE]        the last events as a trace for https://ui.perfetto.dev; --follow appends new ones
    mpmm plot [NAMESPACE]         a picture of memory against the limit, from a namespace or a trace
    mpmm metrics [NAMESPACE]      metrics of all namespaces or one, as Prometheus text; --serve serves them by HTTP
    mpmm dashboard                a live page for a browser, on 127.0.0.1 and protected by a token
    mpmm check [NAMESPACE]        verify the invariants; exit status 1 if one does not hold
    mpmm check --health           for probes: exit status 1 also for any ATTENTION, and if all processes are dead
    mpmm unload TAG               unload a model: idle copies now, copies in use when they are released
    mpmm pin TAG, mpmm unpin TAG  keep the idle copies of a model, in all processes, until unpin
    mpmm preload TAG MODULE:FUNCTION
                                  load a model in a server process, for all processes
    mpmm suspend TAG, mpmm resume TAG
                                  move a model's idle copies into host memory, and back; exit status 1 if none was
                                  moved, or if one is left that should have been resumed
    mpmm settings                 show the settings; `settings set NAME VALUE` changes one for all processes
    mpmm help TOPIC               settings, errors, guarantees, limits, stall and other topics in detail
    mpmm reset NAMESPACE          unload everything and cancel all waiting requests; asks first at a terminal, unless
                                  --yes is given
    mpmm prune                    remove what crashed processes left behind; --dry-run only lists it
    mpmm doctor                   check versions, drivers, memory sources, limits, permissions and namespaces; exit
                                  status 1 if there is a problem; --bundle FILE.tar.gz packs the report for a support
                                  request, without secrets
    mpmm completion SHELL         a script for bash, zsh or fish: source <(mpmm completion bash)
    mpmm man                      the manual page: mpmm man | man -l -
    mpmm run --mb SIZE -- PROGRAM ARGUMENTS…
                                  run a program once that much memory is free, and reserve the memory while it runs

All commands take `--runtime-root FOLDER`, before or after the command. `python -m mpmm` is the same as `mpmm`.

`run` exits with the status of its program, or with 128 + n if signal n ended it; with 127 if there is no such program,
126 if it cannot be run, 125 if the memory cannot be reserved. See `mpmm.model_manager.run_command`. A command
about one namespace exits with 2 if there is none; `list`, `ps`, `metrics`, `prune` and `doctor` are about all of them,
and `top`, `dashboard` and `trace --follow` wait for the one that they are given.

Commands that only look hardly ever take the lock, so they answer even while its holder is stopped, and report that.

A TAG is the tag of a model; failing that, its name, the beginning of its tag if no other tag begins the same way, or
what a screen shows for these: `01234567`, `01234567…` or `SklearnModelHandlerNumpy models/digits.joblib` for a model
that `mpmm ps` shows as `SklearnModelHandlerNumpy models/digits.joblib [01234567…]`. If several models match, the
command names them, changes nothing and exits with 2. Commands that change something accept the beginning of a tag only
for models with a name, or with a `…` after it: `model-1` does not match `model-10`.

A SIZE is a number of MB, or a number with a unit: `5g`, `5GiB`, `800m`; all units are powers of 1024.

JSON schema, version 2: an object with `schema` (2), and every field of `mpmm.shared_state.snapshot.Snapshot` under
its name, its rows as arrays of objects with the fields of `MemberInfo`, `ModelInfo` and so on. Memory is in MB
(MiB), durations in seconds, `*_wall_s` are Unix times; unknown or infinite values are null. A held lease is among
`instances`, with state `leased`, and every lease is among `models`, with kind `lease`. Tickets, and events that the
policy has decided, also have `why`, the sentence that `mpmm inspect` shows. Tickets have `seconds_left`, how much of
the reason's time `seconds` is left now (null once it has passed, and for reasons without a time), and `expected_s`, the
expected time until they are served, judging by the loads and holds so far. `findings` are the sentences at the top of
that screen, as objects with `urgent` and `text`. Fields may be added; if one is removed or changes its meaning, the
version is raised. Version 1 had other names for a few fields; `mpmm help changes` has the table.

On a terminal, sentences that do not fit beside their rows are printed below them, and columns that do not fit even then
are left out (`inspect --all` and a pipe show them all); colours are used unless NO_COLOR is set or TERM is dumb.

Each command imports what only it needs, so that the shell prompt comes back fast.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mpmm import __version__
from mpmm.commands import changes, moves
from mpmm.commands.joining import join
from mpmm.commands.parser import DEFAULT_NAMESPACE, make_parser
from mpmm.errors import InvalidArgumentError, MpmmError, SegmentLostError
from mpmm.observability.colours import painter
from mpmm.observability.findings import longest_wait_s
from mpmm.observability.inspect_screen import EVENTS_OF_EACH, overview, render
from mpmm.observability.tables import wrapped
from mpmm.shared_state.runtime_dir import REGISTRY_FOLDER, SERVERS_LOG, RuntimeDirectory, default_root
from mpmm.shared_state.segment import segment_lost, segment_name
from mpmm.shared_state.snapshot import (
    DeadMakerError,
    EventChoice,
    Snapshot,
    find_lost_namespaces,
    find_namespaces,
    read_snapshot,
)
from mpmm.text.arguments import checked_number, checked_path, checked_timeout, checked_whole, in_brief
from mpmm.text.printable import printable, printable_lines

__all__ = ["as_program", "main"]

EXIT_PROBLEM = 1
EXIT_USAGE = 2
EXIT_NO_LEASE = 125
# What an option expects, in the error for a path that cannot be one.
_FILE = "a file"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, 1 for a problem, 2 if there is nothing to look at."""
    _prepare_streams()
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Everything after `--` belongs to the program to be run, whatever it looks like.
    ours, program = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = make_parser()
    if not ours:
        # A user who types only `mpmm` wants to see which commands there are.
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    options, unknown = parser.parse_known_args(ours)
    if unknown:
        hint = "; write the program and its arguments after `--`" if options.command == "run" else ""
        parser.error(f"unrecognized arguments: {printable(' '.join(unknown))}{hint}")
    if bool(program) != (options.command == "run"):
        parser.error("`run` needs a program after `--`, and no other command takes one")
    named = getattr(options, "named", None)
    if named is not None:
        if options.namespace is not None:
            parser.error(f"two namespaces: {printable(options.namespace)} and --namespace {printable(named)}")
        options.namespace = named
    if options.command == "reset" and options.namespace is None:
        # Taking the only one there is would be a guess, and a reset cannot be undone.
        parser.error("reset: expected the name of the namespace")
    try:
        root = None
        if options.runtime_root is not None:
            root = checked_path("--runtime-root", options.runtime_root, "a folder")
        if options.command == "run":
            return _run(options, program, root)
        if options.command in changes.COMMANDS:
            status = changes.COMMANDS[options.command](options, _namespace(options, root), root)
        else:
            status = _COMMANDS[options.command](options, root)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader of the output has closed it; what is left in the buffer must not raise an error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, MpmmError) as error:
        print(f"mpmm: {printable_lines(str(error))}", file=sys.stderr)
        return EXIT_USAGE


def as_program() -> int:
    """Run the command line as all that this process is for, with the arguments in `sys.argv`; return the exit status.

    An interrupt ends the process by SIGINT, as a shell expects, and without a traceback. Python does that itself when
    KeyboardInterrupt reaches the top: after the exit hooks, so the process has left its namespace. A second
    interrupt ends it at once. `main` passes KeyboardInterrupt on, because its caller may be another program.
    """
    try:
        return main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.excepthook = _print_nothing
        raise


def _print_nothing(*error: object) -> None:
    """Replace the hook that prints the traceback."""


def _prepare_streams() -> None:
    """Make all output printable in some form, whatever the locale can encode. A closed stream becomes an empty one."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    # The C locale has "surrogateescape", which cannot encode letters beyond ASCII either.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _readable(root: Path | None, choice: EventChoice) -> tuple[list[Snapshot], list[str]]:
    """Return the namespaces that can be read, and why others cannot; one that has just ended is left out."""
    snapshots, troubles = [], []
    for name in find_namespaces(root):
        try:
            snapshots.append(read_snapshot(name, root, choice=choice))
        except (OSError, MpmmError) as error:
            if _is_in_passing(error):
                continue
            troubles.append(f"{name}: {error}")
    lost = find_lost_namespaces(root)
    return snapshots, troubles + [str(segment_lost(name, segment_name(root or default_root(), name))) for name in lost]


def _is_in_passing(error: Exception) -> bool:
    """Tell whether a listed namespace could not be read because it has just ended, or is being created."""
    return isinstance(error, FileNotFoundError) and not isinstance(error, DeadMakerError)


def _only_namespace(root: Path | None) -> str:
    names = find_namespaces(root)
    if not names:
        for lost in find_lost_namespaces(root):
            raise segment_lost(lost, segment_name(root or default_root(), lost))
        raise FileNotFoundError(
            f"no namespaces in {root or default_root()}: no process of this user has a model manager at present; "
            "set MPMM_RUNTIME_DIR or --runtime-root to look in another folder"
        )
    if len(names) != 1:
        raise FileNotFoundError(f"which namespace? There are {len(names)}: {', '.join(map(printable, names))}")
    return names[0]


def _namespace(options: argparse.Namespace, root: Path | None) -> str:
    """Return the namespace that the user named, else the only one there is."""
    return _only_namespace(root) if options.namespace is None else options.namespace


def _width() -> int | None:
    """Return how many characters a line of the output may have; None if it is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _list(options: argparse.Namespace, root: Path | None) -> int:
    print("\n".join(map(printable, find_namespaces(root))) or "no namespaces")
    return 0


def _inspect(options: argparse.Namespace, root: Path | None) -> int:
    max_wait_s = checked_number("--max-wait", options.max_wait, 0.0, math.inf, "seconds")
    choice = EventChoice() if options.json else EventChoice(newest_of_each=EVENTS_OF_EACH)
    snapshots, troubles = ([], []) if options.namespace is not None or options.json else _readable(root, choice)
    if not snapshots and not troubles:
        snapshots = [read_snapshot(_namespace(options, root), root, choice=choice)]
    if not options.json:
        for trouble in troubles:
            print("\n".join(wrapped(printable(f"ATTENTION: {trouble}"), _width())) + "\n")
    if not snapshots:
        return EXIT_PROBLEM
    if options.json:
        from mpmm.observability.json_text import snapshot_json

        print(snapshot_json(snapshots[0]))
    elif len(snapshots) > 1:
        print(overview(snapshots, None if options.all else _width(), painter(sys.stdout)))
    else:
        width = None if options.all else _width()
        print(render(snapshots[0], everything=options.all, width=width, paint=painter(sys.stdout)))
        log = RuntimeDirectory(REGISTRY_FOLDER, root).file(SERVERS_LOG)
        if log.exists():
            print(f"\noutput of model servers that outlived the processes that started them: {printable(str(log))}")
    return EXIT_PROBLEM if troubles or max(map(longest_wait_s, snapshots)) > max_wait_s else 0


def _run(options: argparse.Namespace, program: Sequence[str], root: Path | None) -> int:
    import logging

    from mpmm.model_manager.run_command import run_on_lease
    from mpmm.observability.terminal_log import terminal_handler

    # The standard streams belong to the program; a warning that our defaults differ from the settings would be noise.
    logging.getLogger("mpmm").setLevel(logging.ERROR)
    name = Path(program[0]).name if options.name is None else options.name
    try:
        namespace = options.namespace
        if namespace is None:
            namespace = _only_namespace(root) if find_namespaces(root) else DEFAULT_NAMESPACE
        return run_on_lease(
            program,
            options.mb,
            name=name,
            namespace=namespace,
            root=root,
            wait_seconds=options.wait,
            priority=options.priority,
            steady_seconds=checked_timeout("--steady", options.steady),
            says=terminal_handler(sys.stderr),
        )
    except (FileNotFoundError, MpmmError) as error:
        print(f"mpmm: {printable_lines(str(error))}", file=sys.stderr)
        return EXIT_NO_LEASE


def _top(options: argparse.Namespace, root: Path | None) -> int:
    try:
        from mpmm.observability.top import print_once, run
    except ImportError:
        return _missing("cli", "rich")
    from mpmm.observability.controls import SORTS, Controls

    interval_s = checked_number("--interval", options.interval, 0.05, 3600.0, "seconds")
    if options.sort not in SORTS:
        raise InvalidArgumentError(f"--sort {in_brief(options.sort)}: expected one of {', '.join(SORTS)}")
    controls = Controls(options.sort, filter=options.filter)
    if not sys.stdout.isatty():
        return print_once(_namespace(options, root), root, controls)
    # On a terminal, wait for the first namespace to appear.
    namespace = _namespace(options, root) if options.namespace is not None or find_namespaces(root) else None
    # `run` restores the terminal as the stack unwinds; the default action of a signal would end us without that.
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                # A signal that our parent ignores, as nohup does, stays ignored.
                if signal.getsignal(number) == signal.SIG_DFL:
                    stack.callback(signal.signal, number, signal.signal(number, _leave))
        return run(namespace, root, interval_s, controls)


def _leave(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


def _ps(options: argparse.Namespace, root: Path | None) -> int:
    from mpmm.observability.listing import as_table, copies_of, formatted

    copies, status = [], 0
    for name in find_namespaces(root) if options.namespace is None else [options.namespace]:
        try:
            copies += copies_of(read_snapshot(name, root, events=False))
        except (OSError, MpmmError) as error:
            if options.namespace is not None:
                raise
            # Leave out a namespace that has just ended or is being created; a broken one must not hide the others.
            if not _is_in_passing(error):
                print(f"mpmm: {printable_lines(str(error))}", file=sys.stderr)
                status = EXIT_PROBLEM
    if options.format is None:
        head, *lines = as_table(copies, _width())
        print("\n".join([painter(sys.stdout)("head", head), *lines]))
    else:
        for copy in copies:
            # A pipe gets the texts as they are.
            print(formatted(copy, options.format, at_terminal=sys.stdout.isatty()))
    return status


def _events(options: argparse.Namespace, root: Path | None) -> int:
    from mpmm.observability.event_lines import Choice, show_events

    last = None if options.last is None else checked_whole("--last", options.last, 0, sys.maxsize)
    choice = Choice(options.model, last, as_json=options.json, follow=options.follow)
    return show_events(_namespace(options, root), root, choice, width=_width)


def _trace(options: argparse.Namespace, root: Path | None) -> int:
    from mpmm.observability.trace_writer import record

    namespace = _namespace(options, root)
    output = None if options.output in (None, Path("-")) else checked_path("--output", options.output, _FILE)
    return record(namespace, root, output, follow=options.follow)


def _plot(options: argparse.Namespace, root: Path | None) -> int:
    from mpmm.observability.plot import draw, read_trace
    from mpmm.observability.trace_writer import recent_trace

    output = checked_path("--output", options.output, _FILE)
    if options.trace is None:
        events = recent_trace(_namespace(options, root), root)
    else:
        events = read_trace(checked_path("--trace", options.trace, _FILE))
    try:
        draw(events, output)
    except ImportError:
        return _missing("plot", "matplotlib")
    return 0


def _metrics(options: argparse.Namespace, root: Path | None) -> int:
    from mpmm.metrics import Exporter, serve

    if options.serve is None:
        if options.namespace is not None:
            # Here an unknown name is a mistake; for a scrape it may be a namespace that has ended.
            read_snapshot(options.namespace, root, events=False)
        text = Exporter(options.namespace, root, follow=False).text(openmetrics=options.openmetrics)
        # A file or a pipe gets the same text as a scrape.
        print(printable_lines(text) if sys.stdout.isatty() else text, end="")
        return 0
    host, _, port = options.serve.rpartition(":")
    # Python takes other digits for numbers, too: those of other scripts for whole ones, and `²` for no number at all.
    if not (port.isascii() and port.isdigit() and len(port) <= 5) or int(port) > 65535:
        raise InvalidArgumentError(f"--serve {in_brief(options.serve)}: expected PORT or HOST:PORT")
    with contextlib.closing(Exporter(options.namespace, root)) as exporter, contextlib.suppress(KeyboardInterrupt):
        exporter.families()
        with serve(exporter, host.strip("[]") or "127.0.0.1", int(port)) as server:
            address = str(server.server_address[0])
            address = f"[{address}]" if ":" in address else address
            print(f"mpmm: metrics at http://{address}:{server.server_port}/", file=sys.stderr)
            server.serve_forever()
    return 0


def _dashboard(options: argparse.Namespace, root: Path | None) -> int:
    try:
        from mpmm.observability.dashboard.server import checked_token, run
    except ImportError:
        return _missing("web", "starlette and uvicorn")
    if not 0 <= options.port <= 65535:
        raise InvalidArgumentError(f"--port {options.port}: expected a number from 0 to 65535")
    token = checked_token(options.token or os.environ.get("MPMM_DASHBOARD_TOKEN"))
    if options.namespace is not None:
        # Raises for an invalid name; a namespace that does not exist yet may still be created.
        RuntimeDirectory(options.namespace, root)
    return run(options.host, options.port, token, root, options.namespace)


def _missing(extra: str, library: str) -> int:
    print(f"mpmm: this needs {library}; install it with: pip install 'mpmm[{extra}]'", file=sys.stderr)
    return EXIT_USAGE


def _check(options: argparse.Namespace, root: Path | None) -> int:
    from mpmm.shared_state.invariants import check_invariants

    if options.health:
        return _check_health(options, root)
    snapshot = read_snapshot(_namespace(options, root), root, events=False)
    problems = check_invariants(snapshot)
    if problems:
        result = f"{len(problems)} invariants broken"
    else:
        result = "all invariants hold; `mpmm check --health` also says what needs attention"
    for text in (*problems, f"{snapshot.namespace}: {result}"):
        print("\n".join(wrapped(printable(text), _width())))
    return EXIT_PROBLEM if problems else 0


def _check_health(options: argparse.Namespace, root: Path | None) -> int:
    from mpmm.observability.findings import attention_texts

    choice = EventChoice(newest_of_each=0)
    snapshots, troubles = ([], []) if options.namespace is not None else _readable(root, choice)
    if not snapshots and not troubles:
        try:
            snapshots = [read_snapshot(_namespace(options, root), root, choice=choice)]
        except (SegmentLostError, DeadMakerError) as error:
            troubles = [str(error)]
    said = [(trouble, "urgent") for trouble in troubles]
    for snapshot in snapshots:
        found = attention_texts(snapshot)
        said += [(f"{snapshot.namespace}: {text}", "urgent") for text in found]
        if not found:
            said.append((f"{snapshot.namespace}: healthy", "well"))
    paint = painter(sys.stdout)
    for text, style in said:
        for line in wrapped(printable(text), _width()):
            print(paint(style, line))
    return EXIT_PROBLEM if any(style == "urgent" for _, style in said) else 0


def _reset(options: argparse.Namespace, root: Path | None) -> int:
    snapshot = read_snapshot(options.namespace, root, events=False)
    if not options.yes and sys.stdin.isatty():
        in_use = sum(copy.state == "active" for copy in snapshot.copies)
        print(
            f"This unloads {len(snapshot.copies)} copies of {options.namespace}, {in_use} of them in use, and "
            f"cancels {snapshot.waiting} waiting requests. Continue? [y/N] ",
            end="",
            flush=True,
        )
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print(f"{options.namespace}: nothing changed")
            return EXIT_PROBLEM
    with join(options.namespace, root) as manager:
        manager.force_reset()
    print(f"{options.namespace}: reset")
    return 0


def _move(options: argparse.Namespace, root: Path | None) -> int:
    from mpmm.observability.terminal_log import terminal_handler

    return moves.move(options, _namespace(options, root), root, terminal_handler(sys.stderr))


def _prune(options: argparse.Namespace, root: Path | None) -> int:
    from mpmm.shared_state.leftovers import prune

    removed = prune(root or default_root(), dry_run=options.dry_run)
    for leftover in removed:
        print(f"{leftover.size_mb:8.1f} MB  {leftover.what}: {leftover.why}")
    would = "would be " if options.dry_run else ""
    print(f"{len(removed)} {would}removed, {sum(leftover.size_mb for leftover in removed):.1f} MB")
    return 0


def _doctor(options: argparse.Namespace, root: Path | None) -> int:
    from mpmm.observability.doctor import examine, report

    bundle = None if options.bundle is None else checked_path("--bundle", options.bundle, _FILE)
    groups = examine(root)
    print(report(groups, _width(), painter(sys.stdout)))
    if bundle is not None:
        from mpmm.observability.bundle import write_bundle

        write_bundle(bundle, report(groups), root)
        print(f"mpmm: wrote {printable(str(bundle))}; look through it before you pass it on", file=sys.stderr)
    return EXIT_PROBLEM if any(check.state == "PROBLEM" for group in groups for check in group.checks) else 0


def _completion(options: argparse.Namespace, root: Path | None) -> int:
    from mpmm.observability.completion import completion

    print(completion(make_parser(), options.shell), end="")
    return 0


def _help(options: argparse.Namespace, root: Path | None) -> int:
    from mpmm.commands.help_pages import page

    print(page(options.topic, _width()))
    return 0


def _man(options: argparse.Namespace, root: Path | None) -> int:
    from mpmm.observability.completion import man_page

    print(man_page(make_parser(), __version__), end="")
    return 0


_COMMANDS = {
    "list": _list,
    "inspect": _inspect,
    "ps": _ps,
    "top": _top,
    "events": _events,
    "trace": _trace,
    "plot": _plot,
    "metrics": _metrics,
    "dashboard": _dashboard,
    "check": _check,
    "reset": _reset,
    "suspend": _move,
    "resume": _move,
    "prune": _prune,
    "doctor": _doctor,
    "completion": _completion,
    "help": _help,
    "man": _man,
}


if __name__ == "__main__":
    sys.exit(as_program())
