"""Requests for answers of a form: response_format, structured_outputs, and the tools that a plain server refuses."""

from __future__ import annotations

import json
from typing import Any

from tests.conformance.case import MODEL, Case

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer", "minimum": 1}},
    "required": ["city", "people"],
    "additionalProperties": False,
}
ENUM = {"enum": ["Paris", "Rome", "Berlin"]}
HELLO = [{"role": "user", "content": "What is the capital of France?"}]
FUNCTION = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
NAMED = {"type": "function", "function": {"name": "look"}}


def _deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def _schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


FORMS: dict[str, dict[str, Any]] = {
    "a schema": {"structured_outputs": {"json": SCHEMA}},
    "a schema as text": {"structured_outputs": {"json": json.dumps(SCHEMA)}},
    "an enumeration": {"structured_outputs": {"json": ENUM}},
    "a regular expression": {"structured_outputs": {"regex": "(Paris|Rome) is [a-z]{3,8}!"}},
    "a choice": {"structured_outputs": {"choice": ["Paris", "Rome", "Parma is"]}},
    "a choice with signs": {"structured_outputs": {"choice": ['a "quoted" one', "Zürich", "a\\b"]}},
    "a grammar": {"structured_outputs": {"grammar": 'start: "The" (" big" | " old")+ " " /[a-z]{4}/'}},
    "another grammar": {"structured_outputs": {"grammar": 'root ::= "yes" | "no" " " [a-z]+'}},
    "an object": {"structured_outputs": {"json_object": True}},
    "response_format of an object": {"response_format": {"type": "json_object"}},
    "response_format of a schema": {"response_format": _schema(SCHEMA)},
    "response_format of text": {"response_format": {"type": "text"}},
    "an empty expression": {"structured_outputs": {"regex": ""}},
}
ALONG: dict[str, dict[str, Any]] = {
    "streamed": {"stream": True, "stream_options": {"include_usage": True}},
    "with ids": {"return_token_ids": True},
    "cut": {"max_tokens": 2},
    "stopped": {"stop": ["is"]},
}
REFUSED: dict[str, dict[str, Any]] = {
    "nothing named": {"structured_outputs": {}},
    "two kinds": {"structured_outputs": {"regex": "a", "choice": ["b"]}},
    "two kinds of any": {"structured_outputs": {"regex": "a", "grammar": 'start: "a"'}},
    "a kind and a format": {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
    "no choice": {"structured_outputs": {"choice": []}},
    "a choice of numbers": {"structured_outputs": {"choice": [1]}},
    "a choice that is a text": {"structured_outputs": {"choice": "yes"}},
    "an empty grammar": {"structured_outputs": {"grammar": " "}},
    "a grammar of nothing": {"structured_outputs": {"grammar": "start: nowhere"}},
    "an empty schema text": {"structured_outputs": {"json": ""}},
    "a schema that is no JSON": {"structured_outputs": {"json": "{"}},
    "a schema of a strange type": {"structured_outputs": {"json": {"type": "nothing"}}},
    "a schema that is a number": {"structured_outputs": {"json": 5}},
    "a schema nested deeply": {"structured_outputs": {"json": _deep(65)}},
    "a NUL": {"structured_outputs": {"regex": "a\0"}},
    "an open bracket": {"structured_outputs": {"regex": "("}},
    "a look ahead": {"structured_outputs": {"regex": "(?=a)b"}},
    "a regular expression that is a number": {"structured_outputs": {"regex": 5}},
    "no object": {"structured_outputs": {"json_object": False}},
    "an empty structural tag": {"structured_outputs": {"structural_tag": ""}},
    "a format without a schema": {"response_format": {"type": "json_schema"}},
    "a format without a name": {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
    "a format whose schema is missing": {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
    "a structural tag without parts": {"response_format": {"type": "structural_tag"}},
    "a budget without a parser": {"thinking_token_budget": 5},
}
TOOLS: dict[str, dict[str, Any]] = {
    "tools": {"tools": [FUNCTION]},
    "tools that have to be called": {"tools": [FUNCTION], "tool_choice": "required"},
    "a named tool": {"tools": [FUNCTION], "tool_choice": NAMED},
    "a named tool that is not there": {"tools": [FUNCTION], "tool_choice": {"function": {"name": "nobody"}}},
    "a choice of a tool without a function": {"tools": [FUNCTION], "tool_choice": {}},
    "a choice of a tool without a name": {"tools": [FUNCTION], "tool_choice": {"function": {}}},
    "a choice of a tool that is no text": {"tools": [FUNCTION], "tool_choice": {"function": {"name": 5}}},
    "a named tool and an expression": {"tools": [FUNCTION], "tool_choice": NAMED, "structured_outputs": {"regex": "a"}},
    "no tool": {"tools": [FUNCTION], "tool_choice": "none", "max_tokens": 3},
    "a tool without a function": {"tools": [{"type": "function"}]},
    "a tool without a name": {"tools": [{"type": "function", "function": {}}]},
    "a tool of another kind": {"tools": [{"type": "code", "function": {"name": "f"}}]},
}


def _completion(name: str, fields: dict[str, Any]) -> Case:
    body = {"model": MODEL, "prompt": "The capital of France is ", "max_tokens": 24, "temperature": 0} | fields
    return Case(f"structured/{name}", "/v1/completions", body)


def _chat(name: str, fields: dict[str, Any]) -> Case:
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 24, "temperature": 0} | fields
    return Case(f"structured/chat, {name}", "/v1/chat/completions", body)


CASES: list[Case] = [
    *(_completion(name, fields) for name, fields in FORMS.items()),
    *(_chat(name, fields) for name, fields in FORMS.items()),
    *(_completion(f"a schema, {how}", FORMS["a schema"] | more) for how, more in ALONG.items()),
    *(_chat(f"an expression, {how}", FORMS["a regular expression"] | more) for how, more in ALONG.items()),
    _completion("a choice with logprobs", FORMS["a choice"] | {"logprobs": 2, "return_token_ids": True}),
    _chat("a choice with logprobs", FORMS["a choice"] | {"logprobs": True, "top_logprobs": 2}),
    *(_completion(name, fields) for name, fields in REFUSED.items()),
    *(_chat(name, fields) for name, fields in (REFUSED | TOOLS).items()),
]
