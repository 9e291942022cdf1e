"""Requests to servers that read tool calls and thoughts from what a model writes: started with `servers.PARSERS`.

What a small model would never write is forced: a call's text by a choice of one, the end of a thought by a bias.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.conformance.case import MODEL, Case

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
QUESTION = [{"role": "user", "content": "How will the weather in Rome be on the next three days?"}]
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>'
WRITTEN = {  # by the model, where it may choose
    "a call": CALL,
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


BIAS = {str(END_OF_THOUGHT): 100}  # thinking ends at once; what comes then is as the form says
OPEN = {str(END_OF_THOUGHT): 20}  # as soon as the model is less sure of a word


def _chat(name: str, **fields: Any) -> Case:
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 60, "temperature": 0, **fields}
    return Case(f"calls/{name}", "/v1/chat/completions", body, parsers=True)


def _writes(text: str) -> dict[str, Any]:
    """Fields that make the model write just this."""
    return {"structured_outputs": {"choice": [text]}, "logit_bias": BIAS}


TOOLS: dict[str, Any] = {"tools": [WEATHER, CLOCK]}
FREE: dict[str, dict[str, Any]] = {
    "none": {"tool_choice": "none", "max_tokens": 8},
    "auto, none is made": {"tool_choice": "auto", "max_tokens": 8},
}
THOUGHTS: dict[str, dict[str, Any]] = {
    "never ended": {"max_tokens": 12},
    "ended": {"logit_bias": OPEN, "structured_outputs": {"choice": ["Rome is in Italy."]}},
    "ended at once": _writes("Rome is in Italy."),
    "not shown": {**_writes("Rome is in Italy."), "include_reasoning": False},
    "with ids": {**_writes("Rome is in Italy."), "return_token_ids": True},
}

CASES: list[Case] = [
    *(
        _chat(f"{name}{how}", **fields, **more)
        for name, fields in {
            **{name: {**TOOLS, **fields} for name, fields in FREE.items()},
            **{f"auto, {name}": {**TOOLS, **_writes(text)} for name, text in WRITTEN.items()},
            "a call, without tools": _writes(CALL),
            "a call, chosen to be none": {**TOOLS, "tool_choice": "none", **_writes(CALL)},
            **{f"thought, {name}": fields for name, fields in THOUGHTS.items()},
        }.items()
        for how, more in (("", {}), (", streamed", STREAMED))
    ),
]
