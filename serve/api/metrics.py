"""Prometheus metrics under vLLM's names, with its types, labels and buckets, so that what is built on those works here.

What vLLM has no name for begins with `heed:`. Tokens and requests are counted from what the engine has given, as vLLM
does it: a prompt when its first token comes, a sequence when it ends.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from serve.api.client import EngineClient, Group, Member
from serve.engine.messages import Output, Ready, Step

# Upper bounds of the buckets, which are vLLM's (v1/metrics/buckets.py).
LATENCIES = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
FIRST_TOKENS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
BETWEEN_TOKENS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
FEW = (1, 2, 5, 10, 20)
PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)

REASONS = ("stop", "length", "abort", "error", "repetition")
LABELS = ("model_name", "engine")
# Where a prompt's tokens may come from; there is no other cache than this process's own.
SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")
TIERS = ("device", "host", "p2p", "disk", "external_unspecified")
Kind = TypeVar("Kind", Counter, Gauge, Histogram)


class Metrics:
    """One registry; hooks into the client see every step and every output."""

    def __init__(self, model_name: str, client: EngineClient, ready: Ready) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self._values = (model_name, "0")
        self.load = {"num_requests_waiting": 0.0, "kv_cache_usage_perc": 0.0}  # after the last step
        self._left: dict[tuple[Group, int], list[Member]] = {}  # of each prompt, the sequences that have ended
        self._gauges(client, ready)
        self._counters(client.config.speculative)
        self._histograms(ready.max_model_len)
        client.on_step = self._on_step
        client.on_output = self._on_output

    def _gauges(self, client: EngineClient, ready: Ready) -> None:
        self._running = self._one(Gauge, "num_requests_running", "Sequences being computed.")
        self._waiting = self._one(Gauge, "num_requests_waiting", "Sequences that wait for a seat or for cache.")
        reasons = self._family(Gauge, "num_requests_waiting_by_reason", "Waiting sequences, by reason.", "reason")
        self._capacity = reasons.labels(*self._values, "capacity")
        reasons.labels(*self._values, "deferred").set(0)  # nothing else is waited for
        self._usage = self._one(Gauge, "kv_cache_usage_perc", "Share of the KV cache that is in use; 1 is all of it.")
        sleep = self._family(Gauge, "engine_sleep_state", "1 for the state that the engine is in.", "sleep_state")
        for state in ("awake", "weights_offloaded", "discard_all"):
            sleep.labels(*self._values, state).set(state == "awake")
        shape = {
            "block_size": str(ready.block_size),
            "num_gpu_blocks": str(ready.blocks),
            "enable_prefix_caching": str(client.config.enable_prefix_caching),
            "cache_dtype": ready.dtype,
            "engine": "0",
        }
        Gauge("vllm:cache_config_info", "The KV cache's shape.", shape, registry=self.registry).labels(**shape).set(1)

    def _counters(self, speculative: int) -> None:
        """speculative: tokens of a draft, 0 for no drafts."""

        def counter(name: str, text: str) -> Counter:
            return self._one(Counter, name, text)

        self._preemptions = counter("num_preemptions", "Sequences that lost their blocks and were computed again.")
        self._prompt = counter("prompt_tokens", "Tokens of prompts, computed or found in the prefix cache.")
        self._cached = counter("prompt_tokens_cached", "Tokens of prompts that were found in the prefix cache.")
        self._generated = counter("generation_tokens", "Tokens generated.")
        self._queries = counter("prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self._hits = counter("prefix_cache_hits", "Tokens found in the prefix cache.")
        for name in ("external_prefix_cache", "mm_cache"):
            counter(f"{name}_queries", "There is no such cache here: always 0.")
            counter(f"{name}_hits", "There is no such cache here: always 0.")
        sources = self._family(Counter, "prompt_tokens_by_source", "Tokens of prompts, by where from.", "source")
        by_source = {source: sources.labels(*self._values, source) for source in SOURCES}
        self._computed, self._found = by_source["local_compute"], by_source["local_cache_hit"]
        tiers = self._family(Counter, "prompt_tokens_cached_by_source", "Tokens found, by the tier of cache.", "source")
        self._device = {tier: tiers.labels(*self._values, tier) for tier in TIERS}["device"]
        success = self._family(Counter, "request_success", "Sequences that ended, by reason.", "finished_reason")
        self._ended = {reason: success.labels(*self._values, reason) for reason in REASONS}
        refused = Counter(
            "vllm:admission_rejections",
            "Requests refused because the queue is full, by the limit that they met.",
            ("model_name", "reason"),
            registry=self.registry,
        )
        limits = ("max_num_queued_reqs", "max_num_queued_tokens")
        self.rejections = {limit: refused.labels(self._values[0], limit) for limit in limits}
        self._seconds = self._one(Counter, "step_seconds", "What the engine's steps took.", "heed")
        self._model = self._one(Counter, "model_seconds", "Of the steps, what the model took.", "heed")
        self._prefix = self._one(Counter, "prefix_cache_seconds", "Of the steps, looking up prefixes.", "heed")
        self._drafts: tuple[Counter, ...] = ()
        self._places: list[Counter] = []
        if speculative:
            name = "spec_decode_num_accepted_tokens_per_pos"
            places = self._family(Counter, name, "Accepted tokens, by their place in the draft.", "position")
            self._places = [places.labels(*self._values, str(place)) for place in range(speculative)]
            self._drafts = (
                counter("spec_decode_num_drafts", "Times that tokens were proposed."),
                counter("spec_decode_num_draft_tokens", "Tokens proposed."),
                counter("spec_decode_num_accepted_tokens", "Proposed tokens that the model agreed with."),
            )

    def _histograms(self, max_model_len: int) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return self._one(Histogram, name, text, buckets=buckets)

        tokens = tuple(one_two_five(max_model_len))
        self._ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", FIRST_TOKENS)
        self._itl = histogram("inter_token_latency_seconds", "Between two tokens of a sequence.", BETWEEN_TOKENS)
        self._tpot = histogram(
            "request_time_per_output_token_seconds", "Mean of a sequence's gaps between tokens.", BETWEEN_TOKENS
        )
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to last token.", LATENCIES)
        self._queue = histogram("request_queue_time_seconds", "Arrival to first scheduled.", LATENCIES)
        self._inference = histogram("request_inference_time_seconds", "First scheduled to last token.", LATENCIES)
        self._prefill = histogram("request_prefill_time_seconds", "First scheduled to first token.", LATENCIES)
        self._decode = histogram("request_decode_time_seconds", "First token to last token.", LATENCIES)
        self._prompt_length = histogram("request_prompt_tokens", "Tokens of a sequence's prompt.", tokens)
        self._length = histogram("request_generation_tokens", "Tokens generated of a sequence.", tokens)
        self._longest = histogram("request_max_num_generation_tokens", "Of the n of a prompt, the longest.", tokens)
        self._max_tokens = histogram("request_params_max_tokens", "max_tokens of a sequence.", tokens)
        self._uncached = histogram(
            "request_prefill_kv_computed_tokens", "Tokens of a sequence's prompt that were computed.", tokens
        )
        self._n = histogram("request_params_n", "n of a prompt.", FEW)
        self._preempted = histogram("request_num_preemptions", "Times that a sequence was preempted.", PREEMPTIONS)
        self._iteration = histogram("iteration_tokens_total", "Tokens computed in a step.", STEP_TOKENS)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)

    # ---------------------------------------------------------------- what happens

    def _on_step(self, step: Step) -> None:
        stats = step.stats
        self.load = {"num_requests_waiting": float(stats.waiting), "kv_cache_usage_perc": float(stats.cache_usage)}
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._capacity.set(stats.waiting)
        self._usage.set(stats.cache_usage)
        self._preemptions.inc(stats.preemptions)
        self._queries.inc(stats.prefix_queries)
        self._hits.inc(stats.prefix_hits)
        self._device.inc(stats.prefix_hits)
        self._seconds.inc(stats.seconds)
        self._model.inc(stats.model_seconds)
        self._prefix.inc(stats.prefix_seconds)
        for counter, value in zip(self._drafts, (stats.drafts, stats.drafted, stats.accepted), strict=False):
            counter.inc(value)
        for counter, value in zip(self._places, stats.accepted_at, strict=False):
            counter.inc(value)
        if stats.tokens:
            self._iteration.observe(stats.tokens)

    def _on_output(self, member: Member, output: Output) -> None:
        now = time.monotonic()
        read = output.tokens or output.finish_reason in ("stop", "length")  # the prompt has been read to its end
        if read and not member.first_token:
            self._read(member, now)
        elif output.tokens:
            self._itl.observe(now - member.last_token)
        if output.tokens:
            member.last_token = now
            self._generated.inc(len(output.tokens))
        if output.finish_reason is not None:
            self._end(member, output)

    def _read(self, member: Member, now: float) -> None:
        member.first_token = now
        self._ttft.observe(now - member.arrival)
        self._prompt.inc(member.prompt_tokens)
        self._cached.inc(member.cached)
        self._found.inc(member.cached)
        self._computed.inc(member.prompt_tokens - member.cached)

    def _end(self, member: Member, output: Output) -> None:
        assert output.finish_reason is not None
        self._ended[output.finish_reason].inc()
        self._whole_prompt(member)
        self._prompt_length.observe(member.prompt_tokens)
        self._uncached.observe(member.prompt_tokens - member.cached)
        self._length.observe(member.generated)
        if member.max_tokens:
            self._max_tokens.observe(member.max_tokens)
        times = output.timings
        if times is None:
            return
        self._preempted.observe(times.preemptions)
        self._e2e.observe(times.finished - times.arrival)
        self._queue.observe(times.scheduled - times.arrival)
        self._inference.observe(times.finished - times.scheduled)
        self._prefill.observe(times.first_token - times.scheduled)
        self._decode.observe(times.finished - times.first_token)
        self._tpot.observe((times.finished - times.first_token) / max(1, member.generated - 1))

    def _whole_prompt(self, member: Member) -> None:
        """What is told once for the n sequences of a prompt: when the last of them has ended."""
        group = member.group
        of_prompt = (group, member.index // group.n)
        ended = self._left.setdefault(of_prompt, [])
        ended.append(member)
        if len(ended) == group.n:
            del self._left[of_prompt]
            self._n.observe(group.n)
            self._longest.observe(max(one.generated for one in ended))

    # ---------------------------------------------------------------- making them

    def _one(self, kind: type[Kind], name: str, text: str, whose: str = "vllm", **more: Any) -> Kind:
        return kind(f"{whose}:{name}", text, LABELS, registry=self.registry, **more).labels(*self._values)

    def _family(self, kind: type[Kind], name: str, text: str, label: str) -> Kind:
        return kind(f"vllm:{name}", text, (*LABELS, label), registry=self.registry)


def one_two_five(most: int) -> Iterator[int]:
    """1, 2, 5, 10, 20, 50 and so on, as far as `most`."""
    for exponent in itertools.count():
        for mantissa in (1, 2, 5):
            if mantissa * 10**exponent > most:
                return
            yield mantissa * 10**exponent
