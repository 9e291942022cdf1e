"""Translators over real servers: the same translation alone, among others, offline; searched, streamed, refused."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch

from lm import pretrained
from lm.beam import VLLM, BeamParams, beam_search
from serve import LLM, BeamSearchParams, SamplingParams
from serve.engine.build import bytes_per_block

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "🎉🦊",
    "jumps",
    "ñandú,",
    "你好",
    "世界",
    "más",
    "naïve",
    "café",
    "it",
    "sleeps.",
]
GREEDY = {"temperature": 0, "max_tokens": 24}


class Served(NamedTuple):
    translator: Any
    server: Any
    llm: LLM


@pytest.fixture(scope="module")
def served(translator: Any, launching: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server whose cache holds two requests of full length, so that twenty preempt each other; and it offline."""
    path = tmp_path_factory.mktemp("translator")
    folder = path / "tiny"
    pretrained.save(
        translator.model, folder, tokenizer=translator.tokenizer, generation={"eos_token_id": translator.eos}
    )
    block = bytes_per_block(translator.model, 4, torch.float32)
    flags = ["--kv-cache-memory-bytes", str(50 * block), "--block-size", "4", "--served-model-name", "tiny"]
    server = launching(folder, path / "serve.log", *flags)
    yield Served(translator, server, LLM(folder, kv_cache_memory_bytes=1 << 24))
    server.end()


def sentences(count: int, longest: int = 7) -> list[str]:
    draw = random.Random(4)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for _ in range(count)]


def offline(served: Served, text: str, **fields: Any) -> tuple[str, list[int]]:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 24, **fields})
    (output,) = served.llm.generate([text], params)
    return output.outputs[0].text, output.outputs[0].token_ids


def streamed(served: Served, **fields: Any) -> Iterator[dict[str, Any]]:
    body = {"stream": True, **fields}
    with httpx.stream("POST", served.server.url + "/v1/completions", json=body, timeout=60) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line[6:])


def idle(served: Served) -> None:
    deadline = time.monotonic() + 20
    while served.server.metric("num_requests_running") or served.server.metric("kv_cache_usage_perc"):
        assert time.monotonic() < deadline, "something is still held"
        time.sleep(0.02)


def test_a_sentence_alone_among_twenty_and_offline(served: Served) -> None:
    texts = sentences(20)
    lone = [served.server.complete(prompt=text, **GREEDY)["choices"][0]["text"] for text in texts[:4]]

    def ask(number: int) -> str | None:
        if number % 5 == 4:  # who leaves in the middle
            for _, _ in zip(range(2), streamed(served, prompt=texts[number], **GREEDY), strict=False):
                pass
            return None
        return served.server.complete(prompt=texts[number], **GREEDY)["choices"][0]["text"]

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(ask, range(20)))
    assert found[:4] == lone
    assert found == [None if number % 5 == 4 else offline(served, text)[0] for number, text in enumerate(texts)]
    assert len(set(found)) > 10
    idle(served)


def test_a_tiny_cache_preempts_and_changes_nothing(served: Served) -> None:
    texts = sentences(12)
    answer = served.server.complete(prompt=texts, temperature=0, max_tokens=40, ignore_eos=True)
    expected = [offline(served, text, max_tokens=40, ignore_eos=True)[0] for text in texts]
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert served.server.metric("num_preemptions_total") > 0
    idle(served)


def test_several_prompts_in_one_request_and_what_they_count(served: Served) -> None:
    texts = sentences(6)
    answer = served.server.complete(prompt=texts, return_token_ids=True, **GREEDY)
    expected = [offline(served, text) for text in texts]
    assert [(choice["text"], choice["token_ids"]) for choice in answer["choices"]] == expected
    tokenizer = served.translator.tokenizer
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [tokenizer.encode(text) for text in texts]
    assert answer["usage"]["prompt_tokens"] == sum(len(tokenizer.encode(text)) for text in texts)
    assert answer["usage"]["completion_tokens"] == sum(len(ids) for _, ids in expected)
    # What /tokenize says is what is read, and ids are as good as text.
    ids = served.server.post("/tokenize", json={"prompt": texts[0]}).json()["tokens"]
    assert served.server.complete(prompt=ids, **GREEDY)["choices"][0]["text"] == expected[0][0]


def test_a_stream_is_the_whole(served: Served) -> None:
    text = "the quick 你好 🎉🦊 café"
    whole = served.server.complete(prompt=text, max_tokens=30, temperature=0.8, seed=3, logprobs=2)
    chunks = list(
        streamed(
            served,
            prompt=text,
            max_tokens=30,
            temperature=0.8,
            seed=3,
            logprobs=2,
            stream_options={"include_usage": True},
        )
    )
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
    tokens = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["tokens"]]
    assert tokens == whole["choices"][0]["logprobs"]["tokens"]
    for name in ("prompt_tokens", "completion_tokens"):
        assert chunks[-1]["usage"][name] == whole["usage"][name]


def test_n_with_seeds(served: Served) -> None:
    fields = {"prompt": "the quick brown fox", "temperature": 0.9, "max_tokens": 12, "ignore_eos": True}
    texts = [choice["text"] for choice in served.server.complete(n=3, seed=7, **fields)["choices"]]
    assert len(set(texts)) == 3
    for i, text in enumerate(texts):
        assert served.server.complete(seed=7 + i, **fields)["choices"][0]["text"] == text
    assert (
        texts[0] == offline(served, "the quick brown fox", temperature=0.9, max_tokens=12, ignore_eos=True, seed=7)[0]
    )


@pytest.mark.parametrize("length_penalty", [1.0, 0.0])
def test_a_beam_is_lms(served: Served, length_penalty: float) -> None:
    model, tokenizer, eos = served.translator.model, served.translator.tokenizer, served.translator.eos
    texts = sentences(3, longest=3)
    fields = {"use_beam_search": True, "n": 3, "max_tokens": 8, "length_penalty": length_penalty, "temperature": 0.3}
    with ThreadPoolExecutor(6) as pool:  # among others
        others = [pool.submit(served.server.complete, prompt=text, **GREEDY) for text in texts]
        answers = list(pool.map(lambda text: served.server.complete(prompt=text, **fields), texts))
        assert [other.result()["choices"][0]["text"] for other in others] == [offline(served, t)[0] for t in texts]
    searches = served.llm.beam_search(
        texts, BeamSearchParams(beam_width=3, max_tokens=8, length_penalty=length_penalty)
    )
    for text, answer, searched in zip(texts, answers, searches, strict=True):
        source = tokenizer.encode(text)
        scorer = VLLM(length_penalty, 1 if model.encoder_decoder else len(source))
        (found,) = beam_search(model, [source], BeamParams(beam=3, n_best=3, scorer=scorer, max_tokens=8), eos)
        expected = [tokenizer.decode(hypothesis.ids) for hypothesis in found]
        assert [choice["text"] for choice in answer["choices"]] == expected
        ends = ["length" if hypothesis.end is None else "stop" for hypothesis in found]
        assert [choice["finish_reason"] for choice in answer["choices"]] == ends
        assert answer["usage"]["completion_tokens"] == sum(len(hypothesis.ids) for hypothesis in found)
        assert answer["usage"]["prompt_tokens"] == len(source)
        if model.encoder_decoder:
            assert [sequence.text for sequence in searched.sequences] == expected
    idle(served)


def test_a_beam_shows_probabilities_and_its_client_may_leave(served: Served) -> None:
    fields = {"prompt": "the quick", "use_beam_search": True, "n": 2, "max_tokens": 6}
    answer = served.server.complete(logprobs=2, return_token_ids=True, **fields)
    for choice in answer["choices"]:
        assert len(choice["logprobs"]["token_logprobs"]) == len(choice["token_ids"])
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            served.server.url + "/v1/completions",
            json={**fields, "max_tokens": 20, "ignore_eos": True},
            timeout=httpx.Timeout(20, read=0.001),
        )
    idle(served)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ""}, "prompt", "Either prompt or prompt_embeds must be provided and non-empty."),
    ({"prompt": [[]]}, "prompt", "The decoder prompt cannot be empty"),
    ({"prompt": [5] * 97}, "input_tokens", "This model's maximum context length is"),
    ({"prompt": "the quick " * 100}, "input_tokens", "This model's maximum context length is"),
    ({"prompt": [339]}, "prompt", "Token id 339 is out of vocabulary"),
    ({"prompt": "a", "max_tokens": 97}, "max_tokens", "max_tokens=97 cannot be greater than max_model_len="),
    ({"prompt": "a", "echo": True}, "echo", "echo is not available: this model reads the prompt as a source"),
    ({"prompt": "a", "prompt_logprobs": 0}, "prompt_logprobs", "prompt_logprobs are not available: this model reads"),
    ({"prompt": "a", "use_beam_search": True, "n": 2, "stream": True}, "stream", "Streaming is not currently"),
    ({"prompt": "a", "use_beam_search": True, "stop": ["x"]}, "stop", "stop is ['x']; a beam search does not look"),
    ({"prompt": "a", "use_beam_search": True, "n": 100, "max_tokens": 20}, "n", "A beam of 100 over "),
]


@pytest.mark.parametrize(("fields", "param", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_is_refused(served: Served, fields: dict[str, Any], param: str, message: str) -> None:
    response = served.server.post("/v1/completions", json=fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(message)


def test_any_script_is_read_and_a_chat_needs_a_template(served: Served) -> None:
    for text in ("🎉" * 5, "ñandú", "世界", "\u202eabc", "é" * 20, " ", "\n", "a\x00b", "😀‍👩"):
        answer = served.server.complete(prompt=text, **GREEDY)
        assert answer["choices"][0]["text"] == offline(served, text)[0]
        assert answer["choices"][0]["finish_reason"] in ("stop", "length")
    response = served.server.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hello"}]})
    assert response.status_code == 400
    assert "no chat template" in response.json()["error"]["message"]


def test_max_model_len_is_of_each_side(served: Served) -> None:
    length = served.translator.model.config.context
    (card,) = httpx.get(served.server.url + "/v1/models").json()["data"]
    assert card["max_model_len"] == length
    if served.translator.model.encoder_decoder:
        answer = served.server.complete(prompt=[5] * (length - 1) + [2], max_tokens=length, ignore_eos=True)
        assert answer["usage"]["completion_tokens"] == length
    else:
        answer = served.server.complete(prompt=[5] * (length - 3) + [1], max_tokens=length, ignore_eos=True)
        assert answer["usage"]["completion_tokens"] == 2


def test_a_flag_that_would_cut_sources_is_raised_with_a_sentence(
    translators: dict[str, Any], launching: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    made = translators["transformer"]
    pretrained.save(made.model, folder, tokenizer=made.tokenizer)
    flags = ["--kv-cache-memory-bytes", "8M", "--max-num-batched-tokens", "16"]
    server = launching(folder, tmp_path / "serve.log", *flags)
    try:
        assert "max_num_batched_tokens is 48 and not 16: a source is read in one step." in server.log.read_text()
        assert server.complete(prompt=[5] * 47 + [2], **GREEDY)["choices"][0]["finish_reason"] in ("stop", "length")
    finally:
        server.end()
