"""Calls of tools, thoughts and forms of answers in the words of /v1/responses and /v1/messages: bodies and streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from lm import DecoderConfig, DecoderLM, pretrained
from lm.tokenizer import Tokenizer, train_bpe

EVENTS = TypeAdapter(ResponseStreamEvent)
TEMPLATE = """{% if tools %}{{ tools | tojson }}{{ eos_token }}{% endif %}
{%- for message in messages %}{{ message.role[0] }}: {{ message.reasoning or '' }}{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments.where }}]{% endfor %}
{{- message.tool_call_id or '' }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}a: {% endif %}
{%- if opens %}<think>{% endif %}"""
PLACES = {"type": "object", "properties": {"where": {"enum": ["fox", "dog"]}}, "required": ["where"]}
PLACES |= {"additionalProperties": False, "x-guidance": {"whitespace_flexible": False}}  # or a random model indents
SAID = "the quick"
SEEDS = (1, 2, 3)
AT_ONCE = {"chat_template_kwargs": {"enable_thinking": False}}  # without thoughts


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    trained = train_bpe(["the quick brown fox jumps over the lazy dog, and then it sleeps. " * 4], 320)
    trained.inner.add_tokens(["<think>", "</think>"])
    return trained


@pytest.fixture(scope="module")
def thinking(words: Tokenizer, tmp_path_factory: pytest.TempPathFactory, launching) -> Iterator[Any]:
    """A server of a model that thinks between marks and calls tools."""
    torch.manual_seed(1)
    config = DecoderConfig(vocab_size=words.inner.get_vocab_size(), context=1024, layers=1, width=32, heads=2)
    path = tmp_path_factory.mktemp("thinking") / "tiny"
    pretrained.save(DecoderLM(config).eval(), path, tokenizer=words)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    flags = ["--served-model-name", "tiny", "--reasoning-parser", "qwen3", "--enable-auto-tool-choice"]
    flags += ["--tool-call-parser", "hermes", "--kv-cache-memory-bytes", "16M"]
    running = launching(path, path.parent / "log", *flags)
    yield running
    running.end()


def ask(server: Any, path: str, **fields: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The body, and the events of the same as a stream."""
    whole, streamed = (server.post(path, json={**fields, "stream": stream}) for stream in (False, True))
    assert whole.status_code == streamed.status_code == 200, whole.text + streamed.text
    return whole.json(), [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: ")]


@pytest.mark.parametrize("bias", [-100, 4, 100])
def test_the_tokens_of_thoughts_are_counted(thinking: Any, words: Tokenizer, bias: int) -> None:
    end = words.inner.token_to_id("</think>")
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": SAID}], "max_tokens": 40, "return_token_ids": True}
    chat |= {"logit_bias": {str(end): bias}, "seed": 3, "ignore_eos": True}
    whole = thinking.post("/v1/chat/completions", json=chat).json()
    ids = whole["choices"][0]["token_ids"]
    thought = ids.index(end) if end in ids else len(ids)
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": thought}
    assert thought == {-100: 40, 100: 0}.get(bias, thought)
    chat |= {"stream": True, "stream_options": {"include_usage": True}}
    lines = thinking.post("/v1/chat/completions", json=chat).text.splitlines()
    *_, last = (json.loads(line[6:]) for line in lines if line.startswith("data: {"))
    assert last["usage"] == {key: value for key, value in whole["usage"].items() if key in last["usage"]}
    assert last["usage"]["completion_tokens_details"] == {"reasoning_tokens": thought}
    off = thinking.post("/v1/chat/completions", json=chat | AT_ONCE | {"stream": False, "stream_options": None}).json()
    assert off["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


# ---------------------------------------------------------------- responses


def respond(server: Any, **fields: Any) -> list[dict[str, Any]]:
    """The output items, the same in a stream, of which each event is one of OpenAI's."""
    asked = {"input": SAID, "max_output_tokens": 200, **fields}
    whole, events = ask(server, "/v1/responses", **asked)
    Response.model_validate(whole)
    for event in events:
        EVENTS.validate_python(event, strict=True)
    last = events[-1]["response"]
    assert [plain(item) for item in last["output"]] == [plain(item) for item in whole["output"]]
    for name in ("status", "incomplete_details", "tools", "tool_choice", "text"):
        assert last[name] == whole[name]
    usage = {name: value for name, value in whole["usage"].items() if not name.endswith("details")}
    assert {name: last["usage"][name] for name in usage} == usage
    return whole["output"]


def plain(item: dict[str, Any]) -> dict[str, Any]:
    """Without what is new each time, and the status of thoughts, which streams alone say."""
    new = {"id", "call_id"} | ({"status"} if item["type"] == "reasoning" else set())
    return {name: value for name, value in item.items() if name not in new}


LOOK = {"type": "function", "name": "look", "description": "Looks.", "parameters": PLACES}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "look"}])
def test_a_function_is_called_and_its_result_is_read(thinking, choice: Any) -> None:
    fields = {"tools": [LOOK], "tool_choice": choice, "parallel_tool_calls": False, "seed": 1, **AT_ONCE}
    output = respond(thinking, **fields)
    call = output[-1]
    assert (call["type"], call["name"], call["status"]) == ("function_call", "look", "completed")
    assert json.loads(call["arguments"])["where"] in ("fox", "dog")
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "there"}
    turns = [{"role": "user", "content": SAID}, *output, result]
    counted = respond(thinking, input=turns, tools=[LOOK], tool_choice="none", max_output_tokens=4, seed=1)
    assert [item["type"] for item in counted][-1] in ("message", "reasoning")


def test_an_answer_in_the_form_that_was_asked(thinking) -> None:
    format = {"type": "json_schema", "name": "places", "schema": PLACES, "strict": True}
    for seed in SEEDS:
        items = respond(thinking, text={"format": format}, seed=seed, include_reasoning=False)
        (message,) = items
        assert json.loads(message["content"][0]["text"])["where"] in ("fox", "dog")


@pytest.mark.parametrize("bias", [0, 5, 100])
def test_thoughts_are_items_of_their_own(thinking, words: Tokenizer, bias: int) -> None:
    """However likely the mark is that ends them."""
    end = words.inner.token_to_id("</think>")
    fields = {"chat_template_kwargs": {"opens": True}, "max_output_tokens": 24, "logit_bias": {str(end): bias}}
    kinds = set()
    for seed in SEEDS:
        items = respond(thinking, **fields, seed=seed)
        assert [item["type"] for item in items] in (["reasoning"], ["message"], ["reasoning", "message"], [])
        kinds |= {item["type"] for item in items}
        hidden = respond(thinking, **fields, seed=seed, include_reasoning=False)
        assert [plain(item) for item in hidden] == [plain(item) for item in items if item["type"] == "message"]
    if bias == 0:
        assert "reasoning" in kinds


# ---------------------------------------------------------------- messages


def say(server: Any, **fields: Any) -> dict[str, Any]:
    """The message, the same in a stream."""
    asked = {"model": "tiny", "messages": [{"role": "user", "content": SAID}], "max_tokens": 200, "temperature": 0}
    asked |= fields
    whole, events = ask(server, "/v1/messages", **asked)
    content: list[dict[str, Any]] = []
    arguments = ""
    for event in events:
        if event["type"] == "content_block_start":
            content.append(event["content_block"])
            arguments = ""
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            arguments += delta.get("partial_json", "")
            for field in ("text", "thinking"):
                if field in delta:
                    content[-1][field] += delta[field]
        elif event["type"] == "content_block_stop" and content[-1]["type"] == "tool_use":
            content[-1]["input"] = json.loads(arguments or "{}")
    shown = [block for block in whole["content"] if block.get("text") != ""]
    assert [bare(block) for block in content] == [bare(block) for block in shown]
    (end,) = [event for event in events if event["type"] == "message_delta"]
    assert (end["delta"]["stop_reason"], end["usage"]) == (whole["stop_reason"], whole["usage"])
    return whole


def bare(block: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in block.items() if name not in ("id", "signature")}


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "look"}])
def test_a_tool_is_used_and_its_result_is_read(thinking, choice: Any) -> None:
    tools = [{"name": "look", "description": "Looks.", "input_schema": PLACES}]
    made = say(thinking, tools=tools, tool_choice={**choice, "disable_parallel_tool_use": True}, **AT_ONCE)
    use = made["content"][-1]
    assert (use["type"], use["name"], made["stop_reason"]) == ("tool_use", "look", "tool_use")
    assert use["input"]["where"] in ("fox", "dog")
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": "there"}
    turns = [
        {"role": "user", "content": SAID},
        {"role": "assistant", "content": made["content"]},
        {"role": "user", "content": [result]},
    ]
    assert say(thinking, messages=turns, tools=tools, tool_choice={"type": "none"}, max_tokens=4)["content"]


def test_a_call_that_is_cut_short_is_not_made(thinking) -> None:
    tools = [{"name": "look", "input_schema": PLACES}]
    for limit in (1, 12, 20, 24):
        made = say_cut(thinking, tools=tools, tool_choice={"type": "any"}, max_tokens=limit, **AT_ONCE)
        assert made["stop_reason"] == "max_tokens"


def say_cut(server: Any, **fields: Any) -> dict[str, Any]:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": SAID}], **fields}
    response = server.post("/v1/messages", json=asked)
    assert response.status_code == 200, response.text
    return response.json()


def test_what_was_thought_is_a_block(thinking) -> None:
    made = say(thinking, chat_template_kwargs={"opens": True}, max_tokens=16, temperature=0)
    assert made["content"][0]["type"] == "thinking"
    assert made["content"][0]["thinking"]


def test_a_message_in_the_form_that_was_asked(thinking) -> None:
    format = {"type": "json_schema", "schema": PLACES}
    made = say(thinking, output_config={"format": format}, thinking={"type": "disabled"})
    assert json.loads(made["content"][-1]["text"])["where"] in ("fox", "dog")


def test_a_tool_that_there_is_none_of(thinking) -> None:
    for choice in ({"type": "any"}, {"type": "tool", "name": "look"}):
        response = thinking.post(
            "/v1/messages",
            json={
                "model": "tiny",
                "messages": [{"role": "user", "content": SAID}],
                "max_tokens": 4,
                "tool_choice": choice,
            },
        )
        assert response.status_code == 400
        assert "`tools` must be set" in response.json()["error"]["message"]
