"""One thing has one word: replaced words do not come back.

Not listed, because they are also plain English or terms of the field: beside, devices, ending, follow, health,
outside, record, refresh (Beam's), room (to make some), screen, together, words. No module has such a name any more.
"""

from __future__ import annotations

import re
from collections import Counter

from harness import CHECKOUT

REPLACED = """
    AnswerUndone Busy Copy ForeignMonitor Keeper MonitorLike Nursery Placed SharedBoard Wish Worker _Nursery _Walk _drop
    _exchange _hand_out _let_go _make_way _told adopt alert arena await_alerted beam_views blocked board booked books
    books_only calm_waiting converse correct debts dismiss dispose doomed duty find_room foreign freshen gap_s grab harm
    heir hold_again hosting is_due is_overdue kept_estimates landing launcher learned let_go loose_mb now_or_later owe
    pass_on passing patience_s pocket poison prelude process_life receipts run_out sample_now settle_debts
    settle_receipts settles_late spare strangers take_answer tally tied transport welcome wire wish with_least_harm
"""
MODULES = (
    "beam_views ending families follow health hosting kept_estimates landing launcher record room screen tally words"
)
# What such a word means where it may stand: a pattern of the path and the line.
KEPT = {
    "Copy": r"Copy the weights to",  # the verb
    "Worker": r"tools/examples/",  # Dask's, and that of an example of Ray
    "alert": r"test_alerts\.py|mpmm-alerts\.yaml|Prometheus|role=\"alert\"",  # Prometheus's, and that of browsers
    "board": r"/sources/|/simulated_|test_simulated_gpu",  # of a GPU: NVIDIA's word
    # The setting's value.
    "booked": r"[\"'`(.]booked|booked[\"'`:]|import booked|takes booked|amdsmi and|host, booked|: +booked +nothing",
    "books_only": r"_flag\(source|test_source_choice",  # a source's attribute, until the next minor version
    "foreign": r'prometheus\.py.*"foreign":',  # a metric, likewise
    "settles_late": r"_flag\(source|test_source_choice",
}
FILES = [
    path
    for pattern in ("mpmm/**/*", "tests/**/*", "tools/**/*", "README.md", "setup.*")
    for path in CHECKOUT.glob(pattern)
    if path.suffix in (".py", ".pyi", ".c", ".h", ".md", ".js", ".css", ".html", ".json", ".yaml", ".cfg")
    and path.name not in ("CHANGELOG.md", "test_words.py")
]


def test_replaced_words_do_not_come_back() -> None:
    word = re.compile(rf"\b({'|'.join(REPLACED.split())})\b")
    lines = [(path.relative_to(CHECKOUT), line) for path in FILES for line in path.read_text().splitlines()]
    hits = [(found, f"{path}: {line}") for path, line in lines for found in set(word.findall(line))]
    assert [hit for hit in hits if not re.search(KEPT.get(hit[0], r"\Z\A."), hit[1])] == []
    assert Counter(found for found, _ in hits).keys() == KEPT.keys(), "no exception is left over"
    assert not {path.stem for path in FILES} & {*MODULES.split()} - {"room"}, "`proxy.room` is the old public name"


def test_sentences_of_the_package_name_their_actor() -> None:
    """Not "Who waits …" or "Whoever takes the lock …", but "A request that waits …" and "The process that …"."""
    headless = re.compile(r"\b(?:[Ww]hoever|[Nn]obody's|[Bb]y the way)\b|(?:^|[.;:] |# |\"\"\"|\* )Who [a-z]")
    lines = [(path.relative_to(CHECKOUT), line) for path in FILES for line in path.read_text().splitlines()]
    assert [f"{path}: {line}" for path, line in lines if path.parts[0] == "mpmm" and headless.search(line)] == []
