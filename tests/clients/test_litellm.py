"""litellm, under its names for a vLLM server and for any server of OpenAI's API."""

from __future__ import annotations

import asyncio
from typing import Any

import litellm
import pytest

CHAT: Any = [{"role": "user", "content": "What is the capital of France?"}]
PARIS = "The capital of France is Paris."


@pytest.fixture(scope="module", params=["hosted_vllm/smollm2", "openai/smollm2"])
def where(request: pytest.FixtureRequest, server) -> dict[str, Any]:
    return {"model": request.param, "api_base": server.api, "api_key": "open-sesame", "num_retries": 0}


def test_a_chat_and_its_stream(where: dict[str, Any]) -> None:
    body = litellm.completion(messages=CHAT, temperature=0, **where)
    assert body.choices[0].message.content == PARIS
    assert body.usage.completion_tokens == 8
    stream = litellm.completion(messages=CHAT, temperature=0, stream=True, **where)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == PARIS


def test_asynchronously(where: dict[str, Any]) -> None:
    async def ask() -> list[str]:
        bodies = await asyncio.gather(*(litellm.acompletion(messages=CHAT, temperature=0, **where) for _ in range(3)))
        return [body.choices[0].message.content for body in bodies]

    assert asyncio.run(ask()) == [PARIS] * 3


def test_a_completion(server) -> None:
    body = litellm.text_completion(
        model="text-completion-openai/smollm2",
        api_base=server.api,
        api_key="open-sesame",
        prompt="The capital of France is",
        max_tokens=2,
        temperature=0,
    )
    assert body.choices[0].text == " Paris."


def test_errors_are_its_own_classes(where: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(messages=CHAT, temperature=3, **where)
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(messages=CHAT, **{**where, "api_key": "wrong"})
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(messages=CHAT, **{**where, "model": where["model"].replace("smollm2", "nobody")})
