"""Our server beside vLLM's build for processors and llama.cpp's server: the same models, machine, run and load.

    make bench-serve                 everything, on a quiet machine: docs/performance.md says how long
    QUICK=1 make bench-serve         one model, fewer cells and rounds, within a quarter of an hour; names end in -quick

Every server of a model is started once and stays; while one is measured all others are stopped (SIGSTOP), so that they
cost nothing. In a round each server gets each load in turn; a figure is the median of the rounds. The load is
`vllm bench serve` for all: random prompts of one length, the same for every side of a round, a closed loop of c
clients, streamed completions that ignore EOS. Results: bench/results/serve-*.json, with the raw samples.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx

from bench import serve_limit
from bench.record import ROOT, save_table
from bench.serve_load import Cell, Generator
from bench.serve_models import MODELS, Model
from bench.serve_points import Points
from bench.serve_report import Samples, median, save_cells
from bench.serve_sides import SIDES, DidNotStart, Server, start

# prompt, answer, clients, requests
CELLS = (
    Cell(128, 64, 1, 4),
    Cell(128, 64, 8, 24),
    Cell(128, 64, 16, 48),
    Cell(128, 64, 32, 96),
    Cell(512, 128, 1, 2),
    Cell(512, 128, 16, 32),
)
QUICK_CELLS = (Cell(128, 64, 1, 3), Cell(128, 64, 16, 16), Cell(512, 128, 1, 1))
FAILURES = (RuntimeError, OSError, ValueError, httpx.HTTPError)  # of a server or a load; what else is ours ends the run
POINTS = ("start", "interruption", "prefixes", "host", "speculation")


def main() -> None:
    quick = bool(os.environ.get("QUICK"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ["smollm2-135m"] if quick else list(MODELS)
    sides = [side.name for side in SIDES]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=models, help="default: %(default)s")
    parser.add_argument("--sides", nargs="+", choices=sides, default=sides, help="default: all")
    parser.add_argument("--rounds", type=int, default=2 if quick else 5, help="default %(default)s")
    parser.add_argument("--points", nargs="*", choices=POINTS, default=POINTS, help="of the first model; default: all")
    parser.add_argument("--point-rounds", type=int, default=1 if quick else 3, help="default %(default)s")
    parser.add_argument("--clients", nargs="+", type=int, help="only cells of so many clients")
    parser.add_argument("--threads", type=int, default=2, help="of each side (default 2)")
    options = parser.parse_args()
    cells = [
        cell for cell in (QUICK_CELLS if quick else CELLS) if not options.clients or cell.clients in options.clients
    ]
    command = "QUICK=1 make bench-serve" if quick else "make bench-serve"
    if len(sys.argv) > 1:
        command = f"{'QUICK=1 ' if quick else ''}python -m bench.serve {shlex.join(sys.argv[1:])}"
    end = "-quick" if quick else ""
    generator = Generator()
    try:
        for i, name in enumerate(options.models):
            model = MODELS[name]()
            measure(model, options, cells, options.points if i == 0 else ["start"], generator, command, end)
    finally:
        generator.close()


def measure(
    model: Model,
    options: argparse.Namespace,
    cells: list[Cell],
    points: list[str],
    generator: Generator,
    command: str,
    end: str,
) -> None:
    """One model: its servers, the rounds, the limit, and those of the other points that are asked for."""
    with servers(model, options.sides, options.threads) as (running, absent):
        samples: Samples = {}
        said = [f"Medians of {options.rounds} rounds, {options.threads} threads a side.", *absent]
        for turn in range(options.rounds):
            for i, cell in enumerate(cells):
                for server in list(running):
                    try:
                        figures = loaded(generator, server, model, cell, 100 * turn + i)
                    except FAILURES as error:  # one side's; the others' rounds go on
                        print(error, flush=True)
                        said.append(f"{server.side.name} was measured no more after this: {error}")
                        running.remove(server)
                        server.end()
                        continue
                    for figure, value in figures.items():
                        side = samples.setdefault(cell.name, {}).setdefault(server.side.name, {})
                        side.setdefault(figure, []).append(value)
            save_cells(f"{model.name}{end}", command, " ".join(said), cells, samples)
        save_limit(model, options, cells, samples, command, end)
        others = Points(generator, model, options.threads, options.point_rounds)
        named = {server.side.name: server for server in running}
        heed = [named[name] for name in ("heed bf16",) if name in named]
        both = [named[name] for name in ("heed bf16", "vLLM bf16") if name in named]
        work: dict[str, Callable[[], None]] = {
            "start": lambda: others.starts({server.side.name: starts(server, model, options) for server in running}),
            "interruption": lambda: others.interruption(both),
            "prefixes": lambda: others.prefixes(both),
            "host": lambda: others.host(heed),
            "speculation": lambda: others.speculation(heed[0]) if heed else None,
        }
        for point in points:
            try:
                work[point]()
            except FAILURES as error:
                others.failed(point, str(error))
                for server in running:
                    server.pause()
            others.save(point, f"serve-{model.name}-{point}{end}", command)


@contextmanager
def servers(model: Model, names: list[str], threads: int) -> Iterator[tuple[list[Server], list[str]]]:
    """All sides that start, stopped; and a sentence for each that does not. They end with the block."""
    running: list[Server] = []
    absent: list[str] = []
    try:
        for side in SIDES:
            if side.name not in names:
                continue
            try:
                server = start(side, model, threads)
            except (DidNotStart, SystemExit) as error:  # or what it needs cannot be installed
                absent.append(str(error).strip().splitlines()[-1].replace(f"{ROOT}/", ""))
                print(error, flush=True)
                continue
            server.pause()
            running.append(server)
            print(f"{side.name}: first token after {server.first_token_s:.1f} s", flush=True)
        yield running, absent
    finally:
        for server in running:
            server.end()


def starts(server: Server, model: Model, options: argparse.Namespace) -> list[float]:
    """Seconds until its first token: of this server and of others like it; of vLLM one more, which finds what the first
    one compiled.
    """
    seconds = [server.first_token_s]
    wanted = min(2, options.point_rounds) if server.side.kind == "vllm" else options.point_rounds
    while len(seconds) < wanted:
        another = start(server.side, model, options.threads)
        seconds.append(another.first_token_s)
        another.end()
    return seconds


def loaded(generator: Generator, server: Server, model: Model, cell: Cell, seed: int) -> dict[str, float]:
    """One load on one server, the others being stopped. Ends the run where it does not go through."""
    server.wake()
    began = time.perf_counter()
    try:
        figures = generator.run(server, model.bfloat16, cell, seed)
    finally:
        server.pause()
    text = f"{figures['output']:.0f} tokens/s, first token {figures['ttft']:.0f} ms"
    print(f"{cell.name}, {server.side.name}: {text} ({time.perf_counter() - began:.0f} s)", flush=True)
    return figures


def save_limit(
    model: Model, options: argparse.Namespace, cells: list[Cell], samples: Samples, command: str, end: str
) -> None:
    """How far our steps are from what the machine could do: measured between two tokens of a stream, 128/64."""
    machine = serve_limit.probe(options.threads)
    measured = {}
    for dtype, side in (("bfloat16", "heed bf16"), ("float32", "heed fp32")):
        for cell in cells:
            between = median(samples, cell.name, side, "tpot")
            if cell.clients in serve_limit.BATCHES and cell.prompt == 128 and between is not None:
                measured[dtype, cell.clients] = between
    if not measured:
        return
    rows = serve_limit.rows(model.bfloat16, machine, measured)
    speeds = ", ".join(f"{speed / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, speed in machine.speed.items())
    note = f"Probes: {machine.bandwidth / 1e9:.1f} GB/s read from memory; {speeds}."
    title = f"a decoding step of {model.name} and the machine's limit"
    save_table(f"serve-{model.name}-limit{end}", title, command, list(rows[0]), rows, note=note)


if __name__ == "__main__":
    main()
