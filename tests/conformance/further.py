"""Requests to the further routes: responses, messages, batches of chats, invocations, and those that are off."""

from __future__ import annotations

from typing import Any

from tests.conformance.case import MODEL, Case

JSON = {"Content-Type": "application/json"}
QUESTION = "What is the capital of France?"
HELLO = [{"role": "user", "content": QUESTION}]
LOGPROBS = ["message.output_text.logprobs"]
FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "4"}
SAID = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Paris."}]}
THOUGHT = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Think."}]}


def _responses(name: str, *, shape: bool = False, **fields: Any) -> Case:
    """Nothing of a prompt is found in the cache, whose blocks are of other sizes: the answer tells how much was."""
    body = {"model": MODEL, "input": QUESTION, "max_output_tokens": 4, "temperature": 0, "cache_salt": name} | fields
    return Case(f"responses/{name}", "/v1/responses", body, shape=shape)


def _messages(name: str, **fields: Any) -> Case:
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 4, "temperature": 0} | fields
    return Case(f"messages/{name}", "/v1/messages", body)


def _count(name: str, **fields: Any) -> Case:
    return Case(f"count_tokens/{name}", "/v1/messages/count_tokens", {"model": MODEL, "messages": HELLO} | fields)


def _batch(name: str, *, shape: bool = False, **fields: Any) -> Case:
    conversations = [HELLO, [{"role": "user", "content": "Hi"}]]
    body = {"model": MODEL, "messages": conversations, "max_tokens": 4, "temperature": 0} | fields
    return Case(f"batch/{name}", "/v1/chat/completions/batch", body, shape=shape)


def _content(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


RESPONSES = [
    _responses("text"),
    _responses("to the end", input="Say only: yes", max_output_tokens=48),
    _responses("no limit", input="word " * 440, max_output_tokens=None),
    _responses("items", input=HELLO),
    _responses("typed items", input=[{"type": "message", "role": "user", "content": QUESTION}]),
    _responses("parts", input=_content({"type": "input_text", "text": "What is the capital"},
                                       {"type": "input_text", "text": "of France?"})),
    _responses("instructions", instructions="You are terse."),
    _responses("turns", input=[*HELLO, SAID, {"role": "user", "content": "And Italy?"}]),
    _responses("turns by text", input=[*HELLO, {"role": "assistant", "content": "Paris."}, *HELLO]),
    _responses("an unfinished message", input=[*HELLO, SAID | {"status": "incomplete"}]),
    _responses("calls of earlier turns", input=[*HELLO, CALL, RESULT]),
    _responses("thoughts of earlier turns", input=[*HELLO, THOUGHT, SAID, *HELLO]),
    _responses("encrypted thoughts", input=[*HELLO, THOUGHT | {"encrypted_content": "x"}]),
    _responses("an unknown item", input=[{"type": "web_search_call", "id": "w", "status": "completed",
                                          "action": {"type": "search", "query": "x"}}]),
    _responses("a strange item", input=[{"type": "nothing"}]),
    _responses("a strange role", input=[{"role": "stranger", "content": "x"}]),
    _responses("no items", input=[]),
    _responses("no input", input=None),
    _responses("a number for input", input=5),
    _responses("logprobs", include=LOGPROBS, top_logprobs=2),
    _responses("logprobs without alternatives", include=LOGPROBS),
    _responses("alternatives without logprobs", top_logprobs=2),
    _responses("null alternatives", include=LOGPROBS, top_logprobs=None),
    _responses("too many alternatives", include=LOGPROBS, top_logprobs=21),
    _responses("something unknown included", include=["everything"]),
    _responses("metadata and user", metadata={"a": "b"}, user="u"),
    _responses("metadata of numbers", metadata={"a": 1}),
    _responses("text format", text={"format": {"type": "text"}, "verbosity": "low"}),
    _responses("reasoning", reasoning={"effort": "low", "summary": "auto"}),
    _responses("reasoning of no known effort", reasoning={"effort": "huge"}),
    _responses("truncation", truncation="auto"),
    _responses("truncated", truncation="auto", input="word " * 600),
    _responses("a strange truncation", truncation="some"),
    _responses("too long", input="word " * 600),
    _responses("one more than fits", max_output_tokens=513),
    _responses("no token", max_output_tokens=0),
    _responses("a negative limit", max_output_tokens=-1),
    _responses("temperature too high", temperature=2.5),
    _responses("top_p of zero", top_p=0),
    _responses("top_k below -1", top_k=-2),
    _responses("presence_penalty too high", presence_penalty=3),
    _responses("penalties", presence_penalty=1, frequency_penalty=0.5, repetition_penalty=1.2),
    _responses("drawn", temperature=0.8, top_p=0.9, top_k=20, min_p=0.01, seed=3, ignore_eos=True, shape=True),
    _responses("stop", stop=" of", max_output_tokens=12),
    _responses("stop kept", stop=[" of"], max_output_tokens=12, include_stop_str_in_output=True),
    _responses("five stops", stop=["a", "b", "c", "d", "e"]),
    _responses("stop token", stop_token_ids=[282], max_output_tokens=12),
    _responses("special tokens shown", input="Say only: yes", max_output_tokens=24, skip_special_tokens=False),
    _responses("bias", logit_bias={"260": 100}),
    _responses("an id of its own", request_id="resp_mine"),
    _responses("stored", store=True),
    _responses("not stored", store=False),
    _responses("in the background", background=True),
    _responses("in the background and not stored", background=True, store=False),
    _responses("after another", previous_response_id="resp_1"),
    _responses("after another and messages", previous_response_id="resp_1", previous_input_messages=[{"a": 1}]),
    _responses("a prompt template", prompt={"id": "p"}),
    _responses("a tier", service_tier="flex"),
    _responses("an unknown tier", service_tier="golden"),
    _responses("raw messages", enable_response_messages=True),
    _responses("an unknown model", model="nobody"),
    _responses("another name", model=f"also-{MODEL}"),
    _responses("no model", model=None),
    _responses("an unknown field", nothing=1),
    _responses("tools shown", tools=[FUNCTION], tool_choice="none"),
    _responses("tools required and none given", tool_choice="required"),
    _responses("a named tool and none given", tool_choice={"type": "function", "name": "f"}),
    _responses("a tool that is not there", tools=[FUNCTION], tool_choice={"type": "function", "name": "g"}),
    _responses("a tool without a name", tools=[{"type": "function"}]),
    _responses("a strange choice of tools", tools=[FUNCTION], tool_choice="some"),
    _responses("a tool that a server would run", tools=[{"type": "web_search"}], tool_choice="none"),
    _responses("a conversation", conversation="conv_1"),
    _responses("a template", chat_template_kwargs={"chat_template": "{{ 1 }}"}),
    _responses("stream", stream=True),
    _responses("stream to the end", stream=True, input="Say only: yes", max_output_tokens=48),
    _responses("stream with logprobs", stream=True, include=LOGPROBS, top_logprobs=1),
    _responses("stream with a stop", stream=True, stop=" of", max_output_tokens=12),
    _responses("stream that fails at once", stream=True, temperature=3),
    _responses("stream of an unknown model", stream=True, model="nobody"),
    Case("responses/kept", "/v1/responses/resp_1", method="GET"),
    Case("responses/kept as a stream", "/v1/responses/resp_1?stream=true", method="GET"),
    Case("responses/cancelled", "/v1/responses/resp_1/cancel"),
    Case("routes/responses got", "/v1/responses", method="GET"),
    Case("keys/responses without", "/v1/responses", {"input": "a"}, key=None),
    Case("responses/as text", "/v1/responses", raw=b"{}", headers={"Content-Type": "text/plain"}),
    Case("responses/empty", "/v1/responses", raw=b"", headers=JSON),
]  # fmt: skip

MESSAGES = [
    _messages("text"),
    _messages("to the end", messages=[{"role": "user", "content": "Say only: yes"}], max_tokens=48),
    _messages("blocks", messages=_content({"type": "text", "text": "What is the capital"},
                                          {"type": "text", "text": "of France?"})),
    _messages("system", system="You are terse."),
    _messages("system of blocks", system=[{"type": "text", "text": "You are "}, {"type": "text", "text": "terse."}]),
    _messages("system with a bill", system=[{"type": "text", "text": "x-anthropic-billing-header: 1"}]),
    _messages("system amid", messages=[*HELLO, {"role": "system", "content": "Be terse."}]),
    _messages("turns", messages=[*HELLO, {"role": "assistant", "content": "Paris."}, *HELLO]),
    _messages("thoughts of earlier turns", messages=[*HELLO, {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "Think.", "signature": "s"}, {"type": "text", "text": "Paris."}]}, *HELLO]),
    _messages("calls of earlier turns", messages=[*HELLO, {"role": "assistant", "content": [
        {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}}]}, {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c1", "content": "4"}, {"type": "text", "text": "So?"}]}]),
    _messages("a result of parts", messages=_content(
        {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "4"}]})),
    _messages("a strange block", messages=_content({"type": "video"})),
    _messages("a strange role", messages=[{"role": "stranger", "content": "x"}]),
    _messages("no messages", messages=[]),
    _messages("null messages", messages=None),
    _messages("no limit", max_tokens=None),
    _messages("no token", max_tokens=0),
    _messages("one more than fits", max_tokens=513),
    _messages("too long", messages=[{"role": "user", "content": "word " * 600}]),
    _messages("stop", stop_sequences=[" of"], max_tokens=12),
    _messages("five stops", stop_sequences=["a", "b", "c", "d", "e"]),
    _messages("empty stop", stop_sequences=[""]),
    _messages("temperature too high", temperature=2.5),
    _messages("top_p of zero", top_p=0),
    _messages("top_k below -1", top_k=-2),
    _messages("top_k", top_k=5, top_p=0.9),
    _messages("metadata", metadata={"user_id": "u"}),
    _messages("an unknown model", model="nobody"),
    _messages("another name", model=f"also-{MODEL}"),
    _messages("no model", model=None),
    _messages("an empty model", model=""),
    _messages("an unknown field", nothing=1),
    _messages("tools shown", tools=[{"name": "f", "input_schema": {"type": "object"}}], tool_choice={"type": "none"}),
    _messages("a tool that has to be used and none given", tool_choice={"type": "any"}),
    _messages("a tool without a schema", tools=[{"name": "f"}]),
    _messages("a named tool without a name", tool_choice={"type": "tool"}),
    _messages("thinking without a budget", thinking={"type": "enabled"}),
    _messages("thinking with a small budget", thinking={"type": "enabled", "budget_tokens": 5}),
    _messages("thinking beyond the limit", thinking={"type": "enabled", "budget_tokens": 1024}),
    _messages("no thinking", thinking={"type": "disabled"}),
    _messages("adaptive thinking", thinking={"type": "adaptive"}),
    _messages("effort", output_config={"effort": "low"}),
    _messages("a strange effort", output_config={"effort": "huge"}),
    _messages("a template", chat_template_kwargs={"chat_template": "{{ 1 }}"}),
    _messages("stream", stream=True),
    _messages("stream to the end", stream=True, messages=[{"role": "user", "content": "Say only: yes"}], max_tokens=48),
    _messages("stream with a stop", stream=True, stop_sequences=[" of"], max_tokens=12),
    _messages("stream that fails at once", stream=True, temperature=3),
    Case("routes/messages got", "/v1/messages", method="GET"),
    Case("keys/messages without", "/v1/messages", {"model": MODEL, "messages": HELLO, "max_tokens": 1}, key=None),
    Case("messages/as text", "/v1/messages", raw=b"{}", headers={"Content-Type": "text/plain"}),
    _count("text"),
    _count("system", system="You are terse."),
    _count("tools", tools=[{"name": "f", "input_schema": {"type": "object"}}], tool_choice={"type": "none"}),
    _count("an unknown model", model="nobody"),
    _count("no messages", messages=None),
    _count("too long", messages=[{"role": "user", "content": "word " * 600}]),
]  # fmt: skip

BATCHES = [
    _batch("two"),
    _batch("one", messages=[HELLO]),
    _batch("logprobs and ids", logprobs=True, top_logprobs=1, return_token_ids=True),
    _batch("drawn", temperature=1, seed=1, ignore_eos=True, shape=True),
    _batch("stop", stop=" of", max_tokens=12),
    _batch("n", n=2),
    _batch("n of one", n=1),
    _batch("beam search", use_beam_search=True),
    _batch("none", messages=[]),
    _batch("an empty one", messages=[HELLO, []]),
    _batch("a chat that is none", messages=HELLO),
    _batch("temperature too high", temperature=3),
    _batch("one too long", messages=[HELLO, [{"role": "user", "content": "word " * 600}]]),
    _batch("an unknown model", model="nobody"),
    _batch("echoed", echo=True, add_generation_prompt=False, continue_final_message=True,
           messages=[[*HELLO, {"role": "assistant", "content": "The capital"}], HELLO]),
]  # fmt: skip

INVOCATIONS = [
    Case("invocations/chat", "/invocations", {"model": MODEL, "messages": HELLO, "max_tokens": 4, "temperature": 0}),
    Case("invocations/completion", "/invocations", {"prompt": "The capital of", "max_tokens": 4, "temperature": 0}),
    Case("invocations/stream", "/invocations", {"prompt": "The capital of", "max_tokens": 4, "stream": True,
                                                "temperature": 0}),
    Case("invocations/nothing", "/invocations", {}),
    Case("invocations/a list", "/invocations", []),
    Case("invocations/no JSON", "/invocations", raw=b"{", headers=JSON),
    Case("invocations/as text", "/invocations", raw=b"{}", headers={"Content-Type": "text/plain"}),
    Case("keys/invocations without", "/invocations", {"prompt": "a", "max_tokens": 1}, key=None),
]  # fmt: skip

SCALE_OUT = [
    Case(f"routes/{path.strip('/').replace('/', ' ')}", path, {})
    for path in (
        "/v1/chat/completions/render",
        "/v1/chat/completions/derender",
        "/v1/completions/render",
        "/v1/completions/derender",
        "/v1/messages/render",
        "/v1/responses/render",
        "/inference/v1/generate",
        "/inference/v1/abort_requests",
    )
]

ROUTES = [
    *SCALE_OUT,
    Case("routes/kv_event_sources", "/kv_event_sources", method="GET"),
    Case("routes/is_scaling_elastic_ep", "/is_scaling_elastic_ep"),
    Case("routes/scale_elastic_ep", "/scale_elastic_ep", {"new_data_parallel_size": 2}),
    Case("routes/generative_scoring", "/generative_scoring", {"model": MODEL}),
    Case("routes/systemone", "/v1/systemone", {"model": MODEL}),
]

CASES: list[Case] = [*RESPONSES, *MESSAGES, *BATCHES, *INVOCATIONS, *ROUTES]
