"""`mpmm help`: pages made from tables and docstrings, which must match the signatures and the source."""

from __future__ import annotations

import configparser
import inspect
import math
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from harness import CHECKOUT, NewManager, wait_until

import mpmm
from mpmm import errors
from mpmm.cli import main
from mpmm.commands.help_pages import TOPICS, as_text, errors_page, page
from mpmm.commands.settings_page import ENVIRONMENT, OWN_PARAMETERS, entry, settings_page
from mpmm.model_manager import ModelManager
from mpmm.observability.doctor import Check, examine
from mpmm.policy.reasons import SENTENCES
from mpmm.shared_state.settings import SETTINGS, Settings

PACKAGE = Path(mpmm.__file__).parent
PARAMETERS = dict(list(inspect.signature(ModelManager.__init__).parameters.items())[1:])
#: Not for users: set by `mpmm run` for its program, which the page says below its table, and by us for our servers.
SET_BY_MPMM = {"MPMM_LEASE_MB", "MPMM_DEVICES", "MPMM_MEMORY_FRACTION", "MPMM_SERVER_LIVES_BY"}


def test_every_parameter_is_declared_once() -> None:
    shared = set(SETTINGS) - {"suspend_checkpoints"}  # what `suspend` is for all processes
    assert shared.isdisjoint(OWN_PARAMETERS)
    assert shared | set(OWN_PARAMETERS) == set(PARAMETERS)


@pytest.mark.parametrize("name", sorted(set(SETTINGS) & set(PARAMETERS)))
def test_the_signature_has_the_defaults_of_the_settings(name: str) -> None:
    default = asdict(Settings())[name]
    assert PARAMETERS[name].default in ((None, default) if math.isinf(default) else (default,))


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_docstring_says_what_the_help_page_says(name: str) -> None:
    documented = " ".join(inspect.getdoc(ModelManager.__init__).split())  # type: ignore[union-attr]  # it has one
    assert f" {entry(name)} " in documented
    meaning = OWN_PARAMETERS[name] if name in OWN_PARAMETERS else SETTINGS[name].meaning
    assert [line for line in settings_page().split("\n") if line.startswith(f"| `{name}` |") and meaning in line]


def test_every_environment_variable_has_its_line() -> None:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        found.update(re.findall(r'"(MPMM_[A-Z_]+)"', path.read_text()))
    assert found == set(ENVIRONMENT) | SET_BY_MPMM
    for name in SET_BY_MPMM - {"MPMM_SERVER_LIVES_BY"}:
        assert f"`{name}`" in settings_page()


def test_every_error_says_when_it_is_raised_and_what_to_do() -> None:
    rows = {line.split("`")[1]: line for line in errors_page().split("\n") if line.startswith("| `")}
    assert set(rows) == set(errors.__all__) - {"MpmmError"}
    for name, row in rows.items():
        _, _, parents, when, remedy, attributes, _ = (cell.strip() for cell in row.split("|"))
        assert parents and when.endswith(".") and remedy.endswith("."), name
        facts = inspect.get_annotations(getattr(errors, name))
        assert all(f"`{fact}`" in attributes for fact in facts), name


@pytest.mark.parametrize("topic", TOPICS)
def test_every_topic_is_printed_as_text(topic: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", topic]) == 0
    text = capsys.readouterr().out
    assert len(text) > 500
    # Code stays as it is; nothing else is wider than a terminal, or has marks that only Markdown needs.
    assert not [line for line in text.split("\n") if len(line) > 100 and not line.startswith("    ")]
    assert not re.search(r"^\||\*\*|```|\]\(", text, re.MULTILINE)


@pytest.mark.parametrize("topic", TOPICS)
def test_no_page_is_wider_than_a_terminal_of_80_columns(topic: str) -> None:
    # Diagrams, programs and manifests among them, which are not wrapped.
    assert [line for line in page(topic, 80).split("\n") if len(line) > 80] == []


def test_without_a_topic_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help"]) == 0
    listed = re.findall(r"^  mpmm help (\w+)", capsys.readouterr().out, re.MULTILINE)
    assert listed == list(TOPICS)
    assert page(None).endswith("explains a command.")


def test_pages_beside_the_code_are_all_printed() -> None:
    printed = {about() for _, about in TOPICS.values()}
    assert all(path.read_text() in printed for path in (PACKAGE / "help").iterdir())


def test_the_page_about_waiting_explains_every_reason_to_wait() -> None:
    explained = re.findall(r"^   - `(\w+)`: ", TOPICS["stall"][1](), re.MULTILINE)
    assert sorted(explained) == sorted(
        reason.name.lower() for reason, sentence in SENTENCES.items() if sentence.startswith("waits")
    )


def test_files_that_the_pages_name_are_there() -> None:
    places = (CHECKOUT, CHECKOUT / "mpmm", CHECKOUT / "tests", CHECKOUT / "tools" / "examples")
    for topic, (_, markdown) in TOPICS.items():
        for name in re.findall(r"`([\w/]+/?\w+\.(?:py|c|md))(?: [^`]*)?`", markdown()):
            assert any((place / name).exists() for place in places), f"{topic}: {name}"


def test_the_page_on_operating_has_manifests_that_work(
    new_manager: NewManager, namespace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    markdown = TOPICS["operating"][1]()
    titles = {"Containers", "Kubernetes", "systemd", "Where to make a manager", "Naming tags", "Security", "Versions"}
    assert titles <= set(re.findall(r"^## (.*)$", markdown, re.MULTILINE))
    blocks = dict(re.findall(r"^```(yaml|ini)\n(.*?)^```$", markdown, re.MULTILINE | re.DOTALL))
    pod = yaml.safe_load(blocks["yaml"])
    [worker] = pod["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in worker["volumeMounts"]}
    volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["medium"] == "Memory"
    [folder] = [Path(variable["value"]) for variable in worker["env"] if variable["name"] == "MPMM_RUNTIME_DIR"]
    assert volumes[mounts[str(folder.parent)]] == {}, "a folder below the mount, which is not of mode 0700"
    new_manager()
    program, *probe = worker["readinessProbe"]["exec"]["command"]
    assert program == "mpmm"
    wait_until(lambda: main([word.replace("NAMESPACE", namespace) for word in probe]) == 0, "the probe succeeds")
    # A folder of the mode that systemd gives it is taken, and no other.
    unit = configparser.ConfigParser(interpolation=None)
    unit.read_string(blocks["ini"])
    assert unit["Service"]["Environment"] == f"MPMM_RUNTIME_DIR=%t/{unit['Service']['RuntimeDirectory']}"
    for mode, status in ((int(unit["Service"]["RuntimeDirectoryMode"], 8), 0), (0o755, 1)):
        tmp_path.chmod(mode)
        assert any(check.state == "PROBLEM" for check in permissions(tmp_path)) == bool(status)
    capsys.readouterr()


def permissions(root: Path) -> list[Check]:
    """Return what `mpmm doctor` says of a runtime directory."""
    [group] = [group for group in examine(root) if group.title == "permissions"]
    return list(group.checks)


def test_markdown_becomes_text() -> None:
    markdown = "# A\ntext **b**\n- one\n  more\n- [two](three)\n\n| c | d |\n|---|---|\n| `e` | f \\| g |\n\n"
    markdown += "```sh\n# h\n\ni\n```\n"
    assert as_text(markdown, 40) == (
        "A\n=\n\ntext b\n- one more\n- two (three)\n\n`e`\n    d: f | g\n\n    # h\n    \n    i"
    )
