"""The decorator `ModelManager.uses`: a function that is given an instance for the length of each call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any, cast

from mpmm.errors import InvalidArgumentError
from mpmm.text.arguments import in_brief

__all__ = ["given_instance"]


def given_instance(
    function: Callable[..., Any],
    tag: str,
    argument: str,
    hold: Callable[[], AbstractContextManager[Any]],
    hold_async: Callable[[], AbstractAsyncContextManager[Any]],
) -> Callable[..., Any]:
    """Return `function` with an instance passed as `argument`; see `ModelManager.uses`.

    hold, hold_async: hold an instance for a block; the second is for coroutine functions. Raises InvalidArgumentError.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"{in_brief(function)} cannot get {tag!r}: {error}") from error
    if not isinstance(argument, str) or argument not in signature.parameters:
        raise InvalidArgumentError(f"{function!r} has no parameter {argument!r}, through which to get {tag!r}")

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with hold() as instance:
            return function(*args, **kwargs, **{argument: instance})

    @functools.wraps(function)
    async def call_async(*args: Any, **kwargs: Any) -> Any:
        async with hold_async() as instance:
            return await function(*args, **kwargs, **{argument: instance})

    made: Any = call_async if inspect.iscoroutinefunction(function) else call
    others = [parameter for name, parameter in signature.parameters.items() if name != argument]
    made.__signature__ = signature.replace(parameters=others)
    return cast("Callable[..., Any]", made)
