"""Tools over HTTP: which choices there are, what is called, and the same in a stream as in a body."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from lm import DecoderConfig, DecoderLM, pretrained
from lm.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[3]
TEMPLATE = """{% if tools %}{{ tools | tojson }}{{ eos_token }}{% endif %}
{%- for message in messages %}{{ message.role[0] }}: {{ message.content }}
{%- for call in message.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments.x }}]{% endfor %}
{{- message.tool_call_id or '' }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}a: {% endif %}"""


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": "What it does.", "parameters": parameters}}


TOOLS = [tool("add", x={"enum": [1, 22]}, y={"type": "boolean"}), tool("look", where={"enum": ["fox", "dög"]})]
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "the quick"}],
    "max_tokens": 120,
    "temperature": 1,
    "seed": 1,
}
ONE = '<tool_call>\\{"name": "add", "arguments": \\{"x": (1|22)\\}\\}</tool_call>'


@pytest.fixture(scope="module")
def calling(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, launching) -> Iterator[Any]:
    """A server of a model with room for what tools look like in the tests' small vocabulary."""
    torch.manual_seed(1)
    config = DecoderConfig(vocab_size=tokenizer.vocab_size, context=2048, layers=1, width=32, heads=2)
    path = tmp_path_factory.mktemp("tools") / "tiny"
    pretrained.save(DecoderLM(config).eval(), path, tokenizer=tokenizer)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    flags = ["--served-model-name", "tiny", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    running = launching(path, path.parent / "log", *flags, "--kv-cache-memory-bytes", "16M")
    yield running
    running.end()


def stream(server: Any, **fields: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The message that the deltas of a stream make, with its reason, and the deltas."""
    response = server.post("/v1/chat/completions", json={**fields, "stream": True})
    assert response.status_code == 200, response.text
    made: dict[str, Any] = {"content": "", "calls": [], "reason": None}
    deltas = []
    for line in response.text.splitlines():
        if not line.startswith("data: {"):
            continue
        (choice,) = json.loads(line[6:])["choices"]
        delta = choice["delta"]
        deltas.append(delta)
        made["content"] += delta.get("content") or ""
        for call in delta.get("tool_calls", []):
            if "id" in call:
                assert call["type"] == "function"
                assert call["index"] == len(made["calls"])
                made["calls"].append([call["function"]["name"], ""])
            made["calls"][call["index"]][1] += call["function"]["arguments"]
        made["reason"] = choice["finish_reason"] or made["reason"]
    return made, deltas


def body(server: Any, **fields: Any) -> dict[str, Any]:
    """The same of a body."""
    (choice,) = server.chat(**fields)["choices"]
    message = choice["message"]
    calls = message.get("tool_calls", [])
    assert len({call["id"] for call in calls}) == len(calls)
    named = [[call["function"]["name"], call["function"]["arguments"]] for call in calls]
    return {"content": message["content"] or "", "calls": named, "reason": choice["finish_reason"]}


@pytest.mark.parametrize("seed", [1, 2])
def test_a_tool_that_has_to_be_called_is_called_as_its_schema_says(calling, seed: int) -> None:
    fields = {**CHAT, "seed": seed, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    made = body(calling, **fields)
    ((name, arguments),) = made["calls"]
    value = json.loads(arguments)
    assert value in ({"x": 1, "y": True}, {"x": 1, "y": False}, {"x": 22, "y": True}, {"x": 22, "y": False}) or (
        name == "look" and value["where"] in ("fox", "dög")
    )
    assert (made["content"], made["reason"]) == ("", "tool_calls")
    streamed, deltas = stream(calling, **fields)
    assert streamed == made
    assert sum("tool_calls" in delta for delta in deltas) > 3  # the arguments come in pieces


def test_a_named_tool_is_called(calling) -> None:
    choice = {"type": "function", "function": {"name": "look"}}
    fields = {**CHAT, "tools": TOOLS, "tool_choice": choice}
    made = body(calling, **fields)
    assert [name for name, _ in made["calls"]] == ["look"]
    assert json.loads(made["calls"][0][1])["where"] in ("fox", "dög")
    assert made["reason"] == "stop"  # as in vLLM
    assert stream(calling, **fields)[0] == made


def test_several_calls(calling) -> None:
    fields = {**CHAT, "max_tokens": 400, "tools": TOOLS, "structured_outputs": {"regex": f"({ONE}){{3}}"}}
    made = body(calling, **fields)
    assert [name for name, _ in made["calls"]] == ["add"] * 3
    assert made["reason"] == "tool_calls"
    assert stream(calling, **fields)[0] == made
    alone = body(calling, **fields, parallel_tool_calls=False)
    assert alone == {**made, "calls": made["calls"][:1]}
    assert stream(calling, **fields, parallel_tool_calls=False)[0] == alone


def test_a_model_may_call_and_what_is_no_call_is_text(calling) -> None:
    auto = {**CHAT, "tools": TOOLS}
    for regex, content, calls in (
        (f"fox \n{ONE}", "fox \n", 1),
        (f"\n\n{ONE} dog", "", 1),
        ("<tool_call>fox</tool_call>", "<tool_call>fox</tool_call>", 0),
        ("<tool_call> *\\{", None, 0),
    ):
        fields = {**auto, "structured_outputs": {"regex": regex}}
        made = body(calling, **fields)
        assert len(made["calls"]) == calls
        assert content is None or made["content"] == content
        assert made["reason"] == ("tool_calls" if calls else "stop")
        assert stream(calling, **fields)[0] == made
    plain = {key: value for key, value in auto.items() if key != "tools"}
    assert body(calling, **plain, structured_outputs={"regex": ONE})["calls"] == []
    assert body(calling, **auto, tool_choice="none", structured_outputs={"regex": ONE})["calls"] == []
    cut = body(calling, **{**auto, "max_tokens": 25}, structured_outputs={"regex": ONE})
    assert cut["reason"] == "length"


def test_earlier_calls_and_their_results_reach_the_template(calling) -> None:
    call = {"id": "call-1", "type": "function", "function": {"name": "add", "arguments": '{"x": 22}'}}
    messages = [
        *CHAT["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call-1", "content": "44"},
    ]
    answer = calling.chat(**{**CHAT, "max_tokens": 1, "messages": messages, "return_prompt_text": True})
    assert answer["prompt_text"].replace("<|endoftext|>", "|") == "u: the quick|a: [add 22]|t: 44call-1|a: "
    shown = calling.chat(**{**CHAT, "max_tokens": 1, "tools": TOOLS, "tool_choice": "none", "return_prompt_text": True})
    assert json.loads(shown["prompt_text"].split("<|endoftext|>")[0]) == TOOLS


def test_openais_client_takes_it(calling) -> None:
    client = openai.OpenAI(base_url=calling.url + "/v1", api_key="none", _strict_response_validation=True)
    asked: Any = {**CHAT, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    message = client.chat.completions.create(**asked).choices[0].message
    assert message.tool_calls
    with client.chat.completions.stream(**asked) as events:
        final = events.get_final_completion().choices[0].message
    assert final.tool_calls
    assert final.tool_calls[0].function.arguments == message.tool_calls[0].function.arguments


@pytest.mark.parametrize(
    ("fields", "param", "sentence"),
    [
        ({"tools": []}, "tools", "`tools` must not be an empty array."),
        ({"tools": [{"type": "code"}]}, "body.tools.0.type", "2 validation errors: "),
        ({"tools": [{"function": {"name": 5}}]}, "body.tools.0.function.name", "1 validation error: "),
        ({"tools": [{"function": {"name": "f", "parameters": 5}}]}, "body.tools.0.function.parameters", "1 validation"),
        ({"tool_choice": "required"}, "tool_choice", "When using `tool_choice`, `tools` must be set."),
        ({"tools": TOOLS, "tool_choice": {}}, "tool_choice.function", "Invalid value for `function`: `None`"),
        ({"tools": TOOLS, "tool_choice": {"function": {}}}, "tool_choice.function.name", "Expected field `name`"),
        (
            {"tools": TOOLS, "tool_choice": {"function": {"name": "nobody"}}},
            "tool_choice",
            "The tool specified in `tool_choice` does not match any of the specified `tools`",
        ),
        (
            {"tools": TOOLS, "tool_choice": {"function": {"name": "add"}}, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "You can only either use constraints for structured outputs or tools, not both.",
        ),
        ({"tools": [tool("f", x={"type": "nothing"})], "tool_choice": "required"}, "tools", "Grammar error: "),
        (
            {"tools": [tool("f", x={"type": "string", "pattern": "("})], "tool_choice": "required"},
            "tools",
            "Grammar error: ",
        ),
        ({"tools": TOOLS, "use_beam_search": True, "n": 2}, "tools", "Calls of tools are not looked for in a beam"),
    ],
)
def test_what_is_refused(calling, fields: dict[str, Any], param: str, sentence: str) -> None:
    response = calling.post("/v1/chat/completions", json={**CHAT, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["message"].startswith(sentence)
    assert error["param"] == param


def test_flags_that_need_each_other() -> None:
    command = [sys.executable, "-m", "serve", "nowhere", "--enable-auto-tool-choice"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "--enable-auto-tool-choice requires --tool-call-parser" in ended.stderr
