"""/v1/messages over HTTP: Anthropic's message and events as vLLM sends them, and what a chat would have said."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.api.messages_chat import chat_of
from serve.api.messages_events import Blocks
from serve.api.messages_protocol import MessagesRequest
from serve.errors import InvalidRequest

SAID = [{"role": "user", "content": "the quick brown fox"}]
GREEDY: dict[str, Any] = {"model": "tiny", "messages": SAID, "temperature": 0, "max_tokens": 24}


def say(server, **fields: Any) -> dict[str, Any]:
    response = server.post("/v1/messages", json=fields)
    assert response.status_code == 200, response.text
    return response.json()


def events(server, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream, each under the name that is its type."""
    response = server.post("/v1/messages", json={"stream": True, **fields})
    assert response.status_code == 200, response.text
    *blocks, rest = response.text.split("\n\n")
    assert rest == ""
    made = []
    for block in blocks:
        name, data = block.split("\n")
        made.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {made[-1]['type']}"
    return made


def put_together(made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The content that a client has after these events; fails where they are not in an order that it can read."""
    content: list[dict[str, Any]] = []
    opened: dict[str, Any] | None = None
    arguments = ""
    for event in made:
        kind = event["type"]
        if not kind.startswith("content_block"):
            continue
        assert event["index"] == len(content)
        if kind == "content_block_start":
            assert opened is None
            opened, arguments = dict(event["content_block"]), ""
        elif kind == "content_block_stop":
            assert opened is not None
            if opened["type"] == "tool_use":
                opened["input"] = json.loads(arguments or "{}")
            content.append(opened)
            opened = None
        else:
            assert opened is not None
            delta = event["delta"]
            if delta["type"] == "input_json_delta":
                arguments += delta["partial_json"]
            elif delta["type"] == "signature_delta":
                opened["signature"] = delta["signature"]
            else:
                (field,) = delta.keys() - {"type"}
                opened[field] += delta[field]
    assert opened is None
    return content


# ---------------------------------------------------------------- shapes


def test_the_message_is_vllms(server) -> None:
    chat = server.chat(**GREEDY)
    body = say(server, **GREEDY)
    assert body == {
        "id": body["id"],
        "type": "message",
        "role": "assistant",
        "content": [{"type": "text", "text": chat["choices"][0]["message"]["content"]}],
        "model": "tiny",
        "stop_reason": "max_tokens",
        "usage": {"input_tokens": chat["usage"]["prompt_tokens"], "output_tokens": 24},
    }


def test_the_events_are_vllms(server) -> None:
    whole = say(server, **GREEDY)
    first, start, *deltas, stop, end, last = events(server, **GREEDY)
    usage = {"input_tokens": whole["usage"]["input_tokens"], "output_tokens": 0}
    empty = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
    assert first == {"type": "message_start", "message": {**whole, **empty, "id": first["message"]["id"]}}
    assert start == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    for event in deltas:
        delta = {"type": "text_delta", "text": event["delta"]["text"]}
        assert event == {"type": "content_block_delta", "index": 0, "delta": delta}
    assert "".join(event["delta"]["text"] for event in deltas) == whole["content"][0]["text"]
    assert stop == {"type": "content_block_stop", "index": 0}
    ended = {"stop_reason": "max_tokens", "stop_sequence": None}
    assert end == {"type": "message_delta", "delta": ended, "usage": whole["usage"]}
    assert last == {"type": "message_stop"}


def test_why_it_ended(server) -> None:
    text = say(server, **GREEDY)["content"][0]["text"]
    stop = next(letter for letter in text if letter.isalpha())
    body = say(server, **GREEDY, stop_sequences=[stop])
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", stop)
    assert body["content"] == [{"type": "text", "text": text[: text.index(stop)]}]
    end = events(server, **GREEDY, stop_sequences=[stop])[-2]["delta"]
    assert end == {"stop_reason": "stop_sequence", "stop_sequence": stop}


ASKED = st.fixed_dictionaries(
    {
        "messages": st.sampled_from([SAID, [{"role": "user", "content": [{"type": "text", "text": "más"}]}]]),
        "max_tokens": st.integers(1, 24),
        "temperature": st.just(0),
    },
    optional={
        "system": st.sampled_from(["Be brief.", [{"type": "text", "text": "Be"}, {"type": "text", "text": " brief."}]]),
        "stop_sequences": st.lists(st.sampled_from(["e", "fox", " "]), max_size=3),
        "top_p": st.just(0.5),
        "top_k": st.just(3),
        "metadata": st.just({"user_id": "u"}),
    },
)


@settings(max_examples=20)
@given(asked=ASKED)
def test_a_stream_says_what_the_body_says(server, asked: dict[str, Any]) -> None:
    whole, made = say(server, model="tiny", **asked), events(server, model="tiny", **asked)
    content = put_together(made) or [{"type": "text", "text": ""}]  # as in vLLM, an empty block is in the body alone
    assert content == whole["content"]
    assert made[-2]["usage"] == whole["usage"]
    assert made[-2]["delta"]["stop_reason"] == whole["stop_reason"]
    assert made[-2]["delta"]["stop_sequence"] == whole.get("stop_sequence")


# ---------------------------------------------------------------- blocks of every kind

PIECES = st.lists(
    st.tuples(st.sampled_from(["reasoning", "content", "first call", "second call"]), st.text(max_size=3)), max_size=12
)


def _delta(kind: str, text: str) -> dict[str, Any]:
    if not kind.endswith("call"):
        return {kind: text}
    index = 0 if kind == "first call" else 1
    arguments = json.dumps({"a": text}) if text else ""
    return {"tool_calls": [{"index": index, "id": kind, "function": {"name": f"f{index}", "arguments": arguments}}]}


@given(pieces=PIECES)
def test_blocks_can_be_put_together_from_their_events(pieces: list[tuple[str, str]]) -> None:
    """Whatever comes in whatever order: text is never lost, and no block is gone on with after its stop."""
    blocks, seen = Blocks(), set()
    kept = []
    for kind, text in pieces:
        if kind.endswith("call"):
            if kind in seen:
                continue  # a call comes in one piece here
            seen.add(kind)
        kept.append((kind, text))
    made = [event for kind, text in kept for event in blocks.feed(_delta(kind, text))] + list(blocks.close())
    assert put_together(made) == blocks.done
    said = "".join(block["text"] for block in blocks.done if block["type"] == "text")
    assert said == "".join(text for kind, text in kept if kind == "content")
    thought = "".join(block["thinking"] for block in blocks.done if block["type"] == "thinking")
    assert thought == "".join(text for kind, text in kept if kind == "reasoning")
    calls = [block for block in blocks.done if block["type"] == "tool_use"]
    assert [call["id"] for call in calls] == [kind for kind, _ in kept if kind.endswith("call")]
    assert blocks.called == bool(calls)


def test_a_call_and_what_becomes_of_one_that_was_cut_short() -> None:
    for arguments, input, complete in (
        ('{"city": "Paris"}', {"city": "Paris"}, True),
        ("", {}, True),
        ('{"city": "Pa', {"invalid_arguments": '{"city": "Pa'}, False),
        ("[1]", {"invalid_arguments": "[1]"}, False),
    ):
        blocks = Blocks()
        call = {"index": 0, "id": "c1", "function": {"name": "weather", "arguments": arguments[:5]}}
        made = list(blocks.feed({"tool_calls": [call]}))
        rest = {"index": 0, "function": {"arguments": arguments[5:]}}
        made += list(blocks.feed({"tool_calls": [rest]})) + list(blocks.close())
        assert blocks.done == [{"type": "tool_use", "id": "c1", "name": "weather", "input": input}]
        assert made[0]["content_block"] == {"type": "tool_use", "id": "c1", "name": "weather", "input": {}}
        assert blocks.complete is complete


# ---------------------------------------------------------------- as a chat


class Template:
    """In a renderer's place: takes system messages anywhere, or (first) at the beginning alone."""

    def __init__(self, first: bool) -> None:
        self.first = first

    async def render(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        if self.first and any(message["role"] == "system" for message in messages[1:]):
            raise InvalidRequest("System message must be at the beginning.", "messages")
        return ""


async def _chat(first: bool = False, **fields: Any) -> Any:
    model: Any = SimpleNamespace(renderer=Template(first))
    return await chat_of(MessagesRequest(**{"model": "tiny", "max_tokens": 5, "messages": SAID, **fields}), model)


def messages_of(chat: Any) -> list[dict[str, Any]]:
    return [message.model_dump(exclude_unset=True) for message in chat.messages]


USE = {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}}
CALLED = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CONVERSATIONS: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]] = [
    (
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    ),
    (
        [
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "text", "text": "a"},
                    USE,
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c1", "content": "42"},
                    {"type": "text", "text": "so?"},
                ],
            },
        ],
        [
            {"role": "assistant", "reasoning": "hm", "content": "a", "tool_calls": [CALLED]},
            {"role": "tool", "tool_call_id": "c1", "content": "42"},
            {"role": "user", "content": "so?"},
        ],
    ),
    (
        [
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "4"}] * 2},
                    {"type": "tool_result", "tool_use_id": "c2"},
                ],
            }
        ],
        [
            {"role": "tool", "tool_call_id": "c1", "content": "4\n4"},
            {"role": "tool", "tool_call_id": "c2", "content": ""},
        ],
    ),
]


@pytest.mark.parametrize(("turns", "messages"), CONVERSATIONS)
def test_turns_become_messages(turns: list[dict[str, Any]], messages: list[dict[str, Any]]) -> None:
    assert messages_of(run(_chat(messages=turns))) == messages


def run(coroutine: Any) -> Any:
    """The result of a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits")


def test_where_the_system_prompt_stands() -> None:
    billing = {"type": "text", "text": "x-anthropic-billing-header: 1"}
    system = [billing, {"type": "text", "text": "Be"}, {"type": "text", "text": " brief."}]
    turns = [*SAID, {"role": "system", "content": "And kind."}]
    brief = {"role": "system", "content": "Be brief."}
    assert messages_of(run(_chat(system=system))) == [brief, *SAID]
    assert messages_of(run(_chat(system=[billing]))) == SAID
    assert messages_of(run(_chat(system=system, messages=turns))) == [brief, *turns]
    merged = {"role": "system", "content": "Be brief.And kind."}
    assert messages_of(run(_chat(first=True, system=system, messages=turns))) == [merged, *SAID]


def test_settings_reach_the_chat() -> None:
    schema = {"properties": {}}
    chat = run(
        _chat(
            stop_sequences=["x"],
            top_k=4,
            tools=[{"name": "f", "input_schema": schema}],
            tool_choice={"type": "any", "disable_parallel_tool_use": True},
            output_config={"effort": "low", "format": {"type": "json_schema", "schema": schema}},
        )
    )
    function = {"name": "f", "description": None, "parameters": {"type": "object", **schema}, "strict": None}
    assert [tool.model_dump(exclude_unset=True) for tool in chat.tools or []] == [
        {"type": "function", "function": function}
    ]
    assert (chat.tool_choice, chat.stop, chat.top_k, chat.max_tokens) == ("required", ["x"], 4, 5)
    assert (chat.reasoning_effort, chat.stream, chat.stream_options) == ("low", False, None)
    asked = {"name": "json_schema", "schema": schema}
    assert chat.response_format is not None
    given = chat.response_format.model_dump(by_alias=True, exclude_unset=True)
    assert given == {"type": "json_schema", "json_schema": asked}
    assert run(_chat(thinking={"type": "disabled"})).reasoning_effort == "none"
    assert (
        run(_chat(thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=2000)).thinking_token_budget == 1024
    )
    tools = {"tools": [{"name": "f", "input_schema": {}}]}
    named = {"type": "function", "function": {"name": "f"}}
    for choice, wanted in ((None, "auto"), ({"type": "none"}, "none"), ({"type": "tool", "name": "f"}, named)):
        assert run(_chat(**tools, tool_choice=choice)).tool_choice == wanted


def test_the_server_counts_what_it_would_read(server) -> None:
    fields = {"model": "tiny", "messages": SAID, "system": "Be brief."}
    used = say(server, **fields, max_tokens=1)["usage"]["input_tokens"]
    response = server.post("/v1/messages/count_tokens", json=fields)
    assert response.json() == {"input_tokens": used, "context_management": {"original_input_tokens": used}}


# ---------------------------------------------------------------- refusals


def refusal(response: httpx.Response, status: int = 400, kind: str = "BadRequestError") -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert body == {"type": "error", "error": {"type": kind, "message": body["error"]["message"]}}
    return body["error"]["message"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 2.5}, "temperature must be in [0, 2]"),
    ({"top_p": 0}, "top_p must be in (0, 1]"),
    ({"top_k": -2}, "top_k must be 0"),
    ({"max_tokens": 999}, "max_tokens=999 cannot be greater than max_model_len=256."),
    ({"stop_sequences": [""]}, "stop cannot contain an empty string."),
    ({"messages": []}, "messages is empty"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "messages[0].content has a block of type 'image'",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": [{"type": "image"}]}]}]},
        "messages[0].content has a tool_result with a part of type 'image'",
    ),
    ({"messages": [{"role": "user", "content": "fox " * 400}]}, "This model's maximum context length is 256 tokens."),
    ({"chat_template_kwargs": {"chat_template": "x"}}, "Chat template is passed with request"),
    ({"cache_salt": "a/b"}, "cache_salt must have"),
]


@pytest.mark.parametrize(("fields", "sentence"), REFUSED)
def test_what_cannot_be_asked(server, fields: dict[str, Any], sentence: str) -> None:
    for stream in (False, True):
        assert refusal(server.post("/v1/messages", json={**GREEDY, **fields, "stream": stream})).startswith(sentence)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"model": ""}, "model"),
        ({"messages": "x"}, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages"),
        ({"stop_sequences": ["a"] * 5}, "stop_sequences"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"thinking": {"type": "enabled"}}, "thinking"),
        ({"thinking": {"type": "enabled", "budget_tokens": 10}}, "thinking"),
        ({"tools": [{"name": "f"}]}, "tools"),
    ],
)
def test_what_has_the_wrong_type(server, fields: dict[str, Any], param: str) -> None:
    """These come in OpenAI's form here, too, as vLLM sends them."""
    response = server.post("/v1/messages", json={**GREEDY, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("Bad Request", 400)
    assert error["param"].split(".")[:2] == ["body", param]


def test_thinking_leaves_room_for_an_answer(server) -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    response = server.post("/v1/messages", json={**GREEDY, "thinking": thinking, "max_tokens": 1024})
    assert "thinking.budget_tokens must be less than max_tokens" in response.json()["error"]["message"]


def test_an_unknown_model(server) -> None:
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        message = refusal(server.post(path, json={**GREEDY, "model": "nobody"}), 404, "NotFoundError")
        assert message.startswith("The model `nobody` does not exist.")
    assert server.post("/v1/messages", content=b"{}").status_code == 400


def test_whoever_leaves_is_aborted(server) -> None:
    asked = {**GREEDY, "messages": SAID, "max_tokens": 200, "stream": True, "temperature": 1}
    with httpx.stream("POST", server.url + "/v1/messages", json=asked) as response:
        next(response.iter_text())
    deadline = time.monotonic() + 10
    while server.metric("num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.metric("num_requests_running") == 0
