"""Thoughts and calls in what a model writes: the same however the text is cut, and nothing lost that is none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.api.reasoning import ThoughtReader
from serve.api.tool_parsers import PARSERS, CallDelta, calls_of

PIECES = (
    *("<tool_call>", "</tool_call>", "<tool", "_call>", "<think>", "</think>", "</thi", "<|python_tag|>", "<|pyt"),
    *("{", "}", "[", "]", '"', "\\", ",", ":", ";", " ", "\n", "a", "1", "é", "name", '"name"', '"arguments"'),
    *('{"name": "f", "arguments": {"x": [1, "}"]}}', '{"arguments": {"y": "\\"{"}, "name": "g"}', '"parameters": '),
    *('{"name": "h", "parameters": {}}', '{"name": "", "arguments": 1}', '{"name": "k"}', "text before "),
)
texts = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
cuts = st.lists(st.integers(0, 200), max_size=20)


def split(text: str, at: Sequence[int]) -> list[str]:
    places = sorted({min(place, len(text)) for place in at} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(places)]


def read(name: str, parts: Sequence[str]) -> tuple[str, list[tuple[str | None, str]], list[CallDelta]]:
    """The content, the calls by name and arguments, and the deltas that they came in."""
    parser = PARSERS[name]()
    pieces = [parser.feed(part) for part in parts] + [parser.finish()]
    deltas = [delta for piece in pieces for delta in piece.calls]
    calls = [(call.name, call.arguments) for call in calls_of(deltas)]
    return "".join(piece.content for piece in pieces), calls, deltas


def think(parts: Sequence[str], **how: bool) -> tuple[str, str]:
    reader = ThoughtReader(**how)
    thoughts = [reader.feed(part) for part in parts] + [reader.finish()]
    return "".join(t.reasoning for t in thoughts), "".join(t.content for t in thoughts)


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=150, deadline=None)
@given(text=texts, at=cuts)
def test_calls_are_the_same_however_the_text_is_cut(name: str, text: str, at: list[int]) -> None:
    content, calls, deltas = read(name, split(text, at))
    assert (content, calls) == read(name, [text])[:2] == read(name, list(text))[:2]
    for index in range(len(calls)):
        own = [delta for delta in deltas if delta.index == index]
        assert own[0].id
        assert own[0].name
        assert not any(delta.id or delta.name for delta in own[1:])
    if not calls:
        assert content == text


@settings(max_examples=150, deadline=None)
@given(text=texts, at=cuts, over=st.booleans(), again=st.booleans())
def test_thoughts_are_the_same_however_the_text_is_cut(text: str, at: list[int], over: bool, again: bool) -> None:
    parts = think(split(text, at), over=over, ends_again=again)
    assert parts == think([text], over=over, ends_again=again)
    if over and not again:
        assert parts == ("", text)
    if not over and "</think>" not in text:
        assert parts == (text.replace("<think>", ""), "")


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', "", [("f", {"x": 1})]),
        ('I ask.\n<tool_call>{"name": "f", "arguments": {}}</tool_call> then', "I ask.\n", [("f", {})]),
        ('\n\n<tool_call>{"arguments": {"a": "}"}, "name": "f"}</tool_call>', "", [("f", {"a": "}"})]),
        (
            '<tool_call>{"name": "f", "arguments": {"s": "</tool_call>"}}</tool_call>\n<tool_call>\n'
            '{"name": "g", "arguments": [[]]}\n</tool_call>',
            "",
            [("f", {"s": "</tool_call>"}), ("g", [[]])],
        ),
        ('<tool_call>{"nom": "f"}</tool_call>', '<tool_call>{"nom": "f"}</tool_call>', []),
        ("<tool_call>no object", "<tool_call>no object", []),
        ('<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
        ("a < b <tool", "a < b <tool", []),
    ],
)
def test_hermes(text: str, content: str, calls: list[tuple[str, object]]) -> None:
    found, named, _ = read("hermes", [text])
    assert (found, [(name, json.loads(arguments)) for name, arguments in named]) == (content, calls)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('{"name": "f", "parameters": {"x": 1}}', "", [("f", {"x": 1})]),
        ('<|python_tag|>{"name": "f", "arguments": {"x": 1}}', "", [("f", {"x": 1})]),
        (
            '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"a": null}}',
            "",
            [("f", {}), ("g", {"a": None})],
        ),
        ('{"name": "f"}', '{"name": "f"}', []),
        ('It is {"name": "f", "parameters": {}}', 'It is {"name": "f", "parameters": {}}', []),
        ("<|python", "<|python", []),
        ("  ", "  ", []),
    ],
)
def test_llama(text: str, content: str, calls: list[tuple[str, object]]) -> None:
    found, named, _ = read("llama3_json", [text])
    assert (found, [(name, json.loads(arguments)) for name, arguments in named]) == (content, calls)


def test_a_call_that_is_cut_off_has_the_arguments_that_came() -> None:
    for name, mark, key in (("hermes", "<tool_call>", "arguments"), ("llama3_json", "", "parameters")):
        content, calls, deltas = read(name, list(mark + '{"name": "f", "' + key + '": {"x": "lon'))
        assert (content, calls) == ("", [("f", '{"x": "lon')])
        assert len(deltas) > 5  # in pieces


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize("sign", [" ", "<", "{", '"', "a", "<tool_call>", '{"name": "f", "arguments": "'])
def test_no_text_is_read_again_and_again(name: str, sign: str) -> None:
    """What is held back is never longer than a tag."""
    parser = PARSERS[name]()
    for _ in range(2000):
        parser.feed(sign)
        assert len(parser._held) < 20
