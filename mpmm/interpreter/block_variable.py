"""A context variable that has a value inside of a `with` block, and nowhere else, whatever ends the block.

A signal handler may raise an exception after a block has set a variable and before anything would reset it, or in the
middle of the reset. So the variable refers weakly to the block, whose only other owner is the frame that runs it: once
that frame has left the block, the value is gone. Code that runs in a copy of the context, such as a task of asyncio,
has the value as long as the block lasts, too.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Generic, TypeVar

__all__ = ["BlockVariable"]

T = TypeVar("T")


class BlockVariable(Generic[T]):
    """The variable. name: for debuggers."""

    def __init__(self, name: str) -> None:
        self._blocks: ContextVar[tuple[weakref.ref[_Block[T]], ...]] = ContextVar(name, default=())
        self._for_good: list[_Block[T]] = []

    def set_inside(self, value: T) -> AbstractContextManager[None]:
        """Return a block inside of which `value` is added to those of the outer blocks."""
        return _Block(self._blocks, value)

    def set_for_good(self, value: T) -> None:
        """Add a value as of a block that never ends, in this thread."""
        block = _Block(self._blocks, value)
        self._for_good.append(block)
        block.__enter__()

    def innermost(self) -> T | None:
        """Return the value of the innermost block that runs this code; None outside of all."""
        values = self.all()
        return values[-1] if values else None

    def all(self) -> tuple[T, ...]:
        """Return the values of the blocks that run this code, from the outermost on."""
        return tuple(block.value for reference in self._blocks.get() if (block := reference()) is not None)


class _Block(AbstractContextManager[None], Generic[T]):
    def __init__(self, blocks: ContextVar[tuple[weakref.ref[_Block[T]], ...]], value: T) -> None:
        self.value = value
        self._blocks = blocks
        self._before: Token[tuple[weakref.ref[_Block[T]], ...]] | None = None

    def __enter__(self) -> None:
        lasting = (reference for reference in self._blocks.get() if reference() is not None)
        self._before = self._blocks.set((*lasting, weakref.ref(self)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            self._blocks.reset(self._before)
