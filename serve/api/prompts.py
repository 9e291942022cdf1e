"""Prompts as token ids that the model knows and that fit its context."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lm.tokenizer import Tokenizer
from serve.api.model import Model
from serve.api.protocol import CompletionRequest, GenerationRequest
from serve.errors import InvalidRequest

MAX_PROMPTS = 1024  # of one request
LONG_TEXT = 20_000  # characters from which tokenizing is done aside, so that the others are answered meanwhile


@dataclass(frozen=True)
class Prompt:
    """Token ids and, where it is known or needed (echo), the text they stand for."""

    ids: list[int]
    text: str | None


async def prompts(body: CompletionRequest, model: Model) -> list[Prompt]:
    """The prompts of a completion: a text, ids, or a list of either. Raises InvalidRequest."""
    prompt = body.prompt
    if prompt is None or prompt == "":
        raise InvalidRequest("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    if prompt == []:
        raise InvalidRequest("The decoder prompt cannot be empty", "prompt")
    several: list[Any] = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)
    if len(several) > MAX_PROMPTS:
        raise InvalidRequest(f"prompt list length {len(several)} exceeds the maximum of {MAX_PROMPTS}.", "prompt")
    aside = sum(len(one) for one in several if isinstance(one, str)) >= LONG_TEXT
    made = []
    for one in several:
        if isinstance(one, str):
            made.append(await of_text(one, body, model, special=body.add_special_tokens, aside=aside))
        else:
            made.append(_fitted(one, None, body, model, wants_text=bool(body.echo)))
    return made


async def of_text(
    text: str, body: GenerationRequest, model: Model, *, special: bool, aside: bool = False, param: str = "prompt"
) -> Prompt:
    """The prompt that a text is, cut where the request says so. Raises InvalidRequest naming the field `param`."""
    if len(text) >= LONG_TEXT and body.truncate_prompt_tokens is None:
        await _check_characters(text, model)
    ids = await encode(text, model.tokenizer, add_special_tokens=special, aside=aside)
    return _fitted(ids, text, body, model, param=param)


async def _check_characters(text: str, model: Model) -> None:
    """Raises InvalidRequest for a text that is too long however few tokens it has: it is not even tokenized."""
    longest = await asyncio.to_thread(longest_token, model.tokenizer)
    most = model.max_model_len * (longest or len(text))
    if len(text) > most:
        raise InvalidRequest(
            f"This model's maximum context length is {model.max_model_len} tokens. However, your prompt contains "
            f"{len(text)} characters (more than {most} characters, which is the upper bound for "
            f"{model.max_model_len} input tokens). Please reduce the length of the input prompt.",
            "input_text",
        )


@lru_cache(maxsize=1)
def longest_token(tokenizer: Tokenizer) -> int | None:
    """How many characters a token of a byte-level BPE stands for, at most. None of other tokenizers, and where some
    characters may be dropped.
    """
    state = json.loads(tokenizer.inner.to_str())
    before = state["pre_tokenizer"] or {}
    parts = before.get("pretokenizers", [before])
    bytewise = any(part.get("type") == "ByteLevel" for part in parts) and state["model"]["type"] == "BPE"
    dropped = any(part.get("behavior") == "Removed" or "Whitespace" in part.get("type", "") for part in parts)
    stripped = any(token["lstrip"] or token["rstrip"] for token in state["added_tokens"])
    if not bytewise or dropped or stripped or state["normalizer"] is not None:
        return None
    # A byte-level vocabulary writes each byte as a character, so that this is more, if anything.
    return max(map(len, tokenizer.inner.get_vocab(with_added_tokens=True)), default=None)


def _fitted(
    ids: list[int],
    text: str | None,
    body: GenerationRequest,
    model: Model,
    *,
    wants_text: bool = False,
    param: str = "prompt",
) -> Prompt:
    if not ids:
        raise InvalidRequest("The decoder prompt cannot be empty", param)
    check_ids(ids, model, param)
    cut = _truncate(ids, body, model)
    if not cut:
        raise InvalidRequest("The decoder prompt cannot be empty", "truncate_prompt_tokens")
    if len(cut) < len(ids) or (text is None and wants_text):
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


def _truncate(ids: list[int], body: GenerationRequest, model: Model) -> list[int]:
    wanted = body.truncate_prompt_tokens
    if wanted is None:
        return ids
    if wanted > model.max_model_len:
        raise InvalidRequest(
            f"truncate_prompt_tokens value ({wanted}) is greater than max_model_len ({model.max_model_len}). "
            "Please, select a smaller truncation size.",
            "truncate_prompt_tokens",
        )
    length = _longest(body, model) if wanted == -1 else wanted
    if length == 0:
        return []
    return ids[:length] if body.truncation_side == "right" else ids[-length:]


def _longest(body: GenerationRequest, model: Model) -> int:
    """Tokens of the longest prompt that leaves room for an answer, where one is wanted."""
    nothing = isinstance(body, CompletionRequest) and bool(body.echo) and body.max_tokens == 0
    return model.max_model_len - (0 if nothing or model.room(model.max_model_len) else 1)


async def encode(text: str, tokenizer: Tokenizer, *, add_special_tokens: bool, aside: bool = False) -> list[int]:
    """Token ids of a text. A long one (or any, `aside`) is tokenized in a thread: tokenizers frees the interpreter."""
    if len(text) < LONG_TEXT and not aside:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)
