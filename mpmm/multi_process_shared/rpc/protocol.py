"""The messages on a connection: one per request and one per answer, each a pickle and its large buffers.

A request is `(token, name, args, kwargs)`. The token names the acquire by which the caller uses the object; CONTROL
means the server itself, which answers ACQUIRE, METHODS, RELEASE, HARD_DELETE, SLEEP, WAKE_UP, GET, CALL and DROP. An
answer is `(RETURNED, value)`, `(LENT, value)` if parts of the value stay in the server, or `(RAISED, (pickled exception
or None, one line, traceback))`.

A client has received what an answer has lent if it sends anything after that on the same connection: its next request,
or FAREWELL before it closes the connection. Otherwise it was interrupted or has died, and the server drops the parts.

`rpc.pickling` decides which buffers are large and sent beside the pickle. The receiver gets them in memory of its
own.
"""

from __future__ import annotations

import importlib.util
import io
import pickle
import sys
import traceback
from typing import Any

from mpmm.errors import InvalidArgumentError, RemoteCallError
from mpmm.interpreter.main_module import is_main_importable
from mpmm.multi_process_shared.rpc import pickling
from mpmm.multi_process_shared.rpc.channel import Message

__all__ = [
    *("ACQUIRE", "CALL", "CONTROL", "DROP", "FAREWELL", "GET", "HARD_DELETE", "LENT", "METHODS", "RELEASE", "SLEEP"),
    "WAKE_UP",
    *("RemoteTraceback", "decode_answer", "dump_for_server", "farewell", "load_answer", "outcome"),
]

CONTROL = 0
ACQUIRE, METHODS, RELEASE, HARD_DELETE = "acquire", "methods", "release", "hard_delete"
SLEEP, WAKE_UP = "sleep", "wake up"
GET, CALL, DROP, FAREWELL = "get", "call", "drop", "farewell"
RETURNED, RAISED, LENT = 0, 1, 2


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


# Encoded ahead: in a newly forked process, the first use of pickle takes a tenth of a millisecond.
_ACQUIRE_REQUESTS = {known: encode_request(CONTROL, ACQUIRE, (known,), {}) for known in (False, True)}


def acquire_request(knows_methods: bool) -> Message:
    """Return the message of an ACQUIRE, whose answer leaves out the names of methods that the client knows."""
    return _ACQUIRE_REQUESTS[knows_methods]


def farewell() -> Message:
    """Return the message that ends a connection after an answer that lent something; there is no answer to it."""
    return encode_request(CONTROL, FAREWELL, (), {})


def decode_request(message: Message) -> tuple[int, str, tuple[Any, ...], dict[str, Any]]:
    """Return token, name and arguments. May raise anything: unpickling runs code of the arguments' classes."""
    token, name, args, kwargs = pickling.load(message)
    return token, name, args, kwargs


def encode_result(value: object, tag: str, method: str, kind: int = RETURNED) -> Message:
    """Return the answer that carries `value`, or one that says why it cannot be sent. kind: RETURNED or LENT."""
    try:
        return pickling.dump((kind, value))
    except Exception as error:
        return encode_error(
            RemoteCallError(
                f"{method}() of {tag!r} returned a {_type_name(value)}, which cannot be pickled: {error}",
                tag=tag,
                method=method,
            )
        )


def encode_error(error: BaseException) -> Message:
    """Return the answer that raises `error` in the caller."""
    # A pickle in the pickle: if the caller cannot load it, the line and the traceback still arrive.
    pickled = None
    # SystemExit and KeyboardInterrupt would end the caller for something that happened elsewhere.
    if isinstance(error, Exception):
        try:
            pickled = pickling.plain(_portable(error))
        except Exception:
            pickled = None
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return pickling.dump((RAISED, (pickled, f"{_type_name(error)}: {_text_of(error)}", text)))


class _Portable:
    """Pickled in place of an exception, and unpickled as the exception itself."""

    def __init__(self, kind: type[Exception], args: tuple[Any, ...], state: dict[str, Any]) -> None:
        self.parts = kind, args, state

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_again, self.parts


def _portable(error: Exception) -> object:
    """Return what to pickle for an exception: itself, if its class says how.

    Pickle makes an exception again by calling its class with `args`. The class passed these to its base, but may have
    been called with others: if it has an `__init__` of its own, pickle's call fails, or makes something else.
    """
    kind = type(error)
    base = _builtin_base(kind)
    if kind.__reduce__ is not base.__reduce__ or kind.__reduce_ex__ is not base.__reduce_ex__:
        return error
    if kind.__init__ is base.__init__ and kind.__new__ is base.__new__:
        return error
    # OSError has more state than `args`.
    reduced: Any = base.__reduce__(error)
    args = reduced[1] if _can_pickle(reduced[1]) else (_text_of(error),)
    return _Portable(kind, args, _picklable(vars(error)))


def _made_again(kind: type[Exception], args: tuple[Any, ...], state: dict[str, Any]) -> Exception:
    """Return an exception with these `args` and attributes, without calling its class's own `__new__` or `__init__`."""
    base = _builtin_base(kind)
    error: Exception = base.__new__(kind, *args)
    base.__init__(error, *args)
    error.__dict__.update(state)
    return error


def _builtin_base(kind: type[BaseException]) -> Any:
    return next(base for base in kind.__mro__ if base.__module__ == "builtins")


def _picklable(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if _can_pickle(value)}


def _can_pickle(value: object) -> bool:
    try:
        pickling.plain(value)
    except Exception:
        return False
    return True


def decode_answer(message: Message, tag: str, method: str) -> Any:
    """Return what the method returned or raise what it raised, with the remote traceback as cause.

    Raises RemoteCallError for a result or an exception that cannot be pickled or unpickled.
    """
    return outcome(*load_answer(message, tag, method), tag, method)


def load_answer(message: Message, tag: str, method: str) -> tuple[int, Any]:
    """Return kind and contents of an answer. Raises RemoteCallError if they cannot be unpickled."""
    try:
        kind, value = pickling.load(message)
    except Exception as error:
        raise RemoteCallError(
            f"{method}() of {tag!r} returned something that cannot be unpickled here: {_text_of(error)}",
            tag=tag,
            method=method,
        ) from error
    return kind, value


def outcome(kind: int, value: Any, tag: str, method: str) -> Any:
    """Return what a method returned or raise what it raised; see `decode_answer`."""
    if kind != RAISED:
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
    try:
        raise raised from RemoteTraceback(text)
    finally:
        # Its traceback has this frame, so they would keep each other, and all callers with what their variables hold.
        del raised


def dump_for_server(thing: object, what: str) -> bytes:
    """Return `thing`, called `what` in errors, pickled for a new process; with cloudpickle if pickle refuses.

    Raises InvalidArgumentError if neither can, or if a socket or Connection is in it.
    """
    refusals = []
    for pickler in _picklers():
        try:
            return _dumped(thing, pickler)
        except pickling.FileRefusedError as error:
            raise InvalidArgumentError(f"{what} cannot be sent to a model server: {error}") from None
        except Exception as error:
            refusals.append(f"{pickler.__module__.rpartition('.')[2].lstrip('_')}: {_text_of(error)}")
    raise InvalidArgumentError(
        f"{what} cannot be sent to a model server ({'; '.join(refusals)}); "
        "define it at the top level of a module, or install cloudpickle"
    )


class _RefusesFiles:
    """Goes before a class of picklers."""

    def reducer_override(self, thing: Any) -> Any:
        pickling.refuse_files(thing)
        inherited = getattr(super(), "reducer_override", None)
        return NotImplemented if inherited is None else inherited(thing)


def _dumped(thing: object, pickler: Any) -> bytes:
    file = io.BytesIO()
    type("Pickler", (_RefusesFiles, pickler), {})(file).dump(thing)
    return file.getvalue()


def _picklers() -> list[Any]:
    picklers: list[Any] = [pickle.Pickler]
    if (cloudpickle := _cloudpickle()) is not None:
        picklers.append(cloudpickle.CloudPickler)
        # The new process could not resolve pickle's references to the main module.
        if not is_main_importable():
            picklers.reverse()
    return picklers


def _cloudpickle() -> Any:
    """Return the package, or else the copy in Beam where this process has imported Beam; None without either."""
    if importlib.util.find_spec("cloudpickle") is not None:
        import cloudpickle  # type: ignore[import-untyped, import-not-found, unused-ignore]  # optional, and untyped

        return cloudpickle
    return sys.modules.get("apache_beam.internal.cloudpickle")


def _type_name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}".removeprefix("builtins.")


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "(its text cannot be made)"
