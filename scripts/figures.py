"""Writes the figures in the documentation from the raw samples in bench/results/*.json. `make figures` calls it.

A block stands between `<!-- figures: KIND -->` and `<!-- /figures -->`; KIND is `summary` (a row for each benchmark
with two sides), `full` (a table for each of them) or `table NAME` (the rows of bench/results/NAME.json). A test fails
while a block differs from what the results say, so no figure is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"(<!-- figures: (\w+)(?: ([\w-]+))? -->\n).*?(<!-- /figures -->)", re.DOTALL)
NONE = "No benchmark has been recorded yet.\n"


def results(folder: Path = ROOT / "bench" / "results") -> list[dict[str, Any]]:
    """Every recorded result, by file name."""
    return [
        {"name": path.stem, **json.loads(path.read_text(encoding="utf-8"))} for path in sorted(folder.glob("*.json"))
    ]


def render(kind: str, name: str | None, found: list[dict[str, Any]]) -> str:
    """The Markdown of one block. Raises KeyError for a kind that does not exist."""
    make = {"summary": _summary, "full": _full, "table": _table}[kind]
    if kind == "table":
        found = [result for result in found if result["name"] == name]
    else:
        found = [result for result in found if "sides" in result]
    return make(found) if found else NONE


def rewrite(text: str, found: list[dict[str, Any]]) -> str:
    """A page with all its blocks made anew."""
    return BLOCK.sub(lambda match: match[1] + render(match[2], match[3], found) + match[4], text)


def _summary(found: list[dict[str, Any]]) -> str:
    rows = ["| benchmark | result | ratio | machine |", "| --- | --- | --- | --- |"]
    for result in found:
        sides = "; ".join(
            f"{name} {_number(_middle(result, side))} {side['unit']}" for name, side in result["sides"].items()
        )
        rows.append(f"| {result['benchmark']} | {sides} | {_ratio(result)} | {result['machine']} |")
    return "\n".join(rows) + "\n"


def _full(found: list[dict[str, Any]]) -> str:
    parts = []
    for result in found:
        lines = [f"### {result['benchmark']}", ""]
        if "note" in result:
            lines += [result["note"], ""]
        lines += [f"| side | {_statistic(result)} | unit | samples |", "| --- | --- | --- | --- |"]
        for name, side in result["sides"].items():
            samples = ", ".join(_number(sample) for sample in side["samples"])
            lines.append(f"| {name} | {_number(_middle(result, side))} | {side['unit']} | {samples} |")
        lines += ["", f"Ratio: {_ratio(result)}. Machine: {result['machine']}. Date: {result['date']}."]
        lines += ["", "```bash", result["command"], "```", ""]
        parts.append("\n".join(lines))
    return "\n".join(parts)


def _table(found: list[dict[str, Any]]) -> str:
    (result,) = found
    lines = [result["note"], ""] if result.get("note") else []
    lines += [f"| {' | '.join(result['columns'])} |", f"| {' | '.join('---' for _ in result['columns'])} |"]
    for row in result["rows"]:
        lines.append(f"| {' | '.join(_cell(row.get(column)) for column in result['columns'])} |")
    lines += ["", f"Machine: {result['machine']}. Date: {result['date']}.", "", "```bash", result["command"], "```"]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    """A value of a table; of several samples their mean, and the samples."""
    if value is None:
        return "n/a"
    if isinstance(value, list):
        samples = f" ({', '.join(_number(sample) for sample in value)})" if len(value) > 1 else ""
        return _number(statistics.mean(value)) + samples
    return value if isinstance(value, str) else _number(value)


def _statistic(result: dict[str, Any]) -> str:
    """How a side's samples are summed up: "mean" or "median"."""
    return result.get("statistic", "mean")


def _middle(result: dict[str, Any], side: dict[str, Any]) -> float:
    return float(getattr(statistics, _statistic(result))(side["samples"]))


def _ratio(result: dict[str, Any]) -> str:
    ratio = result.get("ratio")
    return "n/a" if ratio is None else f"{ratio:.2f}"


def _number(value: float) -> str:
    """Four significant digits; thousands in groups."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page is out of date")
    options = parser.parse_args(argv)
    found = results()
    stale = []
    for name in PAGES:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = rewrite(before, found)
        if before != after:
            stale.append(name)
            if not options.check:
                path.write_text(after, encoding="utf-8")
    if stale and options.check:
        print(f"The figures in {', '.join(stale)} are not those of bench/results: run `make figures`.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
