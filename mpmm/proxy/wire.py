"""What goes through a connection: one message per request, one per answer, each one pickle and its large buffers.

A request is `(token, name, args, kwargs)`. The token says whose use of the object this is; CONTROL stands for
the server itself, whose requests are ACQUIRE, RELEASE and HARD_DELETE. An answer is `(RETURNED, value)` or
`(RAISED, (pickled exception or None, one line, traceback))`.

`proxy.pickling` says what is large and travels beside the pickle. On the other side it becomes memory of its own,
writable if the sender's was.
"""

from __future__ import annotations

import importlib.util
import pickle
import sys
import traceback
from typing import Any

from mpmm.errors import InvalidArgumentError, RemoteCallError
from mpmm.proxy import pickling
from mpmm.proxy.channel import Message

__all__ = ["ACQUIRE", "CONTROL", "HARD_DELETE", "RELEASE", "RemoteTraceback", "decode_answer", "dump_for_server"]

CONTROL = 0
ACQUIRE, RELEASE, HARD_DELETE = "acquire", "release", "hard_delete"
RETURNED, RAISED = 0, 1


class RemoteTraceback(Exception):
    """The cause of an exception that was raised in another process: its traceback there, as text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n{self.text}"


def encode_request(token: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Message:
    """Return the message of a call. Raises what pickle raises for arguments that it refuses."""
    return pickling.dump((token, name, args, kwargs))


def decode_request(message: Message) -> tuple[int, str, tuple[Any, ...], dict[str, Any]]:
    """Return token, name and arguments. Raises anything: unpickling runs the classes of the arguments."""
    token, name, args, kwargs = pickling.load(message)
    return token, name, args, kwargs


def encode_result(value: object, tag: str, method: str) -> Message:
    """Return the answer that carries `value`, or one that says why it cannot be sent."""
    try:
        return pickling.dump((RETURNED, value))
    except Exception as error:
        return encode_error(
            RemoteCallError(
                f"{method}() of {tag!r} returned a {_type_name(value)}, which cannot be pickled: {error}",
                tag=tag,
                method=method,
            )
        )


def encode_error(error: BaseException) -> Message:
    """Return the answer that raises `error` at the caller."""
    # A pickle in the pickle: one that cannot be opened there must not hide the line and the traceback.
    pickled = None
    # SystemExit and KeyboardInterrupt would end the caller for something that happened elsewhere.
    if isinstance(error, Exception):
        try:
            pickled = pickle.dumps(error, pickling.PROTOCOL)
        except Exception:
            pickled = None
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return pickling.dump((RAISED, (pickled, f"{_type_name(error)}: {_text_of(error)}", text)))


def decode_answer(message: Message, tag: str, method: str) -> Any:
    """Return what the method returned or raise what it raised, with the remote traceback as cause.

    Raises RemoteCallError for a result or an exception that does not survive the journey.
    """
    try:
        kind, value = pickling.load(message)
    except Exception as error:
        raise RemoteCallError(
            f"{method}() of {tag!r} returned something that cannot be unpickled here: {_text_of(error)}",
            tag=tag,
            method=method,
        ) from error
    if kind == RETURNED:
        return value
    pickled, line, text = value
    try:
        raised = pickle.loads(pickled) if pickled is not None else None
    except Exception:
        raised = None
    if not isinstance(raised, Exception):
        raised = RemoteCallError(
            f"{method}() of {tag!r} raised {line}, which cannot be raised here as it is. In the server:\n{text}",
            tag=tag,
            method=method,
        )
    raise raised from RemoteTraceback(text)


def dump_for_server(thing: object, what: str) -> bytes:
    """Return `thing`, called `what` in errors, pickled for a new process; with cloudpickle where pickle refuses.

    Raises InvalidArgumentError when neither can.
    """
    refusals = []
    for dump in _dumpers():
        try:
            return bytes(dump(thing))
        except Exception as error:
            refusals.append(f"{dump.__module__.partition('.')[0].lstrip('_')}: {_text_of(error)}")
    raise InvalidArgumentError(
        f"{what} cannot be sent to a model server ({'; '.join(refusals)}); "
        "define it at the top level of a module, or install cloudpickle"
    )


def _dumpers() -> list[Any]:
    dumpers: list[Any] = [pickle.dumps]
    if importlib.util.find_spec("cloudpickle") is not None:
        import cloudpickle  # type: ignore[import-untyped, import-not-found, unused-ignore]  # optional, and untyped

        dumpers.append(cloudpickle.dumps)
        main = sys.modules.get("__main__")
        # Typed in, or `python -c`: the server cannot import this __main__, so pickle's references would lead nowhere.
        if getattr(main, "__spec__", None) is None and getattr(main, "__file__", None) is None:
            dumpers.reverse()
    return dumpers


def _type_name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}".removeprefix("builtins.")


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "(its text cannot be made)"
