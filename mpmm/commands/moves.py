"""The commands that move a model's copies: `mpmm suspend` into host memory, and `mpmm resume` back."""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from mpmm.commands.joining import join
from mpmm.commands.models import HELP, asked_model
from mpmm.errors import AcquireTimeoutError, SuspendTimeoutError
from mpmm.shared_state.settings import Settings
from mpmm.shared_state.snapshot import Snapshot, read_snapshot
from mpmm.text.arguments import checked_timeout
from mpmm.text.printable import printable_lines

__all__ = ["add_commands", "move"]

EXIT_PROBLEM = 1
WAIT_S = Settings().wait_timeout_seconds


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the commands to the subparsers of an `ArgumentParser`, and return them."""
    added = []
    for name, what in (
        ("suspend", "move a model's idle copies into host memory, if they can be suspended"),
        ("resume", "move a model's suspended copies back to their devices"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("tag", metavar="TAG", help=HELP)
        command.add_argument(
            "--wait",
            type=float,
            default=WAIT_S,
            metavar="SECONDS",
            help=f"wait at most this long for that, then exit with 1 (default: {WAIT_S:g})",
        )
        added.append(command)
    return added


def move(options: argparse.Namespace, name: str, root: Path | None, says: logging.Handler | None) -> int:
    """Move the copies; return 1 and print why if none was moved, or one that should have been moved is left.

    says: shows what the command waits for; None if no user sits at a terminal.
    """
    from mpmm.model_manager.waits import say_at_terminal

    wait_s = checked_timeout("--wait", options.wait)
    model = asked_model(options.tag, name, root)
    suspends = options.command == "suspend"
    with join(name, root) as manager:
        say_at_terminal(manager, says)
        call = manager.suspend if suspends else manager.resume
        try:
            moved = call(model.tag, timeout_seconds=wait_s)
        except (AcquireTimeoutError, SuspendTimeoutError) as error:
            print(f"mpmm: {printable_lines(str(error))}", file=sys.stderr)
            return EXIT_PROBLEM
        snapshot = read_snapshot(name, root, events=False)
    print(
        f"{name}: {moved} cop{'y' if moved == 1 else 'ies'} of {model.shown} {'suspended' if suspends else 'resumed'}"
    )
    why = _why_none(snapshot, model.tag) if suspends and not moved else ""
    why = why if suspends else _why_left(snapshot, model.tag, moved)
    if why:
        print(f"mpmm: {why}", file=sys.stderr)
    return EXIT_PROBLEM if why else 0


def _why_none(snapshot: Snapshot, tag: str) -> str:
    """Return why no copy of a model was suspended."""
    states, barred = _states(snapshot, tag), _why_barred(snapshot, tag)
    if barred and states.keys() != {"suspended"}:
        return f"its copies are unloaded instead of suspended, because {barred}"
    if not states:
        return "no copy is loaded"
    if states.keys() == {"suspended"}:
        return f"{_copies(states['suspended'])} suspended already"
    if states["idle"]:
        return (
            "a copy can be suspended if it is idle, and its object has sleep() and wake_up() or the CUDA driver can "
            "do it, and suspend_budget_mb and the host leave room for it; `mpmm help behaviour` says more"
        )
    return f"no copy is idle: {', '.join(f'{count} {state}' for state, count in sorted(states.items()))}"


def _why_left(snapshot: Snapshot, tag: str, moved: int) -> str:
    """Return why suspended copies of a model are left, or why none was resumed; empty if all were."""
    left = [copy for copy in snapshot.copies if copy.tag == tag and copy.state == "suspended"]
    if not left:
        barred = _why_barred(snapshot, tag)
        none = "no copy is suspended" + (f": they are unloaded instead, because {barred}" if barred else "")
        return "" if moved else none
    owners = Counter(copy.owner for copy in left)
    pids = {member.slot: member.pid for member in snapshot.members}
    reasons = []
    if free := owners.pop(None, 0):
        reasons.append(
            f"{_copies(free)} still suspended: max_model_copies allows no more, or there is no room for more at once"
        )
    for owner, count in owners.items():
        reasons.append(
            f"{_copies(count)} still suspended as objects of pid {pids.get(owner or 0, '?')}, which alone can resume "
            "them: at its next request for the model, or by `resume` of its own manager"
        )
    return "; ".join(reasons)


def _why_barred(snapshot: Snapshot, tag: str) -> str:
    """Return why mpmm no longer suspends the model's copies; empty if it still does."""
    return next((model.why_unsuspendable for model in snapshot.models if model.tag == tag), "")


def _states(snapshot: Snapshot, tag: str) -> Counter[str]:
    return Counter(copy.state for copy in snapshot.copies if copy.tag == tag)


def _copies(count: int) -> str:
    return "1 copy is" if count == 1 else f"{count} copies are"
