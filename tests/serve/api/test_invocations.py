"""/invocations, which answers by what the body is; and routes that say that there is nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

CHAT = [{"role": "user", "content": "the quick brown fox"}]
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 8}


def same(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in ("id", "created")}


def test_a_body_with_messages_is_a_chat_and_any_other_a_completion(server) -> None:
    for body, path in (
        ({**GREEDY, "messages": CHAT}, "/v1/chat/completions"),
        ({**GREEDY, "prompt": "the quick"}, "/v1/completions"),
        ({**GREEDY, "prompt": [[1, 2], [3]], "n": 2, "temperature": 1, "seed": 1}, "/v1/completions"),
    ):
        answer, known = server.post("/invocations", json=body), server.post(path, json=body)
        assert answer.status_code == known.status_code == 200
        assert same(answer.json()) == same(known.json())
        streamed = server.post("/invocations", json={**body, "stream": True})
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert streamed.text.endswith("data: [DONE]\n\n")


def test_what_is_neither(server) -> None:
    for body in ({}, {"messages": "x"}, {"prompt": 3}, [], "x", None, {"messages": CHAT, "max_tokens": 0}):
        response = server.post("/invocations", json=body)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["code"] == 400
    for content in (b"", b"{", b'{"prompt": "\xff"}', b"[" * 5000):
        response = server.post("/invocations", content=content, headers={"content-type": "application/json"})
        assert response.status_code == 400, response.text
    assert server.post("/invocations", content=b'{"prompt": "a"}').status_code == 400  # no JSON, it says
    assert server.post("/invocations", json={**GREEDY, "prompt": "a", "model": "nobody"}).status_code == 404


@pytest.fixture(scope="module")
def small(launching, folder, tmp_path_factory) -> Iterator[Any]:
    """With a key, and room for two sequences."""
    flags = ["--max-num-seqs", "1", "--max-num-queued-reqs", "2", "--kv-cache-memory-bytes", "8M"]
    flags += ["--enable-tokenizer-info-endpoint"]
    log = tmp_path_factory.mktemp("log") / "serve.log"
    running = launching(folder, log, "--served-model-name", "tiny", "--api-key", "secret", *flags)
    yield running
    running.end()


def test_the_key_guards_it(small) -> None:
    asked: dict[str, Any] = {"json": {"prompt": "a", "max_tokens": 1}}
    for path in ("/invocations", "/v1/responses", "/v1/messages", "/v1/chat/completions/batch"):
        assert small.post(path, **asked).status_code == 401
    for headers in ({"Authorization": "Bearer secret"}, {"x-api-key": "secret"}):
        assert small.post("/invocations", **asked, headers=headers).status_code == 200


def test_the_tokenizer_is_shown_where_that_was_asked(small, server, folder) -> None:
    assert httpx.get(server.url + "/tokenizer_info").status_code == 404
    assert httpx.get(small.url + "/tokenizer_info").status_code == 401
    shown = httpx.get(small.url + "/tokenizer_info", headers={"x-api-key": "secret"}).json()
    saved = json.loads((folder / "tokenizer_config.json").read_text())
    assert shown == saved | {"chat_template": (folder / "chat_template.jinja").read_text()}
    assert shown["tokenizer_class"]


def test_a_batch_larger_than_the_server(small) -> None:
    def post(count: int) -> httpx.Response:
        body = {**GREEDY, "messages": [CHAT] * count}
        return small.post("/v1/chat/completions/batch", json=body, headers={"x-api-key": "secret"})

    assert post(3).status_code == 400
    assert "3 sequences at once; this server takes 2" in post(3).json()["error"]["message"]
    assert post(2).status_code == 200


def test_what_there_is_none_of(server) -> None:
    assert httpx.get(server.url + "/kv_event_sources").json() == {}
    assert server.post("/is_scaling_elastic_ep").json() == {"is_scaling_elastic_ep": False}


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions/render",
        "/v1/chat/completions/derender",
        "/v1/completions/render",
        "/v1/completions/derender",
        "/v1/messages/render",
        "/v1/responses/render",
        "/inference/v1/generate",
    ],
)
def test_scale_out_is_off(server, path: str) -> None:
    response = server.post(path, json={})
    assert response.status_code == 403
    error = response.json()["error"]
    assert error["message"].startswith("Scale-out endpoints are disabled")
    assert error == {"message": error["message"], "type": "PermissionDeniedError", "param": None, "code": 403}


@pytest.mark.parametrize("path", ["/v1/embeddings", "/generative_scoring", "/v1/systemone", "/scale_elastic_ep"])
def test_what_is_not_built_says_so(server, path: str) -> None:
    response = server.post(path, json={"input": "a"})
    assert response.status_code == 501
    assert response.json()["error"]["type"] == "NotImplementedError"
