"""Gaps between the tokens of running streams, while nothing else happens and while a long prompt arrives."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from dataclasses import dataclass
from itertools import pairwise

import httpx

from bench.serve_sides import NAME, Server

STREAMS = 16
PROMPT, MOST = 128, 4000  # tokens of each stream: what it starts with, and what it could write
SETTLED, QUIET = 24, 96  # tokens of each stream before anything counts, and while it is quiet
WORDS = (100, 30000)  # ids that prompts are drawn from: words of both models


@dataclass(frozen=True)
class Interrupted:
    """Milliseconds."""

    quiet: float  # p99 of the gaps before
    during: float  # p99 of the gaps from the long prompt's arrival to its first token
    first_token: float  # of the long prompt


def interrupt(server: Server, longest: int, seed: int) -> Interrupted:
    """16 streams run; then a prompt of `longest` tokens arrives. Raises RuntimeError where a stream ended early."""
    return asyncio.run(_interrupt(server.url, longest, random.Random(seed)))


async def _interrupt(url: str, longest: int, draw: random.Random) -> Interrupted:
    arrivals: list[list[float]] = [[] for _ in range(STREAMS)]
    async with httpx.AsyncClient(timeout=600, trust_env=False, limits=httpx.Limits(max_connections=None)) as client:
        prompts = [draw.choices(range(*WORDS), k=PROMPT) for _ in range(STREAMS)]
        streams = [
            asyncio.create_task(_stream(client, url, prompt, MOST, times))
            for prompt, times in zip(prompts, arrivals, strict=True)
        ]
        try:
            settled = await _until(arrivals, SETTLED, streams)
            sent = await _until(arrivals, SETTLED + QUIET, streams)
            first: list[float] = []
            await _stream(client, url, draw.choices(range(*WORDS), k=longest), 1, first)
            if any(stream.done() for stream in streams):
                raise RuntimeError(f"A stream of {MOST} tokens ended before the long prompt had its first token.")
        finally:
            for stream in streams:
                stream.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*streams, return_exceptions=True)
    quiet, during = _p99(arrivals, settled, sent), _p99(arrivals, sent, first[0])
    return Interrupted(quiet * 1e3, during * 1e3, (first[0] - sent) * 1e3)


async def _stream(client: httpx.AsyncClient, url: str, prompt: list[int], tokens: int, times: list[float]) -> None:
    body = {"model": NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{url} answered {answer.status_code}: {(await answer.aread()).decode()}")
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                times.append(time.perf_counter())


async def _until(arrivals: list[list[float]], count: int, streams: list[asyncio.Task[None]]) -> float:
    """The moment at which every stream has had so many chunks. Raises what ended a stream before."""
    while min(map(len, arrivals)) < count:
        for stream in streams:
            if stream.done():
                stream.result()
                raise RuntimeError(f"A stream ended before it had {count} tokens.")
        await asyncio.sleep(0.005)
    return time.perf_counter()


def _p99(arrivals: list[list[float]], begin: float, end: float) -> float:
    """Of the gaps that end within this time."""
    gaps = sorted(b - a for times in arrivals for a, b in pairwise(times) if begin < b <= end)
    if not gaps:
        raise RuntimeError("No stream had a token while the long prompt was read: there is no gap to speak of.")
    return gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))]
