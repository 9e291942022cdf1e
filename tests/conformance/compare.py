"""How two answers to one request are compared: every path at which they differ.

Exactly: status, names of fields with their nulls, error type, param and code, reasons, usage, texts and token ids.
To 1e-3: log-probabilities. By form: ids, times. Error messages have to begin as vLLM's where its contract documents
them (`texts.py`). A stream is folded first: for each choice its first, middle and last chunk's fields, and all that it
said, joined; then the chunk with the usage, and [DONE].
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.conformance.case import Answer
from tests.conformance.texts import same_text

CLOSE = 1e-3  # of log-probabilities
# What differs between two answers of one server, too: ids and times.
RANDOM = re.compile(
    r"((?:chatcmpl|cmpl|modelperm|resp|msg|rs|call|fc|toolu|chatcmpl-tool|beam_search)[-_]+)[0-9a-f]{8,}.*"
)
TIMES = {"created", "created_at", "completed_at"}
OWN_HEADERS = {"date", "server", "content-length", "connection", "transfer-encoding"}  # the transport's
DRAWN = {
    "text", "content", "token_ids", "logprobs", "finish_reason", "stop_reason", "completion_tokens", "total_tokens",
    "reasoning", "tool_calls", "output", "output_tokens",
}  # fmt: skip


class _Missing:
    def __repr__(self) -> str:
        return "(absent)"


MISSING = _Missing()


@dataclass(frozen=True)
class Difference:
    """Where two answers differ: a dotted path, and what either has there."""

    path: str
    ours: Any
    theirs: Any

    def __str__(self) -> str:
        return f"{self.path}: ours {str(self.ours)[:600]!r}, vLLM's {str(self.theirs)[:600]!r}"


def compare(ours: Answer, theirs: Answer, *, shape: bool = False, chunks: bool = False) -> list[Difference]:
    """All differences; those of bodies only if the statuses are equal. `shape`: of what is drawn, the form alone.
    `chunks`: streams have to be cut at the same tokens.
    """
    if ours.status != theirs.status:
        return [Difference("status", ours.status, theirs.status)]
    found = [*_walk("headers", _headers(ours), _headers(theirs))]
    if ours.stream != theirs.stream:
        return [*found, Difference("stream", ours.stream, theirs.stream)]
    mine, other = ours.body, theirs.body
    if ours.stream:
        mine, other = fold(mine, chunks=chunks), fold(other, chunks=chunks)
    if shape:
        mine, other = form(mine), form(other)
    return [*found, *_walk("body", mine, other)]


def _headers(answer: Answer) -> dict[str, str]:
    """Numbers left out: a port, and what a load is."""
    return {name: re.sub(r"[\d.]*\d", "#", value) for name, value in answer.headers.items() if name not in OWN_HEADERS}


# ---------------------------------------------------------------- values


def _walk(path: str, ours: Any, theirs: Any) -> Iterator[Difference]:
    name = path.rsplit(".", 1)[-1]
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        if _is_tokens(path):
            yield from _tokens(path, ours, theirs)
            return
        for key in [*theirs, *(key for key in ours if key not in theirs)]:
            mine, other = ours.get(key, MISSING), theirs.get(key, MISSING)
            if mine is MISSING or other is MISSING:
                yield Difference(f"{path}.{key}", mine, other)
            else:
                yield from _walk(f"{path}.{key}", mine, other)
    elif isinstance(ours, list) and isinstance(theirs, list):
        if name == "top_logprobs" and all(isinstance(one, dict) and "token" in one for one in ours + theirs):
            yield from _tokens(path, _by_token(ours), _by_token(theirs))
            return
        if len(ours) != len(theirs):
            yield Difference(f"{path}.length", len(ours), len(theirs))
        for i, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
            yield from _walk(f"{path}.{i}", mine, other)
    elif not _same(name, ours, theirs, path):
        yield Difference(path, ours, theirs)


def _same(name: str, ours: Any, theirs: Any, path: str) -> bool:
    if name in TIMES and isinstance(ours, (int, float)) and isinstance(theirs, (int, float)):
        return type(ours) is type(theirs)
    if type(ours) is not type(theirs) and not (_number(ours) and _number(theirs)):
        return False
    if name == "rank" and _number(ours) and _number(theirs):
        return abs(ours - theirs) <= 1 + 0.01 * max(ours, theirs)  # far down the list many are within the tolerance
    if isinstance(ours, float) or isinstance(theirs, float):
        return abs(ours - theirs) <= CLOSE
    if name == "message" and "error" in path.split("."):
        return same_text(ours, theirs)
    if isinstance(ours, str):
        return _fixed(ours) == _fixed(theirs)
    return bool(ours == theirs)


def _fixed(text: str) -> str:
    """Without what is random in an id."""
    return "modelperm-*" if text.startswith("modelperm-") else RANDOM.sub(r"\1*", text)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# ---------------------------------------------------------------- the likeliest tokens of a position


def _is_tokens(path: str) -> bool:
    """An element of a completion's top_logprobs, or of prompt_logprobs: an object with a key for each token."""
    parts = path.split(".")
    return len(parts) > 1 and parts[-2] in ("top_logprobs", "prompt_logprobs") and parts[-1].isdigit()


def _by_token(listed: list[dict[str, Any]]) -> dict[str, Any]:
    return {str(one["token"]): one for one in listed}


def _logprob(value: Any) -> float:
    return float(value["logprob"] if isinstance(value, Mapping) else value)


def _tokens(path: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Difference]:
    """Those at the end of the list may be others, if they are as likely."""
    if len(ours) != len(theirs):
        yield Difference(f"{path}.length", sorted(ours), sorted(theirs))
        return
    last = min((_logprob(value) for value in theirs.values()), default=0.0)
    for token in [*theirs, *(token for token in ours if token not in theirs)]:
        mine, other = ours.get(token, MISSING), theirs.get(token, MISSING)
        if mine is MISSING or other is MISSING:
            if abs(_logprob(other if mine is MISSING else mine) - last) > 2 * CLOSE:
                yield Difference(f"{path}.{token}", mine, other)
        else:
            yield from _walk(f"{path}.{token}", mine, other)


# ---------------------------------------------------------------- forms and streams


def form(value: Any, drawn: bool = False) -> Any:
    """The answer with what is drawn at random reduced to types; the rest as it is."""
    if isinstance(value, Mapping):
        made = {}
        for key, one in value.items():
            if drawn and key in ("top_logprobs",) and isinstance(one, Mapping):
                made[key] = "tokens"
            else:
                made[key] = form(one, drawn or key in DRAWN)
        return made
    if isinstance(value, list):
        if not drawn:
            return [form(one, drawn) for one in value]
        return ["some"] if value else []
    return ("a number" if _number(value) else type(value).__name__) if drawn else value


def fold(stream: list[Any], *, chunks: bool = False) -> dict[str, Any]:
    """A stream of completions or of a chat as one object, whose parts do not depend on how it was cut."""
    done = bool(stream) and stream[-1] == "[DONE]"
    listed = stream[:-1] if done else stream
    if any("event" in event for event in listed):
        return {"events": _named(listed), "done": done}
    heads, choices, tail = [], {}, []
    for event in listed:
        if event.get("choices"):
            heads.append({key: value for key, value in event.items() if key not in ("choices", "usage")})
            for choice in event["choices"]:
                rest = {key: value for key, value in event.items() if key != "choices"}
                choices.setdefault(str(choice.get("index")), []).append({"choice": choice, **rest})
        else:
            tail.append(event)
    folded: dict[str, Any] = {"head": heads[0] if heads else None, "choices": {}, "tail": tail, "done": done}
    for index in sorted(choices, key=int):
        folded["choices"][index] = _one(choices[index], chunks)
    return folded


def _one(parts: list[dict[str, Any]], chunks: bool) -> dict[str, Any]:
    """All chunks of a choice."""
    said: dict[str, Any] = {}
    for part in parts:
        _join(said, part["choice"])
    made = {"first": fields(parts[0]), "last": fields(parts[-1]), "said": said}
    middle: list[Any] = []
    for part in parts[1:-1]:
        shape = fields(part)
        if shape not in middle:
            middle.append(shape)
    made["between"] = sorted(middle, key=str)
    usages = [part["usage"] for part in parts if part.get("usage")]
    if usages:
        made["last usage"] = usages[-1]
    if chunks:
        made["cut"] = [len(part["choice"].get("token_ids") or []) for part in parts]
    return made


def _join(said: dict[str, Any], part: Mapping[str, Any]) -> None:
    for key, value in part.items():
        if value is None:
            said.setdefault(key, None)
        elif key == "index" or said.get(key) is None:
            said[key] = _calls(value) if key == "tool_calls" else _copy(value)
        elif isinstance(value, Mapping):
            _join(said[key], value)
        elif key == "tool_calls":
            said[key] = _calls([*said[key], *value])
        elif key in ("role", "finish_reason", "stop_reason", "type", "id"):
            said[key] = value
        elif key == "text_offset" or isinstance(value, (str, list)):
            said[key] = said[key] + value


def _calls(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The parts of each call put together."""
    made: dict[int, dict[str, Any]] = {}
    for part in parts:
        call = made.setdefault(part["index"], {"function": {"name": "", "arguments": ""}})
        function = part["function"]
        for key in ("name", "arguments"):
            call["function"][key] += function.get(key) or ""
        call |= {key: value for key, value in part.items() if key != "function"}
    return [made[index] for index in sorted(made)]


def _copy(value: Any) -> Any:
    return {key: _copy(one) for key, one in value.items()} if isinstance(value, Mapping) else value


def fields(value: Any) -> Any:
    """Names and nulls alone; a list by its first element."""
    if isinstance(value, Mapping):
        return {key: fields(one) for key, one in value.items() if key not in ("top_logprobs", "bytes")}
    if isinstance(value, list):
        return [fields(one) for one in value[:1]]
    return type(value).__name__


def _named(listed: list[Any]) -> list[Any]:
    """Named events (responses, messages): their names and fields, runs of one kind once, and their texts joined."""
    made: list[Any] = []
    for event in listed:
        name, data = event.get("event"), event.get("data", event)
        shape = {"event": name, "fields": fields(data)}
        text = data.get("delta") if isinstance(data, Mapping) else None
        if isinstance(text, Mapping):
            text = next((one for key, one in text.items() if key != "type" and isinstance(one, str)), None)
        if made and made[-1]["event"] == name and made[-1]["fields"] == shape["fields"]:
            if isinstance(text, str):
                made[-1]["text"] += text
            continue
        if isinstance(text, str):
            shape["text"] = text
        made.append(shape)
    return made
