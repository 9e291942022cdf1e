"""/v1/completions over HTTP: vLLM's shapes, and answers that are the model's own whoever shares the batch."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch

from lm import DecoderLM, SamplingParams
from lm.beam import VLLM, BeamParams, beam_search
from lm.search import generate
from lm.tokenizer import Tokenizer

PROMPT = "the quick brown fox"
GREEDY = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 24}


def events(response: httpx.Response) -> list[Any]:
    """The chunks of a stream, which must end with [DONE]."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    assert blocks.pop() == "data: [DONE]"
    assert all(block.startswith("data: ") for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def stream(server, **fields: Any) -> list[Any]:
    response = server.post("/v1/completions", json={"stream": True, **fields})
    assert response.status_code == 200, response.text
    return events(response)


def greedy(model: DecoderLM, tokenizer: Tokenizer, text: str, count: int) -> list[int]:
    params = SamplingParams(temperature=0.0, max_tokens=count)
    return generate(model, [tokenizer.encode(text)], params, [tokenizer.eos_id])[0]


# ---------------------------------------------------------------- shapes


def test_the_body_has_every_field_of_vllms(server, tokenizer: Tokenizer) -> None:
    body = server.complete(**GREEDY)
    assert body["id"].startswith("cmpl-")
    (choice,) = body["choices"]
    usage = body["usage"]
    assert body == {
        "id": body["id"],
        "object": "text_completion",
        "created": body["created"],
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "text": choice["text"],
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
                "token_ids": None,
                "prompt_logprobs": None,
                "prompt_token_ids": None,
                "routed_experts": None,
            }
        ],
        "service_tier": None,
        "system_fingerprint": body["system_fingerprint"],
        "usage": {
            "prompt_tokens": len(tokenizer.encode(PROMPT)),
            "total_tokens": len(tokenizer.encode(PROMPT)) + 24,
            "completion_tokens": 24,
            "prompt_tokens_details": None,
            "completion_tokens_details": None,
        },
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_chunks_have_the_shape_of_vllms(server) -> None:
    whole = server.complete(**GREEDY)
    chunks = stream(server, **GREEDY)
    assert 1 < len(chunks) <= 24  # one a token, unless the reader is slower than the engine
    for chunk in chunks[:-1]:
        assert chunk == {
            "id": chunks[0]["id"],
            "object": "text_completion",
            "created": chunks[0]["created"],
            "model": "tiny",
            "choices": [
                {
                    "index": 0,
                    "text": chunk["choices"][0]["text"],
                    "logprobs": None,
                    "finish_reason": None,
                    "stop_reason": None,
                    "prompt_token_ids": None,
                    "token_ids": None,
                }
            ],
        }
    last = chunks[-1]
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["system_fingerprint"] == whole["system_fingerprint"]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]


def test_usage_in_a_stream(server) -> None:
    usage = server.complete(**GREEDY)["usage"]
    *chunks, last = stream(server, **GREEDY, stream_options={"include_usage": True})
    assert all("usage" not in chunk for chunk in chunks)
    assert last["choices"] == []
    assert {name: last["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")} == {
        name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    }
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, _ = stream(server, **GREEDY, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(set(counts))
    assert (counts[0] >= 1, counts[-1]) == (True, 24)


def test_a_stream_interval_bundles_tokens(server) -> None:
    chunks = stream(server, **GREEDY, stream_interval=10)
    assert len(chunks) <= 4  # the first token is not held back
    whole = server.complete(**GREEDY)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]


def test_ids_of_prompt_and_output(server, tokenizer: Tokenizer) -> None:
    (choice,) = server.complete(**GREEDY, return_token_ids=True)["choices"]
    assert choice["prompt_token_ids"] == tokenizer.encode(PROMPT)
    assert tokenizer.decode(choice["token_ids"]) == choice["text"]
    chunks = [chunk["choices"][0] for chunk in stream(server, **GREEDY, return_token_ids=True)]
    assert [chunk["prompt_token_ids"] for chunk in chunks] == [choice["prompt_token_ids"]] + [None] * (len(chunks) - 1)
    assert [id for chunk in chunks for id in chunk["token_ids"]] == choice["token_ids"]


# ---------------------------------------------------------------- answers


def test_greedy_is_the_models_own_alone_and_with_eight_others(server, model: DecoderLM, tokenizer: Tokenizer) -> None:
    texts = [PROMPT, "and then", "más ñandú", "🎉", "the lazy dog, and then it sleeps. " * 3, "fox", "x", "naïve", "it"]
    expected = [greedy(model, tokenizer, text, 24) for text in texts]

    def ask(text: str) -> list[int]:
        return server.complete(**{**GREEDY, "prompt": text}, return_token_ids=True)["choices"][0]["token_ids"]

    assert ask(texts[0]) == expected[0]
    with ThreadPoolExecutor(len(texts)) as pool:
        assert list(pool.map(ask, texts)) == expected
    # As one request, too, and given as ids.
    ids = [tokenizer.encode(text) for text in texts]
    for prompt in (texts, ids):
        choices = server.complete(**{**GREEDY, "prompt": prompt}, return_token_ids=True)["choices"]
        assert [choice["index"] for choice in choices] == list(range(9))
        assert [choice["token_ids"] for choice in choices] == expected


def test_seeds_and_n_do_not_depend_on_the_batch(server) -> None:
    fields = {"prompt": PROMPT, "seed": 7, "n": 3, "temperature": 1.0, "top_p": 0.95, "max_tokens": 16}

    def ask(_: int = 0) -> list[str]:
        choices = server.complete(**fields)["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2]
        return [choice["text"] for choice in choices]

    alone = ask()
    assert len(set(alone)) == 3
    with ThreadPoolExecutor(6) as pool:
        assert all(texts == alone for texts in pool.map(ask, range(6)))
    # Each of the n can be had again by itself.
    for i, text in enumerate(alone):
        assert server.complete(**{**fields, "n": 1, "seed": 7 + i})["choices"][0]["text"] == text
    several = server.complete(**{**fields, "prompt": ["a", PROMPT], "n": 2})["choices"]
    assert [choice["text"] for choice in several[2:]] == alone[:2]


def test_without_seeds_answers_differ(server) -> None:
    texts = {server.complete(prompt=PROMPT, max_tokens=16)["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 3


def test_logprobs_are_a_log_softmax(server, model: DecoderLM, tokenizer: Tokenizer) -> None:
    (choice,) = server.complete(**GREEDY, logprobs=3, return_token_ids=True)["choices"]
    ids, given = tokenizer.encode(PROMPT), choice["logprobs"]
    for position, id in enumerate(choice["token_ids"]):
        with torch.inference_mode():
            logits = model.step(torch.tensor([ids[-1:]]), model.start(torch.tensor([ids])))[0][0, -1]
        row = torch.log_softmax(logits, dim=-1)
        assert given["token_logprobs"][position] == pytest.approx(row[id].item(), abs=1e-4)
        text = given["tokens"][position]
        alone = tokenizer.inner.decode([id], skip_special_tokens=False)
        assert text == alone or alone.endswith("\ufffd")  # then it is of a character that another token completes
        if text:  # else more than one token may be called so
            assert given["top_logprobs"][position][text] == pytest.approx(row[id].item(), abs=1e-4)
        assert len(given["top_logprobs"][position]) <= 4
        ids.append(id)
    assert "".join(given["tokens"]).replace("\ufffd", "") == choice["text"].replace("\ufffd", "")
    lengths = [len(text) for text in given["tokens"]]
    assert given["text_offset"] == [sum(lengths[:i]) for i in range(len(lengths))]
    chunks = [chunk["choices"][0]["logprobs"] for chunk in stream(server, **GREEDY, logprobs=3)]
    assert [value for chunk in chunks for value in chunk["token_logprobs"]] == pytest.approx(given["token_logprobs"])


def test_echo_scores_the_prompt(server, model: DecoderLM, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT)
    body = server.complete(prompt=PROMPT, echo=True, max_tokens=0, logprobs=1)
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
    assert (body["usage"]["completion_tokens"], body["usage"]["prompt_tokens"]) == (0, len(ids))
    first, *rest = choice["logprobs"]["token_logprobs"]
    assert first is None
    assert choice["logprobs"]["top_logprobs"][0] is None
    with torch.inference_mode():
        for position, value in enumerate(rest):
            state = model.start(torch.tensor([ids[: position + 1]]))
            logits = model.step(torch.tensor([[ids[position]]]), state)[0][0, -1]
            assert value == pytest.approx(torch.log_softmax(logits, -1)[ids[position + 1]].item(), abs=1e-4)
    assert "".join(choice["logprobs"]["tokens"]) == PROMPT

    fields = {"prompt": PROMPT, "echo": True, "max_tokens": 4, "temperature": 0, "logprobs": 0}
    (more,) = server.complete(**fields)["choices"]
    assert more["text"].startswith(PROMPT)
    assert len(more["logprobs"]["tokens"]) == len(ids) + 4
    assert more["logprobs"]["token_logprobs"][1 : len(ids)] == pytest.approx(rest)
    chunks = [chunk["choices"][0] for chunk in stream(server, **fields)]
    assert "".join(chunk["text"] for chunk in chunks) == more["text"]
    assert [n for chunk in chunks for n in chunk["logprobs"]["tokens"]] == more["logprobs"]["tokens"]
    assert chunks[0]["logprobs"]["text_offset"][0] == 0


def test_prompt_logprobs(server, tokenizer: Tokenizer) -> None:
    (choice,) = server.complete(**GREEDY, prompt_logprobs=1)["choices"]
    ids = tokenizer.encode(PROMPT)
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    assert len(rest) == len(ids) - 1
    for id, entry in zip(ids[1:], rest, strict=True):
        assert set(entry[str(id)]) == {"logprob", "rank", "decoded_token"}
        assert (len(entry) == 1) == (entry[str(id)]["rank"] == 1)


def test_stop_strings_across_tokens(server) -> None:
    text = server.complete(**GREEDY)["choices"][0]["text"]
    for begin in range(2, 8):
        stop = text[begin : begin + 3]
        at = text.find(stop)
        (choice,) = server.complete(**GREEDY, stop=[stop])["choices"]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text[:at], "stop", stop)
        shown = ""
        for chunk in stream(server, **GREEDY, stop=stop):
            shown += chunk["choices"][0]["text"]
            assert text[:at].startswith(shown)
        assert shown == text[:at]
        kept = server.complete(**GREEDY, stop=stop, include_stop_str_in_output=True)["choices"][0]["text"]
        assert kept == text[: at + len(stop)]


def test_stop_tokens_and_bias(server, tokenizer: Tokenizer) -> None:
    ids = server.complete(**GREEDY, return_token_ids=True)["choices"][0]["token_ids"]
    (choice,) = server.complete(**GREEDY, stop_token_ids=[ids[5]], return_token_ids=True)["choices"]
    end = ids.index(ids[5]) + 1
    assert (choice["token_ids"], choice["stop_reason"]) == (ids[:end], ids[5])
    (choice,) = server.complete(**GREEDY, logit_bias={str(tokenizer.eos_id): 100})["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", None)
    (choice,) = server.complete(**GREEDY, logit_bias={"65": 100}, return_token_ids=True)["choices"]
    assert choice["token_ids"] == [65] * 24


def test_characters_of_several_tokens_come_whole(server, tokenizer: Tokenizer) -> None:
    """An owl is four byte tokens here; a bias makes the model say it, one token at a time."""
    owl = tokenizer.encode("🦉")
    assert len(owl) > 1
    shown = ""
    for id in owl:
        body = server.complete(
            prompt=tokenizer.encode("x") + owl[: owl.index(id)], logit_bias={str(id): 100}, max_tokens=1
        )
        shown += body["choices"][0]["text"]
    assert shown.count("🦉") == 1
    chunks = stream(server, prompt="más 你好", max_tokens=200, seed=4, temperature=0.8, ignore_eos=True)
    whole = server.complete(prompt="más 你好", max_tokens=200, seed=4, temperature=0.8, ignore_eos=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]


def test_the_context_is_filled_and_no_more(server, tokenizer: Tokenizer) -> None:
    prompt = [5] * 250
    body = server.complete(prompt=prompt, max_tokens=100, ignore_eos=True)
    assert (body["usage"]["completion_tokens"], body["choices"][0]["finish_reason"]) == (6, "length")
    cut = server.complete(prompt=[5] * 300, truncate_prompt_tokens=10, max_tokens=1)
    assert cut["usage"]["prompt_tokens"] == 10
    left = server.complete(prompt=[1, 2, 3], truncate_prompt_tokens=2, max_tokens=1, return_token_ids=True)
    assert left["choices"][0]["prompt_token_ids"] == [2, 3]
    fields = {"truncate_prompt_tokens": 2, "truncation_side": "right", "max_tokens": 1, "return_token_ids": True}
    assert server.complete(prompt=[1, 2, 3], **fields)["choices"][0]["prompt_token_ids"] == [1, 2]
    longest = server.complete(prompt=[5] * 300, truncate_prompt_tokens=-1, max_tokens=9, ignore_eos=True)
    assert (longest["usage"]["prompt_tokens"], longest["usage"]["completion_tokens"]) == (255, 1)
    echoed = server.complete(prompt=[5] * 300, truncate_prompt_tokens=-1, max_tokens=0, echo=True)
    assert echoed["usage"]["prompt_tokens"] == 256


def test_a_small_temperature_is_raised_and_draws(server) -> None:
    """As in vLLM: only 0 is greedy, so that several sequences may be asked for."""
    body = server.complete(prompt="the fox", temperature=1e-6, n=2, seed=1, max_tokens=4, ignore_eos=True)
    assert len(body["choices"]) == 2


def test_ids_and_names(server) -> None:
    response = server.post("/v1/completions", json={**GREEDY, "model": "also-tiny"}, headers={"X-Request-Id": "mine-1"})
    assert (response.json()["id"], response.json()["model"]) == ("cmpl-mine-1", "tiny")
    assert server.complete(**GREEDY, request_id="b")["id"] == "cmpl-b"
    assert server.complete(**GREEDY, some_field_of_the_future={"a": 1})["object"] == "text_completion"


# ---------------------------------------------------------------- the official client


def test_the_openai_client(server) -> None:
    strict = openai.OpenAI(base_url=server.url + "/v1", api_key="none", _strict_response_validation=True)
    whole = strict.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, temperature=0)
    # Not strict where it streams: OpenAI's type has no null finish_reason, and vLLM's chunks, which these are, do.
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24
    chunks = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [model.id for model in client.models.list()] == ["tiny", "also-tiny"]
    assert client.models.retrieve("also-tiny").id == "also-tiny"
    with pytest.raises(openai.NotFoundError, match="The model `nobody` does not exist"):
        client.completions.create(model="nobody", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="temperature must be in"):
        client.completions.create(model="tiny", prompt=PROMPT, temperature=2.5)


def test_the_async_openai_client(server) -> None:
    async def ask(client: openai.AsyncOpenAI, prompt: str) -> str:
        chunks = await client.completions.create(model="tiny", prompt=prompt, max_tokens=8, temperature=0, stream=True)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, f"fox {i}") for i in range(8)))

    expected = [server.complete(**{**GREEDY, "prompt": f"fox {i}", "max_tokens": 8}) for i in range(8)]
    assert asyncio.run(main()) == [body["choices"][0]["text"] for body in expected]


@pytest.mark.parametrize("length_penalty", [1.0, -1.0, 2.5])
def test_a_beam_has_vllms_score_prompt_included(server, model, tokenizer, length_penalty: float) -> None:
    prompt = tokenizer.encode("the fox")
    params = BeamParams(beam=3, n_best=3, scorer=VLLM(length_penalty, len(prompt)), max_tokens=6)
    (found,) = beam_search(model, [prompt], params, [tokenizer.eos_id])
    fields = {"prompt": "the fox", "use_beam_search": True, "n": 3, "max_tokens": 6, "length_penalty": length_penalty}
    answer = server.complete(return_token_ids=True, logprobs=1, seed=1, temperature=0, **fields)
    assert [choice["token_ids"] for choice in answer["choices"]] == [hypothesis.ids for hypothesis in found]
    for choice, hypothesis in zip(answer["choices"], found, strict=True):
        shown = choice["logprobs"]["token_logprobs"]
        assert shown == pytest.approx(hypothesis.logprobs[: len(shown)], abs=1e-4)
    echoed = server.complete(echo=True, **fields)
    assert [choice["text"] for choice in echoed["choices"]] == ["the fox" + c["text"] for c in answer["choices"]]
    both = server.complete(**{**fields, "prompt": ["the fox", "a dog"]})
    assert [choice["text"] for choice in both["choices"][:3]] == [choice["text"] for choice in answer["choices"]]
    assert len(both["choices"]) == 6


def test_a_chat_may_be_searched(server) -> None:
    fields = {"messages": [{"role": "user", "content": "hello"}], "use_beam_search": True, "n": 2, "max_tokens": 5}
    answer = server.chat(logprobs=True, top_logprobs=1, **fields)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    contents = [choice["message"]["content"] for choice in answer["choices"]]
    assert contents[0] != contents[1]
    assert contents == [choice["message"]["content"] for choice in server.chat(**fields)["choices"]]


def test_tokens_that_are_allowed_banned_or_shown(server, tokenizer) -> None:
    asked = {"prompt": "fox", "temperature": 0, "max_tokens": 12, "ignore_eos": True, "return_token_ids": True}
    free = server.complete(**asked)["choices"][0]
    few = sorted(set(free["token_ids"]))[:3]
    assert set(server.complete(**asked, allowed_token_ids=few)["choices"][0]["token_ids"]) <= set(few)
    word = tokenizer.inner.decode(free["token_ids"][:1])
    assert not server.complete(**asked, bad_words=[word])["choices"][0]["text"].startswith(word)
    shown = server.complete(**asked, logprobs=0, logprob_token_ids=few, return_tokens_as_token_ids=True)
    top = shown["choices"][0]["logprobs"]["top_logprobs"][0]
    assert set(top) == {f"token_id:{id}" for id in (*few, free["token_ids"][0])}
    loop = {"max_pattern_size": 1, "min_count": 4}
    ended = server.complete(**asked, allowed_token_ids=few[:1], repetition_detection=loop)["choices"][0]
    assert (ended["finish_reason"], ended["token_ids"]) == ("repetition", few[:1] * 4)
