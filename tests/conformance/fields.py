"""The table of fields: for each field of completions and chats the values that are sent, valid ones and others.

Each value makes one request, a small greedy one with this field set. What raises the temperature is drawn at random,
and compared by its form.
"""

from __future__ import annotations

from typing import Any

from tests.conformance.case import MODEL, Case

INT64 = 2**63
# What no field takes, whatever its type.
OBJECT: dict[str, Any] = {"a": 1}

# Fields of both routes: values that are sent.
SHARED: dict[str, list[Any]] = {
    "model": [None, "", "also-smollm2", "nobody", 5],
    "n": [0, -1, 2, 2.0, 1.5, "2", "two", True, 16385, 10**30, None],
    "temperature": [0, 0.005, 0.7, 2, 2.1, -0.1, "0", "hot", True, None, [0]],
    "top_p": [1, 0.5, 0, 1.1, -1, "half", None],
    "top_k": [0, -1, 1, 5, -2, 10**6, 1.5, "x", None],
    "min_p": [0, 0.5, 1, -0.1, 1.1, "x", None],
    "presence_penalty": [-2, 0.5, 2, 2.1, -2.1, "x", None],
    "frequency_penalty": [-2, 0.5, 2, 2.1, -2.1, "x", None],
    "repetition_penalty": [0.5, 1.3, 0, -1, "x", None],
    "seed": [0, 7, -1, -5, INT64 - 1, INT64, -INT64 - 1, 1.5, "x", None],
    "stop": [None, [], "", [""], " a", ["zebra", " the"], ["a", "b", "c", "d"], ["a", "b", "c", "d", "e"], 5, [5]],
    "stop_token_ids": [None, [], [2], [260, 253], [-1], [49152], [10**9], 5, ["x"]],
    "include_stop_str_in_output": [True, False, "true", "x", 2, None],
    "ignore_eos": [True, False, "no", None, 3],
    "min_tokens": [0, 2, 3, 4, -1, 1.5, "x", None],
    "prompt_logprobs": [None, 0, 1, 3, -1, -2, 20, 21, "1", "x", True],
    "logprob_token_ids": [None, [], [260]],
    "logit_bias": [
        None,
        {},
        {"260": 100},
        {"260": 200},
        {"260": -100.5},
        {"x": 1},
        {"-1": 1},
        {"49152": 1},
        {"260": "x"},
        {"260": None},
        [1],
        5,
    ],
    "allowed_token_ids": [None, [], [260, 253, 28], [49152], [-1], 5, ["x"]],
    "bad_words": [[], [" the"], [""], ["the", " a", "Paris"], None, "x", [5]],
    "repetition_detection": [
        None,
        {},
        {"max_pattern_size": 2, "min_count": 2},
        {"max_pattern_size": 2},
        {"max_pattern_size": -1, "min_count": 2},
        {"max_pattern_size": 1, "min_pattern_size": 2, "min_count": 2},
        {"max_pattern_size": "x"},
        5,
    ],
    "stream": [False, None, "no", "x", 3],
    "stream_options": [None, {}, {"include_usage": True}, 5, "x"],
    "stream_interval": [None, 1, 2, 0, -1, "x"],
    "skip_special_tokens": [True, False, None, "x"],
    "spaces_between_special_tokens": [True, False, None, "x"],
    "truncate_prompt_tokens": [None, -1, 1, 3, 0, -2, 512, 513, 1.5, "x"],
    "truncation_side": [None, "left", "right", "middle", 5],
    "add_special_tokens": [True, False, None, "x"],
    "return_token_ids": [True, False, None, "x"],
    "return_tokens_as_token_ids": [True, False, None, "x"],
    "request_id": ["my-id.1", "", None, 5, "ä/b c"],
    "session_id": ["s", None, 5],
    "user": ["u", None, 5],
    "priority": [0, 5, -5, INT64, 1.5, "x", None],
    "cache_salt": ["salt", None, "", "a@b", "a/b", "s" * 128, "s" * 129, 5],
    "use_beam_search": [None, "x"],
    "length_penalty": [0.5, "x", None],
    "thinking_token_budget": [None, -2, "x"],
    "kv_transfer_params": [None, 5, OBJECT],
    "ec_transfer_params": [None, 5],
    "vllm_xargs": [None, 5, {"a": [1, "b"]}],
    "response_format": [None, {"type": "text"}, {}, {"type": "nonsense"}, {"type": "json_schema"}, 5],
    "structured_outputs": [None, 5],
    "watermarking": [None, False, "x"],
    "routed_experts_prompt_start": [0, 3, -1, "x"],
    "return_token_offsets": [None, False, True, "x"],
    "mm_payload": ["tensors", "none", "x"],
    "best_of": [None, 1, 2],  # of older clients: no field of vLLM's any more
    "early_stopping": [True],
    "guided_json": [{"type": "object"}],
    "nonsense": [1, None, OBJECT],
}

COMPLETION: dict[str, list[Any]] = {
    "prompt": [
        None, "", [], [[]], [""], ["a", ""], 5, True, OBJECT, [-1], [1.5], [49152], [INT64], ["a", 1], [[1], "a"],
        [[-1]], [504, 3575, 282, 4649, 314], [[504, 3575, 282], [504, 1, 2]], ["The sky", "Water is"], "naïve 你好 🦊",
        "\n\n", "\u0000",
        [1] * 511, [1] * 512, [1] * 513, "word " * 600,
    ],
    "max_tokens": [None, 0, 1, 511, 512, 513, -1, INT64, 1.5, 2.0, "2", "x", True],
    "logprobs": [None, 0, 1, 5, 20, 21, -1, -2, "1", "x", True, 1.0],
    "echo": [None, False, True, "x", 3],
    "suffix": [None, "", "x", 5],
    "prompt_embeds": [None, []],
}  # fmt: skip

CHAT: dict[str, list[Any]] = {
    "messages": [
        None, [], 5, "x", [5], [{}], [{"role": "user"}], [{"role": "user", "content": None}], [{"content": "a"}],
        [{"role": 5, "content": "a"}], [{"role": "user", "content": 5}], [{"role": "user", "content": ""}],
        [{"role": "stranger", "content": "a"}], [{"role": "user", "content": []}],
        [{"role": "user", "content": [{"type": "text", "text": "Say hi."}]}],
        [{"role": "user", "content": [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]}],
        [{"role": "user", "content": [{"text": "Say hi."}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "nonsense", "x": 1}]}],
        [{"role": "user", "content": ["Say hi."]}],
        [{"role": "assistant", "content": "I am"}],
        [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Say hi."}],
        [{"role": "developer", "content": "Be short."}, {"role": "user", "content": "Say hi."}],
        [{"role": "user", "content": "Say hi.", "name": "ann", "nonsense": 1}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}, {"role": "user", "content": "b"}],
        [{"role": "tool", "content": "4", "tool_call_id": "x"}, {"role": "user", "content": "Say hi."}],
        [{"role": "user", "content": "word " * 600}],
    ],
    "max_tokens": [None, 0, 1, 513, -1, INT64, 1.5, "x"],
    "max_completion_tokens": [None, 0, 1, 513, -1, 1.5, "x"],
    "logprobs": [None, False, True, 1, 5, "x"],
    "top_logprobs": [None, 0, 1, 21, -1, -2, "x"],
    "echo": [None, False, True, "x"],
    "add_generation_prompt": [True, False, None, "x"],
    "continue_final_message": [False, True, None, "x"],
    "chat_template": [None, "", "{{ messages[0].content }}", 5],
    "chat_template_kwargs": [None, {}, {"x": 1}, {"chat_template": "x"}, {"tokenize": True}, 5],
    "documents": [None, [], [{"title": "a", "text": "b"}], [5], 5],
    "reasoning_effort": [None, "none", "low", "max", "huge", 5],
    "include_reasoning": [True, False, None, "x"],
    "parallel_tool_calls": [None, True, False, "x"],
    "return_prompt_text": [None, True, False, "x"],
    "tool_choice": [None, "none", "auto", "required", "x", OBJECT],
    "tools": [None, []],
    "function_call": ["auto"],
    "functions": [[]],
    "modalities": [["text"]],
    "store": [True],
    "metadata": [{"a": "b"}],
    "service_tier": ["auto"],
    "verbosity": ["low"],
    "prediction": [{"type": "content", "content": "a"}],
}  # fmt: skip

COMPLETION_BODY = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 3, "temperature": 0}
CHAT_BODY = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 3,
    "temperature": 0,
}


def cases() -> list[Case]:
    """A request for each value of each field."""
    made = []
    for subject, path, body, table in (
        ("completions", "/v1/completions", COMPLETION_BODY, SHARED | COMPLETION),
        ("chat", "/v1/chat/completions", CHAT_BODY, SHARED | CHAT),
    ):
        for field, values in table.items():
            made += [_case(subject, path, body, field, value) for value in values]
    return made


def _case(subject: str, path: str, base: dict[str, Any], field: str, value: Any) -> Case:
    body = base | {field: value}
    if field == "top_logprobs":
        body["logprobs"] = True
    if field == "logprob_token_ids":
        body |= {"logprobs": True} if subject == "chat" else {"logprobs": 1}
    drawn = field == "temperature" and (value is None or not isinstance(value, (int, float)) or value >= 1e-5)
    if drawn:
        body["ignore_eos"] = True
    lone = field == "logprob_token_ids"  # in a batch with others, it changes their log-probabilities in vLLM
    shown = repr(value)
    shown = shown if len(shown) <= 90 else f"{shown[:60]}... ({len(shown)})"
    return Case(f"{subject}/{field}={shown}", path, body, shape=drawn, alone=lone)
