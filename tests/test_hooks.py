"""Hooks for forks and exits are in one place, which the code itself shows."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator

import pytest
from harness import CHECKOUT

# What has code called when a process forks or ends, by the last part of its name.
HOOKS = ("register_at_fork", "register_after_fork", "Finalize", "_register_atexit")
# The same names may have other meanings elsewhere.
QUALIFIED_HOOKS = ("atexit.register", "weakref.finalize")
HOOKS_MODULE = "mpmm/interpreter/fork_hooks.py"
# The only other places, and why they are none for `fork_hooks`.
OTHER_PLACES = {
    # Closes the descriptor of a server's process once its object is garbage, as the objects of `multiprocessing` do,
    # whose `close` calls it. It does nothing at a fork or an exit.
    "mpmm/multi_process_shared/forkserver/client.py": ["Finalize"],
    "mpmm/multi_process_shared/spawned_server.py": ["Finalize"],
    # In servers only: masks signals around a fork, before `fork_hooks` does, and in the parent, too.
    "mpmm/multi_process_shared/server_process.py": ["register_at_fork"],
}
SOURCES = {str(path.relative_to(CHECKOUT)): path for path in sorted((CHECKOUT / "mpmm").rglob("*.py"))}


def hooks_in(text: str) -> Iterator[str]:
    """Yield the hooks that a module's text uses, in calls and as values; also under another name."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            names = [(name.name, f"{node.module}.{name.name}") for name in node.names]
        elif isinstance(node, ast.Attribute):
            names = [(node.attr, ast.unparse(node))]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # As in `getattr(os, "register_at_fork")`.
            names = [(node.value, node.value)]
        else:
            continue
        for name, qualified in names:
            if name in HOOKS:
                yield name
            elif qualified in QUALIFIED_HOOKS:
                yield qualified


def test_hooks_for_forks_and_exits_are_in_one_place() -> None:
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name, path in SOURCES.items():
        for hook in hooks_in(path.read_text()):
            found[name].append(hook)
    assert set(found.pop(HOOKS_MODULE)) == {"register_at_fork", "Finalize"}
    assert found == OTHER_PLACES


@pytest.mark.parametrize(
    ("text", "hook"),
    [
        ("os.register_at_fork(before=f)", "register_at_fork"),
        ("from os import register_at_fork as at_fork", "register_at_fork"),
        ("util.register_after_fork(thing, f)", "register_after_fork"),
        ("getattr(os, 'register_at_fork')(before=f)", "register_at_fork"),
        ("multiprocessing.util.Finalize(None, f, exitpriority=1)", "Finalize"),
        ("from multiprocessing.util import Finalize", "Finalize"),
        ("import atexit\n\n@atexit.register\ndef f(): ...", "atexit.register"),
        ("from atexit import register", "atexit.register"),
        ("threading._register_atexit(f)", "_register_atexit"),
        ("weakref.finalize(thing, f)", "weakref.finalize"),
    ],
)
def test_a_hook_is_found_however_it_is_written(text: str, hook: str) -> None:
    assert list(hooks_in(text)) == [hook]
    assert list(hooks_in("selector.register(fd)\nfinalizer.finalize()")) == []
