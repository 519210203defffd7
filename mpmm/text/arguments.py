"""Checks of callers' arguments, before anything is changed: one function for each kind of value.

Each returns the value in the plain form that the rest of the package works with, so that NumPy's scalars are as good as
Python's, and raises InvalidArgumentError with a text that names the parameter, its value and the expected values. A
bool does not count as a number, although it is one in Python: `timeout_seconds=True` is a mistake.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from mpmm.errors import InvalidArgumentError

__all__ = [
    "LARGEST_PID",
    "checked_devices",
    "checked_number",
    "checked_path",
    "checked_size_mb",
    "checked_timeout",
    "checked_whole",
    "encoded_text",
    "in_brief",
]

# How many characters of a value a message shows.
LONGEST_SHOWN = 80
# The largest value of the kernel's type for it.
LARGEST_PID = 2**31 - 1
_SIZE = re.compile(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([kmgt]?)(i?b)?\s*", re.IGNORECASE)
# MB in one of each unit; a number alone is in MB.
_UNITS_MB = {"": 1.0, "k": 2.0**-10, "m": 1.0, "g": 2.0**10, "t": 2.0**20}


def in_brief(value: object) -> str:
    """Return `repr(value)`, cut off to fit into a message."""
    try:
        text = repr(value)
    except Exception:
        # A number of thousands of digits (Python refuses to print it), or a `__repr__` that fails.
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def checked_number(
    name: str, value: object, low: float, high: float, unit: str, *, above: bool = False, finite: bool = False
) -> float:
    """Return a number from `low` to `high` as a float.

    above: `low` itself is too little. finite: infinity is too much, even if `high` is infinite. unit: for the error.
    Raises InvalidArgumentError.
    """
    number = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except (OverflowError, ValueError):
            # A whole number that no float can hold; it is no duration or size either.
            number = math.nan
    fits = low < number <= high if above else low <= number <= high
    if not fits or (finite and math.isinf(number)):
        bound = f"above {low:g}" if above else f"from {low:g}"
        limit = f" to {high:g}" if math.isfinite(high) else ", finite" if finite else ""
        raise InvalidArgumentError(f"{name}={in_brief(value)}: expected {unit} {bound}{limit}")
    return number


def checked_size_mb(name: str, text: str) -> float:
    """Return the MB of a size as people type it: `5g`, `5GiB`, `0.5 TB`, `800m`, or `5120`, which is in MB.

    All units are powers of 1024, because an MB is a MiB everywhere in mpmm. Raises InvalidArgumentError.
    """
    found = _SIZE.fullmatch(text)
    if found is None or (found[3] and not found[2]):
        raise InvalidArgumentError(f"{name}={in_brief(text)}: expected a size such as 5g, 5GiB, 800m or 5120 (MB)")
    return float(found[1]) * _UNITS_MB[found[2].lower()]


def checked_timeout(name: str, value: object) -> float:
    """Return a time limit in seconds, 0 or more, infinity included. Raises InvalidArgumentError."""
    return checked_number(name, value, 0.0, math.inf, "seconds")


def checked_whole(name: str, value: object, low: int, high: int, what: str = "a whole number") -> int:
    """Return a whole number from `low` to `high` as an int. Raises InvalidArgumentError."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        number = operator.index(value)
        if low <= number <= high:
            return number
    raise InvalidArgumentError(f"{name}={in_brief(value)}: expected {what} from {low} to {high}")


def checked_devices(devices: object) -> tuple[int | str, ...] | None:
    """Return a choice of devices, indices or uuids, as a tuple; None stays None. Raises InvalidArgumentError.

    Does not check whether there are such devices.
    """
    if devices is None:
        return None
    if isinstance(devices, str | bytes | Mapping) or not isinstance(devices, Collection) or not len(devices):
        raise InvalidArgumentError(
            f"devices={in_brief(devices)}: expected a sequence of indices or uuids that is not empty, or None"
        )
    chosen: list[int | str] = []
    for one in devices:
        if isinstance(one, str):
            chosen.append(one)
        elif isinstance(one, numbers.Integral) and not isinstance(one, bool):
            chosen.append(operator.index(one))
        else:
            raise InvalidArgumentError(f"devices={in_brief(devices)}: {in_brief(one)} is no index and no uuid")
    return tuple(chosen)


def encoded_text(what: str, text: object) -> bytes:
    """Return a str as UTF-8, with the bytes of a file name that are not UTF-8 (U+DC80 to U+DCFF) as they were.

    Raises InvalidArgumentError if it is no str, or has another lone surrogate.
    """
    if not isinstance(text, str):
        raise InvalidArgumentError(f"{what} {in_brief(text)}: expected a str")
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"{what} {in_brief(text)}: character {error.start} is half of a surrogate pair, which is no text"
        ) from None


def checked_path(name: str, value: object, what: str) -> Path:
    """Return a path. Raises InvalidArgumentError for any other value, or a path that no system could have."""
    return Path(checked_path_text(name, value, what))


def checked_path_text(name: str, value: object, what: str) -> str:
    """Return a path as text. Raises InvalidArgumentError like `checked_path`."""
    path = value
    # The quick check first: the other one is expensive in a process that was just forked.
    if not isinstance(path, str) and isinstance(path, os.PathLike):
        path = os.fspath(path)
    if not isinstance(path, str) or not path or "\0" in path or not _is_encodable(path):
        raise InvalidArgumentError(f"{name}={in_brief(value)}: expected {what}, as a str or a path object")
    return path


def _is_encodable(path: str) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True
