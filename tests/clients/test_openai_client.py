"""OpenAI's own client, which checks every answer against the API's types (_strict_response_validation).

Two things of the older completions are outside of those types, at OpenAI as at vLLM: a chunk that is not the last has
no finish_reason, and the first token of a prompt no log-probability. They are asked for without that check.
"""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

CHAT: Any = [{"role": "user", "content": "What is the capital of France?"}]
PARIS = "The capital of France is Paris."


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.api, api_key="open-sesame", _strict_response_validation=True, max_retries=0)


@pytest.fixture(scope="module")
def older(server) -> openai.OpenAI:
    """Without the check: for streams of completions, and for the log-probabilities of a prompt."""
    return openai.OpenAI(base_url=server.api, api_key="open-sesame", max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "smollm2"
    assert client.models.retrieve("smollm2").id == "smollm2"


def test_a_completion_and_its_stream(client: openai.OpenAI, older: openai.OpenAI) -> None:
    ask: Any = {"model": "smollm2", "prompt": "The capital of France is", "max_tokens": 7, "temperature": 0}
    body = client.completions.create(**ask)
    assert body.choices[0].text == " Paris.\n\nThe answer is"
    assert body.choices[0].finish_reason == "length"
    assert body.usage is not None
    assert (body.usage.prompt_tokens, body.usage.completion_tokens) == (5, 7)
    chunks = list(older.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == body.choices[0].text
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (5, 7)


def test_the_logprobs_of_a_prompt(older: openai.OpenAI) -> None:
    body = older.completions.create(
        model="smollm2", prompt="The capital of France is Paris", max_tokens=1, echo=True, logprobs=2, temperature=0
    )
    logprobs = body.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert "".join(logprobs.tokens).startswith("The capital of France is Paris")
    assert logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in logprobs.token_logprobs[1:])


def test_prompts_of_every_kind(client: openai.OpenAI) -> None:
    for prompt, choices in (("Hi", 1), (["Hi", "Ho"], 2), ([504, 3575], 1), ([[504], [3575, 282]], 2)):
        body = client.completions.create(model="smollm2", prompt=prompt, max_tokens=1)
        assert [choice.index for choice in body.choices] == list(range(choices))
    body = client.completions.create(model="smollm2", prompt=["Hi", "Ho"], n=2, max_tokens=2, seed=5)
    assert [choice.index for choice in body.choices] == [0, 1, 2, 3]


def test_a_chat_and_its_stream(client: openai.OpenAI) -> None:
    body = client.chat.completions.create(model="smollm2", messages=CHAT, temperature=0)
    assert (body.choices[0].message.content, body.choices[0].finish_reason) == (PARIS, "stop")
    said = [chunk.choices[0].delta for chunk in client.chat.completions.create(
        model="smollm2", messages=CHAT, temperature=0, stream=True)]  # fmt: skip
    assert said[0].role == "assistant"
    assert "".join(delta.content or "" for delta in said) == PARIS
    with client.chat.completions.stream(model="smollm2", messages=CHAT, temperature=0) as stream:
        assert stream.get_final_completion().choices[0].message.content == PARIS


def test_every_option_of_a_chat(client: openai.OpenAI) -> None:
    body = client.chat.completions.create(
        model="smollm2", messages=CHAT, max_completion_tokens=8, n=2, seed=1, temperature=0.7, top_p=0.9,
        presence_penalty=0.1, frequency_penalty=0.1, logit_bias={"30": -5}, stop=["Rome"], logprobs=True,
        top_logprobs=3, user="me", extra_body={"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.05},
    )  # fmt: skip
    assert len(body.choices) == 2
    entries = body.choices[0].logprobs
    assert entries is not None
    assert entries.content is not None
    assert all(len(entry.top_logprobs) == 3 for entry in entries.content)


def test_many_at_once(server) -> None:
    async def ask(client: openai.AsyncOpenAI, n: int) -> tuple[str, str]:
        prompt = f"Count from {n}: {n},"
        body = await client.completions.create(model="smollm2", prompt=prompt, max_tokens=6, temperature=0)
        stream = await client.completions.create(
            model="smollm2", prompt=prompt, max_tokens=6, temperature=0, stream=True
        )
        return body.choices[0].text, "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[tuple[str, str]]:
        async with openai.AsyncOpenAI(base_url=server.api, api_key="open-sesame") as client:
            return await asyncio.gather(*(ask(client, n) for n in range(8)))

    for whole, streamed in asyncio.run(all_of_them()):
        assert whole == streamed != ""


def test_errors_are_the_clients_own_classes(server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nobody", prompt="a")
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="smollm2", prompt="a", temperature=3)
    assert "temperature" in wrong.value.message
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="smollm2", messages=[])
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")
    stranger = client.with_options(api_key="wrong")
    for call in (stranger.models.list, lambda: stranger.completions.create(model="smollm2", prompt="a")):
        with pytest.raises(openai.AuthenticationError):
            call()
    with pytest.raises(openai.APIStatusError) as absent:  # 404 or 501: there are no embeddings here
        client.embeddings.create(model="smollm2", input="a")
    assert absent.value.status_code in (404, 501)


def test_a_client_that_gives_up_leaves_nothing_behind(server, older: openai.OpenAI) -> None:
    import time

    import httpx

    stream = older.completions.create(
        model="smollm2", prompt="Once", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        metrics = httpx.get(server.url + "/metrics", headers={"Authorization": "Bearer open-sesame"}).text
        running = [line for line in metrics.splitlines() if line.startswith("vllm:num_requests_running{")]
        if running and running[0].endswith(" 0.0"):
            return
        time.sleep(0.1)
    pytest.fail("the abandoned stream still runs")


# ---------------------------------------------------------------- the newer API


def test_a_response_and_its_stream(client: openai.OpenAI) -> None:
    body = client.responses.create(model="smollm2", input="What is the capital of France?", temperature=0)
    assert body.output_text == PARIS
    assert body.status == "completed"
    events = list(client.responses.create(
        model="smollm2", input="What is the capital of France?", temperature=0, stream=True))  # fmt: skip
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == PARIS


# ---------------------------------------------------------------- tools and structure

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def test_a_tool_that_must_be_called(client: openai.OpenAI) -> None:
    import json

    chat: Any = [{"role": "user", "content": "How is the weather in Paris?"}]
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        body = client.chat.completions.create(
            model="smollm2", messages=chat, tools=[WEATHER], tool_choice=choice, temperature=0, max_tokens=64
        )
        calls = body.choices[0].message.tool_calls
        assert calls, body
        assert calls[0].type == "function"
        assert calls[0].function.name == "weather"
        assert set(json.loads(calls[0].function.arguments)) == {"city"}


def test_an_answer_of_a_given_shape(client: openai.OpenAI) -> None:
    from pydantic import BaseModel

    class Capital(BaseModel):
        city: str
        is_in_europe: bool

    body = client.chat.completions.parse(
        model="smollm2", messages=CHAT, response_format=Capital, temperature=0, max_tokens=64
    )
    assert isinstance(body.choices[0].message.parsed, Capital)
