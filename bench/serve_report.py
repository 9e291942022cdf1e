"""What bench/serve.py measured, as tables for docs/performance.md: medians, and ratios beside the goals."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bench.record import save, save_table
from bench.serve_load import Cell

# cell -> side -> figure -> one value a round
Samples = dict[str, dict[str, dict[str, list[float]]]]
OUTPUT, FIRST, GAP = "output, tokens/s", "first token, ms", "gap p99, ms"
COLUMNS = ["tokens in/out", "clients", "side", OUTPUT, FIRST, GAP]
HEADLINES = ((128, 64, 1), (128, 64, 16))  # prompt, answer, clients: the loads that the README's table has

# Of a ratio of output rates, ours over theirs: sides, clients, the least that is asked.
FASTER = [
    *(
        (f"heed {dtype}", f"vLLM {dtype}", clients, least)
        for dtype in ("bf16", "fp32")
        for clients, least in ((1, 1.15), (8, 1.3), (16, 1.4), (32, 1.4))
    ),
    ("heed int8", "heed bf16", 1, 1.0),
    ("heed int8", "heed bf16", 8, 1.0),
    ("heed int8", "heed bf16", 16, 1.0),
    ("heed int8", "heed bf16", 32, 1.0),
]
BESIDE_LLAMA = ((1, 1.0), (16, 1.5))  # clients, the least that the fastest of ours must be over llama.cpp
SOONER = ((1, 0.65), (16, 0.5))  # clients, the most that our median time to first token may be of vLLM's


def median(samples: Samples, cell: str, side: str, figure: str) -> float | None:
    """None where this side was not measured in this cell."""
    values = samples.get(cell, {}).get(side, {}).get(figure)
    return statistics.median(values) if values else None


def save_cells(name: str, command: str, note: str, cells: Sequence[Cell], samples: Samples, **more: Any) -> None:
    """bench/results/serve-NAME.json, a row for each cell and side; serve-NAME-CLIENTS.json, the rates of the
    loads of HEADLINES; and serve-NAME-goals.json, a row for each goal.
    """
    rows = [
        {
            "tokens in/out": f"{cell.prompt}/{cell.answer}",
            "clients": cell.clients,
            "side": side,
            OUTPUT: median(samples, cell.name, side, "output"),
            FIRST: median(samples, cell.name, side, "ttft"),
            GAP: median(samples, cell.name, side, "itl_p99"),
        }
        for cell in cells
        for side in samples.get(cell.name, {})
    ]
    title = f"serving {name} beside vLLM and llama.cpp"
    save_table(f"serve-{name}", title, command, COLUMNS, rows, note=note, samples=samples, **more)
    for cell in cells:
        rates = {side: figures["output"] for side, figures in samples.get(cell.name, {}).items() if figures}
        most = max(map(len, rates.values()), default=0)
        rates = {side: values for side, values in rates.items() if len(values) == most}  # in all rounds
        ratio = _ratio(samples, cell, "heed bf16", "vLLM bf16", "output")
        if (cell.prompt, cell.answer, cell.clients) in HEADLINES and ratio is not None:
            told = f"Serving {name}, {cell.prompt} tokens in, {cell.answer} out, {cell.clients} at once: bf16 over bf16"
            sides = {side: {"samples": values, "unit": "tokens/s"} for side, values in rates.items()}
            save(f"serve-{name}-{cell.clients}", told, command, sides, ratio, statistic="median", note=note)
    columns = ["goal", "tokens in/out", "clients", "asked", "reached", "holds"]
    save_table(f"serve-{name}-goals", f"{title}: the goals", command, columns, goals(cells, samples))


def goals(cells: Sequence[Cell], samples: Samples) -> list[dict[str, Any]]:
    """A row for each goal of which both sides were measured."""
    made: list[dict[str, Any]] = []

    def add(goal: str, cell: Cell, asked: float, ratio: float | None, *, at_most: bool = False) -> None:
        if ratio is None:
            return
        made.append(
            {
                "goal": goal,
                "tokens in/out": f"{cell.prompt}/{cell.answer}",
                "clients": cell.clients,
                "asked": f"at {'most' if at_most else 'least'} {asked}",
                "reached": f"{ratio:.2f}",
                "holds": "yes" if (ratio <= asked if at_most else ratio >= asked) else "no",
            }
        )

    for cell in cells:
        of = {side: figures for side, figures in samples.get(cell.name, {}).items() if figures}
        for ours, theirs, clients, least in FASTER:
            if clients == cell.clients:
                add(f"output, {ours} over {theirs}", cell, least, _ratio(samples, cell, ours, theirs, "output"))
        own = [side for side in of if side.startswith("heed")]
        fastest = max(own, key=lambda side: median(samples, cell.name, side, "output") or 0.0, default="")
        for clients, least in BESIDE_LLAMA:
            if clients == cell.clients:
                ratio = _ratio(samples, cell, fastest, "llama.cpp Q8_0", "output")
                add(f"output, {fastest} over llama.cpp Q8_0", cell, least, ratio)
        for clients, most in SOONER:
            if clients == cell.clients:
                for dtype in ("bf16", "fp32"):
                    ratio = _ratio(samples, cell, f"heed {dtype}", f"vLLM {dtype}", "ttft")
                    add(f"first token, {dtype}, of vLLM's time", cell, most, ratio, at_most=True)
    return made


def _ratio(samples: Samples, cell: Cell, ours: str, theirs: str, figure: str) -> float | None:
    a, b = (median(samples, cell.name, side, figure) for side in (ours, theirs))
    return None if a is None or b is None or not b else a / b
