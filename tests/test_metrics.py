"""Metrics: parsers accept them, they are true, and all ways to export them work."""

from __future__ import annotations

import asyncio
import http.client
import os
import re
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from harness import NewManager, NewProcess, acquire, release, wait_until, waiting
from loaders import Loads

import mpmm.metrics
from mpmm.cli import main
from mpmm.metrics import Exporter, asgi_app, serve, wsgi_app
from mpmm.model_manager import ModelManager
from mpmm.observability import event_reader
from mpmm.observability.event_reader import LONGEST_PAUSE_S
from mpmm.observability.histograms import BOUNDS_S
from mpmm.shared_state.layout import Capacities
from mpmm.shared_state.snapshot import read_snapshot

prometheus_client = pytest.importorskip("prometheus_client", reason="needs the extra metrics")
from prometheus_client import parser  # noqa: E402  # needs the library
from prometheus_client.openmetrics import parser as openmetrics_parser  # noqa: E402  # likewise

parse_classic: Callable[[str], Any] = parser.text_string_to_metric_families
parse_openmetrics: Callable[[str], Any] = openmetrics_parser.text_string_to_metric_families

Capture = pytest.CaptureFixture[str]
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
ODD = 'odd "tag"\nof two\\lines'


def samples(families: Any) -> Samples:
    """Return all values by name and labels."""
    found: Samples = {}
    for family in families:
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"{key} is there twice"
            found[key] = sample.value
    return found


def value(found: Samples, metric: str, **labels: str) -> float:
    """Return the one value of a metric whose labels agree, whatever others it has."""
    [one] = [amount for (own, has), amount in found.items() if own == metric and set(labels.items()) <= has]
    return one


@pytest.fixture
def exporter(namespace: str) -> Iterator[Exporter]:
    """One that looks when it is asked, and only then."""
    with closing(Exporter(namespace, follow=False)) as made:
        yield made


@pytest.fixture
def lively(namespace: str, new_manager: NewManager, new_process: NewProcess) -> ModelManager:
    """A namespace where one request waits, two have waited, and a copy was evicted."""
    manager, other = new_manager(fallback_memory_mb=200), new_process()
    handle = manager.acquire_model("a", Loads())
    manager.acquire_model("held", Loads())
    other.send(acquire, "a")
    wait_until(lambda: waiting(namespace, "a"), "the other one waits")
    manager.release_model("a", handle)
    other.result()
    other.call(release)
    other.call(acquire, ODD)
    other.send(acquire, "held")
    wait_until(lambda: waiting(namespace, "held"), "the other one waits again")
    return manager


def test_a_copy_that_two_share_is_one_copy_and_two_uses(
    namespace: str, new_manager: NewManager, exporter: Exporter
) -> None:
    manager = new_manager()
    handles = [manager.acquire_model("shared", Loads(), users=2) for _ in range(2)]
    families = list(parse_classic(exporter.text()))
    found = samples(families)
    assert value(found, "mpmm_model_copies", model="shared", state="active") == 1
    assert value(found, "mpmm_active", namespace=namespace) == 2
    [said] = [family.documentation for family in families if family.name == "mpmm_active"]
    assert said == "Uses of copies: one that several share counts once for each of them."
    for handle in handles:
        manager.release_model("shared", handle)


@pytest.mark.parametrize(("openmetrics", "parse"), [(True, parse_openmetrics), (False, parse_classic)])
def test_parsers_accept_the_text(
    openmetrics: bool, parse: Callable[[str], Any], lively: ModelManager, exporter: Exporter, namespace: str
) -> None:
    families = list(parse(exporter.text(openmetrics=openmetrics)))
    assert all(family.type in ("counter", "gauge", "histogram") for family in families)
    assert all(family.documentation for family in families)
    found = samples(families)
    snapshot = read_snapshot(namespace)
    assert value(found, "mpmm_loads_total", namespace=namespace) == 3
    assert value(found, "mpmm_hits_total") == 1
    assert value(found, "mpmm_evictions_total") == 1
    assert value(found, "mpmm_waiting") == 1
    assert 0 < value(found, "mpmm_oldest_wait_seconds") < 60
    assert value(found, "mpmm_members", kind="worker") == 2
    assert value(found, "mpmm_device_used_bytes", device="0") == 200 * 2**20
    assert value(found, "mpmm_device_limit_bytes", name="booked") == 200 * 2**20
    assert value(found, "mpmm_device_unrelated_bytes") == value(found, "mpmm_device_foreign_bytes") == 0
    assert value(found, "mpmm_model_bytes", model=ODD) == 100 * 2**20
    assert value(found, "mpmm_model_copies", model="held", state="active") == 1
    assert value(found, "mpmm_model_evictions_total", model="a") == 1
    assert value(found, "mpmm_events_total") == snapshot.events_written
    assert value(found, "mpmm_events_unseen_total") == 0
    assert value(found, "mpmm_leader_age_seconds") >= 0
    assert value(found, "mpmm_wait_seconds_count", model="a") == 2
    assert value(found, "mpmm_hold_seconds_count", model="a") == 2
    assert value(found, "mpmm_load_seconds_count", model=ODD) == 1
    assert value(found, "mpmm_wait_seconds_bucket", model="a", le="+Inf") == 2
    buckets = [value(found, "mpmm_hold_seconds_bucket", model="a", le=str(bound)) for bound in BOUNDS_S]
    assert buckets == sorted(buckets)


def test_histograms_go_on_from_look_to_look(namespace: str, new_manager: NewManager, exporter: Exporter) -> None:
    manager = new_manager()

    def holds() -> float:
        return value(samples(parse_openmetrics(exporter.text(openmetrics=True))), "mpmm_hold_seconds_count", model="a")

    for expected in (1, 2, 3):
        manager.release_model("a", manager.acquire_model("a", Loads()))
        assert holds() == expected
    assert holds() == 3


def test_events_that_no_histogram_has_seen_are_counted(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(capacities=Capacities(events=16))
    for _ in range(20):
        manager.release_model("a", manager.acquire_model("a", Loads()))
    with closing(Exporter(namespace, follow=False)) as exporter:
        found = samples(parse_openmetrics(exporter.text(openmetrics=True)))
    unseen = value(found, "mpmm_events_unseen_total")
    # Of the ring's 16 rows, the two behind the newest may be in the making.
    assert unseen == value(found, "mpmm_events_total") - 15
    assert value(found, "mpmm_hold_seconds_count", model="a") == 8
    assert value(found, "mpmm_hits_total") == 19


def test_a_thread_sees_what_happens_between_two_readings(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(capacities=Capacities(events=64))
    with closing(Exporter(namespace)) as exporter:
        exporter.text()
        written = read_snapshot(namespace).events_written
        follower, histograms = exporter._followed[namespace]
        for _ in range(3):
            for _ in range(20):
                manager.release_model("a", manager.acquire_model("a", Loads()))
            wait_until(lambda: follower._seen == read_snapshot(namespace).events_written, "all is seen")
        assert histograms.lost == 0
        assert read_snapshot(namespace).events_written - written > 64
        assert "mpmm-metrics" in [thread.name for thread in threading.enumerate()]
    assert "mpmm-metrics" not in [thread.name for thread in threading.enumerate()]


def test_all_namespaces_are_exported_while_they_are_there(new_manager: NewManager) -> None:
    new_manager()
    with closing(Exporter(follow=False)) as exporter:
        with ModelManager(namespace="second", memory_source="booked"):
            both = samples(parse_openmetrics(exporter.text(openmetrics=True)))
        one = samples(parse_openmetrics(exporter.text(openmetrics=True)))
    assert {value(both, "mpmm_loads_total", namespace=name) for name in ("test", "second")} == {0.0}
    assert {dict(labels)["namespace"] for _, labels in one} == {"test"}
    assert list(parse_openmetrics(Exporter("nowhere", follow=False).text(openmetrics=True))) == []


def test_a_namespace_that_has_ended_is_forgotten_and_looked_for_no_more_often(
    new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With this many events at a time, the next look comes sooner.
    monkeypatch.setattr(event_reader, "WANTED_AT_A_TIME", 4)
    manager = new_manager()
    with closing(Exporter(follow=False)) as exporter:
        exporter.families()
        for number in range(8):
            with manager.model(f"tag-{number}", Loads()):
                pass
        exporter.families()
        assert exporter._pause_s < LONGEST_PAUSE_S
        assert list(exporter._followed) == [manager.namespace]
        manager.shutdown()
        exporter.families()
        assert (exporter._followed, exporter._pause_s) == ({}, LONGEST_PAUSE_S)


def test_a_server_answers_head_and_leaves_a_client_that_says_nothing(
    exporter: Exporter, lively: ModelManager, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(mpmm.metrics, "CLIENT_TIMEOUT_S", 0.1)
    with serve(exporter, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as silent:
                assert silent.recv(1) == b"", "the server has hung up"
            with closing(http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)) as client:
                client.request("HEAD", "/")
                answer = client.getresponse()
                assert (answer.status, answer.read()) == (200, b"")
                assert int(answer.headers["Content-Length"]) > 1000
        finally:
            server.shutdown()
            thread.join()
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/proc/net/if_inet6"), reason="needs IPv6")
def test_a_server_can_listen_on_an_address_of_version_6(exporter: Exporter, lively: ModelManager) -> None:
    with serve(exporter, "::1", 0) as server:
        assert server.server_address[0] == "::1"


def test_it_is_a_collector_of_the_client_library(lively: ModelManager, exporter: Exporter) -> None:
    registry = prometheus_client.CollectorRegistry()
    registry.register(exporter)
    assert registry.get_sample_value("mpmm_loads_total", {"namespace": "test"}) == 3
    collected = samples(parse_classic(prometheus_client.generate_latest(registry).decode()))
    assert value(collected, "mpmm_wait_seconds_count", model="a") == 2
    assert value(collected, "mpmm_model_bytes", model=ODD) == 100 * 2**20


def test_tags_that_are_not_utf8_are_escaped_and_stay_apart(
    namespace: str, new_manager: NewManager, exporter: Exporter, capsys: Capture
) -> None:
    manager = new_manager()
    tags = [os.fsdecode(f"models/{name}.pt".encode("latin-1")) for name in ("caf\xe8", "caf\xe9")]
    shown = {f"models/caf{byte}.pt" for byte in (r"\udce8", r"\udce9")}
    for tag in tags:
        manager.release_model(tag, manager.acquire_model(tag, Loads()))
    registry = prometheus_client.CollectorRegistry()
    registry.register(exporter)
    # An application's own metrics are in the same text, and must not be lost either.
    prometheus_client.Counter("own", "Of the application.", registry=registry).inc()
    _, served = mpmm.metrics._answer(exporter, "")
    assert main(["metrics"]) == 0
    for text in (
        prometheus_client.generate_latest(registry).decode(),
        served.decode(),
        capsys.readouterr().out,
    ):
        found = samples(parse_classic(text))
        loads = [dict(labels) for name, labels in found if name == "mpmm_model_loads_total"]
        assert {labels["model"] for labels in loads} == shown
    assert registry.get_sample_value("own_total") == 1


def test_it_mounts_in_web_servers(lively: ModelManager, exporter: Exporter) -> None:
    answered: dict[str, Any] = {}

    def start_response(status: str, headers: list[tuple[str, str]]) -> None:
        answered.update(status=status, headers=dict(headers))

    body = b"".join(wsgi_app(exporter)({"HTTP_ACCEPT": "application/openmetrics-text;version=1.0.0"}, start_response))
    assert answered["status"] == "200 OK"
    assert answered["headers"]["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    assert int(answered["headers"]["Content-Length"]) == len(body)
    assert value(samples(parse_openmetrics(body.decode())), "mpmm_loads_total") == 3

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    async def ask() -> None:
        await asgi_app(exporter)({"type": "http", "headers": [(b"accept", b"*/*")]}, receive, send)

    asyncio.run(ask())
    assert (sent[0]["status"], dict(sent[0]["headers"])[b"content-type"][:17]) == (200, b"text/plain; versi")
    assert value(samples(parse_classic(sent[1]["body"].decode())), "mpmm_loads_total") == 3


def test_the_command_prints_them(lively: ModelManager, namespace: str, capsys: Capture) -> None:
    assert main(["metrics", "--openmetrics", namespace]) == 0
    assert value(samples(parse_openmetrics(capsys.readouterr().out)), "mpmm_loads_total") == 3
    assert main(["metrics"]) == 0
    assert value(samples(parse_classic(capsys.readouterr().out)), "mpmm_loads_total", namespace=namespace) == 3
    assert main(["metrics", "nowhere"]) == 2
    assert "there is no namespace 'nowhere'" in capsys.readouterr().err
    assert main(["metrics", "--serve", "here"]) == 2
    assert "expected PORT or HOST:PORT" in capsys.readouterr().err


def test_the_command_serves_them(lively: ModelManager) -> None:
    server = subprocess.Popen(
        [sys.executable, "-m", "mpmm.cli", "metrics", "--serve", "0"], stderr=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        assert server.stderr is not None
        address = re.search(r"http://127\.0\.0\.1:\d+/", server.stderr.readline())
        assert address is not None
        with urllib.request.urlopen(address[0], timeout=20) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            assert value(samples(parse_classic(answer.read().decode())), "mpmm_loads_total") == 3
    finally:
        server.terminate()
        server.communicate(timeout=20)
