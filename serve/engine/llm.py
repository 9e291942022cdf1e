"""Offline use, in this process and with vLLM's names: LLM(folder).generate(prompts, SamplingParams(...))."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lm.params import SamplingParams
from serve.engine.build import build
from serve.engine.messages import Add, EngineConfig, TokenLogprobs
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
        """Continues a text, {"prompt_token_ids": [...]} or a list of ids, or a list of such, all batched together.

        Returns an output for each prompt, in order. Raises ValueError for a prompt that does not fit, RuntimeError
        where the engine failed on one.
        """
        several = [prompts] if _is_one(prompts) else list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(several)
        else:
            params = list(sampling_params)
        if len(params) != len(several):
            raise ValueError(
                f"there are {len(several)} prompts and {len(params)} sampling_params; give one, or one for each."
            )
        made = []
        try:
            for prompt, wanted in zip(several, params, strict=True):
                made.append(self._request(prompt, wanted))
            adds = [add for request in made for add in request.adds]
            for add in adds:
                self.engine.add(add)
            self._run({add.id: (request, index) for request in made for index, add in enumerate(request.adds)})
        except BaseException:
            self.engine.abort([add.id for request in made for add in request.adds])
            raise
        return [request.output for request in made]

    def _request(self, prompt: Any, params: SamplingParams) -> _Made:
        text, ids = self._ids(prompt)
        room = self.ready.max_model_len - len(ids)
        if not ids or room < 1:
            raise ValueError(
                f"a prompt has {len(ids)} tokens; to be continued it must have 1 to {self.ready.max_model_len - 1}."
            )
        foreign = [
            id
            for id in (*ids, *params.stop_token_ids, *(params.logit_bias or ()))
            if not 0 <= id < self.ready.vocab_size
        ]
        if foreign:
            raise ValueError(
                f"token id {foreign[0]} is out of vocabulary; ids are from 0 to {self.ready.vocab_size - 1}."
            )
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

    def _run(self, waiting: dict[str, tuple[_Made, int]]) -> None:
        while waiting:
            for output in self.engine.step().outputs:
                request, index = waiting[output.id]
                if output.error is not None:
                    raise RuntimeError(f"the engine failed on prompt {request.output.request_id}: {output.error}")
                self._extend(request.output, request.output.outputs[index], output)
                if output.finish_reason is not None:
                    del waiting[output.id]

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


def _is_one(prompts: Any) -> bool:
    return isinstance(prompts, (str, Mapping)) or (len(prompts) > 0 and isinstance(prompts[0], int))
