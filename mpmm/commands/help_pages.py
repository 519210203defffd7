"""`mpmm help TOPIC`: detailed pages, as plain text for a terminal.

Most pages are the Markdown files in `mpmm/help`. Those on settings and errors are made from the tables and docstrings
that the code itself uses, so the two cannot differ.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

from mpmm import errors
from mpmm.commands.settings_page import settings_page
from mpmm.errors import MpmmError

__all__ = ["TOPICS", "as_text", "errors_page", "page"]

_PACKAGE = Path(__file__).resolve().parent.parent
#: Lines longer than this are hard to read, however wide a terminal is.
LONGEST_LINE = 100
_REMEDY, _ATTRIBUTES = "What to do:", "Attributes:"


def errors_page() -> str:
    """Return the page about errors as Markdown, made from the docstrings of `mpmm.errors`."""
    rows = []
    for name in errors.__all__:
        error = getattr(errors, name)
        if error is not MpmmError:
            built_in = ", ".join(f"`{base.__name__}`" for base in error.__bases__ if base is not MpmmError)
            rows.append(f"| `{name}` | {built_in} | {' | '.join(_parts(inspect.getdoc(error) or ''))} |")
    return "\n".join(
        [
            "# Errors",
            "",
            "All errors are in `mpmm`, children of `MpmmError` and of a built-in exception. The facts in their texts "
            "are also attributes. Invalid arguments are refused before anything is changed, and the error names the "
            "parameter (NumPy's scalars count as numbers, a bool does not). A tag may be any text of 1 to 511 bytes, "
            "including the bytes of a file name (`os.fsdecode`); screens, errors and logs escape its unprintable "
            "characters, metrics only those that are not UTF-8, while JSON and traces contain it exactly.",
            "",
            "| error | is also a | when | what to do | attributes |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _parts(docstring: str) -> tuple[str, str, str]:
    """Return when an error is raised, what to do, and its attributes, each as one line."""
    head, _, attributes = " ".join(docstring.split()).partition(_ATTRIBUTES)
    when, _, remedy = head.partition(_REMEDY)
    return when.strip(), remedy.strip(), attributes.strip()


def _file(name: str) -> Callable[[], str]:
    return lambda: (_PACKAGE / name).read_text(encoding="utf-8")


#: For each topic, what it is about, and a function that returns its page as Markdown.
TOPICS: dict[str, tuple[str, Callable[[], str]]] = {
    "settings": ("parameters of ModelManager and environment variables: defaults, units, ranges", settings_page),
    "errors": ("every error: when it is raised and what to do", errors_page),
    "guarantees": ("what is lost when a process dies, hangs or fails", _file("help/guarantees.md")),
    "limits": ("what mpmm cannot do or measure", _file("help/limits.md")),
    "stall": ("what to look at when something waits", _file("help/stall.md")),
    "behaviour": ("how mpmm decides: queue, admission, eviction, copies, leases, failures", _file("help/behaviour.md")),
    "memory": ("where memory figures come from, and what happens when they fail", _file("help/memory.md")),
    "costs": ("measured times and sizes, beside those of Beam's manager", _file("help/costs.md")),
    "internals": ("the shared segment, transactions, the leader, model servers", _file("help/internals.md")),
    "hosts": ("from one host to many: Ray, Dask, Flink, Dataflow", _file("help/hosts.md")),
    "operating": ("containers, Kubernetes, systemd, security, versions", _file("OPERATING.md")),
    "changes": ("what changed in which version", _file("CHANGELOG.md")),
}


def page(topic: str | None, width: int | None = None) -> str:
    """Return a page as plain text in lines of at most `width`; without a topic, the list of topics."""
    width = min(width or LONGEST_LINE, LONGEST_LINE)
    if topic is not None:
        return as_text(TOPICS[topic][1](), width)
    longest = max(map(len, TOPICS))
    lines = [f"  mpmm help {name:<{longest}}  {about}" for name, (about, _) in TOPICS.items()]
    return "\n".join([*lines, "", "`mpmm COMMAND --help` explains a command."])


def as_text(markdown: str, width: int) -> str:
    """Turn the Markdown that our pages use into plain text; each row of a table becomes a paragraph."""
    parts = []
    for block in _blocks(markdown):
        if block[0].startswith("```"):
            parts.append("\n".join(f"    {line}" for line in block[1:-1]))
        elif block[0].startswith("#"):
            title = block[0].lstrip("# ")
            parts.append(f"{title}\n{('=' if block[0].startswith('# ') else '-') * len(title)}")
        elif block[0].startswith("|"):
            parts += _rows(block, width)
        else:
            parts.append("\n".join(_items(block, width)))
    return "\n\n".join(parts)


def _blocks(markdown: str) -> Iterator[list[str]]:
    """Yield headings, tables, code and paragraphs; a whole list is one paragraph."""
    block: list[str] = []
    inside_code = False
    for line in markdown.split("\n"):
        fence = line.startswith("```")
        if not inside_code and block and (not line or fence or line.startswith("#")):
            yield block
            block = []
        if line or inside_code:
            block.append(line)
        if (fence and inside_code) or (line.startswith("#") and not inside_code):
            yield block
            block = []
        inside_code ^= fence
    if block:
        yield block


def _rows(table: list[str], width: int) -> Iterator[str]:
    """Yield the rows of a table: the first cell, and below it the others, each after the name of its column."""
    head, _, *rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table)
    for row in rows:
        first, *cells = map(_plain, row)
        lines = _wrapped(first, width)
        for name, cell in zip(head[1:], cells, strict=True):
            if cell:
                lines += _wrapped(f"{_plain(name)}: {cell}", width, "    ", "      ")
        yield "\n".join(lines)


def _items(block: list[str], width: int) -> list[str]:
    """Return a paragraph, or a list, in lines of at most `width`."""
    texts: list[tuple[str, str]] = []
    for line in block:
        found = re.match(r"( *)([-*]|\d+\.) ", line)
        if found or not texts:
            texts.append((" " * len(found[0]) if found else "", line))
        else:
            texts[-1] = (texts[-1][0], f"{texts[-1][1]} {line.strip()}")
    return [one for indent, text in texts for one in _wrapped(_plain(text), width, "", indent)]


def _wrapped(text: str, width: int, first: str = "", others: str = "") -> list[str]:
    indent = text[: len(text) - len(text.lstrip())]
    return textwrap.wrap(
        text.strip(),
        width,
        initial_indent=first + indent,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _plain(text: str) -> str:
    """Return a line without emphasis and links; code keeps its backticks, or a reader might take it for words."""
    return re.sub(r"\[([^\]]+)\]\(([^)]+)\)", r"\1 (\2)", text.replace("**", "").replace("\\|", "|"))
