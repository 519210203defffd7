"""Every code block and command of README.md is taken from the file itself and run, or only checked if it takes long.

Not run here are the main job and the test command, which take minutes (`test_the_long_commands_have_all_their_parts`);
the tests of the demo and `.ci/run` run them. Of the screen of `mpmm inspect`, the tables and columns are compared.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness import CHECKOUT, NewManager
from loaders import LoadsObject

from mpmm.cli import main
from mpmm.commands.parser import make_parser
from mpmm.model_manager import ModelManager
from mpmm.model_manager.request import AcquireOptions
from mpmm.observability.inspect_screen import sections
from mpmm.shared_state.snapshot import read_snapshot

README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
#: The code blocks, in order, with their language.
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
SHELL = [text.strip() for language, text in BLOCKS if language == "sh"]
TEXT = [text for language, text in BLOCKS if language == "text"]
INSTALL, MAIN_JOB, TESTS, RUN = range(4)
WITH_BEAM, FIRST_USE, MORE_USES = range(3)
TIMEOUT_S = 300

#: What the examples assume: a model, and an image.
BEFORE = """
import os

class Detector:
    def predict(self, image):
        return f"{image} in {os.getpid()}"

load_detector, image = Detector, "found"
"""


def run(command: list[str], folder: Path) -> str:
    """Run a command that must succeed, with this checkout importable; return its output."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(CHECKOUT),
        "MPMM_MEMORY_SOURCE": "booked",
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_python(text: str, folder: Path) -> list[str]:
    """Run a program, as a file, because model servers import the main module; return the lines that it prints."""
    program = folder / "program.py"
    program.write_text(text)
    return run([sys.executable, str(program)], folder).splitlines()


def extras() -> set[str]:
    """Return the extras that setup.cfg declares."""
    section = (CHECKOUT / "setup.cfg").read_text().partition("[options.extras_require]")[2].partition("\n[")[0]
    return set(re.findall(r"^(\w+) =", section, re.MULTILINE))


def subcommands() -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of the commands, by name."""
    [action] = [action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(action.choices)


def test_an_index_shows_nothing_of_it_that_is_not_there() -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--long-description"], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    assert "tools/demo/memory.png" in README and "The picture" in README
    assert "![" not in done.stdout and "The picture" not in done.stdout
    assert {link.partition(":")[0] for link in re.findall(r"\]\(([^)]*)\)", done.stdout)} == {"https"}
    # Nothing else is missing.
    texts = re.sub(r"!\[.*\n|\[([^\]]*)\]\(mpmm/.*?\)|The picture is .*?\. ", r"\1", README).split()
    assert texts == done.stdout.split()


def test_no_block_is_left_out() -> None:
    assert (len(PYTHON), len(SHELL), len(TEXT)) == (3, 4, 2) and len(BLOCKS) == 9
    assert README.count("```") == 2 * len(BLOCKS)
    assert README.count("\n") < 200


def test_the_long_commands_have_all_their_parts() -> None:
    marked = [README.index(f"<!-- {mark} -->\n```sh\n") for mark in ("main job", "tests")]
    for place, command in zip(marked, (SHELL[MAIN_JOB], SHELL[TESTS]), strict=True):
        assert README.index(command) == README.index("```sh\n", place) + len("```sh\n")
        steps = [step.split() for step in command.split(" && ")]
        assert steps[0] == ["python3", "-m", "venv", ".venv"]
        assert all(step[0].startswith(".venv/bin/") for step in steps[1:])
        assert set(re.findall(r"\.\[(\w+)\]", command)) <= extras()
        assert all((CHECKOUT / path).is_file() for path in re.findall(r"tools/\w+\.py", command))
    # What `.ci/run` does with its mark, in its own words.
    [line] = [line for line in (CHECKOUT / ".ci" / "run").read_text().splitlines() if line.startswith("command=")]
    found = subprocess.run(["bash", "-c", f'{line}; echo "$command"'], cwd=CHECKOUT, capture_output=True, text=True)
    assert found.stdout.strip() == SHELL[TESTS]


def test_the_extras_exist() -> None:
    assert re.fullmatch(r"pip install 'mpmm\[beam\]'", SHELL[INSTALL])
    paragraph = README[README.index("Extras: ") :].partition(". A C compiler")[0]
    named = set(re.findall(r"`(\w+)`", paragraph))
    assert named == extras() - {"demo", "dev", "docs", "examples", "hosts", "large"}


def test_the_first_example(tmp_path: Path) -> None:
    [said] = run_python(BEFORE + PYTHON[FIRST_USE], tmp_path)
    assert said.startswith("found in ")


def test_the_other_examples(tmp_path: Path) -> None:
    shared = PYTHON[FIRST_USE].partition("\nwith ")[0]
    after = """
if __name__ == "__main__":
    import asyncio
    print(detect_anywhere(image), asyncio.run(detect_in_a_loop(image)), detect(image), os.getpid(), sep="\\n")
    MultiProcessShared(load_detector, tag="detector-1", always_proxy=True).unsafe_hard_delete()
"""
    served, *own, pid = run_python(BEFORE + shared + PYTHON[MORE_USES] + after, tmp_path)
    assert own == [f"found in {pid}"] * 2
    assert served.startswith("found in ") and served != own[0], "it is served by another process"


BEAM_BEFORE = """
from apache_beam.ml.inference.base import ModelHandler
from apache_beam.options.pipeline_options import PipelineOptions

class Doubler:
    def predict(self, numbers):
        return [2 * number for number in numbers]

class Handler(ModelHandler):
    def load_model(self):
        return Doubler()

    def run_inference(self, batch, model, inference_args=None):
        return model.predict(batch)

options, examples, handler = PipelineOptions(), [1, 2, 3], Handler()
"""


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is None, reason="needs apache_beam")
def test_the_pipeline(tmp_path: Path) -> None:
    guarded = "if __name__ == '__main__':\n" + "".join(f"    {line}\n" for line in PYTHON[WITH_BEAM].splitlines())
    after = "    import mpmm\n    print(type(beam.ml.inference.base.ModelManager), mpmm.beam.is_installed())\n"
    assert run_python(BEAM_BEFORE + guarded + after, tmp_path)[-1].endswith(" True")


def test_any_program_runs_on_a_lease(tmp_path: Path) -> None:
    for name, script in (("train", 'echo trained with "$@" and "$MPMM_LEASE_MB" MB'), ("mpmm", None)):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n" if script else f'#!/bin/sh\nexec {sys.executable} -m mpmm "$@"\n')
        path.chmod(0o700)
    assert run(["sh", "-c", SHELL[RUN]], tmp_path) == "trained with --epochs 3 and 6000 MB\n"


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`mpmm ([a-z][^`]*)`", README))))
def test_a_command_in_the_text_is_one(command: str) -> None:
    known, (name, *words) = subcommands(), command.split()
    assert name in known
    options = {option for action in known[name]._actions for option in action.option_strings}
    assert {word for word in words if word.startswith("-")} <= options
    if name == "help":
        assert not words or words[0] in known["help"]._actions[1].choices  # type: ignore[operator]  # it has choices


def test_methods_and_parameters_in_the_text_exist() -> None:
    [methods] = re.findall(r"`manager\.preload`.*? act for all processes", README, re.DOTALL)
    for name in re.findall(r"`(?:manager\.)?(\w+)`", methods):
        assert callable(getattr(ModelManager, name))
    [parameters] = re.findall(r"A request may have a (.*?)\.", README, re.DOTALL)
    assert set(re.findall(r"`(\w+)=`", parameters)) <= set(AcquireOptions.__annotations__)
    [reserved] = re.findall(r"`with (manager\.reserve\(.*?\)):`", README)
    call = ast.parse(reserved, mode="eval").body
    assert isinstance(call, ast.Call) and {keyword.arg for keyword in call.keywords} == {"name"}


def test_the_commands_answer(new_manager: NewManager, namespace: str, capsys: pytest.CaptureFixture[str]) -> None:
    manager = new_manager()
    manager.release_model("m", manager.acquire_model("m", LoadsObject()))
    for command in ("inspect", "ps", "events", "check --health", "metrics", "settings", "help"):
        assert main(command.split()) == 0, command
        assert capsys.readouterr().out


def test_the_screen_has_the_tables_that_inspect_shows(new_manager: NewManager, namespace: str) -> None:
    new_manager()
    heads = {section.title: section.head for section in sections(read_snapshot(namespace))}
    shown = dict(re.findall(r"^([\w ]+):\n  (.*)$", TEXT[0], re.MULTILINE))
    assert (
        set(shown)
        == {"devices", "waiting", "copies", "last evictions"}
        == set(heads) - {*("models", "last decisions", "members")}
    )
    for title, head in shown.items():
        assert set(re.split(r"  +", head.strip())) <= set(heads[title]), title


def test_what_the_tree_and_the_links_name_is_there() -> None:
    for line in TEXT[1].splitlines():
        for name in re.split(r" +", re.split(r" {3,}", line)[0]):
            assert (CHECKOUT / "mpmm" / name).exists(), name
    for path in re.findall(r"\]\((?!https:)([^)]+)\)", README):
        assert (CHECKOUT / path).is_file(), path
    for path in re.findall(r"tools/[\w/]+(?:\.py)?", README):
        assert (CHECKOUT / path).exists() or path == "tools/demo/memory", path
