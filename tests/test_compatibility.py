"""docs/compatibility.md says what the conformance suite knows."""

from __future__ import annotations

from tests.conformance.differences import DIFFERENCES, PAGE, page


def test_the_page_has_the_table_of_differences() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == page(text), "`python -m tests.conformance.differences` writes it"


def test_each_difference_has_its_reason() -> None:
    for entry in DIFFERENCES:
        assert entry.what
        assert entry.why
        assert entry.theirs_is != entry.ours_is
