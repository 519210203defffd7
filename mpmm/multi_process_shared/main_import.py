"""Refuses what a process must not do while it imports the program's main module to become a model server.

A model server imports the main module, like every process that `multiprocessing` spawns. A program that loads or
acquires at module level does so again in its own server. That server would wait forever for the very tag that it is to
serve, and its starter for the server.
"""

from __future__ import annotations

from multiprocessing import process as mp_process

from mpmm.errors import ServerStartError
from mpmm.multi_process_shared.registry import is_server_process

__all__ = ["is_importing_main", "not_while_importing_main", "refuse_while_importing_main"]


def is_importing_main() -> bool:
    """Tell whether this process was spawned, as a model server or otherwise, and is still importing the main module."""
    # multiprocessing checks the same attribute before it refuses to spawn in such a process.
    return bool(getattr(mp_process.current_process(), "_inheriting", False))


def refuse_while_importing_main(what: str, tag: str) -> None:
    """Raise ServerStartError in a model server that is importing the main module; what: the verb before the tag."""
    if is_server_process() and is_importing_main():
        raise not_while_importing_main(f"{what} {tag!r}", tag)


def not_while_importing_main(what: str, tag: str) -> ServerStartError:
    """Return the error for `what`, a verb and its object."""
    return ServerStartError(
        f"An attempt has been made to {what} before the current process has finished its bootstrapping phase: a model "
        "server imports the main module, like every process that multiprocessing spawns. Put code that loads, acquires "
        'or starts something there behind\n\n    if __name__ == "__main__":\n',
        tag=tag,
    )
