"""response_format and structured_outputs over HTTP: what comes obeys, and nothing hostile keeps the server busy."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import pytest

from lm.tokenizer import Tokenizer
from serve.api.grammars import KEPT, Grammars

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TIGHT = {"disable_any_whitespace": True}
PROMPT = {"model": "tiny", "prompt": "the quick brown fox", "max_tokens": 120, "temperature": 1, "seed": 3}
CHAT = {
    **{key: value for key, value in PROMPT.items() if key != "prompt"},
    "messages": [{"role": "user", "content": "the quick brown fox"}],
}
DATE = {"structured_outputs": {"regex": r"[12]\d{3}-[01]\d"}}


def of_schema(text: str) -> bool:
    value = json.loads(text)
    return (
        list(value) == ["name", "age", "tags"]
        and len(value["name"]) <= 8
        and 0 <= value["age"] <= 150
        and set(value["tags"]) <= {"a", "b"}
    )


CASES: list[tuple[dict[str, Any], Any]] = [
    ({"structured_outputs": {"json": SCHEMA, **TIGHT}}, of_schema),
    ({"structured_outputs": {"json": json.dumps(SCHEMA), **TIGHT}}, of_schema),
    ({"structured_outputs": {"regex": r"[12]\d{3}-[01]\d"}}, re.compile(r"[12]\d{3}-[01]\d").fullmatch),
    ({"structured_outputs": {"choice": ["yes", "no", "perhaps, 你好"]}}, ["yes", "no", "perhaps, 你好"].__contains__),
    ({"structured_outputs": {"grammar": 'start: "fox" ("," "dog")+ "."'}}, re.compile("fox(,dog)+[.]").fullmatch),
    ({"structured_outputs": {"grammar": 'root ::= "a" | "bb"'}}, ["a", "bb"].__contains__),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, "seed": 2},
        of_schema,
    ),
]


@pytest.mark.parametrize(("fields", "obeys"), CASES)
def test_answers_obey_and_end_by_themselves(server, fields: dict[str, Any], obeys: Any) -> None:
    for seed in (3, 4):
        choice = server.complete(**{**PROMPT, "max_tokens": 230, "seed": seed, **fields})["choices"][0]
        assert choice["finish_reason"] == "stop", choice
        assert obeys(choice["text"]), choice["text"]
        said = server.chat(**{**CHAT, "max_tokens": 200, "seed": seed, **fields})["choices"][0]
        assert obeys(said["message"]["content"]), said


def test_any_object_is_json(server) -> None:
    fields = {**PROMPT, "max_tokens": 200, "logit_bias": {}, "response_format": {"type": "json_object"}}
    choice = server.complete(**fields)["choices"][0]
    assert choice["text"].lstrip().startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["text"]), dict)
    text = {"response_format": {"type": "text"}}
    assert server.complete(**PROMPT, **text)["choices"][0] == server.complete(**PROMPT)["choices"][0]


def test_a_stream_is_the_same_and_so_are_several(server, tokenizer: Tokenizer) -> None:
    fields = {**PROMPT, **DATE, "n": 3, "logprobs": 2, "return_token_ids": True}
    whole = server.complete(**fields)["choices"]
    assert len({choice["text"] for choice in whole}) > 1
    response = server.post("/v1/completions", json={**fields, "stream": True})
    texts, ends = ["", "", ""], {}
    for line in response.text.splitlines():
        if line.startswith("data: {"):
            (choice,) = json.loads(line[6:])["choices"]
            texts[choice["index"]] += choice["text"]
            ends[choice["index"]] = choice["finish_reason"] or ends.get(choice["index"])
    assert texts == [choice["text"] for choice in whole]
    assert ends == {0: "stop", 1: "stop", 2: "stop"}
    for choice in whole:
        assert choice["token_ids"][-1] == tokenizer.eos_id
        assert choice["logprobs"]["token_logprobs"][-1] == 0  # EOS, which alone was left


def test_other_fields_keep_their_meaning(server) -> None:
    stopped = server.complete(**{**PROMPT, **DATE, "stop": ["-"]})["choices"][0]
    assert re.fullmatch(r"[12]\d{3}", stopped["text"])
    assert stopped["stop_reason"] == "-"
    least = server.complete(**{**PROMPT, **DATE, "min_tokens": 100})["choices"][0]
    assert re.fullmatch(r"[12]\d{3}-[01]\d", least["text"])
    cut = server.complete(**{**PROMPT, **DATE, "max_tokens": 2})["choices"][0]
    assert cut["finish_reason"] == "length"
    tag = {"triggers": ["<f"], "structures": [{"begin": "<f=a>", "schema": {"enum": [1, 2]}, "end": "</f>"}]}
    (choice,) = server.complete(
        **{**PROMPT, "structured_outputs": {"structural_tag": json.dumps(tag)}, "max_tokens": 8}
    )["choices"]
    assert choice["text"]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"structured_outputs": {}}, "You must use one kind of structured outputs constraint but none are specified"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "You can only use one kind of structured outputs constr"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "You can only use one kind of structured outputs constraint but multiple are specified",
        ),
        ({"structured_outputs": {"choice": []}}, "Choice '[]' cannot be an empty list"),
        ({"structured_outputs": {"grammar": " "}}, "structured_outputs.grammar cannot be an empty string"),
        ({"structured_outputs": {"json": ""}}, "structured_outputs.json cannot be an empty string"),
        ({"structured_outputs": {"json": "{"}}, "Invalid grammar specification: "),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object must be True if set"),
        ({"structured_outputs": {"regex": "a\0"}}, "structured_outputs.regex must not contain a NUL character"),
        ({"structured_outputs": {"regex": "("}}, "Grammar error: "),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "Grammar error: "),
        ({"structured_outputs": {"grammar": "start: nowhere"}}, "Grammar error: "),
        ({"structured_outputs": {"json": {"type": "nothing"}}}, "Grammar error: "),
        ({"structured_outputs": {"structural_tag": "{}"}}, "Invalid grammar specification: "),
        ({"response_format": {"type": "json_schema"}}, "When response_format type is 'json_schema', the 'json_schema'"),
        ({"response_format": {"type": "structural_tag"}}, "Invalid response_format structural_tag specification."),
        ({"structured_outputs": {"regex": "a"}, "use_beam_search": True, "n": 2}, "structured_outputs is not availab"),
    ],
)
def test_what_cannot_be_is_a_sentence(server, fields: dict[str, Any], sentence: str) -> None:
    for path, body in (("/v1/completions", PROMPT), ("/v1/chat/completions", CHAT)):
        response = server.post(path, json={**body, **fields})
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["message"].startswith(sentence)
        assert len(error["message"]) < 400
        assert "\n" not in error["message"]


def test_a_wrong_type_is_told_by_its_place(server) -> None:
    for fields, place in (
        ({"structured_outputs": {"choice": [1]}}, "body.structured_outputs.choice.0"),
        ({"structured_outputs": {"json": 5}}, "body.structured_outputs.json"),
        ({"response_format": {"type": "xml"}}, "body.response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "body.response_format.json_schema.name"),
    ):
        response = server.post("/v1/completions", json={**PROMPT, **fields})
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == place


def test_half_of_a_surrogate_pair_is_a_sentence(server) -> None:
    raw = json.dumps({**PROMPT, "structured_outputs": {"regex": "a\ud800"}})
    response = server.post("/v1/completions", content=raw, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    assert "surrogate" in response.json()["error"]["message"]


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


HOSTILE = [
    {"json": nested(65)},
    {"json": json.dumps(nested(500))},
    {"json": "[" * 100_000},
    {"regex": "(x{1000}){1000}"},
    {"regex": "(" * 20_000 + "a" + ")" * 20_000},
    {"json": {"type": "integer", "multipleOf": 999_983}},
    {"json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}}},
    {"grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(30)) + 'r30: "a"\n'},
    {"choice": ["x" * 100] * 12_000},
]


def test_hostile_grammars_are_refused_and_others_are_answered_meanwhile(server) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for asked in HOSTILE:
            response = client.post("/v1/completions", json={**PROMPT, "structured_outputs": asked})
            assert response.status_code == 400, (str(asked)[:80], response.text[:200])
            assert len(response.json()["error"]["message"]) < 400
        good = client.post("/v1/completions", json={**PROMPT, **DATE})
    assert re.fullmatch(r"[12]\d{3}-[01]\d", good.json()["choices"][0]["text"])


def test_many_choices_are_one_automaton(server) -> None:
    choices = [f"option {i}" for i in range(5000)]
    choice = server.complete(**{**PROMPT, "structured_outputs": {"choice": choices}})["choices"][0]
    assert choice["text"] in choices


def test_grammars_do_not_pile_up(tokenizer: Tokenizer) -> None:
    async def kept() -> int:
        grammars = Grammars(tokenizer, tokenizer.vocab_size, [])
        try:
            for i in range(KEPT + 5):
                await grammars.grammar("regex", f"a{i}", {}, "regex")
            return len(grammars._known)
        finally:
            await grammars.close()

    assert asyncio.run(kept()) == KEPT
