"""The bodies of requests, with vLLM's field names and defaults. Types alone are checked here; values in validation.py.

Unknown fields are accepted and ignored, as vLLM does. Fields that we know and do not honour are listed in
validation.py, which refuses them where they would change the answer.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _valid(text: str) -> str:
    """JSON can spell halves of surrogate pairs, which are no characters and which nothing after this could encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text has half of a surrogate pair at character {error.start}") from None
    return text


Text = Annotated[str, AfterValidator(_valid)]
TokenId = Annotated[int, Field(ge=0, lt=2**63)]
# One bad element is enough to know: a list of millions must not become millions of complaints.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class Body(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())


class StreamOptions(Body):
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class CompletionRequest(Body):
    """POST /v1/completions. None means: the server's default (generation_config.json), else OpenAI's."""

    model: Text | None = None
    prompt: (
        TokenIds
        | Annotated[list[TokenIds], Field(fail_fast=True)]
        | Text
        | Annotated[list[Text], Field(fail_fast=True)]
        | None
    ) = None
    max_tokens: Int64 | None = 16
    n: Int64 | None = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int64 | None = None
    min_p: float | None = None
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    repetition_penalty: float | None = None
    seed: Int64 | None = None
    stop: Text | Annotated[list[Text], Field(fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[Int64], Field(fail_fast=True)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: Int64 = 0
    logprobs: Int64 | None = None
    prompt_logprobs: Int64 | None = None
    echo: bool | None = False
    logit_bias: dict[str, float] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stream_interval: Annotated[int, Field(ge=1)] | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    add_special_tokens: bool = True
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**63)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    request_id: Text | None = None
    user: Text | None = None

    # Known and refused where set: see validation.REFUSED.
    suffix: str | None = None
    use_beam_search: bool = False
    best_of: Int64 | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    prompt_embeds: Any = None
    allowed_token_ids: list[Int64] | None = None
    bad_words: list[str] | None = None
    logprob_token_ids: list[Int64] | None = None
    repetition_detection: dict[str, Any] | None = None
    thinking_token_budget: Int64 | None = None
    kv_transfer_params: dict[str, Any] | None = None
    vllm_xargs: dict[str, Any] | None = None


class TokenizeRequest(Body):
    """POST /tokenize."""

    model: Text | None = None
    prompt: Text
    add_special_tokens: bool = True
    return_token_strs: bool | None = False


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: Text | None = None
    tokens: TokenIds
