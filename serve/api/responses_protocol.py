"""The body of POST /v1/responses, with vLLM's field names and defaults.

As in protocol.py, types alone are checked here; values are in responses_chat.py and in what every chat passes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from serve.api.protocol import Body, Int64, Text

LOGPROBS = "message.output_text.logprobs"  # what `include` says to have them


# ---------------------------------------------------------------- items of the input


class TextPart(Body):
    """A part of a content; which field has its text depends on the type."""

    type: Text
    text: Text | None = None
    refusal: Text | None = None


Part = Text | TextPart
Parts = Annotated[list[Part], Field(fail_fast=True)]


class MessageItem(Body):
    role: Literal["user", "assistant", "system", "developer"]
    content: Text | Parts
    status: Text | None = None


class FunctionCallItem(Body):
    call_id: Text
    name: Text
    arguments: Text


class FunctionCallOutputItem(Body):
    call_id: Text
    output: Text | Parts


class ReasoningItem(Body):
    summary: Parts | None = None
    content: Parts | None = None
    encrypted_content: Text | None = None
    status: Text | None = None


class OtherItem(Body):
    """What this server does not take, for a sentence that says so."""

    type: Any = None


def _kind(item: Any) -> str:
    if not isinstance(item, dict):
        return "message"  # whose complaint is that it is no object
    kind = item.get("type", "message" if "role" in item else None)
    return kind if kind in ("message", "function_call", "function_call_output", "reasoning") else "other"


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[OtherItem, Tag("other")],
    Discriminator(_kind),
]


# ---------------------------------------------------------------- the body


class Reasoning(Body):
    context: Text | None = None
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    mode: Text | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class Format(Body):
    """How the text is to be formed: freely, as some JSON, or as JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: Text | None = None
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(Body):
    format: Format | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponsesRequest(Body):
    """POST /v1/responses."""

    background: bool | None = False
    conversation: Any = None
    include: (
        list[
            Literal[
                "code_interpreter_call.outputs",
                "computer_call_output.output.image_url",
                "file_search_call.results",
                "message.input_image.image_url",
                "message.output_text.logprobs",
                "reasoning.encrypted_content",
            ]
        ]
        | None
    ) = None
    input: Text | Annotated[list[Item], Field(fail_fast=True)]
    instructions: Text | None = None
    max_output_tokens: Int64 | None = None
    max_tool_calls: Int64 | None = None
    metadata: dict[Text, Text] | None = None
    model: Text | None = None
    parallel_tool_calls: bool | None = True
    previous_response_id: Text | None = None
    prompt: Any = None
    reasoning: Reasoning | None = None
    include_reasoning: bool = True
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] = "auto"
    store: bool | None = True
    stream: bool | None = False
    temperature: float | None = None
    text: TextConfig | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] = "auto"
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True, default_factory=list)]
    top_logprobs: Int64 | None = 0
    top_p: float | None = None
    truncation: Literal["auto", "disabled"] | None = "disabled"
    user: Text | None = None

    # vLLM's own.
    top_k: Int64 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Int64 | None = None
    stop: Text | Annotated[list[Text], Field(fail_fast=True, max_length=4)] | None = None
    stop_token_ids: Annotated[list[Int64], Field(fail_fast=True)] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logit_bias: dict[str, float] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    request_id: Text | None = None
    priority: Int64 = 0
    cache_salt: Text | None = None
    enable_response_messages: bool = False
    previous_input_messages: Any = None
    structured_outputs: dict[str, Any] | None = None
    kv_transfer_params: dict[str, Any] | None = None
    vllm_xargs: dict[str, Any] | None = None

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())
