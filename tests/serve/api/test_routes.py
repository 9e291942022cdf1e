"""The other routes: models, health, version, metrics, tokens."""

from __future__ import annotations

import httpx

from lm import __version__
from lm.tokenizer import Tokenizer

METRICS = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "num_preemptions_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "time_to_first_token_seconds_count",
    "inter_token_latency_seconds_count",
    "request_time_per_output_token_seconds_count",
    "e2e_request_latency_seconds_count",
    "request_queue_time_seconds_count",
    "request_inference_time_seconds_count",
    "request_prefill_time_seconds_count",
    "request_decode_time_seconds_count",
    "request_prompt_tokens_count",
    "request_generation_tokens_count",
    "iteration_tokens_total_count",
    "request_params_n_count",
    "request_params_max_tokens_count",
)


def test_models(server, folder) -> None:
    body = httpx.get(server.url + "/v1/models").json()
    assert body["object"] == "list"
    assert [card["id"] for card in body["data"]] == ["tiny", "also-tiny"]
    card = httpx.get(server.url + "/v1/models/tiny").json()
    assert card == body["data"][0]
    assert (card["object"], card["max_model_len"], card["root"], card["parent"]) == ("model", 256, str(folder), None)
    assert len(card["permission"]) == 1


def test_life(server) -> None:
    for path in ("/health", "/ping", "/live"):
        response = httpx.get(server.url + path)
        assert (response.status_code, response.content) == (200, b"")
    assert server.post("/ping").status_code == 200
    assert httpx.get(server.url + "/version").json() == {"version": __version__}
    assert httpx.get(server.url + "/load").json() == {"server_load": 0}
    assert httpx.get(server.url + "/openapi.json").json()["paths"]["/v1/completions"]


def test_metrics_count_what_happens(server) -> None:
    before = {name: server.metric(name) for name in METRICS}
    server.complete(prompt=[1, 2, 3], max_tokens=5, n=2, ignore_eos=True)
    after = {name: server.metric(name) for name in METRICS}
    grown = {name: after[name] - before[name] for name in METRICS}
    assert grown["prompt_tokens_total"] == 6
    assert grown["generation_tokens_total"] == 10
    assert grown["request_success_total"] == 2
    assert grown["time_to_first_token_seconds_count"] == 2
    assert grown["inter_token_latency_seconds_count"] == 8
    assert grown["request_params_n_count"] == 1
    assert (after["num_requests_running"], after["kv_cache_usage_perc"]) == (0, 0)


def test_tokenize_and_back(server, tokenizer: Tokenizer) -> None:
    text = "más 🦉 fox"
    body = server.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert body["tokens"] == tokenizer.encode(text)
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert body["max_model_len"] == 256
    assert server.post("/tokenize", json={"prompt": "", "model": "tiny"}).json()["tokens"] == []
    assert server.post("/detokenize", json={"tokens": body["tokens"]}).json() == {"prompt": text}
    assert server.post("/detokenize", json={"tokens": [10**6]}).status_code == 400
    assert server.post("/detokenize", json={"tokens": [-1]}).status_code == 400
    assert server.post("/tokenize", json={"prompt": "a", "model": "nobody"}).status_code == 404
    long = "the quick brown fox " * 4000
    assert server.post("/tokenize", json={"prompt": long}).json()["count"] > 10_000
