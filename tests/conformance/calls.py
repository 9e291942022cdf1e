"""Requests to servers that read tool calls and thoughts from what a model writes: both started with PARSERS.

What a small model would never write is forced: a call's text by a choice of one, the end of a thought by a bias.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.conformance.case import MODEL, Case

PARSERS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "deepseek_r1")
# SmolLM2 has tokens that mark notebooks; in `with_tags` they are the tags that the parsers look for.
TAGS = {
    "<jupyter_start>": "<think>",
    "<jupyter_text>": "</think>",
    "<jupyter_code>": "<tool_call>",
    "<jupyter_output>": "</tool_call>",
}
END_OF_THOUGHT = 12  # the id of </think>

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": CITY}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
NAMED = {"type": "function", "function": {"name": "weather"}}
QUESTION = [{"role": "user", "content": "How will the weather in Rome be on the next three days?"}]
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
WRITTEN = {  # by the model, where it may choose
    "a call": CALL,
    "two calls": f"{CALL}\n{OTHER}",
    "a text and a call": f"I will look.\n{CALL}",
    "a call that is no JSON": "<tool_call>\nweather in Rome\n</tool_call>",
    "a call of nobody": '<tool_call>\n{"name": "nobody", "arguments": {"a": [1, {"b": "ü"}]}}\n</tool_call>',
    "a call that is not closed": '<tool_call>\n{"name": "clock", "arguments": {}}',
    "a text with a sign": "3 < 4, and </tool_call> is a tag.",
}


def with_tags(folder: Path, copy: Path) -> Path:
    """The folder's model with TAGS as plain tokens."""
    copy.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            (copy / file.name).symlink_to(file)
        else:
            shutil.copy(file, copy / file.name)
    path = copy / "tokenizer.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    for token in told["added_tokens"]:
        if token["content"] in TAGS:
            token |= {"content": TAGS[token["content"]], "special": False}
    told["model"]["vocab"] = {TAGS.get(token, token): id for token, id in told["model"]["vocab"].items()}
    path.write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")
    return copy


def _chat(name: str, **fields: Any) -> Case:
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 60, "temperature": 0, **fields}
    return Case(f"calls/{name}", "/v1/chat/completions", body, parsers=True)


def _writes(text: str, thinks: bool = False) -> dict[str, Any]:
    """Fields that make the model write just this; `thinks` first, which ends at once."""
    bias = {"logit_bias": {str(END_OF_THOUGHT): 100}} if thinks else {}
    return {"structured_outputs": {"choice": [text]}, **bias}


TOOLS: dict[str, Any] = {"tools": [WEATHER, CLOCK]}
THOUGHT: dict[str, Any] = {"logit_bias": {str(END_OF_THOUGHT): 9}, "max_tokens": 24}
NO_THOUGHT: dict[str, Any] = {"chat_template_kwargs": {"thinking": False}}

CASES: list[Case] = [
    *(
        _chat(f"{name}{how}", **TOOLS, **fields, **more)
        for name, fields in {
            "required": {"tool_choice": "required"},
            "named": {"tool_choice": NAMED},
            "none": {"tool_choice": "none", "max_tokens": 8},
            "auto, none is made": {"tool_choice": "auto", "max_tokens": 8},
            "required, cut": {"tool_choice": "required", "max_tokens": 6},
            "named, cut": {"tool_choice": NAMED, "max_tokens": 4},
            "named, twice": {"tool_choice": NAMED, "n": 2},
            "one at a time": {"tool_choice": "required", "parallel_tool_calls": False},
        }.items()
        for how, more in (("", {}), (", streamed", STREAMED))
    ),
    *(
        _chat(f"auto, {name}{how}", **TOOLS, **_writes(text), **more)
        for name, text in WRITTEN.items()
        for how, more in (("", {}), (", streamed", STREAMED))
    ),
    _chat("a call, without tools", **_writes(CALL)),
    _chat("a call, chosen to be none", **TOOLS, tool_choice="none", **_writes(CALL)),
    *(
        _chat(f"thought, {name}{how}", **fields, **more)
        for name, fields in {
            "never ended": {"max_tokens": 12},
            "ended": THOUGHT,
            "ended, not shown": {**THOUGHT, "include_reasoning": False},
            "ended, with ids": {**THOUGHT, "return_token_ids": True},
            "ended, then a form": {**THOUGHT, "response_format": {"type": "json_object"}, "max_tokens": 40},
            "ended, then a choice": {**THOUGHT, "structured_outputs": {"choice": ["Rome", "Paris"]}},
            "ended, tools at hand": {**THOUGHT, **TOOLS},
        }.items()
        for how, more in (("", {}), (", streamed", STREAMED))
    ),
    Case(
        "calls/responses, required",
        "/v1/responses",
        {
            "model": MODEL,
            "input": "How will the weather in Rome be?",
            "max_output_tokens": 60,
            "temperature": 0,
            "tools": [{"type": "function", "name": "weather", "parameters": CITY}],
            "tool_choice": "required",
        },
        parsers=True,
    ),
    Case(
        "calls/messages, any",
        "/v1/messages",
        {
            "model": MODEL,
            "messages": QUESTION,
            "max_tokens": 60,
            "temperature": 0,
            "tools": [{"name": "weather", "input_schema": CITY}],
            "tool_choice": {"type": "any"},
        },
        parsers=True,
    ),
]
