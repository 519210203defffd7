"""Imports run only downwards between the parts of the package, and no two modules import each other."""

from __future__ import annotations

import ast
import graphlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from harness import CHECKOUT

# The parts that each part may import, also inside functions and for type checkers, from the doors to the ground. The
# package itself does not count: its names are imported at their first use, and all parts may ask for its version.
PARTS = {
    "__main__": "cli",
    "cli": "commands metrics observability model_manager shared_state ground",
    "beam": "multi_process_shared memory ground",
    "commands": "model_manager scheduling shared_state ground",
    "metrics": "observability shared_state ground",
    "observability": "shared_state sources policy ground",
    "model_manager": "suspend multi_process_shared memory scheduling shared_state sources policy ground",
    "suspend": "multi_process_shared rpc memory scheduling shared_state sources policy ground",
    # The old place of the next one.
    "proxy": "multi_process_shared",
    "multi_process_shared": "rpc shared_state ground",
    "rpc": "ground",
    "memory": "scheduling shared_state sources ground",
    "scheduling": "shared_state policy ground",
    "shared_state": "sources policy ground",
    "sources": "ground",
    "policy": "ground",
    "ground": "",
}
GROUND = ("errors", "interpreter", "text")
# The tables of `shared_state.layout`, whose fields are numbers of words.
ROWS = ("Header", "Member", "Model", "Instance", "Ticket", "Pin", "Device", "Observation", "Event", "Undo")
MODULES = {
    ".".join(path.relative_to(CHECKOUT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (CHECKOUT / "mpmm").rglob("*.py")
}


def imports_of(path: Path, for_types: bool) -> Iterator[str]:
    """Yield the modules of mpmm that a file imports; `for_types`: also those that only type checkers see."""
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not for_types:
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            inner = [f"{node.module}.{name.name}" for name in node.names]
            yield from (name if name in MODULES else node.module for name in inner)


def part_of(module: str) -> str:
    names = module.split(".")[1:]
    part = "rpc" if names[1:2] == ["rpc"] else names[0] if names else "mpmm"
    return "ground" if part in GROUND else part


def test_each_part_imports_only_what_the_table_allows() -> None:
    found: defaultdict[str, set[str]] = defaultdict(set)
    for module, path in MODULES.items():
        found[part_of(module)].update(part_of(imported) for imported in imports_of(path, for_types=True))
    found.pop("mpmm")
    assert found.keys() == PARTS.keys()
    beyond = {part: seen - {part, "mpmm", *PARTS[part].split()} for part, seen in found.items()}
    assert not any(beyond.values()), beyond


def test_the_table_runs_downwards() -> None:
    order = list(PARTS)
    upwards = [
        (part, other) for part in order for other in PARTS[part].split() if order.index(other) <= order.index(part)
    ]
    assert not upwards


def test_no_modules_import_each_other() -> None:
    graph = {module: set(imports_of(path, for_types=False)) - {module, "mpmm"} for module, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()


def raw_accesses(path: Path) -> Iterator[str]:
    """Yield where a file reads or writes words of the segment by their numbers, or reckons with those."""

    def is_field(node: ast.expr) -> bool:
        return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ROWS

    for node in ast.walk(ast.parse(path.read_text())):
        found = False
        if isinstance(node, ast.Subscript):
            columns = node.slice.elts if isinstance(node.slice, ast.Tuple) else []
            found = ast.unparse(node.value).endswith(("words", "floats")) or any(map(is_field, columns))
        elif isinstance(node, ast.BinOp):
            found = is_field(node.left) or is_field(node.right)
        if found:
            yield f"{path.relative_to(CHECKOUT)}:{ast.unparse(node)}"


def test_shared_state_is_the_only_part_that_touches_words() -> None:
    outside = [path for module, path in MODULES.items() if part_of(module) != "shared_state"]
    found = [access for path in outside for access in raw_accesses(path)]
    assert len(found) < 40, "\n".join(found)
