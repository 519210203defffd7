"""The Grafana dashboard and the alert rules: they query exported metrics, and fire when they should."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from device import SimulatedDevice
from harness import NewManager, wait_until

from mpmm.observability.findings import LONG_WAIT_S, STALE_AFTER_S
from mpmm.observability.histograms import Histograms
from mpmm.observability.prometheus import families
from mpmm.shared_state.settings import Settings
from mpmm.shared_state.snapshot import read_snapshot

ROOT = Path(__file__).resolve().parent.parent
FILES = ROOT / "mpmm" / "observability" / "dashboard" / "grafana"
RULES = yaml.safe_load((FILES / "mpmm-alerts.yaml").read_text())["groups"][0]["rules"]
ALERTS: dict[str, dict[str, Any]] = {rule["alert"]: rule for rule in RULES}
BOARD = json.loads((FILES / "mpmm-dashboard.json").read_text())
# What Prometheus adds to each sample of a target.
ADDED = {"instance", "job"}


def board_queries() -> Iterator[tuple[str, str]]:
    """Yield each query of the dashboard, with its legend."""
    for panel in BOARD["panels"]:
        for target in panel.get("targets", []):
            yield target["expr"], target["legendFormat"]
    for variable in BOARD["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"])
            assert found, variable["definition"]
            yield found[1], f"{{{{{found[2]}}}}}"


QUERIES = [*board_queries(), *((rule["expr"], " ".join(rule["annotations"].values())) for rule in RULES)]


@pytest.fixture
def exported(namespace: str, new_manager: NewManager, tmp_path: Path) -> dict[str, set[str]]:
    """The labels of each sample that is exported, by its name."""
    manager = new_manager(memory_source=SimulatedDevice(tmp_path / "device", 1000.0))
    manager.release_model("a", manager.acquire_model("a", lambda: "handle"))
    wait_until(lambda: read_snapshot(namespace).devices[0].external_mb is not None, "the device is measured")
    counted = Histograms()
    for histograms in (counted.waits, counted.holds, counted.loads):
        histograms["a"].add(1.0)
    return {
        family.name + suffix: {name for name, _ in labels}
        for family in families([(read_snapshot(namespace), counted)])
        for suffix, labels, _ in family.samples
    }


def test_what_they_ask_for_is_exported(exported: dict[str, set[str]]) -> None:
    for query, shown in QUERIES:
        names = re.findall(r"\bmpmm_\w+", query)
        assert names, query
        assert not set(names) - exported.keys(), query
        labels = set.union(*(exported[name] for name in names)) | ADDED
        used = set(re.findall(r"(\w+)(?:=~|!=|=)\"", query)) | set(re.findall(r"\$labels\.(\w+)", shown))
        used |= {name for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", query) for name in group.split(", ")}
        used |= set(re.findall(r"\{\{(\w+)\}\}", shown))
        assert not used - labels, query
        # The rules use rates of counters, and of nothing else.
        for rated in re.findall(r"(?:rate|increase)\((\w+)", query):
            assert rated.endswith(("_total", "_bucket")), query


def test_each_kind_of_metric_is_on_the_dashboard(exported: dict[str, set[str]]) -> None:
    asked = {name for query, _ in QUERIES for name in re.findall(r"\bmpmm_\w+", query)}
    for name in ("mpmm_wait_seconds_bucket", "mpmm_hold_seconds_bucket", "mpmm_load_seconds_bucket", "mpmm_waiting"):
        assert name in asked
    counted = ("loads", "hits", "evictions", "failed_loads", "timeouts", "out_of_memory", "reaps", "suspend_failures")
    assert {f"mpmm_{name}_total" for name in counted} <= asked & exported.keys()


def test_panels_do_not_overlap_and_have_titles() -> None:
    taken: set[tuple[int, int]] = set()
    numbers = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert panel["title"]
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def threshold(alert: str) -> float:
    """Return the number that an alert's first comparison is with."""
    found = re.search(r"> ([\d.]+)(?!\S)", ALERTS[alert]["expr"])
    assert found, alert
    return float(found[1])


def test_thresholds_agree_with_what_mpmm_says_itself() -> None:
    stale_s = Settings().poll_interval + STALE_AFTER_S
    assert stale_s < threshold("MpmmNotPolled") < 60
    assert stale_s < threshold("MpmmSampleOld") < 600
    assert LONG_WAIT_S < threshold("MpmmLongWait") < threshold("MpmmVeryLongWait")
    for alert in ("MpmmLockHolderStopped", "MpmmDeadNotReclaimed", "MpmmOutOfMemory", "MpmmTimeouts"):
        assert threshold(alert) == 0
    coloured = {
        tuple(step["value"] for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"][1:])
        for panel in BOARD["panels"]
        if panel["title"] == "Longest wait"
    }
    assert coloured == {(threshold("MpmmLongWait"), threshold("MpmmVeryLongWait"))}


def test_alerts_say_how_bad_it_is_and_what_to_do() -> None:
    assert len(ALERTS) == len(RULES)
    for name, rule in ALERTS.items():
        assert rule["labels"] in ({"severity": "critical"}, {"severity": "warning"}), name
        assert re.fullmatch(r"\d+[sm]", rule.get("for", "0s")), name
        assert "{{ $labels.namespace }}" in rule["annotations"]["summary"], name
        assert rule["annotations"]["description"].endswith("."), name


def test_they_are_part_of_the_package() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = setup["options.package_data"]["mpmm.observability.dashboard"].split()
    shipped = {path for pattern in patterns for path in (ROOT / "mpmm" / "observability" / "dashboard").glob(pattern)}
    assert shipped == {path for folder in ("grafana", "page") for path in (FILES.parent / folder).iterdir()}


# Each alert with samples, one a minute, for which it fires after 30 minutes; all others then stay silent.
SCENES: dict[str, dict[str, str]] = {
    "MpmmLockHolderStopped": {"mpmm_lock_holder_stopped": "1x30"},
    "MpmmNotPolled": {"mpmm_poll_age_seconds": "0+60x30"},
    "MpmmNoLeader": {"mpmm_leader_age_seconds": "_x30"},
    "MpmmDeadNotReclaimed": {"mpmm_dead_members": "1x30"},
    "MpmmLongWait": {"mpmm_oldest_wait_seconds": "0+10x30"},
    "MpmmOverLimit": {"mpmm_device_used_bytes": "950x30"},
    "MpmmMemoryOfOthers": {"mpmm_device_external_bytes": "600x30", "mpmm_waiting": "1x30"},
    "MpmmSampleOld": {"mpmm_device_sample_age_seconds": "0+60x30"},
    "MpmmOutOfMemory": {"mpmm_out_of_memory_total": "0x20 1x10"},
    "MpmmLoadsFail": {"mpmm_failed_loads_total": "0+1x30"},
    "MpmmTimeouts": {"mpmm_timeouts_total": "0x20 3x10"},
    "MpmmThrashing": {"mpmm_evictions_total": "0+9x30"},
    "MpmmProcessesDie": {"mpmm_reaps_total": "0+1x30"},
    "MpmmMemoryNeverCameBack": {"mpmm_written_off_bytes_total": "0+100000000x30"},
}
# A namespace in which all is well.
QUIET = {
    "mpmm_lock_holder_stopped": "0x30",
    "mpmm_poll_age_seconds": "0.4x30",
    "mpmm_leader_age_seconds": "0+60x30",
    "mpmm_members": "4x30",
    "mpmm_dead_members": "0x30",
    "mpmm_oldest_wait_seconds": "3x30",
    "mpmm_waiting": "0x30",
    "mpmm_device_used_bytes": "800x30",
    "mpmm_device_limit_bytes": "900x30",
    "mpmm_device_external_bytes": "100x30",
    "mpmm_device_sample_age_seconds": "0.4x30",
    "mpmm_out_of_memory_total": "0x30",
    "mpmm_failed_loads_total": "0x30",
    "mpmm_loads_total": "0+2x30",
    "mpmm_hits_total": "0+10x30",
    "mpmm_evictions_total": "0+2x30",
    "mpmm_timeouts_total": "0x30",
    "mpmm_reaps_total": "0x30",
    "mpmm_written_off_bytes_total": "0x30",
}


def test_each_alert_fires_for_what_it_is_about_and_for_nothing_else(tmp_path: Path) -> None:
    assert SCENES.keys() | {"MpmmVeryLongWait"} == ALERTS.keys()
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("there is no promtool; Debian's package prometheus brings it")
    scenes = [*SCENES.items(), ("MpmmVeryLongWait", {"mpmm_oldest_wait_seconds": "0+60x30"}), ("none", {})]
    tests = [scene(name, {**QUIET, **samples}) for name, samples in scenes]
    (tmp_path / "tests.yaml").write_text(
        yaml.safe_dump({"rule_files": [str(FILES / "mpmm-alerts.yaml")], "evaluation_interval": "1m", "tests": tests})
    )
    ran = subprocess.run(
        [promtool, "test", "rules", str(tmp_path / "tests.yaml")], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def scene(name: str, samples: dict[str, str]) -> dict[str, Any]:
    """Return a test for promtool."""
    device = 'device="0", name="gpu", uuid="u"'
    series = []
    for metric, values in samples.items():
        more = {"mpmm_members": 'kind="worker"'}.get(metric, device if "_device_" in metric else "")
        labels = ", ".join(filter(None, ('namespace="n"', 'instance="i"', more)))
        series.append({"series": f"{metric}{{{labels}}}", "values": values})
    fires = {name} | ({"MpmmLongWait"} if name == "MpmmVeryLongWait" else set())
    query = "count by (alertname) (ALERTS{alertstate='firing'})"
    samples_of = [{"labels": f'{{alertname="{one}"}}', "value": 1} for one in sorted(fires & ALERTS.keys())]
    expected = {"expr": query, "eval_time": "30m", "exp_samples": samples_of}
    return {"name": name, "interval": "1m", "input_series": series, "promql_expr_test": [expected]}
