"""The findings about rows with one changed field are those that were recorded: see `broken_rows`."""

from __future__ import annotations

from broken_rows import RECORDED, recorded


def test_what_a_change_of_a_field_breaks_is_what_was_recorded() -> None:
    before, now = RECORDED.read_text().splitlines(), recorded()
    assert set(now) - set(before) == set(), "said now"
    assert set(before) - set(now) == set(), "said before"
