"""What each reason says to people, with its figures: the one place where decisions are put into words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mpmm.policy.view import Reason

__all__ = ["SENTENCES", "explain"]

#: The subject is the model of the ticket, or of the copy, that was decided about.
SENTENCES: dict[Reason, str] = {
    Reason.BEHIND: "waits behind one that must not be delayed, or for a model that runs alone",
    Reason.DRAINING: "waits to run alone{on} and be measured: copies are in use, for {time}",
    Reason.MEMORY: "waits: needs {need:.0f} MB{on}, {free:.0f} free, and nothing that may be unloaded makes enough "
    "room",
    Reason.UNLOADING: "waits: needs {need:.0f} MB{on}, {free:.0f} free, {coming:.0f} coming from the unload of {other}",
    Reason.RETURNING: "waits: needs {need:.0f} MB{on}, {free:.0f} free, {coming:.0f} returning from the unload of "
    "{other}",
    Reason.NO_DEVICE: "waits: no device is known yet",
    Reason.SHARING: "waits for a copy that is in use or being loaded: {time}, sooner than a load",
    Reason.PINNED: "waits: needs {need:.0f} MB{on}, {free:.0f} free, and what is idle and not pinned makes too little "
    "room",
    Reason.COPIES: "waits for a copy that is in use: there are as many as there may be",
    Reason.LEASED: "waits: needs {need:.0f} MB{on}, {free:.0f} free, and the leases that are held leave too little "
    "room",
    Reason.FOREIGN: "waits: needs {need:.0f} MB{on}, {free:.0f} free, and {coming:.0f} MB that the driver and other "
    "programs take leave too little room",
    Reason.IN_USE: "waits: needs {need:.0f} MB{on}, {free:.0f} free, {coming:.0f} kept for it where {other} is in use, "
    "for {time}",
    Reason.TABLE_FULL: "waits for a row in the table of copies, which is full",
    Reason.OUTRANKED: "waits behind {other}, which came later and has a higher priority",
    Reason.QUIET: "waits: {other} starts{on}, where nothing else is loaded or unloaded meanwhile",
    Reason.RESTLESS: "waits to start quietly{on}: something is being loaded or unloaded there",
    Reason.BACKING_OFF: "waits: its loads have failed, so nothing is evicted for another try for {time}",
    Reason.SUSPENDING: "waits for its copy, which is being suspended, and is resumed then: {time}, sooner than a load",
    Reason.RESUMES: "gets a suspended copy{on}: needs {need:.0f} MB, {free:.0f} free; it resumes in {time}",
    Reason.IDLE_COPY: "gets an idle copy",
    Reason.PASSING: "gets an idle copy, past {other}, which waits for room elsewhere",
    Reason.FITS: "loads{on}: needs {need:.0f} MB, {free:.0f} free",
    Reason.ALONE: "loads alone{on}, to be measured: taken for {need:.0f} MB, {free:.0f} free",
    Reason.BESIDE: "loads{on} beside the room kept for {other}: needs {need:.0f} MB, {free:.0f} free",
    Reason.ANOTHER_COPY: "loads another copy{on}, sooner than one in use could be had: needs {need:.0f} MB, {free:.0f} "
    "free",
    Reason.LEAST_FULL: "loads{on}, the least full of those with room: needs {need:.0f} MB, {free:.0f} free",
    Reason.TIGHTEST: "loads{on}, the tightest fit of those as full: needs {need:.0f} MB, {free:.0f} free",
    Reason.ONLY_ONE: "loads{on}, where alone there is room: needs {need:.0f} MB, {free:.0f} free",
    Reason.LOWEST_SCORE: "goes for {other}, which needs {need:.0f} MB{on}, {free:.0f} free: {coming:.0f} MB of the "
    "lowest score",
    Reason.SMALLEST_HARM: "goes for {other}, which needs {need:.0f} MB{on}, {free:.0f} free: {coming:.0f} MB of the "
    "least harm, {seconds:.3f} s of loading a second",
    Reason.FLUSHED: "goes so that {other} runs alone{on} to be measured",
    Reason.NO_ROW: "goes for {other}, because the table of copies, or of models, is full",
    Reason.EXCHANGED: "goes for another copy of its model, which may have no more of them",
    Reason.ASKED: "is unloaded, now or when it is given back: a call of `unload` or `update_settings` asks for it",
    Reason.HOST_FULL: "is dropped from host memory, so that {other} can be suspended, which needs {need:.0f} MB, "
    "{free:.0f} free",
    Reason.HOST_SHORT: "is dropped from host memory, of which only {free:.0f} MB are left",
    Reason.BY_HAND: "is suspended by hand",
    Reason.EXPIRED: "is unloaded: it has been idle for {seconds:g} s, for as long as copies of its model are kept",
    Reason.TOO_LARGE: "is refused: needs {need:.0f} MB, the largest device takes {free:.0f}",
}


def explain(
    reason: int,
    need_mb: float = 0.0,
    free_mb: float = 0.0,
    coming_mb: float = 0.0,
    seconds: float = 0.0,
    other: str | None = None,
    devices: Sequence[int] = (),
) -> str:
    """Return the sentence for a reason; memory in MB. A number of a later version is named as such.

    devices: rows of those it is about, empty where that goes without saying.
    """
    try:
        sentence = SENTENCES[Reason(reason)]
    except (KeyError, ValueError):
        return f"reason {reason}"
    time = f"about {seconds:.2f} s" if math.isfinite(seconds) else "an unknown time"
    on = f" on device{'s' if len(devices) > 1 else ''} {' and '.join(map(str, devices))}" if devices else ""
    return sentence.format(
        need=need_mb, free=free_mb, coming=coming_mb, seconds=seconds, time=time, other=other or "others", on=on
    )
