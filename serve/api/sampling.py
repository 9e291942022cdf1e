"""What a request may ask of sampling. Ranges that need no model to be judged are lm.params.SamplingParams' own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from lm.params import RepetitionDetectionParams, SamplingParams
from serve.api.model import Model
from serve.api.protocol import Body, GenerationRequest
from serve.engine.bad_words import spellings
from serve.errors import InvalidRequest

MAX_N = 128  # sequences of one prompt
MAX_IDS = 1024  # in stop_token_ids and logit_bias: they are looked at for every token
MAX_BAD_WORDS = 128  # as tokens: a word has up to two spellings
MAX_BAD_TOKENS = 1024  # in all of them

# Fields that would change the answer and are not honoured, with what is said of them.
REFUSED = {
    "suffix": "suffix is only supported for models with FIM completion rendering",
    "prompt_embeds": "prompt_embeds is not supported by this server; send text or token ids as prompt.",
    "kv_transfer_params": "kv_transfer_params is not supported by this server.",
    "mm_processor_kwargs": "Per-request mm_processor_kwargs are disabled: this server reads text alone.",
    "media_io_kwargs": "Per-request media_io_kwargs are disabled: this server reads text alone.",
}


def refuse_fields(body: Body) -> None:
    """Raises InvalidRequest for a field that is set and not honoured."""
    for name, sentence in REFUSED.items():
        if getattr(body, name, None) not in (None, [], {}):
            raise InvalidRequest(sentence, name)


def refuse(body: GenerationRequest) -> None:
    """Raises InvalidRequest for what is asked and not honoured."""
    refuse_fields(body)
    if body.best_of is not None and body.best_of != body.n:
        raise InvalidRequest("best_of is not supported; ask for n sequences and choose among them.", "best_of")


def params(
    body: GenerationRequest,
    model: Model,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
    logprobs_field: str = "logprobs",
) -> SamplingParams:
    """The request's values, else the server's, else OpenAI's. `logprobs_field` is where the number of `logprobs` comes
    from. Raises InvalidRequest.
    """
    vocab = model.ready.vocab_size
    n = count(body)
    stops = [] if body.stop is None else [body.stop] if isinstance(body.stop, str) else body.stop
    for name in ("stop_token_ids", "logit_bias"):
        entries = len(getattr(body, name) or ())
        if entries > MAX_IDS:
            raise InvalidRequest(f"{name} must have at most {MAX_IDS} entries, got {entries}.", name)
    loop, named = body.repetition_detection, body.logprob_token_ids or None
    if named and logprobs is None:
        how = "set" if logprobs_field == "logprobs" else "set to true"
        raise InvalidRequest(f"when using `logprob_token_ids`, `logprobs` must be {how}.", "logprob_token_ids")
    temperature = _first(body.temperature, model.defaults.get("temperature"), 1.0)
    values = {
        "n": n,
        "temperature": temperature,
        "top_p": _first(body.top_p, model.defaults.get("top_p"), 1.0),
        "top_k": _first(body.top_k, model.defaults.get("top_k"), 0),
        "min_p": _first(body.min_p, model.defaults.get("min_p"), 0.0),
        "repetition_penalty": _first(body.repetition_penalty, model.defaults.get("repetition_penalty"), 1.0),
        "presence_penalty": _first(body.presence_penalty, model.defaults.get("presence_penalty"), 0.0),
        "frequency_penalty": _first(body.frequency_penalty, model.defaults.get("frequency_penalty"), 0.0),
        "seed": None if body.seed == -1 else body.seed,
        "max_tokens": max_tokens,
        "min_tokens": body.min_tokens,
        "stop": tuple(stops),
        "stop_token_ids": tuple(body.stop_token_ids or ()),
        "include_stop_str_in_output": body.include_stop_str_in_output,
        "ignore_eos": body.ignore_eos,
        "logprobs": None if named else logprobs,
        "prompt_logprobs": prompt_logprobs,
        "logprob_token_ids": named,
        "logit_bias": _logit_bias(body, vocab),
        "allowed_token_ids": body.allowed_token_ids,
        "bad_words": body.bad_words,
        "skip_special_tokens": body.skip_special_tokens,
    }
    try:
        if loop is not None:
            values["repetition_detection"] = RepetitionDetectionParams(
                max_pattern_size=loop.max_pattern_size,
                min_pattern_size=loop.min_pattern_size,
                min_count=loop.min_count,
            )
        made = SamplingParams(**values)
    except ValueError as error:
        sentence = str(error)
        raise InvalidRequest(sentence, sentence.split()[0]) from None
    for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
        foreign = [id for id in getattr(made, name) or () if not 0 <= id < vocab]
        if foreign:
            raise InvalidRequest(
                f"{name} {foreign[:10]} are out of the vocabulary; ids are from 0 to {vocab - 1}.", name
            )
    _check_bad_words(made.bad_words, model)
    if made.logprob_token_ids is None:
        check_logprobs(made.logprobs, "sample", model)
    check_logprobs(made.prompt_logprobs, "prompt", model)
    return made


def _check_bad_words(words: Sequence[str], model: Model) -> None:
    """Raises InvalidRequest for words that are none, or so many that looking for them would slow others down."""
    if len(words) > MAX_BAD_WORDS:
        raise InvalidRequest(f"bad_words must have at most {MAX_BAD_WORDS} words, got {len(words)}.", "bad_words")
    try:
        found = spellings(words, partial(model.tokenizer.encode, add_special_tokens=False))
    except ValueError as error:
        raise InvalidRequest(str(error), "bad_words") from None
    tokens = sum(map(len, found))
    if len(found) > MAX_BAD_WORDS or tokens > MAX_BAD_TOKENS:
        raise InvalidRequest(
            f"bad_words are {len(found)} sequences of {tokens} tokens in all, with and without a space before them; "
            f"they may be {MAX_BAD_WORDS} of {MAX_BAD_TOKENS}.",
            "bad_words",
        )


def alternatives(body: GenerationRequest, logprobs: int | None) -> int | None:
    """How many tokens an answer shows beside each of its own."""
    return len(body.logprob_token_ids) + 1 if body.logprob_token_ids else logprobs


def widen(body: GenerationRequest, model: Model) -> None:
    """Says by its number how many log-probabilities -1 is: those of all tokens."""
    for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
        if getattr(body, name, None) == -1:
            setattr(body, name, model.ready.vocab_size)


def count(body: GenerationRequest) -> int:
    """n: sequences of each prompt. Raises InvalidRequest where they are too many."""
    n = 1 if body.n is None else body.n
    if n > MAX_N:
        raise InvalidRequest(f"n must be at most {MAX_N}, got {n}.", "n")
    return n


def check_logprobs(value: int | None, kind: str, model: Model) -> None:
    """Raises InvalidRequest for more logprobs of a `kind` (sample or prompt) than the server shows."""
    if value is not None and value > model.max_logprobs:
        message = f"Requested {kind} logprobs of {value}, which is greater than max allowed: {model.max_logprobs}"
        raise InvalidRequest(message, "logprobs" if kind == "sample" else "prompt_logprobs")  # in chats, too, as vLLM


def max_tokens(wanted: int | None, prompt_length: int, model: Model, name: str = "max_tokens") -> int:
    """How many tokens may be generated: as many as wanted (None: no limit), no more than the context leaves room for.

    Raises InvalidRequest naming the field `name`.
    """
    if wanted is not None and wanted > model.max_model_len:
        raise InvalidRequest(
            f"{name}={wanted} cannot be greater than max_model_len={model.max_model_len}. "
            "Please request fewer output tokens.",
            name,
        )
    room = model.room(prompt_length)
    return min(limit for limit in (wanted, room, model.defaults.get("max_new_tokens")) if limit is not None)


def _logit_bias(body: GenerationRequest, vocab: int) -> dict[int, float] | None:
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
