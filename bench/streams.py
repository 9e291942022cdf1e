"""500 streams at once on one server, for ten minutes: is any lost, is any wrong, and does the memory grow?

    make bench-streams               ten minutes of load, and some before it for the lone answers
    QUICK=1 make bench-streams       one minute; the result's name ends in -quick

A pool of requests of mixed lengths, half of them greedy and half seeded, is first answered one by one by the same
server while it does nothing else. Then as many clients as there are streams send requests of the pool in a loop, and
each answer is compared with its lone one, token by token and text by text. Half of the requests bring a cache salt that
nobody else has, so that their prompts are computed again. Resident memory of both processes is sampled each second
after a warm-up; times come from the server's own metrics. Results: bench/results/streams.json, with the samples.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from bench.record import ROOT, WORK, save_table, timed

PROMPTS, ANSWERS = (8, 192), (8, 96)  # tokens, from the fewest to the most
WORDS = (100, 30_000)  # ids that prompts are drawn from
WARM = 0.2  # of the time: until caches are full, memory is not compared
FLAT = 0.05  # by how much memory may grow after that
# The KV cache's memory, which the system hands out as it is first used, is to be full within the warm-up.
CACHE = "512M"
PATIENCE = 900  # seconds that the last streams may take to end


@dataclass
class Seen:
    """What the clients saw."""

    right: int = 0
    lost: Counter[str] = field(default_factory=Counter)  # why -> how many
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0


@dataclass
class Samples:
    """Once a second: bytes resident of both processes, and seconds that /health took."""

    at: list[float] = field(default_factory=list)
    http: list[int] = field(default_factory=list)
    engine: list[int] = field(default_factory=list)
    health: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """Of one stream: what it wrote, and how it ended."""

    tokens: tuple[int, ...]
    text: str
    reason: str | None


def main() -> int:
    quick = bool(os.environ.get("QUICK"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or GGUF file (default: SmolLM2-135M-Instruct, fetched)")
    parser.add_argument("--streams", type=int, default=500, help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=60 if quick else 600, help="default %(default)s")
    parser.add_argument(
        "--pool", type=int, default=40 if quick else 120, help="different requests; default %(default)s"
    )
    options = parser.parse_args()
    model = options.model
    if model is None:
        timed([sys.executable, "scripts/fetch.py", "smollm2"])
        model = str(ROOT / ".cache" / "weights" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    command = f"{'QUICK=1 ' if quick else ''}make bench-streams"
    if len(sys.argv) > 1:
        command = f"{'QUICK=1 ' if quick else ''}python -m bench.streams {shlex.join(sys.argv[1:])}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends, too
    with serving(model) as (process, port):
        return asyncio.run(_measure(process, port, options, Path(model).stem, command, "-quick" if quick else ""))


@contextmanager
def serving(model: str) -> Iterator[tuple[psutil.Process, int]]:
    """A server as a user starts it; it ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    WORK.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "serve", model, "--port", str(port), "--served-model-name", "model"]
    command += ["--kv-cache-memory-bytes", CACHE]
    with (WORK / "streams.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 300
            while True:
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"The server did not start: {(WORK / 'streams.log').read_text()[-2000:]}")
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.2)
            yield psutil.Process(process.pid), port
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def pool(count: int) -> list[dict[str, Any]]:
    """The different requests, greedy and seeded in turn."""
    draw = random.Random(0)
    made = []
    for i in range(count):
        fields: dict[str, Any] = {
            "prompt": draw.choices(range(*WORDS), k=draw.randint(*PROMPTS)),
            "max_tokens": draw.randint(*ANSWERS),
            "stream": True,
            "return_token_ids": True,
        }
        made.append(fields | ({"temperature": 0} if i % 2 else {"temperature": 0.9, "top_p": 0.95, "seed": i}))
    return made


async def stream(port: int, fields: dict[str, Any]) -> Answer:
    """One request on a connection of its own. Raises OSError or ValueError for a stream that does not end as it should.

    No HTTP library: the clients share the cores with the server.
    """
    body = json.dumps(fields).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        status = (await reader.readline()).decode()
        if " 200 " not in status:
            raise ValueError(f"status {status.strip()}")
        tokens: list[int] = []
        text, reason, done = "", None, False
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise ValueError(f"error {event['error']['message']}")
                choice = event["choices"][0]
                tokens += choice["token_ids"] or ()
                text += choice["text"]
                reason = choice["finish_reason"] or reason
            elif line.startswith(b"data: [DONE]"):
                done = True
        if not done or reason not in ("stop", "length"):
            raise ValueError(f"ended early, reason {reason}")
        return Answer(tuple(tokens), text, reason)
    finally:
        writer.close()


async def _measure(
    server: psutil.Process, port: int, options: argparse.Namespace, model: str, command: str, end: str
) -> int:
    requests = pool(options.pool)
    began = time.perf_counter()
    lone = [await stream(port, fields) for fields in requests]
    print(f"{len(lone)} lone answers in {time.perf_counter() - began:.0f} s", flush=True)
    before = await scrape(port)
    seen, samples = Seen(), Samples()
    began = time.perf_counter()
    watching = asyncio.create_task(_watch(server, port, samples, began))
    cpu = _cpu(server)
    clients = [_client(port, requests, lone, seen, i, began + options.seconds) for i in range(options.streams)]
    await asyncio.wait_for(asyncio.gather(*clients), options.seconds + PATIENCE)
    seconds = time.perf_counter() - began
    used = [after - first for after, first in zip(_cpu(server), cpu, strict=True)]
    watching.cancel()
    after = await scrape(port)
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    return _report(options, model, command, end, seen, samples, grown, seconds, used)


async def _client(
    port: int, requests: list[dict[str, Any]], lone: list[Answer], seen: Seen, number: int, until: float
) -> None:
    draw = random.Random(number)
    while time.perf_counter() < until:
        i = draw.randrange(len(requests))
        salt = {"cache_salt": f"{number}-{draw.random()}"} if draw.random() < 0.5 else {}
        try:
            answer = await stream(port, requests[i] | salt)
        except (OSError, ValueError) as error:
            seen.lost[f"{type(error).__name__}: {error}"] += 1
            await asyncio.sleep(1)
            continue
        seen.tokens += len(answer.tokens)
        seen.prompt_tokens += len(requests[i]["prompt"])
        if answer == lone[i]:
            seen.right += 1
        else:
            seen.wrong.append(f"request {i}: {answer} and not {lone[i]}")


async def _watch(server: psutil.Process, port: int, samples: Samples, began: float) -> None:
    engine = server.children()[0]
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        while True:
            asked = time.perf_counter()
            await client.get(f"http://127.0.0.1:{port}/health")
            samples.at.append(asked - began)
            samples.health.append(time.perf_counter() - asked)
            samples.http.append(server.memory_info().rss)
            samples.engine.append(engine.memory_info().rss)
            await asyncio.sleep(1)


def _cpu(server: psutil.Process) -> list[float]:
    """Seconds of processor time: the process of HTTP, the engine, and this one with the clients."""
    times = [process.cpu_times() for process in (server, server.children()[0], psutil.Process())]
    return [one.user + one.system for one in times]


async def scrape(port: int) -> dict[tuple[str, str], float]:
    """(name, `le` or "") -> value; other labels are summed over."""
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        text = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
    values: defaultdict[tuple[str, str], float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values[sample.name, sample.labels.get("le", "")] += sample.value
    return dict(values)


def quantile(grown: dict[tuple[str, str], float], name: str, share: float) -> float:
    """Of a histogram of the server: the upper bound of the bucket in which that share of all is reached."""
    buckets = sorted((float(le), value) for (one, le), value in grown.items() if one == f"{name}_bucket")
    total = buckets[-1][1]
    return next(bound for bound, value in buckets if value >= share * total)


def growth(samples: list[int], at: list[float], seconds: float) -> float:
    """By which share the most after the warm-up is more than what there was at its end (the mean of five samples)."""
    warm = [value for value, moment in zip(samples, at, strict=True) if WARM * seconds <= moment <= seconds]
    return max(warm) / statistics.mean(warm[:5]) - 1


def _report(
    options: argparse.Namespace,
    model: str,
    command: str,
    end: str,
    seen: Seen,
    samples: Samples,
    grown: dict[tuple[str, str], float],
    seconds: float,
    used: list[float],
) -> int:
    http, engine = (growth(one, samples.at, options.seconds) for one in (samples.http, samples.engine))
    ended = int(grown["vllm:request_success_total", ""])
    counted = int(grown["vllm:generation_tokens_total", ""])
    lost = sum(seen.lost.values())
    queue = "vllm:request_queue_time_seconds"
    measures: dict[str, str | float] = {
        "streams at once": options.streams,
        "minutes of load": options.seconds / 60,
        "requests answered": seen.right + len(seen.wrong),
        "lost": lost,
        "other than the lone answer": len(seen.wrong),
        "tokens/s generated": seen.tokens / seconds,
        "prompt tokens/s": seen.prompt_tokens / seconds,
        "time in the queue, mean (s)": grown[f"{queue}_sum", ""] / grown[f"{queue}_count", ""],
        "time in the queue, 99% are below (s)": quantile(grown, queue, 0.99),
        "time to the first token, half are below (s)": quantile(grown, "vllm:time_to_first_token_seconds", 0.5),
        "time between tokens, half are below (s)": quantile(grown, "vllm:inter_token_latency_seconds", 0.5),
        "time between tokens, 99% are below (s)": quantile(grown, "vllm:inter_token_latency_seconds", 0.99),
        "/health, median and slowest (ms)": f"{1000 * statistics.median(samples.health):.1f}, "
        f"{1000 * max(samples.health):.0f}",
        "memory of the HTTP process (MiB)": _memory(samples.http, http),
        "memory of the engine (MiB)": _memory(samples.engine, engine),
        "processor: HTTP, engine, clients (cores)": ", ".join(f"{one / seconds:.2f}" for one in used),
    }
    save_table(
        f"streams{end}",
        f"{options.streams} concurrent streams of {model}",
        command,
        ["measure", "value"],
        [{"measure": name, "value": value} for name, value in measures.items()],
        note="Prompts of 8 to 192 tokens, answers of up to 8 to 96, greedy and seeded in turn; "
        f"--kv-cache-memory-bytes {CACHE}, otherwise default flags.",
        samples={"seconds": samples.at, "http": samples.http, "engine": samples.engine, "health_s": samples.health},
        lost=dict(seen.lost),
        wrong=seen.wrong[:10],
    )
    problems = [
        (lost > 0, f"{lost} streams were lost: {seen.lost.most_common(3)}"),
        (bool(seen.wrong), f"{len(seen.wrong)} answers differ: {seen.wrong[:1]}"),
        (max(http, engine) > FLAT, f"memory grew by {max(http, engine):.1%}"),
        (ended != seen.right + len(seen.wrong), f"the server counts {ended} sequences"),
        (counted != seen.tokens, f"the server counts {counted} tokens, the clients {seen.tokens}"),
    ]
    for wrong, sentence in problems:
        if wrong:
            print(sentence, file=sys.stderr)
    return int(any(wrong for wrong, _ in problems))


def _memory(samples: list[int], grown: float) -> str:
    return f"{samples[-1] / 2**20:,.0f}, {grown:+.1%} after the warm-up"


if __name__ == "__main__":
    sys.exit(main())
