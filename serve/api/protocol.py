"""The bodies of requests, with vLLM's field names and defaults. Types alone are checked here (and, before them, what
before.py looks at); values in validation.py.

Unknown fields are accepted and ignored, as vLLM does. Fields that we know and do not honour are listed in
sampling.py, which refuses them where they would change the answer.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from serve.api import before
from serve.api.form_protocol import ResponseFormat, StructuredOutputs, Tool

MAX_STOPS = 4


def _valid(text: str) -> str:
    """JSON can spell halves of surrogate pairs, which are no characters and which nothing after this could encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text has half of a surrogate pair at character {error.start}") from None
    return text


Text = Annotated[str, AfterValidator(_valid)]
TokenId = Annotated[int, Field(ge=0)]
# One bad element is enough to know: a list of millions must not become millions of complaints.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class Body(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())


class StreamOptions(Body):
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class RepetitionDetection(Body):
    max_pattern_size: Annotated[int, Field(lt=1 << 16)] = 0
    min_pattern_size: Annotated[int, Field(lt=1 << 16)] = 0
    min_count: Int64 = 0


class GenerationRequest(Body):
    """What completions and chats share. None means: the server's default (generation_config.json), else OpenAI's."""

    model: Text | None = None
    n: int | None = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int64 | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Int64 | None = None
    stop: Text | Annotated[list[Text], Field(fail_fast=True, max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[Int64], Field(fail_fast=True)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = None
    min_tokens: Int64 = 0
    prompt_logprobs: Int64 | None = None
    logprob_token_ids: Annotated[list[Int64], Field(fail_fast=True)] | None = None  # shown in place of the likeliest
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: Annotated[list[Int64], Field(fail_fast=True)] | None = None
    bad_words: Annotated[list[Text], Field(fail_fast=True)] = []
    repetition_detection: RepetitionDetection | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stream_interval: Annotated[int, Field(ge=1)] | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**63)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    request_id: Text = ""
    session_id: Text | None = None
    user: Text | None = None
    priority: Int64 = 0  # the lower goes first; of effect under --scheduling-policy priority alone, as in vLLM
    cache_salt: Text | None = None

    use_beam_search: bool = False  # n is the beam's width then
    length_penalty: float = 1.0  # of a beam search alone

    # Known and of no effect here: for what this server does not have, as the text models of vLLM do not.
    ec_transfer_params: dict[str, Any] | None = None
    vllm_xargs: dict[str, str | int | float | list[str | int | float]] | None = None
    watermarking: bool | None = None
    routed_experts_prompt_start: Annotated[int, Field(ge=0)] = 0
    return_token_offsets: bool | None = False
    mm_payload: Literal["tensors", "none"] = "tensors"

    # Known and refused where set: see sampling.REFUSED.
    best_of: Int64 | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    thinking_token_budget: Int64 | None = None
    kv_transfer_params: dict[str, Any] | None = None


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: (
        TokenIds
        | Annotated[list[TokenIds], Field(fail_fast=True)]
        | Text
        | Annotated[list[Text], Field(fail_fast=True)]
        | None
    ) = None
    n: int = 1
    max_tokens: int | None = 16
    logprobs: Int64 | None = None
    echo: bool | None = False
    add_special_tokens: bool = True

    # Known and refused where set.
    suffix: str | None = None
    prompt_embeds: Any = None

    _before = model_validator(mode="before")(before.completion)


class Message(Body):
    """One turn of a chat. Templates also get `name`, `tool_calls`, `tool_call_id` and `reasoning`, where they are."""

    role: Text
    content: Text | Annotated[list[Text | dict[str, Any]], Field(fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _said(self) -> Message:
        if self.content is None and self.role != "assistant" and "content" in self.model_fields_set:
            raise ValueError(f"the content of a message of role {self.role[:50]!r} cannot be null")
        return self


class Conversation(Body):
    """A chat to be rendered as a prompt; the names are the template's."""

    messages: Annotated[list[Message], Field(fail_fast=True)]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False  # the template writes them itself
    chat_template: Text | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    documents: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None

    # Known and refused where set: see sampling.REFUSED.
    mm_processor_kwargs: dict[str, Any] | None = None
    media_io_kwargs: dict[str, dict[str, Any]] | None = None


class ChatRequest(GenerationRequest, Conversation):
    """POST /v1/chat/completions. `max_completion_tokens` counts before the older `max_tokens`; without both, the
    answer may fill the context.
    """

    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: Int64 | None = 0
    echo: bool = False
    include_reasoning: bool = True
    parallel_tool_calls: bool | None = True
    return_prompt_text: bool | None = None
    tool_choice: str | dict[str, Any] | None = None

    _before = model_validator(mode="before")(before.chat)


class TokenizeRequest(Body):
    """POST /tokenize with a text."""

    model: Text | None = None
    prompt: Text
    add_special_tokens: bool = True
    return_token_strs: bool | None = False


class TokenizeChatRequest(Conversation):
    """POST /tokenize with a chat."""

    model: Text | None = None
    return_token_strs: bool | None = False


def _which(body: Any) -> str:
    chat = "messages" in body if isinstance(body, dict) else isinstance(body, TokenizeChatRequest)
    return "TokenizeChatRequest" if chat else "TokenizeRequest"


TokenizeEither = Annotated[
    Annotated[TokenizeRequest, Tag("TokenizeRequest")] | Annotated[TokenizeChatRequest, Tag("TokenizeChatRequest")],
    Discriminator(_which),
]


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: Text | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(fail_fast=True)]
