"""Anthropic's client, over /v1/messages."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest

CHAT: Any = [{"role": "user", "content": "What is the capital of France?"}]
PARIS = "The capital of France is Paris."


@pytest.fixture(scope="module")
def client(server) -> anthropic.Anthropic:
    return anthropic.Anthropic(
        base_url=server.url, api_key="open-sesame", _strict_response_validation=True, max_retries=0
    )


def test_a_message_and_its_stream(client: anthropic.Anthropic) -> None:
    body = client.messages.create(model="smollm2", messages=CHAT, max_tokens=32, extra_body={"temperature": 0})
    assert body.content[0].type == "text"
    assert body.content[0].text == PARIS
    assert (body.stop_reason, body.usage.output_tokens) == ("end_turn", 8)
    with client.messages.stream(model="smollm2", messages=CHAT, max_tokens=32, extra_body={"temperature": 0}) as stream:
        assert "".join(stream.text_stream) == PARIS
        assert stream.get_final_message().usage.output_tokens == 8


def test_a_system_prompt_and_blocks(client: anthropic.Anthropic) -> None:
    blocks: Any = [{"role": "user", "content": [{"type": "text", "text": "Say hello."}]}]
    body = client.messages.create(
        model="smollm2", system="You are terse.", messages=blocks, max_tokens=4, stop_sequences=["zzz"]
    )
    assert body.stop_reason == "max_tokens"


def test_counting_tokens(client: anthropic.Anthropic, server) -> None:
    counted = client.messages.count_tokens(model="smollm2", messages=CHAT)
    assert counted.input_tokens == server.post("/tokenize", messages=CHAT)["count"]


def test_errors_are_its_own_classes(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="nobody", messages=CHAT, max_tokens=4)
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model="smollm2", messages=CHAT, max_tokens=4, extra_body={"temperature": 3})
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.create(model="smollm2", messages=CHAT, max_tokens=4)
