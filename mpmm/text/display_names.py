"""What people call a model whose tag says nothing to them, such as the uuid that Beam gives it.

A process that knows such a name sets it here. The model's row in the segment gets it when this process asks for the
model the next time and has to queue, and from then on everybody is shown it beside the tag; log lines of this process
have it at once. Programs (JSON, metrics, attributes of errors) go by tags alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

__all__ = ["MOST_BYTES", "display_name", "set_display_name", "shown_tag", "shown_tags"]

MOST_BYTES = 127
# A worker of Beam that lives for months sets up pipeline after pipeline.
MOST_NAMES = 4096
# Of a longer tag people are shown the beginning.
TAG_SHOWN = 12

_names: dict[str, str] = {}


def set_display_name(tag: str, name: str) -> None:
    """Give a model a name for people; what is longer than MOST_BYTES loses its end, an empty one is none."""
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
    """Return what people are shown for a tag with a name: both, or the tag where there is no name."""
    if not name:
        return tag
    return f"{name} [{tag if len(tag) <= TAG_SHOWN else tag[: TAG_SHOWN - 4] + '…'}]"


def shown_tags(names: Mapping[str, str]) -> dict[str, str]:
    """Return what people are shown for each of several tags that have names, no two of them the same.

    names: by tag. Where name and beginning are the same, the whole tag is shown: Beam loads a model anew under a tag
    that only ends in another way.
    """
    shown = {tag: shown_tag(tag, name) for tag, name in names.items() if name}
    times = Counter(shown.values())
    return {tag: text if times[text] == 1 else f"{names[tag]} [{tag}]" for tag, text in shown.items()}
