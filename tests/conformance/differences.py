"""Every difference from vLLM that is on purpose: one line each, with its reason. The suite and docs/compatibility.md
read this table; an entry that no longer applies fails the suite.

    python -m tests.conformance.differences      writes the table into docs/compatibility.md
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tests.conformance.compare import Difference

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
BEGIN, END = "<!-- differences: begin -->", "<!-- differences: end -->"
ANY = object()


@dataclass(frozen=True)
class Deliberate:
    """Where answers may differ: the cases and the paths (of `Difference`) that match these patterns, where ours and
    vLLM's are so (or ANY).
    """

    cases: str | Sequence[str]
    paths: str | Sequence[str]
    what: str  # in the table
    theirs_is: str
    ours_is: str
    why: str
    ours: Any = ANY
    theirs: Any = ANY

    def allows(self, case: str, difference: Difference) -> bool:
        return (
            _matches(case, self.cases)
            and _matches(difference.path, self.paths)
            and (self.ours is ANY or self.ours == difference.ours)
            and (self.theirs is ANY or self.theirs == difference.theirs)
        )


def _matches(name: str, patterns: str | Sequence[str]) -> bool:
    """`*` is anything; brackets are themselves."""
    listed = (patterns,) if isinstance(patterns, str) else patterns
    return any(fnmatchcase(name, pattern.replace("[", "[[]")) for pattern in listed)


DIFFERENCES: tuple[Deliberate, ...] = ()


def table() -> str:
    """The table of docs/compatibility.md, a row for each entry."""
    rows = [f"| {one.what} | {one.theirs_is} | {one.ours_is} | {one.why} |" for one in DIFFERENCES]
    return "\n".join(["| | vLLM 0.32 | here | why |", "| --- | --- | --- | --- |", *rows])


def page(text: str) -> str:
    """The page with the table as it is now."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
