"""The sentence for each reason, with its figures: the only place that explains decisions to people."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mpmm.policy.behind import Behind, Obstacle
from mpmm.policy.view import Reason

__all__ = ["SENTENCES", "explain", "explain_behind", "time_left_s"]

# Reasons whose time is the one until the expected end of the wait, counted from when that became the reason. (What is
# left of a back-off follows from the model's row.)
_UNTIL_SERVED = frozenset({Reason.DRAINING, Reason.IN_USE, Reason.SHARING, Reason.SUSPENDING})

#: The subject of each is a model: that of the ticket, or of the copy, about which was decided.
SENTENCES: dict[Reason, str] = {
    Reason.BEHIND: "waits: a request before it must not be delayed, or a model runs alone",
    Reason.DRAINING: "waits to run alone{on} and be measured: copies are still in use, for {time}",
    Reason.MEMORY: "waits: needs {need:.0f} MB{on}, {free:.0f} free, and unloading every idle copy would not free "
    "enough",
    Reason.UNLOADING: "waits: needs {need:.0f} MB{on}, {free:.0f} free, {coming:.0f} coming from the unload of {other}",
    Reason.RETURNING: "waits: needs {need:.0f} MB{on}, {free:.0f} free, {coming:.0f} returning from the unload of "
    "{other}",
    Reason.NO_DEVICE: "waits: no device is known yet",
    Reason.SHARING: "waits for a copy that is in use or being loaded: {time}, sooner than another load",
    Reason.PINNED: "waits: needs {need:.0f} MB{on}, {free:.0f} free, and unloading every idle copy that is not pinned "
    "would not free enough",
    Reason.COPIES: "waits for a copy that is in use: max_model_copies allows no more of them",
    Reason.ONLY_COPY: "waits for a copy that is in use: another one would need {need:.0f} MB, but the largest device "
    "takes only {free:.0f}",
    Reason.LEASED: "waits: needs {need:.0f} MB{on}, {free:.0f} free, and the leases that are held leave too little "
    "room",
    Reason.EXTERNAL: "waits: needs {need:.0f} MB{on}, {free:.0f} free; the driver and other programs take "
    "{coming:.0f} MB, which leaves too little room",
    Reason.IN_USE: "waits: needs {need:.0f} MB{on}, {free:.0f} free, {coming:.0f} kept for it where {other} is in use, "
    "for {time}",
    Reason.TABLE_FULL: "waits for a row in the table of copies, which is full",
    Reason.OUTRANKED: "waits behind {other}, which came later but has a higher priority",
    Reason.QUIET: "waits: {other} is starting{on}, and until it has, nothing else may be loaded or unloaded there",
    Reason.RESTLESS: "waits to start undisturbed{on}: something is being loaded or unloaded there",
    Reason.BACKING_OFF: "waits: its loads have failed, so nothing is evicted for another attempt for {time}",
    Reason.SUSPENDING: "waits for its copy to be suspended and then resumed: {time}, sooner than another load",
    Reason.RESUMES: "gets a suspended copy{on}, which takes {time} to resume: needs {need:.0f} MB, {free:.0f} free",
    Reason.IDLE_COPY: "gets an idle copy",
    Reason.OVERTAKES: "gets an idle copy ahead of {other}, which waits for memory and is not delayed by that",
    Reason.FITS: "loads{on}: needs {need:.0f} MB, {free:.0f} free",
    Reason.ALONE: "loads alone{on} to be measured: assumed to need {need:.0f} MB, {free:.0f} free",
    Reason.BACKFILL: "loads{on} in addition to what is reserved for {other}: needs {need:.0f} MB, {free:.0f} free",
    Reason.ANOTHER_COPY: "loads another copy{on}, which is quicker than waiting for one in use: needs {need:.0f} MB, "
    "{free:.0f} free",
    Reason.LEAST_FULL: "loads{on}, the least full with enough room: needs {need:.0f} MB, {free:.0f} free",
    Reason.TIGHTEST: "loads{on}, the tightest fit among equally full ones: needs {need:.0f} MB, {free:.0f} free",
    Reason.ONLY_ONE: "loads{on}, the only place with enough room: needs {need:.0f} MB, {free:.0f} free",
    Reason.LOWEST_SCORE: "is evicted for {other}, which needs {need:.0f} MB{on}, {free:.0f} free: lowest score, frees "
    "{coming:.0f} MB",
    Reason.CHEAPEST_RELOAD: "is evicted for {other}, which needs {need:.0f} MB{on}, {free:.0f} free: cheapest to "
    "reload ({seconds:.3f} s of loading per second), frees {coming:.0f} MB",
    Reason.FLUSHED: "is evicted so that {other} can run alone{on} and be measured",
    Reason.NO_ROW: "is evicted for {other}, because the table of copies, or of models, is full",
    Reason.EXCHANGED: "is evicted for another copy of its model: max_model_copies allows no more of them",
    Reason.ASKED: "is unloaded, now or when it is released, because `unload` or `update_settings` asked for it",
    Reason.RESET: "is unloaded because `mpmm reset` or `force_reset` unloads everything",
    Reason.OUT_OF_MEMORY: "is evicted because a load or a use ran out of memory there, so that all idle copies make "
    "room",
    Reason.HOST_FULL: "is dropped from host memory so that {other}, which needs {need:.0f} MB there, can be suspended: "
    "{free:.0f} free",
    Reason.HOST_SHORT: "is dropped from host memory: the host has only {free:.0f} MB left",
    Reason.BY_HAND: "is suspended because `suspend` asked for it",
    Reason.EXPIRED: "is unloaded: it has not been used for {seconds:g} s, the time for which idle copies of its model "
    "are kept",
    Reason.NOT_FREE: "gets nothing: idle copies of {other} would have to be evicted for it, and nothing is evicted for "
    "a request that does not wait",
    Reason.TOO_LARGE: "is refused: needs {need:.0f} MB, but the largest device takes only {free:.0f}",
}
#: For waits that should have ended by now, because the sentence above would still promise their end.
_OVERDUE: dict[Reason, str] = {
    Reason.SHARING: "waits for a copy that is in use or being loaded, for an unknown time: it should have been free by "
    "now, sooner than another load",
    Reason.SUSPENDING: "waits for its copy to be suspended and then resumed, for an unknown time: that should have "
    "ended by now",
}
#: Instead of the sentence for `Reason.PINNED`, if the pinned copies are those of the waiter's own model.
_PINNED_COPIES = "waits: max_model_copies allows no more copies of {other}, and those that it cannot use are pinned"
#: Instead of the sentence for `Reason.BEHIND`, if it is known what the waiter waits behind.
_BEHIND: dict[Behind, str] = {
    Behind.RUNS_ALONE: "waits: {other} runs alone{on} until it has been measured",
    Behind.IS_TO_RUN_ALONE: "waits behind {other}, which is to run alone{on} and be measured",
    Behind.LEASE: "waits behind {other}, which waits for leases to end",
    Behind.HEAD: "waits behind {other}, which waits for memory and must not be delayed",
    Behind.QUEUE: "waits behind {other}, which is first in the queue",
}


def time_left_s(reason: int, seconds: float, for_s: float) -> float:
    """Return what is left of the time in a reason that a waiter was given `for_s` ago.

    It is `inf`, unknown, once that time has passed, and for a reason that has no such time.
    """
    left_s = seconds - for_s
    return left_s if reason in _UNTIL_SERVED and left_s > 0 else math.inf


def explain(
    reason: int,
    need_mb: float = 0.0,
    free_mb: float = 0.0,
    coming_mb: float = 0.0,
    seconds: float = 0.0,
    other: str | None = None,
    devices: Sequence[int] = (),
) -> str:
    """Return the sentence for a reason; memory in MB. A number that only a later version knows is shown as a number.

    devices: rows of the devices that the decision is about, empty if there is only one device. free_mb: below 0 if more
    is promised than there is, which people are shown as 0.
    """
    try:
        known = Reason(reason)
        sentence = SENTENCES[known]
    except (KeyError, ValueError):
        return f"reason {reason}"
    if known is Reason.PINNED and other:
        sentence = _PINNED_COPIES
    time = f"about {seconds:.2f} s" if seconds >= 0.005 else "less than 0.01 s"
    if not math.isfinite(seconds):
        sentence, time = _OVERDUE.get(known, sentence), "an unknown time"
    return sentence.format(
        need=need_mb,
        free=max(0.0, free_mb),
        coming=coming_mb,
        seconds=seconds,
        time=time,
        other=other or "others",
        on=_on(devices),
    )


def explain_behind(found: Obstacle | None) -> str:
    """Return the sentence for `Reason.BEHIND`, with the obstacle if that was found."""
    if found is None:
        return SENTENCES[Reason.BEHIND]
    return _BEHIND[found.what].format(other=found.tag, on=_on(found.on))


def _on(devices: Sequence[int]) -> str:
    return f" on device{'s' if len(devices) > 1 else ''} {' and '.join(map(str, devices))}" if devices else ""
