"""Finds the model that people mean by a tag, the beginning of a tag, a name, or any of these as a screen shows it.

Screens shorten long tags and names, and a shortened text has to work at the prompt, too. `…` stands for the part that a
screen has left out, wherever it is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from mpmm.errors import InvalidArgumentError
from mpmm.text.arguments import in_brief
from mpmm.text.display_names import shown_tag, shown_tags
from mpmm.text.printable import printable

__all__ = ["ELLIPSIS", "meant_tag"]

ELLIPSIS = "…"
# An error names no more models than fit on a screen.
MODELS_NAMED = 10


def meant_tag(
    wanted: str, names: Mapping[str, str], *, first: Collection[str] = (), may_be_new: bool = False
) -> str | None:
    """Return the tag of the model that `wanted` means, None if there is none.

    names: of all models by tag, "" for no name. first: the tags to prefer if several fit. may_be_new: the text may be
    the tag of a future model, so the beginning of a tag counts only if the model has a name, and its tag tells people
    nothing.

    An exact tag comes first, then an exact name, then a text with `…`, then the beginning of a tag. Raises
    InvalidArgumentError if several models fit.
    """
    if wanted in names:
        return wanted
    if not wanted.strip(ELLIPSIS):
        return None
    for fitting in _fitting(wanted, names, may_be_new):
        if fitting:
            found = [tag for tag in fitting if tag in first] or fitting
            if len(found) > 1:
                raise _several(wanted, found, names)
            return found[0]
    return None


def _fitting(wanted: str, names: Mapping[str, str], may_be_new: bool) -> Iterator[list[str]]:
    """Yield the tags that fit in each of the ways, the most certain one first."""
    distinct = shown_tags(names)
    texts = {
        tag: {printable(text) for text in (tag, name or tag, shown_tag(tag, name), distinct.get(tag, tag))}
        for tag, name in names.items()
    }
    yield [tag for tag, shown in texts.items() if wanted in shown]
    if ELLIPSIS in wanted:
        pattern = re.compile(".*".join(map(re.escape, wanted.split(ELLIPSIS))), re.DOTALL)
        yield [tag for tag, shown in texts.items() if any(map(pattern.fullmatch, shown))]
    begin = [tag for tag in names if tag.startswith(wanted) or printable(tag).startswith(wanted)]
    yield begin if not may_be_new or any(names[tag] for tag in begin) else []


def _several(wanted: str, found: list[str], names: Mapping[str, str]) -> InvalidArgumentError:
    distinct = shown_tags({tag: names[tag] for tag in found})
    texts = sorted(distinct.get(tag, tag) for tag in found)
    more = f" and {len(texts) - MODELS_NAMED} more" if len(texts) > MODELS_NAMED else ""
    return InvalidArgumentError(
        f"model {in_brief(wanted)}: {len(found)} models fit: {', '.join(texts[:MODELS_NAMED])}{more}; expected the tag "
        "of one, or enough of its beginning to tell it from the others"
    )
