"""From a group's outputs to an HTTP answer, one body or the chunks of a stream: what completions and chats share.

`completions.py` and `chat.py` fill in the shapes, which are vLLM's: bodies include their nulls.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from serve.api.client import Group, join
from serve.api.errors import body as error_body
from serve.api.errors import log
from serve.api.logprobs import LONGEST, Context, TokenTexts
from serve.api.model import Model
from serve.api.prompts import Prompt
from serve.api.protocol import GenerationRequest
from serve.api.reading import Reader
from serve.api.validation import Job
from serve.engine.messages import Output
from serve.errors import GenerationFailed, ServeError

MANY = 2000  # tokens whose log-probabilities take a moment to be written down


@dataclass
class Choice:
    """What one sequence has given so far."""

    index: int
    prompt: Prompt
    tokens: int = 0
    cached: int = 0  # tokens of the prompt that were found in the prefix cache
    text_length: int = 0
    begun: bool = False  # something of it has been shown
    reader: Reader | None = None  # of its text, where it is not all content
    context: Context = field(default_factory=lambda: deque(maxlen=LONGEST))  # its last tokens


class Answer(ABC):
    """One request's answer, made from its group's outputs."""

    prefix: ClassVar[str]  # of the id
    object: ClassVar[str]
    chunk_object: ClassVar[str]
    running_usage: ClassVar[dict[str, Any]] = {}  # further fields of the usage in each chunk

    def __init__(
        self,
        id: str,
        request: GenerationRequest,
        job: Job,
        model: Model,
        fingerprint: str | None,
        *,
        prompt_details: bool = False,
    ) -> None:
        self.id = f"{self.prefix}-{id}"
        self.created = int(time.time())
        self.request = request
        self.job = job
        self.fingerprint = fingerprint
        self.prompt_details = prompt_details
        self.model_name = model.names[0]  # by whichever of its names it was asked, as in vLLM
        self.flags = model.flags
        as_ids = request.return_tokens_as_token_ids
        self.token_texts = TokenTexts(model, model.flags.tokens_as_ids if as_ids is None else as_ids)
        self.wants_ids = bool(request.return_token_ids)
        self.choices = [Choice(i, job.prompts[i // job.n]) for i in range(len(job.prompts) * job.n)]

    @abstractmethod
    def choice(self, choice: Choice, output: Output) -> dict[str, Any]:
        """An element of `choices` in the body: all that its sequence gave."""

    @abstractmethod
    def delta(self, choice: Choice, output: Output) -> dict[str, Any] | None:
        """An element of `choices` in a chunk: what came since the last. None where nothing is to be shown yet."""

    def rest(self, outputs: list[Output]) -> dict[str, Any]:
        """Further fields of the body."""
        return {}

    def openings(self) -> Iterator[dict[str, Any]]:
        """Chunks (their fields beside the head) that come before the first with text."""
        yield from ()

    def usage(self) -> dict[str, Any]:
        """Each prompt counts once, whatever n; so does what was cached of it, for its first sequence."""
        usage = _usage(sum(len(p.ids) for p in self.job.prompts), sum(choice.tokens for choice in self.choices))
        if self.prompt_details:
            cached = sum(choice.cached for choice in self.choices[:: self.job.n])
            usage["prompt_tokens_details"] = {
                "cached_tokens": cached,
                "created_cache_tokens": None,
                "multimodal_tokens": None,
            }
        return usage

    def prompt_logprobs(self, output: Output) -> list[dict[str, Any] | None] | None:
        """vLLM's form; None where the request has not asked for them."""
        if not self.job.prompt_logprobs:
            return None
        return self.token_texts.ranked(output.prompt_logprobs or [])

    async def whole(self, group: Group) -> dict[str, Any]:
        """The non-streaming body. Raises GenerationFailed or EngineDead."""
        outputs = await gather(group)
        if sum(len(output.logprobs or ()) + len(output.prompt_logprobs or ()) for output in outputs) > MANY:
            return await asyncio.to_thread(self.body, outputs)  # beside it, others are answered
        return self.body(outputs)

    def body(self, outputs: list[Output]) -> dict[str, Any]:
        """The non-streaming body, of what each sequence gave in all."""
        choices = []
        for choice, output in zip(self.choices, outputs, strict=True):
            choice.tokens, choice.cached = len(output.tokens), output.cached
            choices.append(self.choice(choice, output))
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model_name,
            "choices": choices,
            "service_tier": None,
            "system_fingerprint": self.fingerprint,
            "usage": {"prompt_tokens_details": None, "completion_tokens_details": None} | self.usage(),
            **self.rest(outputs),
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }

    async def chunks(self, group: Group) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream but [DONE]. An error is an event too: the status has been sent by now."""
        options = self.request.stream_options
        usage = self.flags.usage or bool(options and options.include_usage)
        continuous = self.flags.usage or bool(usage and options and options.continuous_usage_stats)
        interval = max(self.request.stream_interval or 1, self.flags.interval)
        held: dict[int, Output] = {}
        opened = False
        try:
            async for index, output in group:
                if not opened:  # not before: what fails at once is the first event
                    for fields in self.openings():
                        yield self._chunk(fields, self.choices[fields["choices"][0]["index"]], continuous)
                    opened = True
                if index in held:
                    output = join(held.pop(index), output)
                choice = self.choices[index]
                if choice.tokens and output.finish_reason is None and len(output.tokens) < interval:
                    held[index] = output
                    continue
                choice.tokens += len(output.tokens)
                choice.cached = choice.cached or output.cached
                delta = self.delta(choice, output)
                if delta is None:
                    continue
                fields = {"choices": [delta]}
                if output.finish_reason is not None and not usage:
                    fields |= self._signed()
                yield self._chunk(fields, choice, continuous)
        except ServeError as error:
            yield error_body(error)
            return
        except Exception as error:
            log.error("unforeseen error in a stream", exc_info=error)
            yield error_body(GenerationFailed("The server failed to handle this request; its log says why."))
            return
        if usage:
            total = self.usage()
            if self.prompt_details:  # a chunk has no nulls here
                total["prompt_tokens_details"] = {"cached_tokens": total["prompt_tokens_details"]["cached_tokens"]}
            yield self._head() | {"choices": [], "usage": total} | self._signed()

    def _signed(self) -> dict[str, Any]:
        """The fingerprint as a stream ends with it."""
        return {} if self.fingerprint is None else {"system_fingerprint": self.fingerprint}

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": self.chunk_object, "created": self.created, "model": self.model_name}

    def _chunk(self, fields: dict[str, Any], choice: Choice, continuous: bool) -> dict[str, Any]:
        chunk = self._head() | fields
        if continuous:
            chunk["usage"] = _usage(len(choice.prompt.ids), choice.tokens) | self.running_usage
        return chunk


async def gather(group: Group) -> list[Output]:
    """All that each sequence of a group gives, in their order. Raises GenerationFailed or EngineDead."""
    gathered: dict[int, Output] = {}
    async for index, output in group:
        gathered[index] = join(gathered[index], output) if index in gathered else output
    return [output for _, output in sorted(gathered.items())]


def _usage(prompt: int, completion: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}
