"""How a user names a model to a command; `mpmm.text.model_names` says what is accepted."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mpmm.shared_state.snapshot import read_snapshot
from mpmm.text.display_names import shown_tags
from mpmm.text.model_names import meant_tag
from mpmm.text.printable import printable

__all__ = ["HELP", "HELP_IF_NEW", "Asked", "asked_model"]

HELP = "the model: its tag, a beginning of its tag that no other has, or its name, as `mpmm ps` shows them"
HELP_IF_NEW = "the tag of the model, which need not exist yet, or its name or tag as `mpmm ps` shows them"


class Asked(NamedTuple):
    """The model that a command is about. shown: what the output has for its tag."""

    tag: str
    shown: str


def asked_model(wanted: str, name: str, root: Path | None) -> Asked:
    """Return the model of a namespace that the user means; if none matches, `wanted` is its tag.

    The beginning of a tag alone counts only if the model has a name: a user who means `model-1`, which does not exist,
    must not change `model-10`. name: of the namespace. Raises InvalidArgumentError if several models match, and what
    `read_snapshot` raises.
    """
    snapshot = read_snapshot(name, root, events=False)
    names = {model.tag: model.name for model in snapshot.models if model.kind == "model"}
    # Rows stay when nothing of their model is left to change: those of a pipeline's earlier runs have the same names.
    present = {copy.tag for copy in snapshot.copies}
    present |= {model.tag for model in snapshot.models if model.pins or model.waiting}
    tag = meant_tag(wanted, names, first=present, may_be_new=True)
    tag = wanted if tag is None else tag
    return Asked(tag, printable(shown_tags(names).get(tag, tag)))
