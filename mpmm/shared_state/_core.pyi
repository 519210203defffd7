"""Types of `_core.c`; the module exists only where it could be compiled."""

from collections.abc import Sized
from typing import Any

OFFSETS: tuple[str, ...]

class Core:
    def __new__(
        cls,
        memory: Any,
        words: int,
        offsets: tuple[int, ...],
        strange_models: tuple[int, ...],
        strange_instances: tuple[int, ...],
        pid: int,
        smoothing: float,
        turn: int,
        crowded_turns: int,
        spin_ns: int,
        /,
    ) -> Core: ...
    @property
    def done(self) -> int: ...
    @property
    def sleeps(self) -> int: ...
    def take_idle(
        self,
        namespace: Any,
        reference: int,
        hints: dict[str, tuple[int, int]],
        handles: dict[int, Any],
        objects: dict[int, Any],
        owned: dict[int, list[int]],
        held: dict[tuple[int, int], Any],
        held_at: dict[Any, tuple[int, int]],
        tag: str,
        operation: Any,
        kept: int,
        timeout: float,
        /,
    ) -> Any: ...
    def release(
        self,
        namespace: Any,
        reference: int,
        taken_grants: set[tuple[int, int]],
        row: int,
        generation: int,
        way: int,
        timeout: float,
        /,
    ) -> int: ...
    def queue(
        self,
        namespace: Any,
        reference: int,
        hints: dict[str, tuple[int, int]],
        tag: str,
        operation: Any,
        deadline: int,
        loadable_on: int,
        called_up_for: int,
        timeout: float,
        /,
    ) -> int: ...
    def await_answer(self, row: int, until: int, looked_for: int, called_up_for: int, spin: int, /) -> int: ...
    def wake_after_sleep(self, bell: int, calls: int, sleeps: int, /) -> bool: ...
    def doze(
        self,
        bell: int,
        seen: int,
        until: int,
        tick: int,
        fd: int,
        late: int,
        times: tuple[int, ...],
        operations: set[Any] | None,
        lock: Any,
        deferred: Sized | None,
        /,
    ) -> bool: ...
    def keep_watch(
        self,
        bell: int,
        seen: int,
        until: int,
        tick: int,
        folder: int,
        slot: int,
        operations: set[Any] | None,
        lock: Any,
        deferred: Sized | None,
        /,
    ) -> bool: ...
    def may_be_dead(self, folder: int, slot: int, /) -> bool: ...
    def take_granted(
        self,
        row: int,
        handles: dict[int, Any],
        objects: dict[int, Any],
        held: dict[tuple[int, int], Any],
        held_at: dict[Any, tuple[int, int]],
        taken_grants: set[tuple[int, int]],
        operation: Any,
        /,
    ) -> Any: ...
    def close(self) -> None: ...

def rehearse(store: int, killed: bool, now_ns: int, /) -> None: ...
