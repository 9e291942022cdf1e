"""Offline use, in this process and with vLLM's names: LLM(folder).generate(prompts, SamplingParams(...)), and
LLM(folder).beam_search(prompts, BeamSearchParams(...)).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from lm.params import SamplingParams
from serve.engine.build import build
from serve.engine.messages import Add, AddBeam, BeamSearchParams, EngineConfig, Output, TokenLogprobs
from serve.engine.requests import children

Prompt = str | Mapping[str, Any] | Sequence[int]


@dataclass
class Logprob:
    logprob: float
    rank: int
    decoded_token: str


@dataclass
class CompletionOutput:
    """One of the n continuations of a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    """A prompt and its continuations."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool = True


@dataclass
class BeamSearchSequence:
    """A sequence that a search ended with. `tokens` are the decoder's: a decoder's prompt is among them, a source is
    not; `text` is theirs.
    """

    tokens: list[int]
    logprobs: list[dict[int, Logprob]] | None
    cum_logprob: float
    text: str
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass
class BeamSearchOutput:
    """The sequences of a prompt, as many as the beam is wide, best first."""

    sequences: list[BeamSearchSequence]


class LLM:
    """A model folder, loaded. The keyword arguments are those flags of `python -m serve` that concern the engine.

    Raises ValueError with one sentence for a folder or a setting that cannot be.
    """

    def __init__(self, model: str | os.PathLike[str], **settings: Any) -> None:
        try:
            config = EngineConfig(folder=os.fspath(model), **settings)
        except TypeError as error:
            raise ValueError(f"{error}; the settings are {', '.join(EngineConfig.__struct_fields__[1:])}.") from None
        self.engine, self.ready = build(config)
        self._made = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continues (or, with an encoder-decoder, translates) a text, {"prompt_token_ids": [...]} or a list of ids, or
        a list of such, all batched together.

        Returns an output for each prompt, in order. Raises ValueError for a prompt that does not fit, RuntimeError
        where the engine failed on one.
        """
        several = _several(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(several)
        else:
            params = list(sampling_params)
        if len(params) != len(several):
            raise ValueError(
                f"there are {len(several)} prompts and {len(params)} sampling_params; give one, or one for each."
            )
        made = [self._request(prompt, wanted) for prompt, wanted in zip(several, params, strict=True)]
        waiting = {add.id: (request, index) for request in made for index, add in enumerate(request.adds)}
        for id, output in self._outputs([add for request in made for add in request.adds]):
            request, index = waiting[id]
            self._extend(request.output, request.output.outputs[index], output)
        return [request.output for request in made]

    def beam_search(self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams) -> list[BeamSearchOutput]:
        """Searches the likeliest continuations (or translations) of each prompt; prompts as in `generate`.

        Raises ValueError for a prompt that does not fit, RuntimeError where the engine failed on one.
        """
        adds: list[AddBeam] = []
        for prompt in _several(prompts):
            _, ids = self._ids(prompt)
            wanted = msgspec.structs.replace(params, max_tokens=min(self._room(ids), params.max_tokens))
            self._made += 1
            names = [f"{self._made}-{i}" for i in range(params.beam_width)]
            adds.append(AddBeam(names, ids, wanted, time.monotonic()))
        found = dict(self._outputs(adds))
        return [BeamSearchOutput([self._sequence(add.prompt, found[id]) for id in add.ids]) for add in adds]

    def _sequence(self, prompt: Sequence[int], output: Output) -> BeamSearchSequence:
        tokens = [*([] if self.ready.encoder_decoder else prompt), *output.tokens]
        logprobs = None if output.logprobs is None else [self._named(entry) for entry in output.logprobs]
        text = self.engine.tokenizer.decode(tokens)
        total = output.cumulative_logprob or 0.0
        return BeamSearchSequence(tokens, logprobs, total, text, output.finish_reason, output.stop_reason)

    def _room(self, ids: Sequence[int], more: Sequence[int] = ()) -> int:
        """How many tokens can follow a prompt. Raises ValueError where none can, and for ids, or `more` of them, that
        are none.
        """
        longest = self.ready.max_model_len
        most = longest if self.ready.encoder_decoder else longest - 1
        if not 1 <= len(ids) <= most:
            raise ValueError(f"a prompt has {len(ids)} tokens; it must have 1 to {most}.")
        foreign = [id for id in (*ids, *more) if not 0 <= id < self.ready.vocab_size]
        if foreign:
            raise ValueError(
                f"token id {foreign[0]} is out of vocabulary; ids are from 0 to {self.ready.vocab_size - 1}."
            )
        return longest if self.ready.encoder_decoder else longest - len(ids)

    def _request(self, prompt: Any, params: SamplingParams) -> _Made:
        text, ids = self._ids(prompt)
        room = self._room(ids, [*params.stop_token_ids, *(params.logit_bias or ())])
        longest = room if params.max_tokens is None else min(room, params.max_tokens)
        params = replace(params, max_tokens=longest, min_tokens=min(params.min_tokens, longest))
        self._made += 1
        id, now = str(self._made), time.monotonic()
        adds = [Add(f"{id}-{i}", list(ids), child, now) for i, child in enumerate(children(params, params.n))]
        outputs = [CompletionOutput(index=i) for i in range(params.n)]
        return _Made(adds, RequestOutput(id, text, list(ids), None, outputs))

    def _ids(self, prompt: Any) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            prompt = prompt["prompt_token_ids"] if "prompt_token_ids" in prompt else prompt["prompt"]
        if isinstance(prompt, str):
            return prompt, self.engine.tokenizer.encode(prompt)
        return None, list(prompt)

    def _outputs(self, adds: Sequence[Add | AddBeam]) -> Iterator[tuple[str, Output]]:
        """Every output of these, as they come; whatever goes wrong, nothing of them stays in the engine."""
        ids = {id for add in adds for id in (add.ids if isinstance(add, AddBeam) else [add.id])}
        try:
            for add in adds:
                self.engine.add(add)
            while ids:
                for output in self.engine.step().outputs:
                    if output.error is not None:
                        raise RuntimeError(f"the engine failed on a prompt: {output.error}")
                    yield output.id, output
                    if output.finish_reason is not None:
                        ids.remove(output.id)
        finally:
            self.engine.abort(list(ids))

    def _extend(self, request: RequestOutput, completion: CompletionOutput, output: Any) -> None:
        completion.text += output.text
        completion.token_ids += output.tokens
        completion.finish_reason, completion.stop_reason = output.finish_reason, output.stop_reason
        if output.prompt_logprobs is not None:
            request.prompt_logprobs = [
                None if entry is None else self._named(entry) for entry in output.prompt_logprobs
            ]
        if output.logprobs is not None:
            completion.logprobs = (completion.logprobs or []) + [self._named(entry) for entry in output.logprobs]
            added = sum(entry.logprob for entry in output.logprobs)
            completion.cumulative_logprob = (completion.cumulative_logprob or 0.0) + added

    def _named(self, entry: TokenLogprobs) -> dict[int, Logprob]:
        decode = self.engine.tokenizer.inner.decode
        named = {entry.token: Logprob(entry.logprob, entry.rank, decode([entry.token], skip_special_tokens=False))}
        for rank, (id, value) in enumerate(entry.top, start=1):
            named.setdefault(id, Logprob(value, rank, decode([id], skip_special_tokens=False)))
        return named


@dataclass
class _Made:
    adds: list[Add]
    output: RequestOutput


def _several(prompts: Any) -> list[Any]:
    one = isinstance(prompts, (str, Mapping)) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return [prompts] if one else list(prompts)
