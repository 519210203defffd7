"""`mpmm events`: past and new events, one line for each, for people or as JSON."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mpmm.observability.colours import painter
from mpmm.observability.event_reader import EventReader, Step, asked_to_end, steps
from mpmm.observability.formatting import age, mb, named, names_of, why
from mpmm.observability.tables import wrapped
from mpmm.shared_state.snapshot import EventInfo, as_json
from mpmm.text.model_names import meant_tag
from mpmm.text.printable import printable

__all__ = ["Choice", "lines", "said", "show_events"]

_TAG_WIDTH = 20
_INDENT = "  "

# The text if a process other than the one that has left writes the event.
_SEEN_TO_HAVE_LEFT = "sees that pid {pid} has ended"
# {mb}, {s} and {pid} are the event's value, {on} its devices, if it has any.
_TEXTS = {
    "joined": "joined",
    "left": "left",
    "reaped": "finds pid {pid} dead, and takes back what it had",
    "leader": "leads: polls memory and cleans up after dead processes",
    "queued": "queues, needs {mb} MB",
    "hit": "takes an idle copy",
    "granted": "gets a copy after {s}",
    "released": "releases a copy after {s}",
    "load_began": "load begins{on}, {mb} MB reserved",
    "load_ended": "load ended after {s}",
    "load_failed": "load failed after {s}",
    "unload_began": "unload begins, {mb} MB expected back",
    "unload_ended": "unload ended, {mb} MB expected back",
    "isolation_began": "runs alone{on} to be measured, {mb} MB in use before",
    "isolation_ended": "has run alone and takes {mb} MB",
    "estimated": "estimate: {mb} MB",
    "left_queue": "leaves the queue after {s}",
    "refused": "refused, needs {mb} MB",
    "lost": "copy of {mb} MB lost with its process",
    "written_off": "{mb} MB that were unloaded never came back",
    "reset": "namespace reset",
    "leased": "leases {mb} MB{on}",
    "lease_ended": "lease ended after {s}",
    "pinned": "pinned",
    "unpinned": "unpinned",
    "out_of_memory": "out of memory; estimate until now {mb} MB",
    "waits": "has waited for {s}",
    "unload_on_release": "will be unloaded when it is released, which frees {mb} MB",
    "settings": "settings changed",
    "suspend_began": "suspension begins, {mb} MB expected back",
    "suspend_ended": "suspended after {s}",
    "suspend_failed": "could not be suspended, after {s}; it is unloaded",
    "resume_began": "resume begins{on}, {mb} MB reserved",
    "resume_ended": "resumed after {s}",
    "resume_failed": "could not be resumed, after {s}; it is unloaded",
    "resume_given_up": "resume given up after {s}; it stays suspended",
}


_TROUBLE = frozenset({"reaped", "load_failed", "refused", "lost", "written_off", "reset", "out_of_memory"}) | {
    "suspend_failed",
    "resume_failed",
}


@dataclass(frozen=True)
class Choice:
    """Which events are shown, and how.

    model: only those of this one, as a user names it, see `meant_tag`. last: how many past ones, None for all.
    """

    model: str | None = None
    last: int | None = None
    as_json: bool = False
    follow: bool = False


def show_events(
    namespace: str,
    root: Path | None,
    choice: Choice,
    say: Callable[[str], None] = print,
    width: Callable[[], int | None] = lambda: None,
) -> int:
    """Print the events so far, or with `follow` those until the namespace ends, or an interrupt; return 0.

    With `follow`, wait for a namespace that does not exist yet. width: returns how many characters a line may have at
    the time, None for any number, as in a pipe. Raises what `read_snapshot` raises, FileNotFoundError only without
    `follow`; InvalidArgumentError if several models match.
    """
    reader, paint = EventReader(namespace, root), painter(sys.stdout)
    with contextlib.ExitStack() as stack:
        looks = steps(reader, stack.enter_context(asked_to_end())) if choice.follow else [reader.step()]
        first, tag = True, None
        for step in looks:
            # Once a tag is found it stays the one, whichever models are added later.
            tag = _tag_meant(choice.model, step) if tag is None else tag
            wanted = choice.model if tag is None else tag
            events = [event for event in step.events if wanted is None or event.tag == wanted]
            if first and choice.last is not None:
                events = list(deque(events, choice.last))
            elif step.lost and not first:
                # On another stream, so that every line of the output is an event.
                print(f"mpmm: {step.lost} events were overwritten before they could be read", file=sys.stderr)
            names, columns = names_of(step.snapshot), width()
            for event in events:
                for_people = named(event, names)
                if choice.as_json:
                    say(_json(step, event, why(for_people)))
                    continue
                for text in lines(step, for_people, columns):
                    say(paint("urgent", text) if event.kind in _TROUBLE else text)
            # The reader of a pipe should get it now.
            sys.stdout.flush()
            first = False
    return 0


def _tag_meant(model: str | None, step: Step) -> str | None:
    """Return the tag of the model that the user named, None until there is one."""
    if model is None:
        return None
    names = {event.tag: "" for event in step.events if event.tag is not None}
    names |= {one.tag: one.name for one in step.snapshot.models}
    return meant_tag(model, names)


def lines(step: Step, event: EventInfo, width: int | None = None) -> list[str]:
    """Return an event for people: local time, pid, model, what happened, and why.

    That is one line, or with a width as many as it takes: further lines begin below the model, and if the model's name
    is longer than its column, so does what happened.
    """
    at = step.snapshot.taken_wall_s - event.age_s
    clock = f"{time.strftime('%H:%M:%S', time.localtime(at))}.{int(at * 1000) % 1000:03d}"
    reason = why(event)
    tag = printable("-" if event.tag is None else event.tag)
    begin, text = f"{clock}  {event.pid:>7}  ", printable(f"{said(event)}{'; ' if reason else ''}{reason}")
    whole = f"{begin}{tag:<{_TAG_WIDTH}}  {text}"
    if width is None or len(whole) <= width:
        return [whole]
    indent = " " * min(len(begin) + len(_INDENT), width // 2)
    if len(tag) <= _TAG_WIDTH:
        return wrapped(whole, width, indent)
    return wrapped(f"{begin}{tag}", width, indent) + wrapped(f"{indent}{text}", width, indent)


def said(event: EventInfo) -> str:
    """Return what happened, without the model and the reason."""
    on = f" on device{'s' if len(event.devices) > 1 else ''} {' and '.join(map(str, event.devices))}"
    template = _TEXTS.get(event.kind, f"{event.kind.replace('_', ' ')} {{value}}")
    if event.kind == "left" and event.value != event.pid:
        template = _SEEN_TO_HAVE_LEFT
    figures = {"mb": mb(event.value), "pid": mb(event.value), "s": _seconds(event.value), "value": event.value}
    return template.format(**figures, on=on if event.devices else "")


def _seconds(value: float | None) -> str:
    return f"{value:.3f} s" if value is not None and value < 1 else age(value)


def _json(step: Step, event: EventInfo, reason: str) -> str:
    found = as_json(event)
    # The age would differ with every look.
    del found["age_s"]
    at = step.snapshot.taken_wall_s - event.age_s
    return json.dumps({"namespace": step.snapshot.namespace, "wall_s": at, **found, "why": reason})
