"""LangChain's OpenAI classes, pointed at the server."""

from __future__ import annotations

from typing import Annotated

import pytest
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

PARIS = "The capital of France is Paris."
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def chat(server) -> ChatOpenAI:
    return ChatOpenAI(model="smollm2", base_url=server.api, api_key="open-sesame", temperature=0, max_retries=0)


def test_invoke_stream_and_batch(chat: ChatOpenAI) -> None:
    answer = chat.invoke(QUESTION)
    assert answer.content == PARIS
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 8
    assert "".join(str(chunk.content) for chunk in chat.stream(QUESTION)) == PARIS
    assert [one.content for one in chat.batch([QUESTION] * 3)] == [PARIS] * 3


def test_a_plain_completion(server) -> None:
    model = OpenAI(model="smollm2", base_url=server.api, api_key="open-sesame", temperature=0, max_tokens=2)
    assert model.invoke("The capital of France is") == " Paris."


def test_an_answer_of_a_given_shape(chat: ChatOpenAI) -> None:
    class Capital(BaseModel):
        """A capital."""

        city: str = Field(max_length=20)

    for method in ("json_schema", "function_calling"):
        answer = chat.bind(max_tokens=64).bound.with_structured_output(Capital, method=method).invoke(QUESTION)
        assert isinstance(answer, Capital)


def test_a_tool_that_must_be_called(chat: ChatOpenAI) -> None:
    @tool
    def weather(city: Annotated[str, Field(max_length=20)]) -> str:
        """The weather of a city."""
        return f"It rains in {city}."

    # strict: with no property but its own; a model so small goes on to others until it is cut short.
    asked = chat.bind_tools([weather], tool_choice="weather", strict=True)
    answer = asked.invoke("How is the weather in Paris?", max_tokens=64)
    (call,) = answer.tool_calls
    assert call["name"] == "weather"
    assert set(call["args"]) == {"city"}
