"""`tools/mutate.py`: its changes are changes, and it says which of them nothing notices."""

from __future__ import annotations

import ast
from pathlib import Path

import mutate
import pytest


class FakeTree:
    """A copy of the tree whose tests notice what makes a function return nothing."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def put(self, file: str, content: bytes) -> None:
        self.files[file] = content

    def fails(self, test: str, timeout_s: float) -> str | None:
        changed = any(content.count(b"return None") > 1 for content in self.files.values())
        return "test_it" if changed and test == "test_second" else None

    def __enter__(self) -> FakeTree:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_each_change_is_code_that_does_something_else() -> None:
    for part, (patterns, tests) in mutate.PARTS.items():
        assert all((mutate.ROOT / "tests" / f"{test}.py").is_file() for test in tests), part
        assert all(list(mutate.ROOT.glob(pattern)) for pattern in patterns), part
    for file in ("mpmm/policy/fairness.py", "mpmm/shared_state/durations.py", "mpmm/text/arguments.py"):
        source = (mutate.ROOT / file).read_bytes()
        original = ast.dump(ast.parse(source))
        changes = mutate.Changes(file).all()
        assert len(changes) == len(set(changes)) > 5
        for change in changes:
            assert ast.dump(ast.parse(change.applied_to(source))) != original, change
            assert change.diff().count("\n@@") == 1


def test_words_for_people_are_not_changed() -> None:
    changed = {change.line for change in mutate.Changes("mpmm/errors.py").all()}
    lines = (mutate.ROOT / "mpmm/errors.py").read_text().splitlines()
    assert all(
        "return" in lines[line - 1] or "self." in lines[line - 1] or "super" in lines[line - 1] for line in changed
    )


def test_the_same_seed_draws_the_same_changes(capsys: pytest.CaptureFixture[str]) -> None:
    listed = []
    for arguments in (["policy"], ["policy"], ["policy", "--seed", "2"], ["mpmm/policy/plan.py"]):
        assert mutate.main([*arguments, "--list", "--changes", "5"]) == 0
        listed.append(capsys.readouterr().out)
    assert listed[0] == listed[1] != listed[2]
    assert listed[0].count("\n--- mpmm/policy/") == 5
    assert mutate.main(["policy", "--list", "--changes", "5", "--only", "3"]) == 0
    assert capsys.readouterr().out.partition("\n\n3: ")[2] in listed[0]
    with pytest.raises(SystemExit):
        mutate.main(["no such part"])


def test_survivors_are_told_with_their_diffs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = "mpmm/policy/one.py"
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text("def first(x):\n    if x > 1:\n        return None\n    return x\n")
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    monkeypatch.setattr(mutate, "TreeCopy", FakeTree)
    arguments = ["policy", "--tests", "test_first", "test_second"]
    assert mutate.main(arguments) == 0
    said = capsys.readouterr().out
    assert f"{file}:4, nothing returned: test_second: test_it" in said
    assert f"{file}:2, another comparison: SURVIVES" in said
    assert "-    if x > 1:\n+    if (x >= 1):" in said
    assert "3 changes, 1 noticed (33 %), 2 survive" in said
    assert mutate.main([*arguments, "--at-least", "95"]) == 1
