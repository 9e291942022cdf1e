"""What a request may ask, decided in one place, before the engine: whatever passes here can be carried out.

`Model` is what is being served; `completion` turns a body into the sequences to run, or raises InvalidRequest or
NotFound with one sentence. Ranges that need no model to be judged are lm.params.SamplingParams' own.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from lm.params import SamplingParams
from lm.tokenizer import Tokenizer
from serve.api.protocol import CompletionRequest
from serve.engine.messages import Ready
from serve.errors import InvalidRequest, NotFound

MAX_PROMPTS = 1024  # of one request
MAX_N = 128  # sequences of one prompt
MAX_STOPS = 4
MAX_IDS = 1024  # in stop_token_ids and logit_bias: they are looked at for every token
LONG_TEXT = 20_000  # characters from which tokenizing is done aside, so that the others are answered meanwhile

# Fields that would change the answer and are not honoured, with what is said of them.
REFUSED = {
    "suffix": "suffix is only supported for models with FIM completion rendering",
    "use_beam_search": "use_beam_search is not supported by this server.",
    "best_of": "best_of is not supported; ask for n sequences and choose among them.",
    "structured_outputs": "structured_outputs is not supported by this server.",
    "prompt_embeds": "prompt_embeds is not supported by this server; send text or token ids as prompt.",
    "allowed_token_ids": "allowed_token_ids is not supported by this server; logit_bias can exclude tokens.",
    "bad_words": "bad_words is not supported by this server; logit_bias can exclude tokens.",
    "logprob_token_ids": "logprob_token_ids is not supported by this server; logprobs gives the most probable ones.",
    "repetition_detection": "repetition_detection is not supported by this server.",
    "thinking_token_budget": "thinking_token_budget is not supported by this server.",
    "kv_transfer_params": "kv_transfer_params is not supported by this server.",
    "vllm_xargs": "vllm_xargs is not supported by this server.",
}


@dataclass(frozen=True)
class Model:
    """What is served: names, limits, tokenizer, and the sampling defaults of its generation_config.json."""

    names: tuple[str, ...]
    folder: str
    ready: Ready
    tokenizer: Tokenizer
    max_logprobs: int = 20
    defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def max_model_len(self) -> int:
        return self.ready.max_model_len

    def check_name(self, name: str | None) -> None:
        """Raises NotFound unless `name` is served; no name means the first."""
        if name and name not in self.names:
            aliases = ", ".join(self.names)
            raise NotFound(f"The model `{name[:200]}` does not exist. Valid aliases: {aliases}.", "model")


@dataclass(frozen=True)
class Prompt:
    """Token ids and, where it is known or needed (echo), the text they stand for."""

    ids: list[int]
    text: str | None


@dataclass(frozen=True)
class Completion:
    """A request that can be carried out: n sequences of each prompt."""

    prompts: list[Prompt]
    params: list[SamplingParams]  # one for each prompt: they differ in max_tokens
    n: int
    generate: bool  # False: echo with max_tokens 0
    logprobs: int | None
    prompt_logprobs: bool  # whether the body has them (echo with logprobs computes them for its own use)


def sequences(body: CompletionRequest) -> int:
    """How many sequences a request would be in the engine, as far as that can be told before it is looked at."""
    prompt = body.prompt
    several = isinstance(prompt, list) and len(prompt) > 0 and not isinstance(prompt[0], int)
    prompts = len(prompt) if several and isinstance(prompt, list) else 1
    return prompts * body.n if body.n is not None and 0 < body.n <= MAX_N and prompts <= MAX_PROMPTS else 1


async def completion(body: CompletionRequest, model: Model) -> Completion:
    """Raises InvalidRequest (400) or NotFound (404)."""
    model.check_name(body.model)
    _refuse(body)
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("Stream options can only be defined when `stream=True`.", "stream_options")
    if body.prompt_logprobs and body.stream:
        raise InvalidRequest("`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")
    prompts = await _prompts(body, model)
    params = [_params(body, model, len(prompt.ids)) for prompt in prompts]
    return Completion(
        prompts=prompts,
        params=params,
        n=1 if body.n is None else body.n,
        generate=not _prompt_only(body),
        logprobs=body.logprobs,
        prompt_logprobs=body.prompt_logprobs is not None,
    )


def _prompt_only(body: CompletionRequest) -> bool:
    return bool(body.echo) and body.max_tokens == 0


def _refuse(body: CompletionRequest) -> None:
    for name, sentence in REFUSED.items():
        if getattr(body, name):
            raise InvalidRequest(sentence, name)
    kind = (body.response_format or {}).get("type", "text")
    if kind != "text":
        raise InvalidRequest(
            f"response_format {str(kind)[:50]!r} is not supported by this server; it may be 'text'.", "response_format"
        )


# ---------------------------------------------------------------- prompts


async def _prompts(body: CompletionRequest, model: Model) -> list[Prompt]:
    prompt = body.prompt
    if prompt is None or prompt == "":
        raise InvalidRequest("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    if prompt == []:
        raise InvalidRequest("The decoder prompt cannot be empty", "prompt")
    several: list[Any] = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)
    if len(several) > MAX_PROMPTS:
        raise InvalidRequest(f"prompt list length {len(several)} exceeds the maximum of {MAX_PROMPTS}.", "prompt")
    aside = sum(len(one) for one in several if isinstance(one, str)) >= LONG_TEXT
    return [await _prompt(one, body, model, aside) for one in several]


async def _prompt(prompt: str | list[int], body: CompletionRequest, model: Model, aside: bool) -> Prompt:
    if isinstance(prompt, str):
        ids = await encode(prompt, model.tokenizer, add_special_tokens=body.add_special_tokens, aside=aside)
        text: str | None = prompt
    else:
        ids, text = prompt, None
    if not ids:
        raise InvalidRequest("The decoder prompt cannot be empty", "prompt")
    check_ids(ids, model, "prompt")
    cut = _truncate(ids, body, model)
    if len(cut) < len(ids) or (text is None and body.echo):
        text = model.tokenizer.decode(cut)
    if len(cut) > model.max_model_len:
        raise InvalidRequest(
            f"This model's maximum context length is {model.max_model_len} tokens. However, your prompt contains "
            f"{len(cut)} input tokens, which exceeds this limit even without any output tokens. "
            "Please reduce the length of the input prompt.",
            "input_tokens",
        )
    return Prompt(cut, text)


def check_ids(ids: list[int], model: Model, param: str) -> None:
    """Raises InvalidRequest for an id that the model does not know."""
    largest = max(ids, default=0)
    if largest >= model.ready.vocab_size:
        raise InvalidRequest(f"Token id {largest} is out of vocabulary", param)


def _truncate(ids: list[int], body: CompletionRequest, model: Model) -> list[int]:
    wanted = body.truncate_prompt_tokens
    if wanted is None:
        return ids
    if wanted > model.max_model_len:
        raise InvalidRequest(
            f"truncate_prompt_tokens value ({wanted}) is greater than max_model_len ({model.max_model_len}). "
            "Please, select a smaller truncation size.",
            "truncate_prompt_tokens",
        )
    if wanted == 0:
        raise InvalidRequest(
            "truncate_prompt_tokens is 0, which leaves no prompt; it must be at least 1, or -1.",
            "truncate_prompt_tokens",
        )
    length = model.max_model_len if wanted == -1 else wanted
    return ids[:length] if body.truncation_side == "right" else ids[-length:]


async def encode(text: str, tokenizer: Tokenizer, *, add_special_tokens: bool, aside: bool = False) -> list[int]:
    """Token ids of a text. A long one (or any, `aside`) is tokenized in a thread: tokenizers frees the interpreter."""
    if len(text) < LONG_TEXT and not aside:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)


# ---------------------------------------------------------------- sampling


def _params(body: CompletionRequest, model: Model, prompt_length: int) -> SamplingParams:
    """SamplingParams for a prompt of this length: the request's values, else the server's, else OpenAI's."""
    vocab = model.ready.vocab_size
    n = 1 if body.n is None else body.n
    if n > MAX_N:
        raise InvalidRequest(f"n must be at most {MAX_N}, got {n}.", "n")
    stops = [] if body.stop is None else [body.stop] if isinstance(body.stop, str) else body.stop
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop must have at most {MAX_STOPS} strings, got {len(stops)}.", "stop")
    for name in ("stop_token_ids", "logit_bias"):
        count = len(getattr(body, name) or ())
        if count > MAX_IDS:
            raise InvalidRequest(f"{name} must have at most {MAX_IDS} entries, got {count}.", name)
    prompt_logprobs = body.prompt_logprobs
    if prompt_logprobs is None and body.echo:
        prompt_logprobs = body.logprobs
    temperature = _first(body.temperature, model.defaults.get("temperature"), 1.0)
    values = {
        "n": n,
        "temperature": temperature,
        "top_p": _first(body.top_p, model.defaults.get("top_p"), 1.0),
        "top_k": _first(body.top_k, model.defaults.get("top_k"), 0),
        "min_p": _first(body.min_p, model.defaults.get("min_p"), 0.0),
        "repetition_penalty": _first(body.repetition_penalty, model.defaults.get("repetition_penalty"), 1.0),
        "presence_penalty": _first(body.presence_penalty, 0.0),
        "frequency_penalty": _first(body.frequency_penalty, 0.0),
        "seed": None if body.seed == -1 else body.seed,
        "max_tokens": _max_tokens(body, model, prompt_length),
        "min_tokens": body.min_tokens,
        "stop": tuple(stops),
        "stop_token_ids": tuple(body.stop_token_ids or ()),
        "include_stop_str_in_output": body.include_stop_str_in_output,
        "ignore_eos": body.ignore_eos,
        "logprobs": body.logprobs,
        "prompt_logprobs": prompt_logprobs,
        "logit_bias": _logit_bias(body, vocab),
        "skip_special_tokens": body.skip_special_tokens,
    }
    try:
        params = SamplingParams(**values)
    except ValueError as error:
        sentence = str(error)
        raise InvalidRequest(sentence, sentence.split()[0]) from None
    foreign = [id for id in params.stop_token_ids if not 0 <= id < vocab]
    if foreign:
        raise InvalidRequest(
            f"stop_token_ids {foreign[:10]} are out of the vocabulary; ids are from 0 to {vocab - 1}.", "stop_token_ids"
        )
    for name, kind in (("logprobs", "sample"), ("prompt_logprobs", "prompt")):
        value = getattr(params, name)
        if value is not None and (value == -1 or value > model.max_logprobs):
            count = vocab if value == -1 else value
            message = f"Requested {kind} logprobs of {count}, which is greater than max allowed: {model.max_logprobs}"
            raise InvalidRequest(message, name)
    return params


def _max_tokens(body: CompletionRequest, model: Model, prompt_length: int) -> int | None:
    """What was asked for, or 16, no more than the context leaves room for; None where nothing is to be generated."""
    if _prompt_only(body):
        return None
    wanted = 16 if body.max_tokens is None else body.max_tokens
    if wanted > model.max_model_len:
        raise InvalidRequest(
            f"max_tokens={wanted} cannot be greater than max_model_len={model.max_model_len}. "
            "Please request fewer output tokens.",
            "max_tokens",
        )
    room = min(model.max_model_len - prompt_length, model.defaults.get("max_new_tokens") or wanted)
    return min(wanted, room)


def _logit_bias(body: CompletionRequest, vocab: int) -> dict[int, float] | None:
    if not body.logit_bias:
        return None
    bias: dict[int, float] = {}
    foreign = []
    for key, value in body.logit_bias.items():
        digits = key.removeprefix("-")
        if not (digits.isascii() and digits.isdigit()) or len(digits) > 20:
            raise InvalidRequest(f"logit_bias has the key {key[:50]!r}; keys must be token ids.", "logit_bias")
        if value != value:
            raise InvalidRequest(f"logit_bias for token {key} is not a number.", "logit_bias")
        if not 0 <= int(key) < vocab:
            foreign.append(int(key))
        bias[int(key)] = min(100.0, max(-100.0, value))
    if foreign:
        message = f"logit_bias has token ids {foreign[:10]} out of the vocabulary; ids are from 0 to {vocab - 1}."
        raise InvalidRequest(message, "logit_bias")
    return bias


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
