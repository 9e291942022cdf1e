"""/metrics: vLLM's names, types, labels and buckets; and numbers that are what was sent."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.api.metrics import one_two_five

# Of vLLM 0.32 (v1/metrics/loggers.py, buckets.py) and prometheus-fastapi-instrumentator, for a model of text.
ENGINE = {"model_name", "engine"}
GAUGES = {
    "vllm:num_requests_running": ENGINE,
    "vllm:num_requests_waiting": ENGINE,
    "vllm:num_requests_waiting_by_reason": ENGINE | {"reason"},
    "vllm:kv_cache_usage_perc": ENGINE,
    "vllm:engine_sleep_state": ENGINE | {"sleep_state"},
}
COUNTERS = {
    "vllm:prefix_cache_queries": ENGINE,
    "vllm:prefix_cache_hits": ENGINE,
    "vllm:external_prefix_cache_queries": ENGINE,
    "vllm:external_prefix_cache_hits": ENGINE,
    "vllm:mm_cache_queries": ENGINE,
    "vllm:mm_cache_hits": ENGINE,
    "vllm:num_preemptions": ENGINE,
    "vllm:prompt_tokens": ENGINE,
    "vllm:prompt_tokens_by_source": ENGINE | {"source"},
    "vllm:prompt_tokens_cached": ENGINE,
    "vllm:prompt_tokens_cached_by_source": ENGINE | {"source"},
    "vllm:generation_tokens": ENGINE,
    "vllm:request_success": ENGINE | {"finished_reason"},
    "vllm:admission_rejections": {"model_name", "reason"},
    "http_requests": {"method", "status", "handler"},
}
LATENCY = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680]
BETWEEN = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]
TTFT = [
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
]
TOKENS = [1, 2, 5, 10, 20, 50, 100, 200]  # as far as max_model_len, which is 256 here
HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": TTFT,
    "vllm:inter_token_latency_seconds": BETWEEN,
    "vllm:request_time_per_output_token_seconds": BETWEEN,
    "vllm:e2e_request_latency_seconds": LATENCY,
    "vllm:request_queue_time_seconds": LATENCY,
    "vllm:request_inference_time_seconds": LATENCY,
    "vllm:request_prefill_time_seconds": LATENCY,
    "vllm:request_decode_time_seconds": LATENCY,
    "vllm:request_prompt_tokens": TOKENS,
    "vllm:request_generation_tokens": TOKENS,
    "vllm:request_max_num_generation_tokens": TOKENS,
    "vllm:request_params_max_tokens": TOKENS,
    "vllm:request_prefill_kv_computed_tokens": TOKENS,
    "vllm:request_params_n": [1, 2, 5, 10, 20],
    "vllm:request_num_preemptions": [1, 2, 3, 4, 5, 10, 20],
    "vllm:iteration_tokens_total": [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384],
}


class Scrape:
    """What /metrics says at a moment."""

    def __init__(self, server: Any) -> None:
        text = httpx.get(server.url + "/metrics").text
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.values = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def sum(self, name: str, **labels: str) -> float:
        """Over all samples of that name that have those labels."""
        return sum(
            value for (one, has), value in self.values.items() if one == name and labels.items() <= dict(has).items()
        )


@pytest.fixture(scope="module")
def counted(folder: Path, tmp_path_factory: pytest.TempPathFactory, launching) -> Iterator[Any]:
    """A server that nobody else asks, so small that sequences wait and are preempted."""
    log = tmp_path_factory.mktemp("log") / "counted.log"
    flags = ["--served-model-name", "tiny", "--max-num-seqs", "6", "--kv-cache-memory-bytes", "200000"]
    flags += ["--enable-prompt-tokens-details", "--max-num-queued-reqs", "100"]
    running = launching(folder, log, *flags)
    yield running
    running.end()


def test_names_types_labels_and_buckets_are_vllms(counted) -> None:
    counted.complete(prompt="a", max_tokens=2)
    scrape = Scrape(counted)
    for kind, wanted in (("gauge", GAUGES), ("counter", COUNTERS)):
        for name, labels in wanted.items():
            family = scrape.families[name]
            assert family.type == kind
            for sample in family.samples:
                assert set(sample.labels) == labels, sample.name
    longest = httpx.get(counted.url + "/v1/models").json()["data"][0]["max_model_len"]
    for name, buckets in HISTOGRAMS.items():
        family = scrape.families[name]
        assert family.type == "histogram"
        found = [float(s.labels["le"]) for s in family.samples if s.name.endswith("_bucket")]
        assert found == [float(bound) for bound in buckets if buckets is not TOKENS or bound <= longest] + [
            float("inf")
        ]
    info = scrape.families["vllm:cache_config_info"]
    assert (info.type, info.samples[0].value) == ("gauge", 1)
    assert {"block_size", "num_gpu_blocks", "engine"} <= set(info.samples[0].labels)
    assert "process_resident_memory_bytes" in scrape.families
    assert scrape.sum("vllm:engine_sleep_state", sleep_state="awake") == 1
    assert scrape.families["http_request_duration_seconds"].type == "histogram"


@pytest.mark.parametrize("longest", [1, 2, 9, 256, 8192, 131072])
def test_buckets_of_tokens_go_as_far_as_the_context(longest: int) -> None:
    bounds = list(one_two_five(longest))
    assert bounds[0] == 1
    assert bounds == sorted(set(bounds))
    assert bounds[-1] <= longest < 2.5 * bounds[-1]


def test_the_sums_are_what_was_sent(counted) -> None:
    """Some requests of every kind at once, more than run together; then each total is what the answers said."""
    draw = random.Random(0)
    before = Scrape(counted)
    requests = [
        {
            "prompt": [draw.randrange(10, 300) for _ in range(draw.randrange(1, 60))] * draw.choice([1, 1, 2]),
            "max_tokens": draw.randrange(1, 40),
            "n": draw.choice([1, 1, 2, 3]),
            "stream": draw.random() < 0.4,
            "seed": i,
        }
        for i in range(40)
    ]
    usages: list[dict[str, Any]] = []

    def ask(fields: dict[str, Any]) -> None:
        if fields["stream"]:
            options = {"stream_options": {"include_usage": True}}
            with httpx.stream("POST", counted.url + "/v1/completions", json=fields | options, timeout=60) as response:
                lines = [line for line in response.iter_lines() if line.startswith("data: {")]
            usages.append(httpx.Response(200, content=lines[-1].removeprefix("data: ")).json()["usage"])
        else:
            usages.append(counted.complete(**fields)["usage"])

    threads = [threading.Thread(target=ask, args=(fields,)) for fields in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = Scrape(counted)

    def grown(name: str, **labels: str) -> float:
        return after.sum(name, **labels) - before.sum(name, **labels)

    sequences = sum(fields["n"] for fields in requests)
    prompts = sum(len(fields["prompt"]) * fields["n"] for fields in requests)
    generated = sum(usage["completion_tokens"] for usage in usages)
    assert len(usages) == len(requests)
    assert sum(usage["prompt_tokens"] for usage in usages) == sum(len(fields["prompt"]) for fields in requests)
    assert grown("vllm:prompt_tokens_total") == prompts == grown("vllm:request_prompt_tokens_sum")
    assert grown("vllm:generation_tokens_total") == generated == grown("vllm:request_generation_tokens_sum")
    cached = grown("vllm:prompt_tokens_cached_total")
    assert grown("vllm:prompt_tokens_by_source_total", source="local_cache_hit") == cached
    assert grown("vllm:prompt_tokens_by_source_total", source="local_compute") == prompts - cached
    assert grown("vllm:request_prefill_kv_computed_tokens_sum") == prompts - cached
    assert grown("vllm:request_success_total") == sequences
    assert grown("vllm:request_success_total", finished_reason="abort") == 0
    assert grown("vllm:request_params_n_count") == len(requests)
    assert grown("vllm:request_params_n_sum") == sequences
    assert grown("vllm:request_params_max_tokens_sum") == sum(f["max_tokens"] * f["n"] for f in requests)
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert grown(f"vllm:{name}_count") == sequences
    assert grown("vllm:inter_token_latency_seconds_count") == generated - sequences
    assert grown("vllm:request_num_preemptions_sum") == grown("vllm:num_preemptions_total")
    assert grown("vllm:request_queue_time_seconds_sum") > 0  # six at a time: the others waited
    parts = grown("vllm:request_prefill_time_seconds_sum") + grown("vllm:request_decode_time_seconds_sum")
    assert grown("vllm:request_inference_time_seconds_sum") == pytest.approx(parts)
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert after.sum(f"vllm:{name}") == 0
    posted = {"handler": "/v1/completions", "method": "POST", "status": "2xx"}
    assert grown("http_requests_total", **posted) == len(requests)


def test_refusals_are_counted_by_their_limit(counted) -> None:
    before = Scrape(counted)
    fields = {"prompt": "a", "max_tokens": 20, "ignore_eos": True, "n": 50}
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(counted.post("/v1/completions", json=fields).status_code))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = Scrape(counted)
    name = "vllm:admission_rejections_total"
    refused = after.sum(name, reason="max_num_queued_reqs") - before.sum(name, reason="max_num_queued_reqs")
    assert refused == answers.count(503) > 0


def test_a_path_that_there_is_not_makes_no_label(counted) -> None:
    for i in range(5):
        httpx.get(f"{counted.url}/nothing/{i}")
    handlers = {dict(labels).get("handler") for name, labels in Scrape(counted).values if name == "http_requests_total"}
    assert "none" in handlers
    assert not any(handler and handler.startswith("/nothing") for handler in handlers)


def test_the_load_is_what_is_being_answered(counted) -> None:
    assert httpx.get(counted.url + "/load").json() == {"server_load": 0}
    fields = {"prompt": "a", "max_tokens": 100, "ignore_eos": True, "stream": True, "n": 100}
    with httpx.stream("POST", counted.url + "/v1/completions", json=fields, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        assert httpx.get(counted.url + "/load").json() == {"server_load": 1}


def test_drafts_are_counted_by_place(folder: Path, tmp_path: Path, launching) -> None:
    speculation = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}'
    running = launching(folder, tmp_path / "log", "--speculative-config", speculation)
    try:
        body = {"prompt": [7, 8, 9] * 8, "max_tokens": 60, "temperature": 0, "ignore_eos": True}
        # A model of random weights has no reason to repeat anything but where it has no choice.
        answer = httpx.post(running.url + "/v1/completions", json=body | {"allowed_token_ids": [7]})
        assert answer.status_code == 200, answer.text
        after = Scrape(running)
    finally:
        running.end()
    places = [
        after.sum("vllm:spec_decode_num_accepted_tokens_per_pos_total", position=str(place)) for place in range(3)
    ]
    assert places == sorted(places, reverse=True)
    assert sum(places) == after.sum("vllm:spec_decode_num_accepted_tokens_total") > 0
    assert places[0] <= after.sum("vllm:spec_decode_num_drafts_total")
