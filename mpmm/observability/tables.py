"""Tables of text in a given width: columns that do not fit are left out whole, prose is wrapped, cutting comes last.

Every table says which of its columns matter least, in the order in which they are left out; empty columns are left out
before all others. If not everything fits beside the prose, the prose is placed below its row. A name that must be cut
nevertheless loses its middle, because the end of a path says more than its beginning, and no two names of a column are
cut to the same text.
"""

from __future__ import annotations

import itertools
import textwrap
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

__all__ = ["blocks", "cut", "shortened", "shortened_apart", "table", "wrapped"]

LONGEST_CELL = 40
# A name that is cut keeps at least this many characters, even if other text must be cut for it.
SHORTEST_NAME = 12
# With prose below the rows, names are cut to this many before columns are left out.
NARROW_NAME = 16
# Columns beside prose are left out until it has this many characters.
PROSE_WIDTH = 36
# The share of a cut name that is its beginning.
HEAD_SHARE = 0.25
ROUNDS = 4
GAP = 2
# The indents of prose below its row, in its first line and in the others.
_BELOW, _BELOW_GOES_ON = " " * 4, " " * 6
# Cells that say nothing.
_NOTHING = frozenset({"", "-", "?", "0"})


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int | None = None,
    *,
    least: Sequence[str] = (),
    prose: bool = False,
    wrap: bool = True,
    below: bool = False,
) -> list[str]:
    """Return rows below their heads, in columns; numbers are right-aligned.

    width: in characters; None for as many as it takes. least: heads of the columns to leave out if the width is too
    small, in that order. prose: the last column is prose, which is wrapped, or without `wrap` ends in an ellipsis.
    below: if not all columns fit beside the prose, place it below its row, or without `wrap` leave it out.
    """
    first, *others = blocks(head, rows, width, least=least, prose=prose, wrap=wrap, below=below)
    return [*first, *(line for block in others for line in block)]


def blocks(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int | None = None,
    *,
    least: Sequence[str] = (),
    prose: bool = False,
    wrap: bool = True,
    below: bool = False,
) -> list[list[str]]:
    """Return a `table` as the lines of its head and of each of its rows."""
    columns = list(range(len(head)))
    if width is None:
        return _lines(head, rows, columns, _widths(head, rows), None)
    least = sorted(least, key=lambda name: not _says_nothing(head, rows, name))
    if prose and below and not _fits(head, rows, width):
        *kept, told = head
        first, *others = blocks(kept, _with_short_names(head, rows, width, least), width, least=least)
        if not wrap:
            return [first, *others]
        return [first, *(block + _below(told, row[-1], width) for block, row in zip(others, rows, strict=True))]
    widths = _widths(head, rows)
    # Prose counts with the width that it needs to be readable.
    last = min(widths[-1], PROSE_WIDTH) if prose else widths[-1]
    if _total([*widths[:-1], last], columns) > width:
        widths = [*(min(size, LONGEST_CELL) for size in widths[:-1]), widths[-1]]
    wanted = [*widths[:-1], last]
    for name in least:
        if _total(wanted, columns) <= width:
            break
        columns = [column for column in columns if head[column] != name]
    excess = _total(wanted, columns) - width
    if excess > 0:
        # Only the longest names are left to be shortened.
        texts = [column for column in columns[: -1 if prose else None] if not _is_numeric(rows, column)]
        longest = max(texts, key=lambda column: widths[column], default=None)
        if longest is not None:
            widths[longest] = max(min(SHORTEST_NAME, widths[longest]), widths[longest] - excess)
    return _lines(head, rows, columns, widths, width, wrap=prose and wrap)


def _says_nothing(head: Sequence[str], rows: Sequence[Sequence[str]], name: str) -> bool:
    """Tell whether a column is empty, for example because no request has a priority."""
    return all(row[at] in _NOTHING for at in (head.index(name),) for row in rows) if name in head else True


def _fits(head: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> bool:
    """Tell whether all columns fit beside prose of a readable width."""
    widths = _widths(head, rows)
    return _total([*widths[:-1], min(widths[-1], PROSE_WIDTH)], range(len(head))) <= width


def _with_short_names(
    head: Sequence[str], rows: Sequence[Sequence[str]], width: int, least: Sequence[str]
) -> list[list[str]]:
    """Return rows without their prose; the longest names are shortened, so that fewer columns are left out."""
    empty = [name for name in least if _says_nothing(head, rows, name)]
    columns = [column for column in range(len(head) - 1) if head[column] not in empty]
    widths = _widths(head, rows)
    longest = max((column for column in columns if not _is_numeric(rows, column)), key=lambda one: widths[one])
    excess = _total(widths, columns) - width
    size = max(NARROW_NAME, widths[longest] - max(0, excess))
    short = shortened_apart((row[longest] for row in rows), size)
    return [[*row[:longest], short[row[longest]], *row[longest + 1 : -1]] for row in rows]


def _below(head: str, prose: str, width: int) -> list[str]:
    """Return prose as the lines below a row."""
    if not prose:
        return []
    return textwrap.wrap(
        f"{head}: {prose}",
        max(width, SHORTEST_NAME),
        initial_indent=_BELOW,
        subsequent_indent=_BELOW_GOES_ON,
        break_on_hyphens=False,
    )


def wrapped(line: str, width: int | None, indent: str = "  ") -> list[str]:
    """Return a line, continued in indented ones if it is longer than `width`."""
    if width is None or len(line) <= width:
        return [line]
    return textwrap.wrap(line, max(width, len(indent) + 1), subsequent_indent=indent, break_on_hyphens=False)


def cut(line: str, width: int | None) -> str:
    """Return a line of at most `width` characters."""
    return line if width is None or len(line) <= width else line[: max(1, width - 1)] + "…"


def shortened(text: str, width: int) -> str:
    """Return a text of at most `width` characters, without its middle if it is longer."""
    if len(text) <= width:
        return text
    kept = max(1, width - 1)
    head = int(kept * HEAD_SHARE)
    return f"{text[:head]}…{text[len(text) - (kept - head) :]}"


def shortened_apart(texts: Iterable[str], width: int) -> dict[str, str]:
    """Return short forms of texts, by the whole texts, in at most `width` characters, no two of them the same.

    Texts with the same beginning and end show where they begin to differ and, if that is not enough, a number.
    """
    found = {text: shortened(text, width) for text in texts}
    # Each round divides the groups further; only texts that were made to look alike would need more than a few.
    for _ in range(ROUNDS):
        for alike in _alike(found):
            first = next((place for place, signs in enumerate(zip(*alike, strict=False)) if len({*signs}) > 1), width)
            found |= {text: _around(text, first, width) for text in alike}
    left = itertools.chain.from_iterable(_alike(found))
    marked = [(text, f"~{number}") for number, text in enumerate(left, start=1)]
    return found | {text: shortened(text, width - len(mark)) + mark for text, mark in marked}


def _alike(found: dict[str, str]) -> list[list[str]]:
    """Return the groups of texts that read the same."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for text, short in sorted(found.items()):
        groups[short].append(text)
    return [group for group in groups.values() if len(group) > 1]


def _around(text: str, place: int, width: int) -> str:
    """Return the beginning of a text and the part around a place."""
    head = int(width * HEAD_SHARE)
    room = max(1, width - head - 2)
    begin = max(head, place - room // 3)
    shown = text[begin : begin + room]
    return f"{text[:head]}…{shown}{'…' if begin + room < len(text) else ''}"


def _widths(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]


def _total(widths: Sequence[int], columns: Collection[int]) -> int:
    """Return how wide the columns are together, each with the gap before it."""
    return sum(widths[column] + GAP for column in columns)


def _lines(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    columns: Sequence[int],
    widths: Sequence[int],
    width: int | None,
    *,
    wrap: bool = False,
) -> list[list[str]]:
    numeric = {column for column in columns if _is_numeric(rows, column)}
    *front, last = columns
    # A column without a head is a picture, not a name.
    long = [column for column in columns if head[column] and any(len(row[column]) > widths[column] for row in rows)]
    short = {column: shortened_apart((row[column] for row in rows), widths[column]) for column in long}

    def cell(row: Sequence[str], column: int) -> str:
        size = widths[column]
        text = cut(row[column], size) if row is head or column not in short else short[column][row[column]]
        return " " * GAP + (text.rjust(size) if column in numeric else text.ljust(size))

    found = []
    for row in (head, *rows):
        begin = "".join(cell(row, column) for column in front)
        if not wrap or width is None:
            found.append([cut((begin + cell(row, last)).rstrip(), width)])
            continue
        room = max(SHORTEST_NAME, width - len(begin) - GAP)
        first, *rest = textwrap.wrap(row[last], room, break_on_hyphens=False) or [""]
        lines = [f"{begin}{' ' * GAP}{first}".rstrip(), *(" " * (len(begin) + GAP) + more for more in rest)]
        found.append([cut(line, width) for line in lines])
    return found


def _is_numeric(rows: Sequence[Sequence[str]], column: int) -> bool:
    return all(_is_number(row[column]) for row in rows)


def _is_number(text: str) -> bool:
    return not text.strip("0123456789.+-?") or text[:1].isdigit()
