"""What /v1/completions answers: one body, or the chunks of a stream, in vLLM's shapes (bodies include their nulls)."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from serve.api.client import Group, join
from serve.api.errors import body as error_body
from serve.api.errors import log
from serve.api.protocol import CompletionRequest
from serve.api.validation import Completion, Model
from serve.engine.messages import Output, TokenLogprobs
from serve.errors import GenerationFailed, ServeError

LOWEST = -9999.0  # what OpenAI's clients get for a probability of zero


@dataclass
class Choice:
    """What one sequence has given so far."""

    index: int
    prompt: int  # index of its prompt
    text: str = ""
    text_length: int = 0
    tokens: int = 0
    echoed: bool = False


class Answer:
    """One request's answer, made from its group's outputs."""

    def __init__(self, id: str, request: CompletionRequest, job: Completion, model: Model, fingerprint: str) -> None:
        self.id = id
        self.created = int(time.time())
        self._request = request
        self._job = job
        self._model = model
        self._fingerprint = fingerprint
        self._tokens = TokenTexts(model, bool(request.return_tokens_as_token_ids))
        self.choices = [Choice(i, i // job.n) for i in range(len(job.prompts) * job.n)]

    def usage(self) -> dict[str, Any]:
        prompt = sum(len(p.ids) for p in self._job.prompts)
        return _usage(prompt, sum(choice.tokens for choice in self.choices))

    # ---------------------------------------------------------------- one body

    async def whole(self, group: Group) -> dict[str, Any]:
        """The non-streaming body. Raises GenerationFailed or EngineDead."""
        outputs: list[Output | None] = [None] * len(self.choices)
        async for index, output in group:
            before = outputs[index]
            outputs[index] = output if before is None else join(before, output)
        choices = []
        for choice, last in zip(self.choices, outputs, strict=True):
            assert last is not None
            choice.tokens = len(last.tokens)
            choices.append(self._choice(choice, last))
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self._model_name(),
            "choices": choices,
            "service_tier": None,
            "system_fingerprint": self._fingerprint,
            "usage": self.usage() | {"prompt_tokens_details": None, "completion_tokens_details": None},
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }

    def _choice(self, choice: Choice, output: Output) -> dict[str, Any]:
        wants_ids = bool(self._request.return_token_ids)
        prompt = self._job.prompts[choice.prompt]
        text, logprobs = self._shown(choice, output)
        return {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
            "token_ids": output.tokens if wants_ids else None,
            "prompt_logprobs": self._prompt_logprobs(output) if self._job.prompt_logprobs else None,
            "prompt_token_ids": prompt.ids if wants_ids else None,
            "routed_experts": None,
        }

    def _prompt_logprobs(self, output: Output) -> list[dict[str, Any] | None]:
        return [None if entry is None else self._tokens.ranked(entry) for entry in output.prompt_logprobs or []]

    # ---------------------------------------------------------------- a stream

    async def chunks(self, group: Group) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream but [DONE]. An error is an event too: the status has been sent by now."""
        options = self._request.stream_options
        usage = bool(options and options.include_usage)
        continuous = bool(usage and options and options.continuous_usage_stats)
        interval = self._request.stream_interval or 1
        held: dict[int, Output] = {}
        try:
            async for index, output in group:
                if index in held:
                    output = join(held.pop(index), output)
                if output.finish_reason is None and len(output.tokens) < interval:
                    held[index] = output
                    continue
                yield self._chunk(self.choices[index], output, usage, continuous)
        except ServeError as error:
            yield error_body(error)
            return
        except Exception as error:
            log.error("unforeseen error in a stream", exc_info=error)
            yield error_body(GenerationFailed("The server failed to handle this request; its log says why."))
            return
        if usage:
            yield self._head() | {"choices": [], "usage": self.usage(), "system_fingerprint": self._fingerprint}

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self._model_name()}

    def _chunk(self, choice: Choice, output: Output, usage: bool, continuous: bool) -> dict[str, Any]:
        wants_ids = bool(self._request.return_token_ids)
        prompt = self._job.prompts[choice.prompt]
        first = not choice.echoed
        choice.tokens += len(output.tokens)
        text, logprobs = self._shown(choice, output)
        chunk = self._head()
        chunk["choices"] = [
            {
                "index": choice.index,
                "text": text,
                "logprobs": logprobs,
                "finish_reason": output.finish_reason,
                "stop_reason": output.stop_reason,
                "prompt_token_ids": prompt.ids if wants_ids and first else None,
                "token_ids": output.tokens if wants_ids else None,
            }
        ]
        if output.finish_reason is not None and not usage:
            chunk["system_fingerprint"] = self._fingerprint
        if continuous:
            chunk["usage"] = _usage(len(prompt.ids), choice.tokens)
        return chunk

    # ---------------------------------------------------------------- both

    def _model_name(self) -> str:
        return self._request.model or self._model.names[0]

    def _shown(self, choice: Choice, output: Output) -> tuple[str, dict[str, Any] | None]:
        """Text and log-probabilities of an output; the first of an echoing request has its prompt in front."""
        text, tokens = output.text, output.tokens
        entries: list[TokenLogprobs | None] = list(output.logprobs or [])
        if self._request.echo and not choice.echoed:
            prompt = self._job.prompts[choice.prompt]
            # Who asks for ids gets the prompt as ids.
            text = text if self._request.return_token_ids else (prompt.text or "") + text
            tokens = prompt.ids + tokens
            entries = [*(output.prompt_logprobs or []), *entries]
        choice.echoed = True
        offset, choice.text_length = choice.text_length, choice.text_length + len(text)
        if self._job.logprobs is None:
            return text, None
        return text, self._tokens.listed(tokens, entries, self._job.logprobs, offset)


class TokenTexts:
    """Token ids as the strings that log-probabilities are labelled with."""

    def __init__(self, model: Model, as_ids: bool) -> None:
        self._inner = model.tokenizer.inner
        self._as_ids = as_ids
        self._known: dict[int, str] = {}

    def text(self, id: int) -> str:
        if self._as_ids:
            return f"token_id:{id}"
        if id not in self._known:
            self._known[id] = self._inner.decode([id], skip_special_tokens=False)
        return self._known[id]

    def listed(self, tokens: list[int], entries: list[TokenLogprobs | None], k: int, offset: int) -> dict[str, Any]:
        """OpenAI's form for completions: four lists of one length.

        `offset` is where in the text the first token begins.
        """
        offsets, texts, values, tops = [], [], [], []
        for id, entry in zip(tokens, entries, strict=True):
            text = self.text(id)
            offsets.append(offset)
            offset += len(text)
            texts.append(text)
            values.append(None if entry is None else max(entry.logprob, LOWEST))
            tops.append(None if entry is None else self._top(entry, k))
        return {"text_offset": offsets, "token_logprobs": values, "tokens": texts, "top_logprobs": tops}

    def _top(self, entry: TokenLogprobs, k: int) -> dict[str, float]:
        """The token itself, then the k most probable."""
        top = {self.text(entry.token): max(entry.logprob, LOWEST)}
        for id, value in entry.top[:k]:
            top.setdefault(self.text(id), max(value, LOWEST))
        return top

    def ranked(self, entry: TokenLogprobs) -> dict[str, Any]:
        """vLLM's form of prompt_logprobs: by token id, the prompt's own token first."""
        chosen = {str(entry.token): self._ranked(entry.token, entry.logprob, entry.rank)}
        for rank, (id, value) in enumerate(entry.top, start=1):
            chosen.setdefault(str(id), self._ranked(id, value, rank))
        return chosen

    def _ranked(self, id: int, value: float, rank: int) -> dict[str, Any]:
        return {"logprob": max(value, LOWEST), "rank": rank, "decoded_token": self.text(id)}


def _usage(prompt: int, completion: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}
