"""What requests share and what they do not: prefixes, by key and by salt; and who goes first."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from lm.tokenizer import Tokenizer

FIRST, SECOND = ({"Authorization": f"Bearer {name}"} for name in ("first-key", "second-key"))
PROMPT = "the quick brown fox jumps over the lazy dog, and then it sleeps. " * 6


@pytest.fixture(scope="module")
def shared(folder: Path, tmp_path_factory: pytest.TempPathFactory, launching):
    """A server with two keys and one seat, which goes by priority and tells what was cached."""
    flags = ["--api-key", "first-key", "second-key", "--enable-prompt-tokens-details"]
    flags += ["--scheduling-policy", "priority", "--max-num-seqs", "1", "--enable-log-requests"]
    running = launching(folder, tmp_path_factory.mktemp("log") / "shared.log", *flags)
    yield running
    running.end()


def ask(server, headers: dict[str, str] = FIRST, **fields: Any) -> dict[str, Any]:
    body = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, **fields}
    response = server.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


def cached(body: dict[str, Any]) -> int:
    details = body["usage"]["prompt_tokens_details"]
    assert details.keys() == {"cached_tokens", "created_cache_tokens", "multimodal_tokens"}
    return details["cached_tokens"]


def counters(server) -> dict[str, float]:
    lines = httpx.get(server.url + "/metrics", headers=FIRST).text.splitlines()
    return {line.split("{")[0]: float(line.split()[-1]) for line in lines if line.startswith(("vllm:", "heed:"))}


def test_a_prompt_is_found_by_those_who_may(shared, tokenizer: Tokenizer) -> None:
    length = len(tokenizer.encode(PROMPT))
    most = (length - 1) // 16 * 16
    before = counters(shared)
    first, again = ask(shared), ask(shared)
    assert (cached(first), cached(again)) == (0, most)
    assert first["choices"] == again["choices"]
    assert cached(ask(shared, prompt=PROMPT + "And so on.")) == length // 16 * 16
    assert cached(ask(shared, cache_salt="pepper")) == 0
    assert cached(ask(shared, cache_salt="pepper")) == most
    assert cached(ask(shared, SECOND)) == 0
    assert cached(ask(shared, SECOND, cache_salt="pepper")) == 0
    assert cached(ask(shared, prompt_logprobs=1)) == 0
    several = ask(shared, prompt=[PROMPT, PROMPT], n=2, temperature=1)
    assert cached(several) == 2 * most
    after = counters(shared)
    grown = {name: after[name] - before[name] for name in after}
    assert grown["vllm:prefix_cache_hits_total"] == grown["vllm:prompt_tokens_cached_total"] >= 7 * most
    assert grown["vllm:prefix_cache_queries_total"] >= grown["vllm:prefix_cache_hits_total"]
    assert 0 < grown["heed:prefix_cache_seconds_total"] < grown["heed:step_seconds_total"]
    assert 0 < grown["heed:model_seconds_total"] < grown["heed:step_seconds_total"]


def test_a_stream_tells_at_its_end(shared) -> None:
    ask(shared)
    body = {"prompt": PROMPT, "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    text = shared.post("/v1/completions", json=body, headers=FIRST).text
    *_, last = (json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {"))
    details = last["usage"]["prompt_tokens_details"]
    assert details.keys() == {"cached_tokens"}  # that chunk has no nulls, as vLLM's
    assert details["cached_tokens"] > 0
    chat = {"messages": [{"role": "user", "content": PROMPT[:100]}], "max_tokens": 2}
    bodies = [shared.post("/v1/chat/completions", json=chat, headers=FIRST).json() for _ in range(2)]
    assert cached(bodies[0]) < cached(bodies[1])


def test_without_the_flag_usage_says_nothing(server) -> None:
    assert [server.complete(prompt=PROMPT, max_tokens=2)["usage"]["prompt_tokens_details"] for _ in range(2)] == [
        None,
        None,
    ]


def test_the_urgent_overtake_and_the_header_counts_before_the_body(shared) -> None:
    def wait(name: str, headers: dict[str, str], **fields: Any) -> None:
        ask(shared, {**FIRST, "X-Request-Id": name, **headers}, prompt="fox " + name, ignore_eos=True, **fields)

    # It holds the one seat eight times, so that the others have come long before it is done.
    fields: dict[str, Any] = {"max_tokens": 240, "n": 8, "temperature": 1, "priority": -100}
    threads = [threading.Thread(target=wait, args=("long", {}), kwargs=fields)]
    threads[0].start()
    while counters(shared)["vllm:num_requests_running"] == 0:
        pass
    threads += [
        threading.Thread(target=wait, args=("late", {}), kwargs={"priority": 5}),
        threading.Thread(target=wait, args=("first", {"X-Vllm-Priority": "-7"}), kwargs={"priority": 9}),
        threading.Thread(target=wait, args=("then", {}), kwargs={"priority": -1}),
    ]
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(60)
    # The server's own order: the clients' threads may be woken in another.
    ended = re.findall(r"-(long|late|first|then): \d+ prompt tokens", shared.log.read_text(encoding="utf-8"))
    assert ended == ["long", "first", "then", "late"]
    response = shared.post("/v1/completions", json={"prompt": "a"}, headers={**FIRST, "X-Vllm-Priority": "high"})
    assert response.status_code == 400
    assert "X-Vllm-Priority is 'high' and must be a whole number" in response.json()["error"]["message"]
