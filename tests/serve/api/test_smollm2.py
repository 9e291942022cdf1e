"""A chat model that nobody here trained, straight from its GGUF file: SmolLM2-135M-Instruct, Q4_1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest


@pytest.fixture(scope="module")
def served(smollm2: Path, tmp_path_factory: pytest.TempPathFactory, launching) -> Iterator[Any]:
    flags = ["--dtype", "float32", "--kv-cache-memory-bytes", "256M"]
    running = launching(smollm2, tmp_path_factory.mktemp("smollm2") / "log", *flags)
    yield running
    running.end()


def test_the_capital_of_france_is_paris(served) -> None:
    client = openai.OpenAI(base_url=served.url + "/v1", api_key="none", _strict_response_validation=True)
    (model,) = client.models.list().data
    assert model.id.endswith(".gguf")  # named as it was given
    chat: Any = [{"role": "user", "content": "What is the capital of France?"}]
    answer = client.chat.completions.create(model=model.id, messages=chat, temperature=0)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert (
        answer.choices[0].finish_reason == "stop"
    )  # at the template's end of a turn, with the context as the only limit
    stream = client.chat.completions.create(model=model.id, messages=chat, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answer.choices[0].message.content


def test_the_recorded_greedy_ids(served) -> None:
    fields = {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 7, "return_token_ids": True}
    (choice,) = served.complete(**fields)["choices"]
    assert choice["prompt_token_ids"] == [504, 3575, 282, 4649, 314]
    assert choice["token_ids"] == [7042, 30, 198, 198, 504, 2988, 314]
