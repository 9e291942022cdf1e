"""/v1/responses over HTTP: the object and the events as the real client reads them, and what a chat would have said."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from serve.api.responses_chat import chat_of
from serve.api.responses_events import OutputItems
from serve.api.responses_protocol import ResponsesRequest

SAID = "the quick brown fox"
GREEDY: dict[str, Any] = {"model": "tiny", "input": SAID, "temperature": 0, "max_output_tokens": 24}
LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
EVENTS = TypeAdapter(ResponseStreamEvent)
ANEW = ("id", "created_at", "cached_tokens", "cache_write_tokens")  # in each answer


def respond(server, **fields: Any) -> dict[str, Any]:
    response = server.post("/v1/responses", json=fields)
    assert response.status_code == 200, response.text
    return response.json()


def events(server, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream, each under the name that is its type, and numbered."""
    response = server.post("/v1/responses", json={"stream": True, **fields})
    assert response.status_code == 200, response.text
    *blocks, rest = response.text.split("\n\n")
    assert rest == ""
    made = []
    for block in blocks:
        name, data = block.split("\n")
        made.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {made[-1]['type']}"
    assert [event["sequence_number"] for event in made] == list(range(len(made)))
    return made


def same(value: Any) -> Any:
    """Without what is new each time."""
    if isinstance(value, dict):
        return {name: same(one) for name, one in value.items() if name not in ANEW}
    return [same(one) for one in value] if isinstance(value, list) else value


@pytest.fixture
def client(server) -> openai.OpenAI:
    """Which refuses an answer that is not what OpenAI's types say."""
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, _strict_response_validation=True)


# ---------------------------------------------------------------- the object


def test_the_object_has_every_field_of_vllms(server) -> None:
    chat = server.chat(messages=[{"role": "user", "content": SAID}], temperature=0, max_tokens=24)
    body = respond(server, **GREEDY, metadata={"a": "b"}, user="somebody", instructions=None)
    (message,) = body["output"]
    assert body["id"].startswith("resp_")
    assert message["id"].startswith("msg_")
    usage = chat["usage"]
    assert body == {
        "id": body["id"],
        "created_at": body["created_at"],
        "incomplete_details": {"reason": "max_output_tokens"},
        "instructions": None,
        "metadata": {"a": "b"},
        "model": "tiny",
        "object": "response",
        "output": [
            {
                "id": message["id"],
                "content": [
                    {
                        "annotations": [],
                        "text": chat["choices"][0]["message"]["content"],
                        "type": "output_text",
                        "logprobs": None,
                    }
                ],
                "role": "assistant",
                "status": "completed",
                "type": "message",
                "phase": None,
            }
        ],
        "parallel_tool_calls": True,
        "temperature": 0.0,
        "tool_choice": "none",
        "tools": [],
        "top_p": 1.0,
        "background": False,
        "max_output_tokens": 24,
        "max_tool_calls": None,
        "previous_response_id": None,
        "prompt": None,
        "reasoning": None,
        "service_tier": "auto",
        "status": "incomplete",
        "text": None,
        "top_logprobs": None,
        "truncation": "disabled",
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {
                "cached_tokens": body["usage"]["input_tokens_details"]["cached_tokens"],
                "cache_write_tokens": body["usage"]["input_tokens_details"]["cache_write_tokens"],
                "input_tokens_per_turn": [],
                "cached_tokens_per_turn": [],
            },
            "output_tokens": 24,
            "output_tokens_details": {
                "reasoning_tokens": 0,
                "tool_output_tokens": 0,
                "output_tokens_per_turn": [],
                "tool_output_tokens_per_turn": [],
            },
            "total_tokens": usage["prompt_tokens"] + 24,
        },
        "user": "somebody",
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "input_messages": None,
        "output_messages": None,
    }


def test_the_settings_are_shown_as_they_were_used(server) -> None:
    body = respond(
        server,
        input=SAID,
        request_id="resp_mine",
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=3,
        text={"format": {"type": "text"}, "verbosity": "low"},
        reasoning={"effort": "low", "summary": "auto"},
        truncation="auto",
        **LOGPROBS,
    )
    assert (body["id"], body["model"]) == ("resp_mine", "tiny")
    assert (body["temperature"], body["top_p"], body["top_logprobs"]) == (0.5, 0.9, 2)
    assert (body["presence_penalty"], body["frequency_penalty"]) == (0.5, -0.5)
    assert body["text"] == {"format": {"type": "text"}, "verbosity": "low"}
    nothing = {"context": None, "generate_summary": None, "mode": None}
    assert body["reasoning"] == {"effort": "low", "summary": "auto", **nothing}
    # Without a limit, what the context leaves.
    assert body["max_output_tokens"] == 256 - body["usage"]["input_tokens"]


def test_log_probabilities_are_the_chats(server) -> None:
    asked = {"temperature": 0, "max_tokens": 8, "logprobs": True, "top_logprobs": 2}
    chat = server.chat(messages=[{"role": "user", "content": SAID}], **asked)
    body = respond(server, **{**GREEDY, "max_output_tokens": 8}, **LOGPROBS)
    assert body["output"][0]["content"][0]["logprobs"] == chat["choices"][0]["logprobs"]["content"]
    assert respond(server, **GREEDY, top_logprobs=2)["output"][0]["content"][0]["logprobs"] is None


def test_what_went_in_and_came_out(server, tokenizer) -> None:
    for body in (
        respond(server, **GREEDY, enable_response_messages=True),
        events(server, **GREEDY, enable_response_messages=True)[-1]["response"],
    ):
        (prompt,), (said,) = body["input_messages"], body["output_messages"]
        assert prompt["type"] == said["type"] == "raw_message_tokens"
        assert prompt["tokens"] == tokenizer.encode(prompt["message"], add_special_tokens=False)
        assert SAID in prompt["message"]
        assert said["message"] == body["output"][0]["content"][0]["text"]
        assert len(said["tokens"]) == 24


def test_what_of_a_prompt_was_cached_and_is_now(server) -> None:
    asked = {**GREEDY, "input": "the lazy dog sleeps and jumps over the quick brown fox", "cache_salt": "anew"}
    first, again = (respond(server, **asked)["usage"] for _ in range(2))
    blocks = first["input_tokens"] // 16 * 16
    assert blocks >= 16
    for usage, cached in ((first, 0), (again, blocks)):
        details = usage["input_tokens_details"]
        assert (details["cached_tokens"], details["cache_write_tokens"]) == (cached, blocks - cached)


def test_an_answer_without_text(server, tokenizer) -> None:
    silent = {**GREEDY, "logit_bias": {str(tokenizer.eos_id): 100}}
    body = respond(server, **silent)
    assert [(item["type"], item["content"]) for item in body["output"]] == [("message", [])]
    assert (body["status"], body["incomplete_details"], body["usage"]["output_tokens"]) == ("completed", None, 1)
    assert [event["type"] for event in events(server, **silent)] == [
        "response.created",
        "response.in_progress",
        "response.completed",
    ]


# ---------------------------------------------------------------- the events


def test_the_events_in_their_order(server) -> None:
    made = events(server, **GREEDY, **LOGPROBS)
    for event in made:
        EVENTS.validate_python(event, strict=True)
    opening = ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    closing = [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    names = [event["type"] for event in made]
    assert names[:4] == opening
    assert names[-4:] == closing
    assert set(names[4:-4]) == {"response.output_text.delta"}
    first, last, deltas = made[0]["response"], made[-1]["response"], made[4:-4]
    assert first == made[1]["response"]
    assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
    changed = {name for name in first if first[name] != last[name]}
    assert changed == {"status", "output", "usage", "incomplete_details"}
    (item,) = last["output"]
    assert made[2] | {"item": {**item, "content": [], "status": "in_progress"}} == made[2]
    assert made[-2]["item"] == item
    assert {(event["item_id"], event["output_index"], event["content_index"]) for event in deltas} == {
        (item["id"], 0, 0)
    }
    (part,) = item["content"]
    assert "".join(event["delta"] for event in deltas) == made[-4]["text"] == part["text"]
    assert made[-3]["part"] == part
    shown = [entry for event in deltas for entry in event["logprobs"]]
    assert [(entry["token"], entry["logprob"]) for entry in shown] == [
        (entry["token"], entry["logprob"]) for entry in part["logprobs"][: len(shown)]
    ]
    assert set(shown[0]) == {"token", "logprob", "top_logprobs"}
    assert set(shown[0]["top_logprobs"][0]) == {"token", "logprob"}


ASKED = st.fixed_dictionaries(
    {"input": st.sampled_from([SAID, "más ñandú", [{"role": "user", "content": SAID}]])},
    optional={
        "max_output_tokens": st.integers(1, 24),
        "temperature": st.sampled_from([0, 0.7]),
        "include": st.just(["message.output_text.logprobs"]),
        "top_logprobs": st.integers(0, 3),
        "stop": st.sampled_from(["e", ["fox", " "]]),
        "ignore_eos": st.booleans(),
        "instructions": st.just("Be brief."),
    },
)


@settings(max_examples=25)
@given(asked=ASKED)
def test_a_stream_says_what_the_body_says(server, asked: dict[str, Any]) -> None:
    asked = {"max_output_tokens": 16, **asked, "seed": 5}
    whole, last = respond(server, **asked), events(server, **asked)[-1]["response"]
    if not last["output"]:  # as in vLLM: an empty message is shown by the body alone
        assert [item["content"] for item in whole["output"]] == [[]]
        whole["output"] = []
    assert same(whole) == same(last)


PIECES = st.lists(
    st.tuples(st.sampled_from(["reasoning", "content", "first call", "second call"]), st.text(max_size=3)), max_size=12
)


def _delta(kind: str, text: str) -> dict[str, Any]:
    if not kind.endswith("call"):
        return {kind: text}
    index = 0 if kind == "first call" else 1
    return {"tool_calls": [{"index": index, "id": kind, "function": {"name": f"f{index}", "arguments": text}}]}


@given(pieces=PIECES)
def test_items_do_not_depend_on_how_they_came(pieces: list[tuple[str, str]]) -> None:
    """Any cut of reasoning, then text, then calls gives the items of the uncut answer; what is open gets closed."""
    order = ["reasoning", "content", "first call", "second call"]
    pieces = sorted(pieces, key=lambda piece: order.index(piece[0]))
    cut, whole = OutputItems(), OutputItems()
    made = [event for kind, text in pieces for event in cut.feed(_delta(kind, text))] + list(cut.close())
    joined: dict[str, Any] = {"reasoning": "", "content": "", "tool_calls": []}
    for kind in order:
        texts = [text for one, text in pieces if one == kind]
        if kind in joined:
            joined[kind] = "".join(texts)
        elif texts:
            joined["tool_calls"] += _delta(kind, "".join(texts))["tool_calls"]
    list(whole.feed(joined))
    list(whole.close())
    assert same(cut.done) == same(whole.done)
    assert [event["output_index"] for event in made if event["type"].endswith("item.done")] == list(
        range(len(cut.done))
    )
    for number, event in enumerate(made):
        EVENTS.validate_python(event | {"sequence_number": number}, strict=True)


# ---------------------------------------------------------------- the client


def test_the_real_client(client: openai.OpenAI) -> None:
    whole = client.responses.create(**GREEDY)
    assert isinstance(whole, Response)
    assert whole.output_text
    stream = list(client.responses.create(**GREEDY, stream=True))
    assert "".join(event.delta for event in stream if event.type == "response.output_text.delta") == whole.output_text
    with client.responses.stream(**GREEDY) as helper:
        assert helper.get_final_response().output_text == whole.output_text
    conversation = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"role": "user", "content": SAID},
        *[item.model_dump() for item in whole.output],
        {"role": "user", "content": "más"},
    ]
    assert client.responses.create(model="tiny", input=conversation, max_output_tokens=4).usage.output_tokens <= 4


# ---------------------------------------------------------------- as a chat

CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
CALLED = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ANSWER = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]}
THOUGHT = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
CONVERSATIONS: list[tuple[Any, list[dict[str, Any]]]] = [
    ("hi", [{"role": "user", "content": "hi"}]),
    (
        [{"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    ),
    (
        [THOUGHT, ANSWER, CALL, {**CALL, "call_id": "c2"}],
        [{"role": "assistant", "reasoning": "hm", "content": "a", "tool_calls": [CALLED, {**CALLED, "id": "c2"}]}],
    ),
    ([ANSWER, ANSWER], [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "a"}]),
    (
        [CALL, {"type": "function_call_output", "call_id": "c1", "output": "42"}, ANSWER],
        [
            {"role": "assistant", "tool_calls": [CALLED]},
            {"role": "tool", "content": "42", "tool_call_id": "c1"},
            {"role": "assistant", "content": "a"},
        ],
    ),
    (
        [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]}],
        [{"role": "assistant", "reasoning": "so"}],
    ),
]


@pytest.mark.parametrize(("input", "messages"), CONVERSATIONS)
def test_items_become_messages(input: Any, messages: list[dict[str, Any]]) -> None:
    chat = chat_of(ResponsesRequest(input=input))
    assert [message.model_dump(exclude_unset=True) for message in chat.messages] == messages
    chat = chat_of(ResponsesRequest(input=input, instructions="Be brief."))
    assert chat.messages[0].model_dump(exclude_unset=True) == {"role": "system", "content": "Be brief."}


def test_an_unfinished_message_is_gone_on_with(server) -> None:
    begun = [{"role": "user", "content": SAID}, {**ANSWER, "status": "incomplete"}]
    chat = chat_of(ResponsesRequest(input=begun))
    assert (chat.add_generation_prompt, chat.continue_final_message) == (False, True)
    assert chat_of(ResponsesRequest(input=[*begun[:1], ANSWER])).add_generation_prompt
    wanted = server.chat(
        messages=[{"role": "user", "content": SAID}, {"role": "assistant", "content": "a"}],
        add_generation_prompt=False,
        continue_final_message=True,
        temperature=0,
        max_tokens=8,
    )
    body = respond(server, input=begun, temperature=0, max_output_tokens=8)
    assert body["output"][0]["content"][0]["text"] == wanted["choices"][0]["message"]["content"]


def test_settings_reach_the_chat() -> None:
    schema = {"type": "object"}
    asked = ResponsesRequest(
        input="hi",
        text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
        tools=[{"type": "function", "name": "f", "parameters": schema}],
        tool_choice={"type": "function", "name": "f"},
        reasoning={"effort": "none"},
        max_output_tokens=7,
        parallel_tool_calls=False,
    )
    chat = chat_of(asked)
    assert chat.response_format is not None
    assert chat.response_format.model_dump(by_alias=True, exclude_unset=True) == {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": schema, "strict": True},
    }
    (tool,) = chat.tools or []
    assert tool.model_dump(exclude_unset=True) == {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert chat.tool_choice == {"type": "function", "function": {"name": "f"}}
    assert (chat.reasoning_effort, chat.max_tokens, chat.logprobs) == ("none", 7, False)
    assert chat_of(ResponsesRequest(input="hi")).tool_choice is None
    asked = chat_of(ResponsesRequest(input="hi", text={"format": {"type": "json_object"}})).response_format
    assert asked is not None
    assert asked.type == "json_object"


def test_a_long_conversation_is_cut_where_that_is_asked(server) -> None:
    long = {"input": "the quick brown fox " * 200, "max_output_tokens": 4}
    assert "maximum context length" in refusal(server, long)["message"]
    body = respond(server, **long, truncation="auto")
    assert (body["usage"]["input_tokens"], body["usage"]["output_tokens"], body["truncation"]) == (255, 1, "auto")


# ---------------------------------------------------------------- refusals


def refusal(server, fields: dict[str, Any], status: int = 400, kind: str = "BadRequestError") -> dict[str, Any]:
    for stream in (False, True):
        response = server.post("/v1/responses", json={**fields, "stream": stream})
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert (error["code"], error["type"]) == (status, kind), error
    return error


FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object"}}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": 3}, "temperature", "temperature must be in [0, 2]"),
    ({"top_p": 0}, "top_p", "top_p must be in (0, 1]"),
    ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens must be at least 1, got 0."),
    (
        {"max_output_tokens": 999},
        "max_output_tokens",
        "max_output_tokens=999 cannot be greater than max_model_len=256.",
    ),
    ({**LOGPROBS, "top_logprobs": 21}, "logprobs", "Requested sample logprobs of 21"),
    ({"prompt": {"id": "p"}}, "prompt", "prompt template is not supported"),
    ({"conversation": "c"}, "conversation", "conversation is not supported by this server"),
    ({"previous_input_messages": [{}]}, "previous_input_messages", "previous_input_messages is not supported"),
    ({"background": True, "store": False}, "background", "background can only be used when `store` is true"),
    ({"input": []}, "input", "input is empty"),
    ({"input": [{"type": "web_search_call"}]}, "input", "Unsupported input item type: web_search_call"),
    ({"input": [{"type": ["x"]}]}, "input", "Unsupported input item type: ['x']"),
    ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input", "Encrypted content is not supported."),
    ({"input": [{"type": "reasoning", "content": [{"type": "x"}]}]}, "input", "input[0] has a part without a text."),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
        "input",
        "input[0].content has a part",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
        "input",
        "input[0].content has a part",
    ),
    ({"tools": [{"type": "web_search"}]}, "tools", "tools[0] has the type 'web_search'"),
    ({"tools": [{"type": "function"}]}, "tools", "tools[0] has no name."),
    ({"tool_choice": "required"}, "tool_choice", "Tool choice 'required' must be specified with 'tools' parameter."),
    ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "Tool choice 'function' not found in 'tools'"),
    (
        {"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "g"}},
        "tool_choice",
        "Tool choice 'function' not found in 'tools' parameter.",
    ),
    ({"tools": [FUNCTION], "tool_choice": {"type": "mcp"}}, "tool_choice", "tool_choice has the type 'mcp'"),
    (
        {"text": {"format": {"type": "json_schema", "name": "n"}}},
        "text",
        "text.format of type json_schema needs",
    ),
    (
        {"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}},
        "structured_outputs",
        "Cannot specify both structured_outputs and text.format",
    ),
    ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template", "Chat template is passed with request"),
    ({"cache_salt": "a/b"}, "cache_salt", "cache_salt must have"),
]


@pytest.mark.parametrize(("fields", "param", "sentence"), REFUSED)
def test_what_cannot_be_asked(server, fields: dict[str, Any], param: str, sentence: str) -> None:
    error = refusal(server, {"input": SAID, **fields})
    assert error["param"] == param
    assert error["message"].startswith(sentence)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": 3}, "input"),
        ({"input": ["x"]}, "input"),
        ({"input": [{"role": "nobody", "content": "x"}]}, "input"),
        ({"input": [{"type": "function_call"}]}, "input"),
        ({"input": SAID, "include": ["everything"]}, "include"),
        ({"input": SAID, "service_tier": "golden"}, "service_tier"),
        ({"input": SAID, "temperature": "hot"}, "temperature"),
        ({"input": SAID, "metadata": {"a": 1}}, "metadata"),
    ],
)
def test_what_has_the_wrong_type(server, fields: dict[str, Any], param: str) -> None:
    assert refusal(server, fields, kind="Bad Request")["param"].split(".")[:2] == ["body", param]


def test_nothing_is_kept(server) -> None:
    kind = "invalid_request_error"
    background = refusal(server, {"input": SAID, "background": True}, kind=kind)
    assert background["param"] == "background"
    before = refusal(server, {"input": SAID, "previous_response_id": "resp_1"}, 404, kind)
    assert (before["message"], before["param"]) == ("Response with id 'resp_1' not found.", "response_id")
    both = {"input": SAID, "previous_response_id": "resp_1", "previous_input_messages": [{}]}
    assert refusal(server, both, kind=kind)["param"] == "previous_response_id"
    for response in (
        httpx.get(server.url + "/v1/responses/resp_1"),
        httpx.get(server.url + "/v1/responses/resp_1?stream=true&starting_after=3"),
        server.post("/v1/responses/resp_1/cancel"),
    ):
        assert response.status_code == 404
        assert response.json() == {"error": before}


def test_a_prompt_that_leaves_no_room(server) -> None:
    room = respond(server, input=SAID, max_output_tokens=1)["usage"]
    more = 256 - room["input_tokens"]
    full = refusal(server, {"input": SAID + " fox" * more}, kind="invalid_request_error")
    assert full["param"] == "input"
    assert refusal(server, {"input": SAID + " fox" * (more + 1)})["param"] == "input_tokens"


def test_an_unknown_model_and_no_json(server) -> None:
    assert refusal(server, {"input": SAID, "model": "nobody"}, 404, "NotFoundError")["param"] == "model"
    assert server.post("/v1/responses", content=b"{}").status_code == 400


def test_halves_of_surrogate_pairs(server) -> None:
    for raw in (
        r'{"input": "\ud800"}',
        r'{"input": [{"role": "user", "content": [{"type": "input_text", "text": "\ud800"}]}]}',
        r'{"input": "a", "instructions": "\ud800"}',
        r'{"input": "a", "user": "\ud800"}',
        r'{"input": "a", "tools": [{"type": "function", "name": "f", "description": "\ud800"}]}',
        r'{"input": "a", "text": {"format": {"type": "json_schema", "schema": {"a": "\ud800"}}}}',
        r'{"input": "a", "previous_response_id": "\ud800"}',
    ):
        response = server.post("/v1/responses", content=raw, headers={"content-type": "application/json"})
        assert response.status_code == 400, response.text


def test_whoever_leaves_is_aborted(server) -> None:
    asked = {"input": SAID, "ignore_eos": True, "max_output_tokens": 200, "stream": True}
    with httpx.stream("POST", server.url + "/v1/responses", json=asked) as response:
        next(response.iter_text())
    deadline = time.monotonic() + 10
    while server.metric("num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.metric("num_requests_running") == 0
