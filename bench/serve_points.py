"""What a table of rates does not show: starts, interruptions, shared prefixes, our own share of a step, speculation."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.record import WORK, save_table
from bench.serve_load import Cell, Generator
from bench.serve_models import Model
from bench.serve_sides import DidNotStart, Server, Side, start
from bench.serve_streams import interrupt

DRAFTS = json.dumps({"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4})
COLUMNS = ["what", "side", "measured", "asked", "holds"]
APART = Cell(1024, 32, clients=8, requests=32)
SHARED = Cell(1024, 32, clients=8, requests=32, shared=922)
BUSY = Cell(128, 64, clients=32, requests=64)
REPEATING = Cell(0, 256, clients=1, requests=3)
PLAIN = Cell(128, 64, clients=1, requests=4)
REPORTS = (
    "The gauge at the northern weir read {0} metres at {1}:15, the water was clear and the gate was closed.\n",
    "Order {0}{1} was packed by Anna, weighed by Tom, and left the yard on the truck of half past seven.\n",
    "def test_case_{0}(): assert parse('{0},{1}') == [{0}, {1}], 'the two fields must come back as they were'\n",
)


class Points:
    """Rows of a table, with the raw samples beside them."""

    def __init__(self, generator: Generator, model: Model, threads: int, rounds: int) -> None:
        self.generator, self.model, self.threads, self.rounds = generator, model, threads, rounds
        self.rows: list[dict[str, Any]] = []
        self.samples: dict[str, Any] = {}

    def save(self, point: str, name: str, command: str) -> None:
        """bench/results/NAME.json: what has been measured since the last time."""
        title, note = f"serving {self.model.name}: {point}", f"Medians of {self.rounds}."
        save_table(name, title, command, COLUMNS, self.rows, note=note, samples=self.samples)
        self.rows, self.samples = [], {}

    def starts(self, seconds: dict[str, list[float]]) -> None:
        """From the start of a process until a client has the first token; {side: samples}.

        The median of ours; vLLM's last, since what its first start compiles is found by the later ones.
        """
        self.samples["start"] = seconds
        peers = {side: values[-1] for side, values in seconds.items() if side.startswith("vLLM")}
        for side, values in seconds.items():
            took = peers.get(side, statistics.median(values))
            own = side.startswith("heed")
            self._row("start to first token", side, f"{took:.1f} s", "at most 6 s" if own else "", took <= 6)
            peer = peers.get(side.replace("heed", "vLLM")) if own else None
            if peer is not None:
                ratio = took / peer
                self._row("start to first token, of vLLM's", side, f"{ratio:.3f}", "at most 0.1", ratio <= 0.1)

    def interruption(self, servers: Sequence[Server]) -> None:
        """The p99 gap of 16 streams while a prompt of the longest allowed length arrives, against before."""
        for server in servers:
            server.wake()
            found = [interrupt(server, self.model.longest - 1, seed) for seed in range(self.rounds)]
            server.pause()
            self.samples.setdefault("interruption", {})[server.side.name] = [vars(each) for each in found]
            ratio = statistics.median(each.during / each.quiet for each in found)
            quiet, during, first = (
                statistics.median(getattr(each, name) for each in found) for name in ("quiet", "during", "first_token")
            )
            text = f"{ratio:.2f} ({quiet:.0f} ms quiet, {during:.0f} during; first token after {first / 1e3:.1f} s)"
            what = f"gap p99 of 16 streams while a prompt of {self.model.longest - 1:,} tokens arrives, of quiet"
            self._goal(what, server.side, text, "at most 2", ratio <= 2)

    def prefixes(self, servers: Sequence[Server]) -> None:
        """Output rate with 90% of 1,024 tokens shared against none; and what looking up costs, by our counters."""
        for server in servers:
            rates: dict[str, list[float]] = {"apart": [], "shared": []}
            costs = []
            for turn in range(self.rounds):
                for name, cell in (("apart", APART), ("shared", SHARED)):
                    server.wake()
                    before = self._counters(server)
                    rates[name].append(self._load(server, cell, 7000 + turn)["output"])
                    costs.append(_share(before, self._counters(server), "heed:prefix_cache_seconds_total"))
                    server.pause()
            self.samples.setdefault("prefixes", {})[server.side.name] = {**rates, "look-up": costs}
            apart, shared = (statistics.median(values) for values in rates.values())
            ratio = shared / apart
            text = f"{ratio:.2f} ({shared:.0f} against {apart:.0f} tokens/s)"
            self._goal("1,024 in, 32 out, 90% shared against none", server.side, text, "at least 2.5", ratio >= 2.5)
            known = [cost for cost in costs if cost is not None]
            if known:
                worst = max(known)
                what = "hashing and look-up, of the engine's time, at most"
                self._goal(what, server.side, f"{worst:.2%}", "at most 1%", worst <= 0.01)

    def host(self, servers: Sequence[Server]) -> None:
        """(step - model) / step over a load of 32 clients, by our counters."""
        for server in servers:
            shares = []
            for turn in range(self.rounds):
                server.wake()
                before = self._counters(server)
                self._load(server, BUSY, 8000 + turn)
                model = _share(before, self._counters(server), "heed:model_seconds_total")
                server.pause()
                if model is not None:
                    shares.append(1 - model)
            if shares:
                self.samples.setdefault("host", {})[server.side.name] = shares
                share = statistics.median(shares)
                what = "a step's share outside the model, 32 clients"
                self._goal(what, server.side, f"{share:.1%}", "at most 5%", share <= 0.05)

    def speculation(self, base: Server) -> None:
        """Prompt lookup on text that repeats, and on random text, against the same server without it."""
        folder = WORK / "serve"
        texts = folder / "repeating.jsonl"
        prompts = ["".join(line.format(10 + i, 20 + i % 5) for i in range(8)) * 3 for line in REPORTS]
        texts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
        side = Side(f"{base.side.name}, drafts", base.side.kind, base.side.dtype, base.side.flags)
        try:
            drafting = start(side, self.model, self.threads, ("--speculative-config", DRAFTS))
        except DidNotStart as error:
            self._row("speculation", side.name, str(error), "", None)
            return
        drafting.pause()
        rates: dict[str, dict[str, list[float]]] = {"repeating": {}, "random": {}}
        try:
            for turn in range(self.rounds):
                for server in (base, drafting):
                    server.wake()
                    for name, values in rates.items():
                        cell, prompts_of = (REPEATING, texts) if name == "repeating" else (PLAIN, None)
                        done = self._load(server, cell, 9000 + turn, prompts_of)["output"]
                        values.setdefault(server.side.name, []).append(done)
                    server.pause()
        finally:
            drafting.end()
        self.samples["speculation"] = rates
        for name, values in rates.items():
            off, on = (statistics.median(values[key]) for key in (base.side.name, side.name))
            text = f"{on / off:.2f} ({on:.0f} against {off:.0f} tokens/s)"
            self._row(f"drafts by prompt lookup against none, {name} text, 1 client", base.side.name, text, "", None)

    def failed(self, point: str, sentence: str) -> None:
        """What there is to say instead of a measurement."""
        self._row(point, "", sentence, "", None)

    def _load(self, server: Server, cell: Cell, seed: int, texts: Path | None = None) -> dict[str, float]:
        folder = self.model.bfloat16
        if texts is not None:
            return self.generator.run_text(server, folder, texts, cell, seed)
        return self.generator.run(server, folder, cell, seed)

    def _counters(self, server: Server) -> dict[str, float]:
        return server.metrics() if server.side.kind == "heed" else {}

    def _goal(self, what: str, side: Side, measured: str, asked: str, holds: bool) -> None:
        """The goals are ours; what others reach stands beside them."""
        own = side.kind == "heed"
        self._row(what, side.name, measured, asked if own else "", holds if own else None)

    def _row(self, what: str, side: str, measured: str, asked: str, holds: bool | None) -> None:
        word = "" if holds is None or not asked else "yes" if holds else "no"
        self.rows.append(dict(zip(COLUMNS, (what, side, measured, asked, word), strict=True)))
        print(f"  {what}; {side}: {measured}", flush=True)


def _share(before: dict[str, float], after: dict[str, float], name: str) -> float | None:
    """What a counter of seconds grew by, of what the steps took; None where the server does not count."""
    whole = after.get("heed:step_seconds_total", 0.0) - before.get("heed:step_seconds_total", 0.0)
    return (after[name] - before.get(name, 0.0)) / whole if whole > 0 and name in after else None
