"""Objects for model servers whose methods return what cannot be pickled, like an inference session of ONNX."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Input:
    """Describes an input of a model, and refuses to be pickled, like objects written in C++."""

    def __init__(self, name: str, shape: list[int]) -> None:
        self.name = name
        self.shape = shape

    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle 'Input' object")

    def renamed(self, name: str) -> Input:
        return Input(name, self.shape)


class Session:
    """A model that describes itself."""

    def __init__(self) -> None:
        self._inputs = [Input("x", [1, 2]), Input("y", [3])]
        self._made: weakref.WeakSet[Input] = weakref.WeakSet()
        self._number_made = 0

    def get_inputs(self) -> list[Input]:
        return self._inputs

    def knows(self, one: object) -> bool:
        """Tell whether an object is one of this session's inputs."""
        return any(one is other for other in self._inputs)

    def make_input(self, wait_for: str | None = None) -> Input:
        """Make an input, once there is a file `wait_for`; meanwhile, there is one with `.begun` after that name."""
        if wait_for is not None:
            Path(f"{wait_for}.begun").touch()
            while not Path(wait_for).exists():
                time.sleep(0.01)
        made = Input("made", [])
        self._made.add(made)
        self._number_made += 1
        return made

    def number_made(self) -> int:
        """Return how many inputs it has made."""
        return self._number_made

    def inputs_left(self) -> int:
        """Return how many of the inputs that it made still exist."""
        return len(self._made)

    def count(self, to: int, fail_at: int = -1) -> Iterator[int]:
        for number in range(to):
            if number == fail_at:
                raise ZeroDivisionError("at the end")
            yield number

    def views(self) -> Any:
        return {"numbers": {"a": 1, "b": 2}.values(), "plain": [1, 2]}

    def lock(self) -> Any:
        return threading.Lock()

    def itself(self) -> Any:
        found: list[Any] = [threading.Lock()]
        found.append(found)
        return found
