"""Names for people, for models whose tags tell them nothing, such as the uuids of Beam.

A process that knows such a name sets it here. The model's row in the segment gets the name when this process next
requests the model and has to queue; from then on every process shows it beside the tag. Log lines of this process have
it at once. Programs (JSON, metrics, attributes of errors) use tags alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

__all__ = ["MOST_BYTES", "display_name", "set_display_name", "shown_tag", "shown_tags"]

MOST_BYTES = 127
# A limit, because a worker of Beam that lives for months sets up pipeline after pipeline.
MOST_NAMES = 4096
# Of a longer tag, people see only the beginning.
TAG_SHOWN = 12

_names: dict[str, str] = {}


def set_display_name(tag: str, name: str) -> None:
    """Give a model a name for people, cut off after MOST_BYTES; an empty name removes it."""
    _names.pop(tag, None)
    name = name.encode("utf-8", "replace")[:MOST_BYTES].decode("utf-8", "ignore")
    if name and name != tag:
        _names[tag] = name
        while len(_names) > MOST_NAMES:
            _names.pop(next(iter(_names)), None)


def display_name(tag: str) -> str:
    """Return the name that this process has set for a tag, "" for none."""
    return _names.get(tag, "")


def shown_tag(tag: str, name: str) -> str:
    """Return what people see for a tag with a name: both, or the tag alone if the name is empty."""
    if not name:
        return tag
    return f"{name} [{tag if len(tag) <= TAG_SHOWN else tag[: TAG_SHOWN - 4] + '…'}]"


def shown_tags(names: Mapping[str, str]) -> dict[str, str]:
    """Return what people see for each of several tags that have names, no two of them the same.

    names: by tag. If name and beginning are the same, the whole tag is shown: Beam loads a model again under a tag
    that differs only at its end.
    """
    shown = {tag: shown_tag(tag, name) for tag, name in names.items() if name}
    times = Counter(shown.values())
    return {tag: text if times[text] == 1 else f"{names[tag]} [{tag}]" for tag, text in shown.items()}
