"""What is refused, and how: OpenAI's error object, the right status, one sentence."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.api import errors
from serve.errors import GenerationFailed


def refused(response: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["type"]) == (status, kind)
    assert isinstance(error["message"], str)
    assert 0 < len(error["message"]) < 4000
    return error


OUT_OF_RANGE: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": 2.5}, "temperature", "temperature must be in [0, 2], got 2.5."),
    ({"temperature": -1}, "temperature", "temperature must be in [0, 2], got -1.0."),
    ({"top_p": 0}, "top_p", "top_p must be in (0, 1], got 0.0."),
    ({"top_k": -2}, "top_k", "top_k must be 0 (disable), or at least 1, got -2."),
    ({"min_p": 1.5}, "min_p", "min_p must be in [0, 1], got 1.5."),
    ({"presence_penalty": 3}, "presence_penalty", "presence_penalty must be in [-2, 2], got 3.0."),
    ({"frequency_penalty": -3}, "frequency_penalty", "frequency_penalty must be in [-2, 2], got -3.0."),
    ({"repetition_penalty": 0}, "repetition_penalty", "repetition_penalty must be"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1, got 0."),
    ({"max_tokens": -5}, "max_tokens", "max_tokens must be at least 1, got -5."),
    ({"max_tokens": 1000}, "max_tokens", "max_tokens=1000 cannot be greater than max_model_len=256."),
    ({"min_tokens": 20}, "min_tokens", "min_tokens must be less than or equal to max_tokens=16, got 20."),
    ({"n": 0}, "n", "n must be at least 1, got 0."),
    ({"n": 10**9}, "n", "n must be at most 128, got 1000000000."),
    ({"n": 2, "temperature": 0}, "n", "n must be 1 when using greedy sampling, got 2."),
    ({"stop": [""]}, "stop", "stop cannot contain an empty string."),
    ({"stop_token_ids": [10**6]}, "stop_token_ids", "stop_token_ids [1000000] are out of the vocabulary"),
    ({"logprobs": 25}, "logprobs", "Requested sample logprobs of 25, which is greater than max allowed: 20"),
    ({"logprobs": -1}, "logprobs", "Requested sample logprobs of 337, which is greater than max allowed: 20"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "Requested prompt logprobs of 21"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "`prompt_logprobs` are not available when"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "Stream options can only be defined when"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "logit_bias has the key 'x'; keys must be token ids."),
    ({"logit_bias": {"99999": 1}}, "logit_bias", "logit_bias has token ids [99999] out of the vocabulary"),
    ({"logit_bias": {str(id): 1 for id in range(2000)}}, "logit_bias", "logit_bias must have at most 1024 entries"),
    ({"stop_token_ids": [1] * 2000}, "stop_token_ids", "stop_token_ids must have at most 1024 entries, got 2000."),
    ({"suffix": "x"}, "suffix", "suffix is only supported for models with FIM completion rendering"),
    ({"use_beam_search": True, "stream": True}, "stream", "Streaming is not currently supported with beam search"),
    ({"use_beam_search": True, "min_tokens": 2}, "min_tokens", "min_tokens is 2; a beam search does not look"),
    ({"use_beam_search": True, "length_penalty": 11}, "length_penalty", "length_penalty must be in [-10.0, 10.0], got"),
    ({"use_beam_search": True, "n": 129}, "n", "n must be at most 128, got 129"),
    ({"prompt_embeds": "AAAA"}, "prompt_embeds", "prompt_embeds is not supported"),
    ({"bad_words": ["x", ""]}, "bad_words", "bad_words cannot contain an empty string."),
    ({"bad_words": [f"{i:x}" for i in range(129)]}, "bad_words", "bad_words must have at most 128 words, got 129."),
    ({"bad_words": ["fox" * 1100]}, "bad_words", "bad_words are "),
    ({"allowed_token_ids": []}, "allowed_token_ids", "allowed_token_ids cannot be empty"),
    ({"allowed_token_ids": [1, 337]}, "allowed_token_ids", "allowed_token_ids [337] are out of the vocabulary"),
    ({"logprob_token_ids": [1]}, "logprob_token_ids", "when using `logprob_token_ids`, `logprobs` must be set."),
    ({"logprobs": 1, "logprob_token_ids": [-1]}, "logprob_token_ids", "logprob_token_ids [-1] are out of the"),
    ({"repetition_detection": {"max_pattern_size": 2}}, "repetition_detection", "repetition_detection needs a min_c"),
    ({"use_beam_search": True, "bad_words": ["a"]}, "bad_words", "bad_words is ['a']; a beam search does not look"),
    ({"cache_salt": ""}, "cache_salt", "cache_salt must have 1 to 128 characters, none of them @"),
    ({"cache_salt": "a@b"}, "cache_salt", "cache_salt must have 1 to 128 characters, none of them @"),
    ({"cache_salt": "s" * 129}, "cache_salt", "cache_salt must have 1 to 128 characters, none of them @"),
    ({"prompt": None}, "prompt", "Either prompt or prompt_embeds must be provided and non-empty."),
    ({"prompt": ""}, "prompt", "Either prompt or prompt_embeds must be provided and non-empty."),
    ({"prompt": []}, "prompt", "The decoder prompt cannot be empty"),
    ({"prompt": [[]]}, "prompt", "The decoder prompt cannot be empty"),
    ({"prompt": ["a", ""]}, "prompt", "The decoder prompt cannot be empty"),
    ({"prompt": [337]}, "prompt", "Token id 337 is out of vocabulary"),
    ({"prompt": [2**63]}, "prompt", "Token id 9223372036854775808 is out of vocabulary"),
    ({"n": 10**30}, "n", "n must be at most 128, got 10000000000"),
    ({"max_tokens": 10**30}, "max_tokens", "max_tokens=1000000000000000000000000000000 cannot be greater than"),
    ({"logprobs": "1"}, "logprobs", "`logprobs` must be an integer."),
    ({"prompt_logprobs": -2}, "prompt_logprobs", "`prompt_logprobs` must be a positive value or -1."),
    ({"thinking_token_budget": "x"}, "thinking_token_budget", "`thinking_token_budget` must be a non-negative integer"),
    ({"best_of": 2}, "best_of", "best_of is not supported"),
    ({"suffix": ""}, "suffix", "suffix is only supported for models with FIM completion rendering"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "The decoder prompt cannot be empty"),
    ({"cache_salt": 5}, "cache_salt", "cache_salt must have 1 to 128 characters, none of them @"),
    ({"prompt": ["a"] * 1025}, "prompt", "prompt list length 1025 exceeds the maximum"),
    ({"prompt": [1] * 300}, "input_tokens", "This model's maximum context length is 256 tokens. However, your prompt"),
    ({"prompt": [1] * 256}, "max_tokens", "max_tokens must be at least 1, got 0."),
    ({"truncate_prompt_tokens": 1000}, "truncate_prompt_tokens", "truncate_prompt_tokens value (1000) is greater"),
]


@pytest.mark.parametrize(("fields", "param", "message"), OUT_OF_RANGE, ids=lambda value: str(value)[:40])
def test_values_out_of_range(server, fields: dict[str, Any], param: str, message: str) -> None:
    error = refused(server.post("/v1/completions", json={"prompt": "fox", **fields}), 400, "BadRequestError")
    assert error["param"] == param
    assert error["message"].startswith(message)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": None}, "n"),
        ({"seed": 2**70}, "seed"),
        ({"temperature": "hot"}, "temperature"),
        ({"stop": 1}, "stop"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stream": "maybe"}, "stream"),
        ({"stream_interval": 0}, "stream_interval"),
        ({"echo": []}, "echo"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_values_of_the_wrong_type(server, fields: dict[str, Any], param: str) -> None:
    error = refused(server.post("/v1/completions", json={"prompt": "fox", **fields}), 400, "Bad Request")
    assert error["param"].split(".")[:2] == ["body", param]
    assert "validation error" in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"nonsense",
        b'{"prompt": "\xff"}',
        b"[" * 100_000,
        b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
    ids=["empty", "open", "list", "word", "utf8", "deep", "deep-prompt"],
)
def test_bodies_that_are_no_request(server, body: bytes) -> None:
    response = server.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] == 400


def test_numbers_that_json_should_not_have(server) -> None:
    for value in ("NaN", "Infinity", "-Infinity", "1e999"):
        body = f'{{"prompt": "fox", "temperature": {value}}}'
        response = server.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400, response.text
        assert "temperature" in response.json()["error"]["message"]
    body = '{"prompt": "fox", "logit_bias": {"1": NaN}}'
    assert server.post("/v1/completions", content=body, headers={"content-type": "application/json"}).status_code == 400


def test_halves_of_surrogate_pairs(server) -> None:
    headers = {"content-type": "application/json"}
    for body in (
        r'{"prompt": "\ud800"}',
        r'{"prompt": "a", "stop": ["\udc00"]}',
        r'{"prompt": "a", "model": "\ud800"}',
    ):
        response = server.post("/v1/completions", content=body, headers=headers)
        assert response.status_code in (400, 404), response.text
        assert response.json()["error"]["code"] == response.status_code


def test_a_body_must_say_that_it_is_json(server) -> None:
    response = server.post("/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": "text/plain"})
    error = refused(response, 400, "Bad Request")
    assert error["message"] == "1 validation error: Unsupported Media Type: Only 'application/json' is allowed"


def test_what_does_not_exist(server) -> None:
    error = refused(server.post("/v1/completions", json={"model": "no\n" * 500, "prompt": "a"}), 404, "NotFoundError")
    assert error["param"] == "model"
    assert "Valid aliases: tiny, also-tiny." in error["message"]
    refused(server.post("/v1/nothing", json={}), 404, "NotFoundError")
    refused(httpx.get(server.url + "/v1/models/nobody"), 404, "NotFoundError")
    assert httpx.get(server.url + "/v1/completions").status_code == 405
    for path in ("/v1/embeddings", "/generative_scoring"):
        refused(server.post(path, json={}), 501, "NotImplementedError")


def test_a_big_body_gets_a_small_answer_soon(server) -> None:
    for prompt in (["x"] + [1] * 1_000_000, [[1]] * 1_000_000 + ["x"], [1] * 1_000_000 + ["x"]):
        begin = time.monotonic()
        response = server.post("/v1/completions", json={"prompt": prompt})
        assert response.status_code == 400
        assert len(response.content) < 5000
        assert time.monotonic() - begin < 5


def test_many_long_prompts_do_not_hold_up_the_others(server) -> None:
    """Tokenizing megabytes takes a while, during which the server answers everybody else."""
    import threading

    texts = ["the quick brown fox " * 400] * 400  # each longer than the context: refused, after tokenizing
    done = threading.Event()

    def ask() -> None:
        refused(server.post("/v1/completions", json={"prompt": texts}), 400, "BadRequestError")
        done.set()

    thread = threading.Thread(target=ask)
    thread.start()
    waits = []
    while not done.is_set():
        begin = time.monotonic()
        assert httpx.get(server.url + "/health").status_code == 200
        waits.append(time.monotonic() - begin)
    thread.join()
    assert max(waits) < 1


def test_an_absurd_n_is_refused_at_once_and_nobody_else_notices(server) -> None:
    import threading

    def refusal() -> float:
        begin = time.monotonic()
        refused(server.post("/v1/completions", json={"prompt": "a", "n": 10**9}), 400, "BadRequestError")
        return time.monotonic() - begin

    assert min(refusal() for _ in range(10)) < 0.05
    fields = {"prompt": "the fox", "max_tokens": 200, "ignore_eos": True, "temperature": 0}
    alone, beside = server.complete(**fields), {}
    other = threading.Thread(target=lambda: beside.update(server.complete(**fields)))
    other.start()
    while other.is_alive():
        refusal()
    assert beside["choices"] == alone["choices"]


def test_a_text_too_long_by_its_characters_is_refused_unread(server) -> None:
    error = refused(server.post("/v1/completions", json={"prompt": "x" * 200_000}), 400, "BadRequestError")
    assert error["param"] == "input_text"
    assert error["message"].startswith(
        "This model's maximum context length is 256 tokens. However, your prompt contains"
    )
    cut = server.complete(prompt="x" * 200_000, truncate_prompt_tokens=5, max_tokens=1)
    assert cut["usage"]["prompt_tokens"] == 5


def test_what_the_engine_says_of_itself_is_not_told() -> None:
    said = "<Thing object at 0x7f3a21> in /usr/lib/python3/site-packages/x.py failed; 3/4 of it and https://a.b/c stay"
    assert errors.clean(said) == "<Thing object> in <path> failed; 3/4 of it and https://a.b/c stay"
    assert "0x7f3a21" not in errors.body(GenerationFailed(said))["error"]["message"]


VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=3)
)
FIELDS = [
    "prompt", "max_tokens", "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "seed", "stop", "stop_token_ids", "min_tokens", "logprobs", "prompt_logprobs", "echo",
    "logit_bias", "stream_options", "truncate_prompt_tokens", "skip_special_tokens", "ignore_eos", "return_token_ids",
    "use_beam_search", "length_penalty",
]  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(fields=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
def test_nothing_that_can_be_sent_is_a_server_error(server, fields: dict[str, Any]) -> None:
    import json

    body = json.dumps({"prompt": "fox", "max_tokens": 2, **fields})
    response = server.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400), response.text
