"""/v1/chat/completions over HTTP: vLLM's shapes, the template's text, and what the model says to it."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import DecoderLM, SamplingParams
from lm.search import generate
from lm.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[3]
CHAT = [{"role": "user", "content": "the quick brown fox"}]
TEXT = "u: the quick brown fox<|endoftext|>a: "  # what the template of the tests' folder makes of it
GREEDY = {"model": "tiny", "messages": CHAT, "temperature": 0, "max_tokens": 24}


def stream(server, **fields: Any) -> list[Any]:
    """The chunks of a stream, which must end with [DONE]."""
    response = server.post("/v1/chat/completions", json={"stream": True, **fields})
    assert response.status_code == 200, response.text
    *blocks, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def refused(response: httpx.Response, param: str | None = None, kind: str = "BadRequestError") -> str:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["type"], error["code"]) == (kind, 400)
    place = str(error["param"])
    if kind == "Bad Request":  # then it is the place in the body
        place = place.removeprefix("body.").split(".")[0]
    assert param is None or place == param
    return error["message"]


# ---------------------------------------------------------------- shapes and answers


def test_the_body_has_every_field_of_vllms(server, model: DecoderLM, tokenizer: Tokenizer) -> None:
    body = server.chat(**GREEDY)
    assert body["id"].startswith("chatcmpl-")
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    greedy = generate(model, [ids], SamplingParams(temperature=0.0, max_tokens=24), [tokenizer.eos_id])[0]
    assert body == {
        "id": body["id"],
        "object": "chat.completion",
        "created": body["created"],
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": tokenizer.decode(greedy),
                    "refusal": None,
                    "annotations": None,
                    "audio": None,
                    "function_call": None,
                    "reasoning": None,
                },
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
                "token_ids": None,
                "routed_experts": None,
            }
        ],
        "service_tier": None,
        "system_fingerprint": body["system_fingerprint"],
        "usage": {
            "prompt_tokens": len(ids),
            "total_tokens": len(ids) + 24,
            "completion_tokens": 24,
            "prompt_tokens_details": None,
            "completion_tokens_details": None,
        },
        "prompt_logprobs": None,
        "prompt_token_ids": None,
        "prompt_text": None,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }
    more = server.chat(**GREEDY, return_token_ids=True, return_prompt_text=True)
    assert (more["prompt_token_ids"], more["prompt_text"]) == (ids, TEXT)
    assert more["choices"][0]["token_ids"] == greedy


def test_chunks_have_the_shape_of_vllms(server, tokenizer: Tokenizer) -> None:
    whole = server.chat(**GREEDY)
    first, *chunks, last = stream(server, **GREEDY)
    head = {"id": first["id"], "object": "chat.completion.chunk", "created": first["created"], "model": "tiny"}
    choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    assert first == {**head, "choices": [choice], "prompt_token_ids": None, "prompt_text": None}
    for chunk in chunks:
        content = chunk["choices"][0]["delta"]["content"]
        assert chunk == {**head, "choices": [{**choice, "delta": {"content": content}, "token_ids": None}]}
    ends = {"finish_reason": "length", "stop_reason": None, "token_ids": None}
    content = last["choices"][0]["delta"]["content"]
    assert last["choices"] == [{**choice, "delta": {"content": content}, **ends}]
    assert last["system_fingerprint"] == whole["system_fingerprint"]
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in [*chunks, last])
    assert text == whole["choices"][0]["message"]["content"]

    options = {"include_usage": True, "continuous_usage_stats": True}
    first, *chunks, last = stream(server, **GREEDY, stream_options=options, return_token_ids=True)
    assert first["usage"]["completion_tokens"] == 0
    assert first["prompt_token_ids"] == tokenizer.encode(TEXT)
    assert chunks[-1]["usage"]["completion_tokens"] == 24
    assert len([id for chunk in chunks for id in chunk["choices"][0]["token_ids"]]) == 24
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], whole["usage"]["total_tokens"])


def test_it_is_the_completion_of_the_rendered_text(server) -> None:
    for fields in ({"temperature": 0}, {"seed": 5, "n": 3, "top_p": 0.9}, {"seed": 1, "stop": ["e"]}):
        given = server.complete(prompt=TEXT, max_tokens=16, **fields)
        chat = server.chat(messages=CHAT, max_completion_tokens=16, **fields)
        assert [c["message"]["content"] for c in chat["choices"]] == [c["text"] for c in given["choices"]]
        assert [c["finish_reason"] for c in chat["choices"]] == [c["finish_reason"] for c in given["choices"]]
        assert [c["stop_reason"] for c in chat["choices"]] == [c["stop_reason"] for c in given["choices"]]
        assert chat["usage"] == given["usage"]
    chunks = stream(server, messages=CHAT, max_tokens=16, seed=5, n=3, top_p=0.9)
    assert [chunk["choices"][0]["index"] for chunk in chunks[:3]] == [0, 1, 2]
    assert all(chunk["choices"][0]["delta"] == {"role": "assistant", "content": ""} for chunk in chunks[:3])
    texts = ["", "", ""]
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"]["content"]
    again = server.chat(messages=CHAT, max_tokens=16, seed=5, n=3, top_p=0.9)
    assert texts == [c["message"]["content"] for c in again["choices"]]


def test_without_max_tokens_the_context_is_filled(server, tokenizer: Tokenizer) -> None:
    body = server.chat(messages=CHAT, ignore_eos=True)
    assert body["usage"]["total_tokens"] == 256
    assert body["choices"][0]["finish_reason"] == "length"
    fields = {"messages": CHAT, "ignore_eos": True}
    assert server.chat(**fields, max_tokens=9, max_completion_tokens=3)["usage"]["completion_tokens"] == 3
    assert server.chat(**fields, max_tokens=9)["usage"]["completion_tokens"] == 9
    assert server.chat(**fields, max_tokens=250)["usage"]["total_tokens"] == 256
    ends = server.chat(messages=CHAT, logit_bias={str(tokenizer.eos_id): 100})["choices"][0]
    assert (ends["message"]["content"], ends["finish_reason"], ends["stop_reason"]) == ("", "stop", None)


def test_logprobs_in_the_form_of_chats(server) -> None:
    given = server.complete(prompt=TEXT, temperature=0, max_tokens=8, logprobs=3)["choices"][0]["logprobs"]
    chat = server.chat(messages=CHAT, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3)
    content = chat["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == given["tokens"]
    assert [entry["logprob"] for entry in content] == pytest.approx(given["token_logprobs"])
    for entry in content:
        assert entry["bytes"] == list(entry["token"].encode())
        values = [top["logprob"] for top in entry["top_logprobs"]]
        assert (len(values), values) == (3, sorted(values, reverse=True))
        assert entry["top_logprobs"][0] == {name: entry[name] for name in ("token", "logprob", "bytes")}
    alone = server.chat(messages=CHAT, temperature=0, max_tokens=8, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in alone] == [[]] * 8
    assert [entry["logprob"] for entry in alone] == pytest.approx(given["token_logprobs"])
    chunks = stream(server, messages=CHAT, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3)
    streamed = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [entry["token"] for entry in streamed] == given["tokens"]


def test_contents_in_parts(server) -> None:
    parts = [
        {"type": "text", "text": "the quick"},
        {"type": "input_text", "text": " brown"},
        {"type": "text", "text": "fox"},
    ]
    body = server.chat(messages=[{"role": "user", "content": parts}], max_tokens=1, return_prompt_text=True)
    assert body["prompt_text"] == "u: the quick\n brown\nfox<|endoftext|>a: "
    body = server.chat(messages=[{"role": "assistant", "content": None}], max_tokens=1, return_prompt_text=True)
    assert body["prompt_text"] == "a: <|endoftext|>a: "


def test_going_on_with_the_last_message_and_echo(server) -> None:
    chat = [*CHAT, {"role": "assistant", "content": "over the"}]
    fields = {"messages": chat, "continue_final_message": True, "add_generation_prompt": False, "max_tokens": 8}
    fields |= {"temperature": 0, "return_prompt_text": True}
    body = server.chat(**fields)
    assert body["prompt_text"] == "u: the quick brown fox<|endoftext|>a: over the"
    plain = body["choices"][0]["message"]
    assert (
        plain["content"]
        == server.complete(prompt=body["prompt_text"], temperature=0, max_tokens=8)["choices"][0]["text"]
    )
    echoed = server.chat(**fields, echo=True)
    assert echoed["choices"][0]["message"]["content"] == "over the" + plain["content"]
    assert len(echoed["prompt_logprobs"]) == body["usage"]["prompt_tokens"]  # as vLLM has it
    first, second, *rest = stream(server, **fields, echo=True)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert second["choices"][0]["delta"] == {"content": "over the"}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in rest) == plain["content"]
    # Who does not ask for the assistant's turn is answered in the last one's role, and nothing is echoed of another's.
    body = server.chat(messages=CHAT, add_generation_prompt=False, max_tokens=1, return_prompt_text=True)
    assert (body["prompt_text"], body["choices"][0]["message"]["role"]) == (
        "u: the quick brown fox<|endoftext|>",
        "user",
    )
    assert not server.chat(messages=CHAT, echo=True, max_tokens=1)["choices"][0]["message"]["content"].startswith("the")


def test_ids_names_and_unknown_fields(server) -> None:
    response = server.post("/v1/chat/completions", json={**GREEDY, "model": "also-tiny"}, headers={"X-Request-Id": "a"})
    assert (response.json()["id"], response.json()["model"]) == ("chatcmpl-a", "tiny")
    fields = {"user": "me", "store": True, "parallel_tool_calls": False, "reasoning_effort": "low", "of_the_future": 1}
    assert server.chat(**GREEDY, **fields)["object"] == "chat.completion"
    assert server.post("/v1/chat/completions", json={**GREEDY, "model": "nobody"}).status_code == 404


def test_tokenize_messages(server, tokenizer: Tokenizer) -> None:
    body = server.post("/tokenize", json={"messages": CHAT, "return_token_strs": True}).json()
    assert body["tokens"] == tokenizer.encode(TEXT)
    assert (body["count"], body["max_model_len"]) == (len(body["tokens"]), 256)
    assert body["token_strs"] == [tokenizer.inner.id_to_token(id) for id in body["tokens"]]
    fields = {"messages": CHAT, "add_generation_prompt": False}
    assert server.post("/tokenize", json=fields).json()["tokens"] == tokenizer.encode(TEXT.removesuffix("a: "))
    fields = {"messages": CHAT, "add_generation_prompt": False, "continue_final_message": True}
    assert server.post("/tokenize", json=fields).json()["tokens"] == tokenizer.encode("u: the quick brown fox")
    assert "prompt: Field required" in refused(server.post("/tokenize", json={}), "prompt", "Bad Request")
    assert "messages" in refused(server.post("/tokenize", json={"messages": 1}), "messages", "Bad Request")
    assert refused(server.post("/tokenize", json={"messages": []}), "messages").startswith("messages is empty")


# ---------------------------------------------------------------- refusals

TOOL = {"type": "function", "function": {"name": "f"}}
PARTS = [{"type": "image_url", "image_url": {"url": "http://example.invalid"}}]
HALF = [{"type": "text", "text": "\ud800"}]
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "messages is empty; a chat has at least one message."),
    ({"messages": [{"role": "stranger", "content": "a"}]}, "messages", "No strangers, please."),
    (
        {"messages": [{"role": "user", "content": PARTS}]},
        "messages",
        "messages[0].content has a part of type 'image_url'",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages", "messages[0].content has a part"),
    ({"messages": [{"role": "user", "content": "a" * 3000}]}, "input_tokens", "This model's maximum context length is"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]},
        "messages",
        "The rendered chat has half of a",
    ),
    ({"chat_template": "{{ 1 }}"}, "chat_template", "Chat template is passed with request, but --trust-request-chat"),
    ({"chat_template_kwargs": {"chat_template": "a"}}, "chat_template", "Chat template is passed with request, but"),
    ({"continue_final_message": True}, "continue_final_message", "Cannot set both `continue_final_message` and"),
    ({"top_logprobs": 2}, "top_logprobs", "when using `top_logprobs`, `logprobs` must be set to true."),
    ({"logprobs": True, "top_logprobs": -2}, "top_logprobs", "`top_logprobs` must be a positive value or -1."),
    ({"logprobs": True, "top_logprobs": -1}, "logprobs", "Requested sample logprobs of 337, which is greater than"),
    ({"logprobs": True, "top_logprobs": 21}, "logprobs", "Requested sample logprobs of 21, which is greater than"),
    ({"tools": []}, "tools", "`tools` must not be an empty array."),
    ({"tools": [TOOL]}, None, '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser'),
    ({"tools": [TOOL], "tool_choice": "required"}, None, 'tool_choice="required" requires --tool-call-parser'),
    ({"tools": [TOOL], "tool_choice": TOOL}, None, 'tool_choice=function "f" requires --tool-call-parser'),
    ({"tools": [TOOL], "tool_choice": "x"}, "tool_choice", "Invalid value for `tool_choice`: x! Only named tools,"),
    ({"tool_choice": "auto"}, "tool_choice", "When using `tool_choice`, `tools` must be set."),
    ({"use_beam_search": True, "stream": True}, "stream", "Streaming is not currently supported with beam search"),
    ({"use_beam_search": True, "min_tokens": 2}, "min_tokens", "min_tokens is 2; a beam search does not look"),
    ({"use_beam_search": True, "length_penalty": 11}, "length_penalty", "length_penalty must be in [-10.0, 10.0], got"),
    ({"use_beam_search": True, "n": 129}, "n", "n must be at most 128, got 129"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1, got 0."),
    ({"max_completion_tokens": 0}, "max_tokens", "max_tokens must be at least 1, got 0."),
    (
        {"max_completion_tokens": 999},
        "max_completion_tokens",
        "max_completion_tokens=999 cannot be greater than max_mod",
    ),
    ({"n": 2, "temperature": 0}, "n", "n must be 1 when using greedy sampling, got 2."),
    ({"n": 129}, "n", "n must be at most 128, got 129."),
    ({"stream_options": {"include_usage": True}}, "stream_options", "Stream options can only be defined when"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "`prompt_logprobs` are not available when"),
]


@pytest.mark.parametrize(("fields", "param", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_refused(server, fields: dict[str, Any], param: str, message: str) -> None:
    body = json.dumps({"messages": CHAT, **fields})
    response = server.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert refused(response, param).startswith(message)


@pytest.mark.parametrize(
    "messages",
    [None, 5, "hello", [5], [{}], [{"role": "user", "content": 5}], [{"role": 1, "content": "a"}], [{"content": "a"}]],
    ids=str,
)
def test_messages_that_are_none(server, messages: Any) -> None:
    response = server.post("/v1/chat/completions", json={"messages": messages})
    assert "messages" in refused(response, "messages", "Bad Request")
    assert "validation error" in refused(server.post("/v1/chat/completions", json={}), "messages", "Bad Request")


def test_a_big_body_gets_a_small_answer(server) -> None:
    for messages in ([{}] * 500_000, [{"role": "user", "content": [5] * 1_000_000}]):
        response = server.post("/v1/chat/completions", json={"messages": messages})
        assert response.status_code == 400
        assert len(response.content) < 5000


@pytest.mark.parametrize("depth", [90, 500, 900, 2000, 100_000])
def test_a_deep_body_is_no_server_error(server, depth: int) -> None:
    deep = "[" * depth + "]" * depth
    for fields in (f'"chat_template_kwargs": {{"a": {deep}}}', f'"documents": [{{"a": {deep}}}]', f'"tools": {deep}'):
        body = f'{{"messages": [{{"role": "user", "content": "a"}}], "max_tokens": 1, {fields}}}'
        response = server.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert response.status_code in (200, 400), response.text
    assert server.chat(messages=CHAT, max_tokens=1)["object"] == "chat.completion"


def test_tools_are_shown_where_no_call_is_asked_for(server) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    chat = [*CHAT, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "b", "tool_call_id": "1"}]
    assert server.chat(messages=chat, tools=[TOOL], tool_choice="none", max_tokens=1)["object"] == "chat.completion"
    call["function"]["arguments"] = "{"  # a past that cannot be mended is no reason to refuse what comes after
    assert server.chat(messages=chat, max_tokens=1)["object"] == "chat.completion"
    for wrong in (5, [[]], [{"function": 5}]):
        chat[1] = {"role": "assistant", "tool_calls": wrong}
        sentence = refused(server.post("/v1/chat/completions", json={"messages": chat}), "messages")
        assert sentence.startswith("messages[1].tool_calls ")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4), lambda inner: st.lists(inner, max_size=3)
)
ODD = st.dictionaries(
    st.sampled_from(["role", "content", "name", "tool_calls", "tool_call_id", "reasoning", "type", "text"]), JSON
)
FIELDS = [
    "messages", "max_tokens", "max_completion_tokens", "n", "temperature", "logprobs", "top_logprobs", "echo", "stop",
    "prompt_logprobs", "tools", "tool_choice", "add_generation_prompt", "continue_final_message", "chat_template",
    "chat_template_kwargs", "documents", "reasoning_effort", "truncate_prompt_tokens", "add_special_tokens",
]  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(
    fields=st.dictionaries(st.sampled_from(FIELDS), JSON | st.lists(ODD, max_size=2) | ODD, max_size=3),
    message=ODD | st.just(CHAT[0]),
)
def test_nothing_that_can_be_sent_is_a_server_error(server, fields: dict[str, Any], message: dict[str, Any]) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "fox", **message}], "max_tokens": 2, **fields})
    response = server.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400), response.text


# ---------------------------------------------------------------- other servers


def test_a_model_without_a_template_says_so(folder: Path, tmp_path: Path, launching) -> None:
    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    running = launching(bare, tmp_path / "log", "--kv-cache-memory-bytes", "4M")
    try:
        for path in ("/v1/chat/completions", "/tokenize"):
            sentence = refused(httpx.post(running.url + path, json={"messages": CHAT}), "messages")
            assert sentence.startswith("This model has no chat template, so messages cannot become a prompt: start the")
    finally:
        running.end()


@pytest.fixture(scope="module")
def trusting(folder: Path, tmp_path_factory: pytest.TempPathFactory, launching) -> Iterator[Any]:
    """A server that takes templates from requests, and has one of its own on the command line."""
    place = tmp_path_factory.mktemp("trusting")
    (place / "mine.jinja").write_text("{{ messages[-1].content }}{{ ' ' + more if more is defined else '' }}")
    flags = ["--chat-template", str(place / "mine.jinja"), "--trust-request-chat-template"]
    running = launching(folder, place / "log", *flags, "--kv-cache-memory-bytes", "4M")
    yield running
    running.end()


def test_templates_from_the_command_line_and_from_requests(trusting) -> None:
    def text(**fields: Any) -> str:
        return trusting.chat(messages=CHAT, max_tokens=1, return_prompt_text=True, **fields)["prompt_text"]

    assert text() == "the quick brown fox"
    assert text(chat_template_kwargs={"more": "jumps", "messages": [1]}) == "the quick brown fox jumps"
    assert text(chat_template="<{{ messages | length }}>") == "<1>"
    assert text(chat_template_kwargs={"chat_template": "also {{ messages[0].role }}"}) == "also user"
    for template, said in [
        ("{% for", "The chat template is not valid Jinja"),
        ("", ""),
        ("{{ ''.__class__.__mro__ }}", "The chat template fails on this chat: SecurityError"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "The chat template takes more",
        ),
    ]:
        fields = {"messages": CHAT, "max_tokens": 1, "chat_template": template}
        if template:
            assert refused(trusting.post("/v1/chat/completions", json=fields), "messages").startswith(said)
    assert text() == "the quick brown fox"
    for wrong in ({"chat_template_kwargs": {"chat_template": 5}}, {"chat_template": "{{ '' }}"}):
        assert refused(trusting.post("/v1/chat/completions", json={"messages": CHAT, **wrong}))


def test_a_template_file_that_is_none(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serve", str(folder), "--port", "0", "--chat-template", str(tmp_path / "none")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"--chat-template {tmp_path / 'none'} cannot be read: No such file or directory.\n"


# ---------------------------------------------------------------- the official client


def test_the_openai_client(server) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", _strict_response_validation=True)
    whole = client.chat.completions.create(
        model="tiny", messages=CHAT, temperature=0, max_completion_tokens=12, logprobs=True, top_logprobs=2
    )
    (choice,) = whole.choices
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert len(choice.logprobs.content) == 12
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=CHAT,
            temperature=0,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == choice.message.content
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": None, "completion_tokens_details": None}
    )
    with pytest.raises(openai.BadRequestError, match="No strangers, please"):
        client.chat.completions.create(model="tiny", messages=[{"role": "stranger", "content": "a"}])


def test_the_async_openai_client(server) -> None:
    async def ask() -> list[str]:
        client = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", _strict_response_validation=True)

        async def one(seed: int) -> str:
            stream = await client.chat.completions.create(
                model="tiny", messages=CHAT, max_tokens=8, seed=seed, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        async with client:
            return await asyncio.gather(*(one(seed % 3) for seed in range(9)))

    texts = asyncio.run(ask())
    assert texts[:3] == texts[3:6] == texts[6:]
    assert len(set(texts)) == 3
