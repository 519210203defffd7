"""The options of a request for a model or a lease, as the caller gives them and as the shared tables hold them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from mpmm.errors import InvalidArgumentError
from mpmm.multi_process_shared.main_import import refuse_while_importing_main
from mpmm.multi_process_shared.registry import is_server_process
from mpmm.policy.fairness import HIGHEST_URGENCY
from mpmm.shared_state.durations import LONGEST_NS, to_ns
from mpmm.shared_state.layout import MOST_SPANNED, MOST_USERS, Capacities, Model
from mpmm.shared_state.tables import encode_text
from mpmm.text.arguments import checked_devices, checked_number, checked_whole

if TYPE_CHECKING:
    from mpmm.memory.samples import SharedSamples

__all__ = [
    "ANYWHERE",
    "AcquireOptions",
    "PlacementRequest",
    "check_names",
    "check_request",
    "encoded_tag",
    "read_options",
]


class AcquireOptions(TypedDict, total=False):
    """The options of a request for a model, besides tag and loader; see `ModelManager.acquire_model`."""

    devices: Sequence[int | str] | None
    span: int
    expect_mb: float | None
    max_waiting: int | None
    keep_alive_seconds: float | None
    priority: int
    steady: bool
    users: int | None


class PlacementRequest(NamedTuple):
    """The options of a request as the tables hold them. Devices are bits, 0 for all.

    loadable_on: where an instance may be loaded. usable_on: where one that is already loaded may be used. span: over
    how many devices a new one is spread. expect_mb: the memory it takes, 0 if the caller does not say. max_waiting: how
    many requests may wait for the model, this one included. keep_alive: the word for `Model.KEEP_ALIVE`, 0 to leave it
    as it is. urgency: see `policy.fairness`. steady: nothing else may be loaded or unloaded on the devices while it
    loads. users: how many may use a copy at a time if it is loaded from now on, 0 to leave that as it is. if_free: a
    preload that neither waits nor evicts.
    """

    loadable_on: int = 0
    usable_on: int = 0
    span: int = 1
    expect_mb: float = 0.0
    max_waiting: float = math.inf
    keep_alive: int = 0
    urgency: int = 0
    steady: bool = False
    users: int = 0
    if_free: bool = False

    @property
    def is_plain(self) -> bool:
        """Tell whether any copy on any device will do, loaded and waited for in the usual way."""
        return self is ANYWHERE or self._replace(users=0) == ANYWHERE

    def with_defaults(self, defaults: PlacementRequest) -> PlacementRequest:
        """Return the request with defaults for `users`, `expect_mb` and `priority` where it does not give them."""
        return self._replace(
            users=self.users or defaults.users,
            expect_mb=self.expect_mb or defaults.expect_mb,
            urgency=self.urgency or defaults.urgency,
        )


# The request of a call without options; compared by identity.
ANYWHERE = PlacementRequest()


def read_options(options: AcquireOptions, samples: SharedSamples) -> PlacementRequest:
    """Check a caller's options and return the request; `ANYWHERE` itself if they ask for nothing.

    Raises InvalidArgumentError, TypeError.
    """
    check_names(options)
    chosen = checked_devices(options.get("devices"))
    usable_on = 0 if chosen is None else samples.bits_of(chosen)
    there = usable_on.bit_count() or len(samples.rows())
    span = checked_whole("span", options.get("span", 1), 1, min(there, MOST_SPANNED), "a number of devices")
    expect_mb = options.get("expect_mb")
    if expect_mb is not None:
        expect_mb = checked_number("expect_mb", expect_mb, 0.0, math.inf, "a number of MB", above=True, finite=True)
    loadable_on = 0 if chosen is None and span == 1 else usable_on or samples.visible_bits()
    most, users = options.get("max_waiting"), options.get("users")
    request = PlacementRequest(
        loadable_on,
        usable_on,
        span,
        expect_mb or 0.0,
        math.inf if most is None else checked_whole("max_waiting", most, 0, Capacities().tickets, "a count"),
        _keep_alive_word(options.get("keep_alive_seconds")),
        checked_whole("priority", options.get("priority", 0), -HIGHEST_URGENCY, HIGHEST_URGENCY),
        bool(options.get("steady")),
        0 if users is None else checked_whole("users", users, 1, MOST_USERS, "a count"),
    )
    return ANYWHERE if request == ANYWHERE else request


def _keep_alive_word(seconds: object) -> int:
    """Return the word of `Model.KEEP_ALIVE` for `keep_alive_seconds`, 0 for None. Raises InvalidArgumentError."""
    if seconds is None:
        return 0
    if seconds == -1 and not isinstance(seconds, bool):
        return LONGEST_NS + 1
    text = "seconds, -1 for ever, or a number"
    return to_ns(checked_number("keep_alive_seconds", seconds, 0.0, math.inf, text)) + 1


def check_request(tag: str, loader: Callable[[], Any]) -> None:
    """Check tag and loader of an acquire. Raises InvalidArgumentError, and ServerStartError while a server starts."""
    if not isinstance(tag, str) or not callable(loader):
        raise InvalidArgumentError(f"model {tag!r}, loader {loader!r}: expected a str and a callable")
    if is_server_process():
        refuse_while_importing_main("acquire the model", tag)


def check_names(options: AcquireOptions) -> None:
    """Raise TypeError for an option that does not exist."""
    for name in options:
        if name not in AcquireOptions.__annotations__:
            raise TypeError(f"unexpected option {name!r}: expected {', '.join(AcquireOptions.__annotations__)}")


def encoded_tag(tag: str) -> bytes:
    """Return a model's tag as the tables hold it. Raises InvalidArgumentError."""
    return encode_text(tag, Model.TAG_BYTES, "model tag")
