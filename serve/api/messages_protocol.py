"""The bodies of POST /v1/messages and /v1/messages/count_tokens: Anthropic's, with what vLLM adds.

As in protocol.py, types alone are checked here, and what vLLM checks with them; values are in messages_chat.py and in
what every chat passes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from serve.api.protocol import Body, Int64, Text

Effort = Literal["low", "medium", "high", "xhigh", "max"]


class ResultPart(Body):
    """A part of what a tool gave."""

    type: Text
    text: Text | None = None


class Block(Body):
    """A part of a message; which fields it has depends on its type."""

    type: Literal[
        "text",
        "image",
        "tool_use",
        "tool_result",
        "tool_reference",
        "thinking",
        "redacted_thinking",
        "tool_addition",
        "tool_removal",
    ]
    text: Text | None = None
    thinking: Text | None = None
    # Of a call and its result.
    id: Text | None = None
    name: Text | None = None
    input: dict[str, Any] | None = None
    tool_use_id: Text | None = None
    content: Text | Annotated[list[ResultPart], Field(fail_fast=True)] | None = None
    is_error: bool | None = None


Content = Text | Annotated[list[Block], Field(fail_fast=True)]


class Turn(Body):
    role: Literal["user", "assistant", "system"]
    content: Content


class Tool(Body):
    name: Text
    description: Text | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: Text | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _named(self) -> ToolChoice:
        if self.type == "tool" and not self.name:
            raise ValueError("tool_choice.name is required when type is 'tool'")
        return self


class OutputFormat(Body):
    type: Literal["json_schema"] = "json_schema"
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class OutputConfig(Body):
    effort: Effort | None = None
    format: OutputFormat | None = None


class Thinks(Body):
    type: Literal["enabled"]
    budget_tokens: Annotated[int, Field(ge=1024, lt=2**63)]


class ThinksNot(Body):
    type: Literal["disabled"]


class ThinksAtWill(Body):
    type: Literal["adaptive"]


Thinking = Annotated[Thinks | ThinksNot | ThinksAtWill, Field(discriminator="type")]


class CountTokensRequest(Body):
    """POST /v1/messages/count_tokens; what it and a request for an answer share."""

    model: Annotated[Text, Field(min_length=1)]
    messages: Annotated[list[Turn], Field(fail_fast=True)]
    system: Content | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class MessagesRequest(CountTokensRequest):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, lt=2**63)]
    metadata: dict[str, Any] | None = None
    stop_sequences: Annotated[list[Text], Field(max_length=4)] | None = None
    stream: bool | None = False
    temperature: float | None = None
    top_k: Int64 | None = None
    top_p: float | None = None

    # vLLM's own.
    cache_salt: Text | None = None
    kv_transfer_params: dict[str, Any] | None = None
    vllm_xargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _room(self) -> MessagesRequest:
        if isinstance(self.thinking, Thinks) and self.thinking.budget_tokens >= self.max_tokens:
            raise ValueError("thinking.budget_tokens must be less than max_tokens")
        return self
