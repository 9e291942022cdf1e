"""Requests for the fuzzer: valid ones of every route, what may be done to them, and what was never a request."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass, field
from typing import Any

HEADERS = {"content-type": "application/json"}
CHAT = [{"role": "user", "content": "the fox"}]
TOOL = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a"]}

# Valid bodies, by route. Few tokens each: what is tried is the way to the engine, not the engine's patience.
SMALL: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"prompt": "the fox", "max_tokens": 4},
        {"prompt": ["the", "fox"], "max_tokens": 2, "n": 2, "logprobs": 2, "echo": True},
        {"prompt": [1, 2, 3], "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}},
        {"prompt": [[1], [2, 3]], "max_tokens": 2, "prompt_logprobs": 1, "return_token_ids": True},
        {"prompt": "a", "max_tokens": 4, "use_beam_search": True, "n": 3, "length_penalty": 0.5},
        {"prompt": "a", "max_tokens": 6, "stop": ["e", "fox"], "min_tokens": 1, "logit_bias": {"5": 2}, "seed": 3},
        {"prompt": "a", "max_tokens": 6, "bad_words": ["fox"], "allowed_token_ids": [5, 6, 7], "stop_token_ids": [6]},
        {"prompt": "a", "max_tokens": 6, "structured_outputs": {"choice": ["yes", "no"]}},
        {"prompt": "a", "max_tokens": 6, "structured_outputs": {"regex": "[ab]{1,3}"}},
        {"prompt": "a", "max_tokens": 6, "structured_outputs": {"grammar": 'start: "a" | "b"'}},
        {"prompt": "a", "max_tokens": 8, "repetition_detection": {"max_pattern_size": 2, "min_count": 3}},
        {"prompt": "a b c", "max_tokens": 2, "truncate_prompt_tokens": 2, "cache_salt": "s", "priority": 3},
    ],
    "/v1/chat/completions": [
        {"messages": CHAT, "max_tokens": 4},
        {"messages": CHAT, "max_completion_tokens": 4, "n": 2, "logprobs": True, "top_logprobs": 3, "stream": True},
        {"messages": CHAT, "max_tokens": 12, "tools": [TOOL], "tool_choice": "auto"},
        {"messages": CHAT, "max_tokens": 16, "tools": [TOOL], "tool_choice": "required", "stream": True},
        {"messages": CHAT, "max_tokens": 8, "response_format": {"type": "json_object"}},
        {
            "messages": CHAT,
            "max_tokens": 12,
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
        },
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "hi"}]},
                {"role": "assistant", "content": None, "tool_calls": [{"id": "1", **TOOL}]},
                {"role": "tool", "content": "x", "tool_call_id": "1"},
            ],
            "max_tokens": 2,
        },
        {"messages": CHAT, "max_tokens": 2, "add_generation_prompt": False, "continue_final_message": True},
        {"messages": CHAT, "max_tokens": 2, "chat_template_kwargs": {"a": 1}, "reasoning_effort": "low", "echo": True},
    ],
    "/v1/chat/completions/batch": [{"messages": [CHAT, CHAT], "max_tokens": 2}],
    "/v1/responses": [
        {"input": "the fox", "max_output_tokens": 4},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "fox"}]}], "max_output_tokens": 4},
        {"input": "fox", "instructions": "be kind", "max_output_tokens": 4, "stream": True, "temperature": 0},
    ],
    "/v1/messages": [
        {"messages": CHAT, "max_tokens": 4},
        {"messages": CHAT, "max_tokens": 4, "stream": True, "system": "be kind", "stop_sequences": ["e"]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "fox"}]}], "max_tokens": 2},
    ],
    "/v1/messages/count_tokens": [{"messages": CHAT}],
    "/invocations": [{"prompt": "fox", "max_tokens": 2}, {"messages": CHAT, "max_tokens": 2}],
    "/tokenize": [{"prompt": "the fox"}, {"messages": CHAT, "return_token_strs": True}],
    "/detokenize": [{"tokens": [1, 2, 3]}],
}
PLAIN = (
    "/health", "/ping", "/live", "/version", "/load", "/metrics", "/v1/models", "/v1/models/tiny", "/openapi.json",
    "/docs", "/tokenizer_info", "/v1/responses/resp_1", "/kv_event_sources", "/", "/nothing", "//v1/models",
    "/v1/../metrics", "/v1/models/%00", "/v1/models/%ff%fe", "/v1/models/" + "a" * 500, "/V1/Models", "/v1/embeddings",
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 128, 2**31, 2**63, -(2**63), 10**40, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", " ", "a", "\0", "é", "\ud800", "🎉" * 50, "a" * 3000, "{{ messages }}", "1", "null", "-1", "[]", [], [[]],
    [None], ["a", 1], [1.5], [-1], [2**70], [[[]]], {}, {"": None}, {"a": {"a": {}}}, {"type": "text"},
    {"type": "image_url"},
    [{"role": "user"}], [{"type": "text"}], "(a+)+$", {"$ref": "#"}, {"type": ["object", 5]}, {"enum": []},
)  # fmt: skip
LONG = ("x" * 60_000, [1] * 20_000, ["a"] * 1500, [[1]] * 1500, {str(i): 1 for i in range(3000)}, "the fox " * 3000)
FIELDS = sorted({name for bodies in SMALL.values() for body in bodies for name in body}) + [
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "logprob_token_ids", "stream_interval", "skip_special_tokens", "spaces_between_special_tokens", "suffix",
    "best_of", "add_special_tokens", "return_tokens_as_token_ids", "request_id", "user", "model", "documents",
    "thinking_token_budget", "include_stop_str_in_output", "ignore_eos", "truncation_side", "prompt_embeds",
    "chat_template", "vllm_xargs", "kv_transfer_params", "parallel_tool_calls", "tool_choice", "metadata",
    "previous_response_id",
]  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One request, and whether its client goes without waiting for the answer."""

    method: str
    path: str
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    leaves: bool = False

    @property
    def stream(self) -> bool:
        return b'"stream": true' in self.body

    @property
    def head(self) -> list[tuple[bytes, bytes]]:
        return [(name.encode(), value.encode("latin-1")) for name, value in self.headers.items()]

    def told(self) -> str:
        """For a person who wants to try it again."""
        return f"{self.method} {self.path}\n{self.headers}\n{self.body[:20_000]!r}"


class Maker:
    """Calls at random; the same generator makes the same calls."""

    def __init__(self, random: random.Random) -> None:
        self._random = random

    def call(self) -> Call:
        draw = self._random
        kind = draw.random()
        if kind < 0.08:
            method = draw.choice(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
            return Call(method, draw.choice([*PLAIN, *SMALL]), b"", self._headers())
        path = draw.choice(list(SMALL))
        if kind < 0.16:
            return Call("POST", path, self._bytes(path), self._headers())
        body = copy.deepcopy(draw.choice(SMALL[path]))
        for _ in range(draw.choice([0, 1, 1, 1, 2, 2, 3, 5])):
            body = self._changed(body)
        return Call("POST", path, _json(body), self._headers(), leaves=draw.random() < 0.03)

    def _changed(self, body: Any) -> Any:
        """One change somewhere in it."""
        draw = self._random
        if not isinstance(body, (dict, list)) or not body or draw.random() < 0.02:
            return self._value()
        if isinstance(body, dict):
            kind = draw.random()
            name = draw.choice(list(body))
            if kind < 0.35:
                body[draw.choice(FIELDS)] = self._value()
            elif kind < 0.45:
                del body[name]
            elif kind < 0.5:
                body[str(draw.choice(ODD))[:40]] = body[name]
            elif kind < 0.7:
                body[name] = self._value()
            else:
                body[name] = self._changed(body[name])
            return body
        index = draw.randrange(len(body))
        if draw.random() < 0.2:
            return body * draw.choice([0, 2, 40])
        body[index] = self._changed(body[index]) if draw.random() < 0.7 else self._value()
        return body

    def _value(self) -> Any:
        draw = self._random
        kind = draw.random()
        if kind < 0.02:
            return copy.deepcopy(draw.choice(LONG))
        if kind < 0.04:
            return _nested(draw.choice([20, 70, 200]), draw.random() < 0.5)
        if kind < 0.12:
            return draw.choice([draw.randint(-5, 400), draw.uniform(-3, 3), draw.getrandbits(70)])
        if kind < 0.2:
            return "".join(chr(draw.choice([draw.randrange(1, 128), draw.randrange(0x3000)])) for _ in range(8))
        if kind < 0.28:
            other = draw.choice(draw.choice(list(SMALL.values())))
            return copy.deepcopy(draw.choice(list(other.values())))
        return copy.deepcopy(draw.choice(ODD))

    def _bytes(self, path: str) -> bytes:
        """A body that was never JSON, or is no more."""
        draw = self._random
        whole = _json(draw.choice(SMALL[path]))
        kind = draw.randrange(6)
        if kind == 0:
            return draw.randbytes(draw.choice([0, 1, 40, 5000]))
        if kind == 1:
            return whole[: draw.randrange(len(whole))]
        if kind == 2:
            return b"[" * draw.choice([50, 5000]) + whole
        if kind == 3:
            at = draw.randrange(len(whole))
            return whole[:at] + draw.randbytes(3) + whole[at:]
        if kind == 4:
            return whole.decode().encode(draw.choice(["utf-16", "utf-32", "utf-8-sig"]))
        return whole + whole

    def _headers(self) -> dict[str, str]:
        draw = self._random
        if draw.random() < 0.9:
            return HEADERS
        return HEADERS | draw.choice(
            [
                {"content-type": "text/plain"},
                {"content-type": "application/json; charset=utf-16"},
                {"content-type": ""},
                {"authorization": "Bearer " + "x" * 300},
                {"authorization": "Basic \u00e9"},
                {"x-request-id": "a\u00ff/../" * 40},
                {"x-vllm-priority": draw.choice(["1", "-99999999999999999999", "high", ""])},
                {"content-encoding": "gzip"},
                {"accept": "text/event-stream"},
                {"expect": "100-continue"},
                {"x-padding": "y" * 20_000},
                {"origin": "http://elsewhere"},
                {"endpoint-load-metrics-format": draw.choice(["JSON", "TEXT", "?"])},
                {"x-session-id": "s", "x-data-parallel-rank": "-1"},
            ]
        )


def _json(body: Any) -> bytes:
    try:
        return json.dumps(body).encode()
    except RecursionError:
        return b'{"prompt": ' + b"[" * 3000 + b"]" * 3000 + b"}"


def _nested(depth: int, lists: bool) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if lists else {"properties": value}
    return value
