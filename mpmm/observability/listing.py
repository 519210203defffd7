"""`mpmm ps`: one line for each loaded copy and each held lease, for people or for scripts."""

from __future__ import annotations

import json
import re
import string
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from mpmm.errors import InvalidArgumentError
from mpmm.observability.formatting import age, for_people, mb
from mpmm.observability.tables import table
from mpmm.shared_state.snapshot import InstanceInfo, Snapshot
from mpmm.text.arguments import in_brief
from mpmm.text.display_names import shown_tags
from mpmm.text.printable import printable

__all__ = ["JSON_FORMAT", "ListedInstance", "as_table", "copies_of", "formatted"]

#: The value of `--format` that prints JSON lines.
JSON_FORMAT = "json"
# Shells pass these on unchanged.
_ESCAPES = {"\\t": "\t", "\\n": "\n"}
# A width or a precision of more than four digits.
_WIDE = re.compile(r"\d{5}")


@dataclass(frozen=True)
class ListedInstance:
    """The fields of one copy or lease for `--format` and JSON; None if unknown or if there is none.

    name: what people call the model, empty if it only has a tag. copy: its row, as in `mpmm inspect`. kind: `model` or
    `lease`. state: `loading`, `active`, `idle` and so on, or `lost` if the process that holds or keeps it is dead. mb:
    memory that it takes. devices: rows. pid, holder: the process that holds it, None while it is idle. kept_by: pid of
    the process that has the memory. held: how many use it, of the `users` that may do so at a time. seconds: how long
    it has been in this state. handle: None for an object of the process `kept_by`.
    """

    namespace: str
    tag: str
    name: str
    copy: int
    kind: str
    state: str
    mb: float
    peak_mb: float | None
    devices: tuple[int, ...]
    pid: int | None
    holder: str | None
    kept_by: int | None
    seconds: float
    uses: int
    held: int
    users: int
    handle: str | None


def copies_of(snapshot: Snapshot) -> list[ListedInstance]:
    """Return the copies and leases of a namespace, sorted by tag."""
    members = {member.slot: member for member in snapshot.members}
    names = {model.tag: model.name for model in snapshot.models}

    def described(copy: InstanceInfo) -> ListedInstance:
        leased = copy.state == "leased"
        slot = copy.owner if copy.server is None else copy.server
        holder, keeper = (None if one is None else members.get(one) for one in (copy.holder, slot))
        lost = any(one is not None and one.alive is False for one in (holder, keeper))
        return ListedInstance(
            namespace=snapshot.namespace,
            tag=copy.tag,
            name=names.get(copy.tag, ""),
            copy=copy.row,
            kind="lease" if leased else "model",
            state="lost" if lost else copy.state,
            mb=copy.reserved_mb if leased or copy.state == "loading" else copy.mb,
            peak_mb=copy.peak_mb,
            devices=tuple(copy.shares_mb),
            pid=holder.pid if holder else None,
            holder=holder.name if holder else None,
            kept_by=copy.program if leased else keeper.pid if keeper else None,
            seconds=copy.for_s,
            uses=copy.uses,
            held=copy.held,
            users=copy.seats + 1,
            handle=copy.handle,
        )

    return sorted(map(described, snapshot.copies), key=lambda copy: (copy.tag, copy.copy))


def as_table(copies: Sequence[ListedInstance], width: int | None) -> list[str]:
    """Return the copies below a head, with a column for the namespace if there are several."""
    several = len({copy.namespace for copy in copies}) > 1
    head = ("model", "copy", "state", "for", "MB", "on", "holder pid", "kept by pid", "uses")
    named: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for copy in copies:
        named[copy.namespace][copy.tag] = copy.name
    names = {namespace: shown_tags(tags) for namespace, tags in named.items()}

    def row(copy: ListedInstance) -> tuple[str, ...]:
        shown = for_people(copy)
        model = printable(names[copy.namespace].get(copy.tag, copy.tag))
        state = f"{shown.state}, {shown.held} of {shown.users} users" if shown.users > 1 else shown.state
        cells = (
            *(model, str(shown.copy), state, age(shown.seconds), mb(shown.mb)),
            *(", ".join(map(str, shown.devices)), _or_dash(shown.pid), _or_dash(shown.kept_by), str(shown.uses)),
        )
        return (shown.namespace, *cells) if several else cells

    least = ("uses", "kept by pid", "copy", "on", "for")
    return table(("namespace", *head) if several else head, [row(copy) for copy in copies], width, least=least)


def formatted(copy: ListedInstance, template: str, *, at_terminal: bool = False) -> str:
    """Return a copy, formatted by a format string or as JSON. Raises InvalidArgumentError for an invalid string.

    at_terminal: escape the texts in it, which another process may have chosen; those of the format string are the
    user's own. JSON escapes everything that is not ASCII anyway.
    """
    values = {field.name: getattr(copy, field.name) for field in fields(copy)}
    if template == JSON_FORMAT:
        return json.dumps(values)
    for written, meant in _ESCAPES.items():
        template = template.replace(written, meant)
    try:
        shown = {name: _shown(value) for name, value in values.items()}
        if at_terminal:
            shown = {name: printable(value) if isinstance(value, str) else value for name, value in shown.items()}
        return _Formatter().vformat(template, (), shown)
    except (KeyError, ValueError, IndexError, TypeError, AttributeError, OverflowError) as error:
        problem = f"there is no field {error}" if isinstance(error, KeyError) else str(error)
        raise InvalidArgumentError(
            f"--format {template!r}: {problem}; expected {JSON_FORMAT!r}, or a Python format string with some of the "
            f"fields {', '.join(values)}, as in '{{tag}} {{mb:.0f}}'"
        ) from None


class _Formatter(string.Formatter):
    """Accepts plain names of fields, but no attributes or items of them."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        return kwargs[field_name], field_name

    def format_field(self, value: Any, format_spec: str) -> Any:
        # Python would make a text of any length that there is memory for.
        if _WIDE.search(format_spec):
            raise ValueError(f"{in_brief(format_spec)} is too wide")
        return super().format_field(value, format_spec)


class _Nothing:
    """Stands for an unknown figure, whatever its format."""

    def __format__(self, spec: str) -> str:
        return "-"


def _shown(value: object) -> object:
    if value is None:
        return _Nothing()
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)
