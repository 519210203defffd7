"""How commands are told a model: see `mpmm.text.model_names` for what is accepted."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mpmm.shared_state.snapshot import read_snapshot
from mpmm.text.display_names import shown_tags
from mpmm.text.model_names import meant_tag
from mpmm.text.printable import printable

__all__ = ["HELP", "HELP_IF_NEW", "Asked", "asked_model"]

HELP = "the model: its tag, the beginning of its tag if no other begins so, or its name, as `mpmm ps` shows them"
HELP_IF_NEW = "the tag of the model, which need not be there yet, or its name or tag as `mpmm ps` shows them"


class Asked(NamedTuple):
    """The model that a command is about. shown: what people are shown for its tag."""

    tag: str
    shown: str


def asked_model(wanted: str, name: str, root: Path | None) -> Asked:
    """Return the model of a namespace that somebody means; if none fits, the text is its tag.

    The mere beginning of a tag counts only where the model has a name: nothing is to happen to `model-10` where
    `model-1` is meant, which is not there. name: of the namespace. Raises InvalidArgumentError where several models
    fit, and what `read_snapshot` raises.
    """
    snapshot = read_snapshot(name, root, events=False)
    names = {model.tag: model.name for model in snapshot.models if model.kind == "model"}
    # Rows outlive all that can be changed: those of earlier runs of a pipeline have the same names.
    present = {copy.tag for copy in snapshot.copies}
    present |= {model.tag for model in snapshot.models if model.pins or model.waiting}
    tag = meant_tag(wanted, names, first=present, may_be_new=True)
    tag = wanted if tag is None else tag
    return Asked(tag, printable(shown_tags(names).get(tag, tag)))
