"""Prometheus metrics under vLLM's names, with its labels; what vLLM has no name for begins with `heed:`."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serve.api.client import EngineClient, Member
from serve.engine.messages import Output, Ready, Step

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
SIZES = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
FEW = (1, 2, 5, 10, 20)
REASONS = ("stop", "length", "abort", "error", "repetition")
LABELS = ("model_name", "engine")


class Metrics:
    """One registry; hooks into the client see every step and every output."""

    def __init__(self, model_name: str, client: EngineClient, ready: Ready) -> None:
        self.registry = CollectorRegistry()
        self._values = (model_name, "0")

        self._running = self._gauge("num_requests_running", "Sequences being computed.")
        self._waiting = self._gauge("num_requests_waiting", "Sequences waiting for a seat or for room in the cache.")
        self._usage = self._gauge("kv_cache_usage_perc", "Share of the KV cache that is in use; 1 is all of it.")
        config = Gauge(
            "vllm:cache_config_info",
            "The KV cache's shape.",
            ("engine", "block_size", "num_gpu_blocks"),
            registry=self.registry,
        )
        config.labels("0", str(ready.block_size), str(ready.blocks)).set(1)

        self._preemptions = self._counter(
            "num_preemptions", "Sequences that lost their blocks and were computed again."
        )
        self._prompt = self._counter("prompt_tokens", "Prompt tokens, computed or found in the prefix cache.")
        self._cached = self._counter("prompt_tokens_cached", "Prompt tokens found in the prefix cache.")
        self._generated = self._counter("generation_tokens", "Tokens generated.")
        self._queries = self._counter("prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self._hits = self._counter("prefix_cache_hits", "Tokens found in the prefix cache.")
        self._drafts = self._counter("spec_decode_num_drafts", "Times that tokens were proposed.")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Tokens proposed.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Proposed tokens that the model agreed with.")
        self._seconds = self._counter("step_seconds", "What the engine's steps took.", "heed")
        self._model = self._counter("model_seconds", "Of the steps, what the model took.", "heed")
        self._prefix = self._counter("prefix_cache_seconds", "Of the steps, hashing and looking up prefixes.", "heed")
        success = self._counter_family("request_success", "Sequences that ended, by reason.", "finished_reason")
        self._ended = {reason: success.labels(*self._values, reason) for reason in REASONS}
        rejected = self._counter_family("admission_rejections", "Requests refused with 503, by reason.", "reason")
        self.rejected = rejected.labels(*self._values, "queue_full")

        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.", SECONDS)
        self._itl = self._histogram("inter_token_latency_seconds", "Between two tokens of a sequence.", SECONDS)
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds", "Mean of a sequence's gaps between tokens.", SECONDS
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", SECONDS)
        self._queue = self._histogram("request_queue_time_seconds", "Arrival to first scheduled.", SECONDS)
        self._inference = self._histogram("request_inference_time_seconds", "First scheduled to last token.", SECONDS)
        self._prefill = self._histogram("request_prefill_time_seconds", "First scheduled to first token.", SECONDS)
        self._decode = self._histogram("request_decode_time_seconds", "First token to last token.", SECONDS)
        self._prompt_length = self._histogram("request_prompt_tokens", "Prompt tokens of a sequence.", COUNTS)
        self._length = self._histogram("request_generation_tokens", "Tokens generated of a sequence.", COUNTS)
        self._iteration = self._histogram("iteration_tokens_total", "Tokens computed in a step.", SIZES)
        self._n = self._histogram("request_params_n", "n of a request.", FEW)
        self._max_tokens = self._histogram("request_params_max_tokens", "max_tokens of a request.", COUNTS)

        client.on_step = self._on_step
        client.on_output = self._on_output

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)

    def request(self, n: int, max_tokens: int | None) -> None:
        """A request was accepted."""
        self._n.observe(n)
        if max_tokens is not None:
            self._max_tokens.observe(max_tokens)

    def _on_step(self, step: Step) -> None:
        stats = step.stats
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._usage.set(stats.cache_usage)
        self._preemptions.inc(stats.preemptions)
        self._prompt.inc(stats.prompt_tokens + stats.prefix_hits)
        self._cached.inc(stats.prefix_hits)
        self._generated.inc(stats.generated)
        self._queries.inc(stats.prefix_queries)
        self._hits.inc(stats.prefix_hits)
        self._drafts.inc(stats.drafts)
        self._drafted.inc(stats.drafted)
        self._accepted.inc(stats.accepted)
        self._seconds.inc(stats.seconds)
        self._model.inc(stats.model_seconds)
        self._prefix.inc(stats.prefix_seconds)
        if stats.tokens:
            self._iteration.observe(stats.tokens)

    def _on_output(self, member: Member, output: Output) -> None:
        now = time.monotonic()
        if output.tokens:
            if member.last_token:
                self._itl.observe(now - member.last_token)
            else:
                self._ttft.observe(now - member.arrival)
            member.last_token = now
        if output.finish_reason is None:
            return
        self._ended[output.finish_reason].inc()
        self._prompt_length.observe(member.prompt_tokens)
        self._length.observe(member.generated)
        times = output.timings
        if times is None:
            return
        self._e2e.observe(times.finished - times.arrival)
        self._queue.observe(times.scheduled - times.arrival)
        self._inference.observe(times.finished - times.scheduled)
        self._prefill.observe(times.first_token - times.scheduled)
        self._decode.observe(times.finished - times.first_token)
        if member.generated > 1:
            self._tpot.observe((times.finished - times.first_token) / (member.generated - 1))

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"vllm:{name}", text, LABELS, registry=self.registry).labels(*self._values)

    def _counter(self, name: str, text: str, whose: str = "vllm") -> Counter:
        return Counter(f"{whose}:{name}", text, LABELS, registry=self.registry).labels(*self._values)

    def _counter_family(self, name: str, text: str, label: str) -> Counter:
        return Counter(f"vllm:{name}", text, (*LABELS, label), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vllm:{name}", text, LABELS, registry=self.registry, buckets=buckets).labels(*self._values)
