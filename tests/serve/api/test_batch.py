"""/v1/chat/completions/batch over HTTP: one choice for each conversation, each what its own chat would have said."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

TEXTS = ("the quick brown fox", "más ñandú", "你好 世界", "it sleeps")
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 8}


def chat(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def post(server, **fields: Any) -> Any:
    return server.post("/v1/chat/completions/batch", json=fields)


@settings(max_examples=10)
@given(texts=st.lists(st.sampled_from(TEXTS), min_size=1, max_size=5), logprobs=st.booleans(), ids=st.booleans())
def test_each_choice_is_its_own_chats(server, texts: list[str], logprobs: bool, ids: bool) -> None:
    asked = {**GREEDY, "logprobs": logprobs, "return_token_ids": ids}
    response = post(server, **asked, messages=[chat(text) for text in texts])
    assert response.status_code == 200, response.text
    body = response.json()
    alone = [server.chat(**asked, messages=chat(text)) for text in texts]
    assert body["choices"] == [one["choices"][0] | {"index": index} for index, one in enumerate(alone)]
    assert body["usage"] == {
        **alone[0]["usage"],
        **{
            name: sum(one["usage"][name] for one in alone)
            for name in ("prompt_tokens", "completion_tokens", "total_tokens")
        },
    }
    same = {"id": body["id"], "created": body["created"], "choices": body["choices"], "usage": body["usage"]}
    assert body == alone[0] | same | {"prompt_token_ids": None}
    assert body["id"].startswith("chatcmpl-")


def test_roles_and_echo_are_each_ones_own(server) -> None:
    begun = [*chat("the"), {"role": "assistant", "content": "quick"}]
    other = [*chat("the"), {"role": "user", "content": "fox"}]
    more = {"echo": True, "add_generation_prompt": False, "continue_final_message": True}
    choices = post(server, **GREEDY, **more, messages=[begun, other]).json()["choices"]
    assert [choice["message"]["role"] for choice in choices] == ["assistant", "user"]
    assert choices[0]["message"]["content"].startswith("quick")
    assert choices[1]["message"]["content"].startswith("fox")


@pytest.mark.parametrize(
    ("fields", "param", "sentence"),
    [
        ({"stream": True}, "stream", "Batch chat completions do not support streaming."),
        ({"use_beam_search": True}, "use_beam_search", "Batch chat completions do not support beam search."),
        ({"tools": [{}]}, "tools", "Batch chat completions do not support tools."),
        ({"n": 2}, "n", "Batch chat completions do not support `n > 1`. Please set `n` to 1."),
        ({"temperature": 3}, "temperature", "temperature must be in [0, 2]"),
        ({"messages": [chat("a"), chat("fox " * 300)]}, "input_tokens", "This model's maximum context length is 256"),
        ({"messages": [chat("a"), [{"role": "stranger", "content": "a"}]]}, "messages", "No strangers, please."),
        ({"messages": [chat("a")] * 1025}, "messages", "messages has 1025 chats; it may have 1024."),
    ],
)
def test_what_cannot_be_asked(server, fields: dict[str, Any], param: str, sentence: str) -> None:
    response = post(server, **{**GREEDY, "messages": [chat("a")], **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("BadRequestError", param)
    assert sentence in error["message"]
    assert server.metric("num_requests_running") == 0


def test_what_has_the_wrong_type(server) -> None:
    for fields, param in (
        ({"messages": []}, "messages"),
        ({"messages": [[]]}, "messages"),
        ({"messages": chat("a")}, "messages"),
        ({"messages": [chat("a")], "temperature": "hot"}, "temperature"),
    ):
        response = post(server, **{**GREEDY, **fields})
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["type"], error["param"].removeprefix("body.").split(".")[0]) == ("Bad Request", param)
    assert post(server, messages=[chat("a")], model="nobody").status_code == 404
