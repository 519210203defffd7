"""The dashboard's page in a real browser: what it shows, and its use by keyboard and on small screens."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing

import dashboards
import pytest
from browser import CHROMIUM, Browser
from dashboards import TOKEN, Served

from mpmm.model_manager import ModelManager
from mpmm.shared_state.snapshot import read_snapshot

served = dashboards.served
lively = dashboards.lively
crowded = dashboards.crowded


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser for all tests: its start takes most of their time."""
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}; Debian's package chromium brings it")
    with closing(Browser(tmp_path_factory.mktemp("browser"))) as made:
        yield made


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """The browser, which shows nothing before and after."""
    chromium.problems.clear()
    yield chromium
    chromium.open("about:blank")


def test_the_page_in_a_browser(lively: ModelManager, served: Served, browser: Browser, namespace: str) -> None:
    served.watcher.start()
    with closing(served.watcher):
        browser.resize(1440, 900)
        browser.prefer("light")
        browser.open(f"{served.url}/?token={TOKEN}")
        browser.wait_until("known.head && byId('waiters').textContent.includes('pid')")
        shown = browser.evaluate("document.body.innerText")
        for text in ("held", "<b>idle</b>", f"pid {os.getpid()}", "Timeline", "100 MiB", "is evicted for"):
            assert text in shown
        assert browser.evaluate("[...timeline.chosen].map((name) => name.split('\\n')[0])") == [
            *("<b>idle</b>", "evicted", "held")
        ]
        browser.evaluate("tagNames.set('held', 'Sorter models/sort.joblib [held]'); show()")
        assert "Sorter models/sort.joblib" in browser.evaluate(
            "byId('waiters').textContent + byId('table').textContent"
        )
        assert browser.evaluate("byId('waiters').querySelector('b').title") == "Sorter models/sort.joblib [held]\nheld"
        # Of a name that is too long the end can be seen, too.
        long = f"SklearnModelHandlerNumpy gs://my-company/models/{'production/' * 9}fraud-v1/model.joblib [held]"
        browser.evaluate(f"tagNames.set('held', {long!r}); show()")
        assert browser.evaluate("document.querySelector('td.name').textContent") == long
        seen = "(([head, tail]) => head.scrollWidth > head.clientWidth && tail.scrollWidth <= tail.clientWidth)"
        assert browser.evaluate(f"{seen}(document.querySelector('td.name').firstChild.children)")
        # It is live.
        lively.release_model("held", next(c.handle for c in read_snapshot(namespace).instances if c.tag == "held"))
        browser.wait_until("byId('waiters').textContent === 'Nothing waits.'")
        check_themes(browser)
        check_keys(browser)
        check_widths(browser)
        lively.shutdown()
    assert browser.problems == []


def check_themes(browser: Browser) -> None:
    """The page follows the system, and the switch overrides that."""
    ground = "getComputedStyle(document.body).backgroundColor"
    light = browser.evaluate(ground)
    browser.prefer("dark")
    browser.wait_until(f"{ground} !== '{light}'")
    browser.press("t")
    assert browser.evaluate(f"{ground} + byId('theme').getAttribute('aria-label')") == f"{light}Theme: light"
    browser.press("t")
    browser.press("t")
    assert browser.evaluate("document.documentElement.dataset.theme") == "system"


def check_keys(browser: Browser) -> None:
    """All can be reached and done by keyboard, and the focus can be seen."""
    browser.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(30):
        browser.press("Tab")
        reached.append(browser.evaluate("document.activeElement.id || document.activeElement.textContent"))
        seen = "document.activeElement === document.body || getComputedStyle(document.activeElement).outlineStyle"
        assert browser.evaluate(seen) not in ("none", ""), reached
    wanted = ["filter", "2 min", "pause", "theme", "help-button", "timeline", "waiters", "category", "decisions"]
    wanted += ["tab-copies", "Model", "table"]
    places = [next((n for n, name in enumerate(reached) if name == one), one) for one in wanted]
    assert all(isinstance(place, int) for place in places), (places, reached)
    browser.press("?")
    assert browser.evaluate("byId('help').open")
    browser.press("Escape")
    assert not browser.evaluate("byId('help').open")
    browser.press("1")
    assert browser.evaluate("view.window_s") == 120
    assert "window=120" in browser.evaluate("location.search")
    browser.wait_until("known.epoch")
    browser.press("/")
    assert browser.evaluate("document.activeElement.id") == "filter"
    for key in "idle":
        browser.press(key)
    assert browser.evaluate("byId('table-note').textContent") == "1 of 2"
    browser.press("Escape")
    assert browser.evaluate("byId('filter').value + byId('table-note').textContent") == "2"
    browser.press("p")
    assert browser.evaluate("byId('health').textContent") == "paused"
    browser.press("p")
    browser.evaluate("byId('timeline').focus()")
    browser.press("ArrowLeft")
    assert "ago" in browser.evaluate("byId('tip').hidden ? '' : byId('tip').textContent")
    browser.press("Escape")
    browser.evaluate("byId('tab-copies').focus()")
    browser.press("ArrowRight")
    assert browser.evaluate("document.activeElement.id + table.which") == "tab-modelsmodels"


def check_widths(browser: Browser) -> None:
    """Nothing sticks out, down to a small phone."""
    for width in (1440, 800, 375, 320):
        browser.resize(width, 800)
        browser.wait_until(f"innerWidth === {width} && document.documentElement.scrollWidth <= {width}")


def test_a_thousand_copies_in_a_browser(crowded: None, served: Served, browser: Browser) -> None:
    served.watcher.look()
    browser.resize(1440, 900)
    browser.open(f"{served.url}/?token={TOKEN}")
    browser.wait_until("known.copies.size === 1000")
    rows = "document.querySelectorAll('#table tbody tr:not(.spacer)').length"
    assert 10 < browser.evaluate(rows) < 60
    assert browser.evaluate("document.querySelector('table').getAttribute('aria-rowcount')") == "1001"
    assert browser.evaluate("document.querySelectorAll('#waiters li').length") <= 41
    assert "960 more" in browser.evaluate("byId('waiters').textContent")
    assert browser.evaluate("byId('timeline-note').textContent").startswith("24 of 1\u202f000 copies")
    browser.evaluate("table.box.scrollTop = 1e6")
    browser.wait_until("byId('table').textContent.includes(table.rows[999].tag)")
    assert browser.evaluate(rows) < 60
    # A look takes a few ms here; the bound says that nothing is made anew for each copy.
    browser.evaluate("globalThis.began = performance.now(); for (let n = 0; n < 5; n++) show()")
    took_ms = "performance.now() - began"
    assert browser.evaluate(took_ms) / 5 < 150
    assert browser.problems == []
