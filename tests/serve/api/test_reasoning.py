"""Thoughts over HTTP: told from the answer, before its grammar, within a budget."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lm import DecoderConfig, DecoderLM, pretrained
from lm.tokenizer import train_bpe

ROOT = Path(__file__).resolve().parents[3]
TEMPLATE = """{% for message in messages %}{{ message.role[0] }}: {{ message.content }}{{ eos_token }}{% endfor %}
{%- if add_generation_prompt %}a: {% if enable_thinking is defined and not enable_thinking %}<think></think>
{%- elif opens %}<think>{% endif %}{% endif %}"""
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "the quick"}],
    "max_tokens": 40,
    "temperature": 1,
    "seed": 1,
}
DATE = {"structured_outputs": {"regex": r"[12]\d{3}-[01]\d"}}
A_DATE = re.compile(r"[12]\d{3}-[01]\d")
OPENS = {"chat_template_kwargs": {"opens": True}}


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose tokenizer has the tags as tokens."""
    words = train_bpe(["the quick brown fox jumps over the lazy dog, and then it sleeps. " * 4], 320)
    words.inner.add_tokens(["<think>", "</think>"])
    torch.manual_seed(1)
    size = words.inner.get_vocab_size()
    model = DecoderLM(DecoderConfig(vocab_size=size, context=256, layers=1, width=32, heads=2)).eval()
    path = tmp_path_factory.mktemp("thinker") / "tiny"
    pretrained.save(model, path, tokenizer=words)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def thinking(thinker: Path, launching) -> Iterator[Any]:
    flags = ["--served-model-name", "tiny", "--reasoning-parser", "qwen3", "--kv-cache-memory-bytes", "16M"]
    tools = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    running = launching(thinker, thinker.parent / "log", *flags, *tools)
    yield running
    running.end()


def both(server: Any, **fields: Any) -> tuple[str | None, str | None, str]:
    """Reasoning, content and reason, of a body and of a stream that has to say the same."""
    (choice,) = server.chat(**fields)["choices"]
    message = choice["message"]
    response = server.post("/v1/chat/completions", json={**fields, "stream": True})
    parts: dict[str, str] = {"reasoning": "", "content": ""}
    reason = None
    for line in response.text.splitlines():
        if line.startswith("data: {"):
            (piece,) = json.loads(line[6:])["choices"]
            for name in parts:
                parts[name] += piece["delta"].get(name) or ""
            reason = piece["finish_reason"] or reason
    assert parts == {"reasoning": message["reasoning"] or "", "content": message["content"] or ""}
    assert reason == choice["finish_reason"]
    return message["reasoning"], message["content"], choice["finish_reason"]


def test_thoughts_are_told_from_the_answer_and_the_grammar_is_its(thinking) -> None:
    reasoning, content, reason = both(thinking, **CHAT, **DATE, **OPENS, thinking_token_budget=6)
    assert reasoning
    assert content
    assert A_DATE.fullmatch(content)
    assert reason == "stop"
    ids = thinking.chat(**CHAT, **DATE, **OPENS, thinking_token_budget=6, return_token_ids=True)["choices"][0]
    tags = thinking.post("/tokenize", json={"prompt": "<think></think>"}).json()["tokens"]
    assert ids["token_ids"].index(tags[1]) <= 6


def test_a_model_that_only_thinks_has_no_content(thinking) -> None:
    reasoning, content, reason = both(thinking, **{**CHAT, "max_tokens": 8}, **OPENS, ignore_eos=True)
    assert reasoning
    assert (content, reason) == (None, "length")


def test_a_prompt_that_ends_the_thoughts_is_followed_by_the_answer(thinking) -> None:
    asked = {"chat_template_kwargs": {"enable_thinking": False}}
    reasoning, content, _ = both(thinking, **CHAT, **DATE, **asked)
    assert reasoning is None
    assert content
    assert A_DATE.fullmatch(content)


def test_thoughts_that_are_not_asked_for_are_not_thought(thinking) -> None:
    hidden = {"include_reasoning": False, "logprobs": True, "return_token_ids": True}
    reasoning, content, _ = both(thinking, **CHAT, **DATE, **OPENS, **hidden)
    assert reasoning is None
    assert content
    assert A_DATE.fullmatch(content)
    (choice,) = thinking.chat(**CHAT, **OPENS, **hidden)["choices"]
    assert choice["message"]["reasoning"] is None
    assert (choice["logprobs"], choice["token_ids"]) == (None, None)


def test_a_tool_is_called_after_the_thoughts(thinking) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"enum": [{"x": 1}]}}}
    fields = {**CHAT, **OPENS, "max_tokens": 100, "tools": [tool], "tool_choice": "required", "seed": 3}
    (choice,) = thinking.chat(**fields, thinking_token_budget=3, parallel_tool_calls=False)["choices"]
    assert choice["message"]["reasoning"]
    (call,) = choice["message"]["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("f", {"x": 1})
    assert choice["finish_reason"] == "tool_calls"


def test_a_completion_is_text_but_its_grammar_waits_too(thinking) -> None:
    fields = {"model": "tiny", "prompt": "the <think>quick", "max_tokens": 40, "seed": 1, "thinking_token_budget": 4}
    text = thinking.complete(**fields, **DATE)["choices"][0]["text"]
    thought, answer = text.split("</think>")
    assert thought
    assert A_DATE.fullmatch(answer)


def test_what_is_refused(thinking, server) -> None:
    for where, budget, sentence in (
        (thinking, -2, "`thinking_token_budget` must be a non-negative integer or -1 for unlimited."),
        (server, 5, "thinking_token_budget is set but reasoning_config is not configured."),
    ):
        response = where.post("/v1/chat/completions", json={**CHAT, "thinking_token_budget": budget})
        assert response.status_code == 400
        assert response.json()["error"]["message"].startswith(sentence)
    assert thinking.chat(**CHAT, thinking_token_budget=-1)["object"] == "chat.completion"


def test_a_tokenizer_without_the_tags_is_told_at_the_start(folder: Path) -> None:
    command = [sys.executable, "-m", "serve", str(folder), "--port", "0", "--reasoning-parser", "deepseek_r1"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert "needs <think> and </think> as tokens" in ended.stderr
