"""Offline use, in this process and with vLLM's names: LLM(folder).generate(prompts, SamplingParams(...)), .chat and
.beam_search. A script written for vLLM changes its import.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from lm.bar import bar
from lm.params import SamplingParams
from serve.api.defaults import generation_defaults
from serve.engine.build import build
from serve.engine.chats import ChatTokenizer, Messages
from serve.engine.messages import Add, AddBeam, BeamSearchParams, Output, TokenLogprobs
from serve.engine.outputs import BeamSearchOutput, BeamSearchSequence, CompletionOutput, Logprob, RequestOutput
from serve.engine.requests import children
from serve.engine.settings import engine_config

Prompt = str | Mapping[str, Any] | Sequence[int]


class LLM:
    """A model folder, loaded. The keyword arguments are those flags of `python -m serve` that concern the engine; those
    of vLLM that say how it uses its devices are taken and change nothing (settings.py).

    Raises ValueError with one sentence for a folder or a setting that cannot be.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        chat_template: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        self._folder = os.fspath(model)
        self.engine, self.ready = build(engine_config(self._folder, settings))
        self._tokenizer = ChatTokenizer(self.engine.tokenizer, chat_template)
        self._made = 0

    def get_tokenizer(self) -> ChatTokenizer:
        """The model's tokenizer, with encode, decode and apply_chat_template."""
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json asks for."""
        values = generation_defaults(self._folder, "auto")
        return SamplingParams(max_tokens=values.pop("max_new_tokens", 16), **values)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Continues (or, with an encoder-decoder, translates) a text, {"prompt_token_ids": [...]} or a list of ids, or
        a list of such, all batched together. `use_tqdm`: whether a terminal sees a bar. `tokenization_kwargs` may hold
        add_special_tokens and truncate_prompt_tokens (so many from the end; -1: as many as fit).

        Returns an output for each prompt, in order. Raises ValueError for a prompt that does not fit, RuntimeError
        where the engine failed on one.
        """
        _no_lora(lora_request)
        several = _several(prompts)
        params = _each("sampling_params", sampling_params or self.get_default_sampling_params(), len(several))
        priorities = _each("priority", priority or 0, len(several))
        how = dict(tokenization_kwargs or {})
        made = [self._request(*each, how) for each in zip(several, params, priorities, strict=True)]
        waiting = {add.id: (request, index) for request in made for index, add in enumerate(request.adds)}
        ended = 0
        with bar("prompts", len(waiting), "prompts", use_tqdm) as show:
            for id, output in self._outputs([add for request in made for add in request.adds]):
                request, index = waiting[id]
                self._extend(request.output, request.output.outputs[index], output)
                if output.finish_reason is not None:
                    show(ended := ended + 1)
        return [request.output for request in made]

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers a chat (a list of {"role", "content"}), or each of a list of chats: `generate` from what the chat
        template makes of it. Whether contents are texts or parts, the template decides (chat_template_content_format).

        Raises as `generate`, and ValueError where the template gives no text for a chat.
        """
        chats = [messages] if messages and isinstance(messages[0], Mapping) else messages
        texts = [
            self._tokenizer.apply_chat_template(
                chat,  # type: ignore[arg-type]
                tools,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **(chat_template_kwargs or {}),
            )
            for chat in chats
        ]
        how = {"add_special_tokens": False, **(tokenization_kwargs or {})}
        return self.generate(
            texts,
            sampling_params,
            use_tqdm=use_tqdm,
            lora_request=lora_request,
            priority=priority,
            tokenization_kwargs=how,
        )

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        lora_request: None = None,
        use_tqdm: bool = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """Searches the likeliest continuations (or translations) of each prompt; prompts as in `generate`. How many run
        at once, the scheduler decides (concurrency_limit).

        Raises ValueError for a prompt that does not fit, RuntimeError where the engine failed on one.
        """
        _no_lora(lora_request)
        adds: list[AddBeam] = []
        for prompt in _several(prompts):
            _, ids = self._ids(prompt, {})
            wanted = msgspec.structs.replace(params, max_tokens=min(self._room(ids), params.max_tokens))
            self._made += 1
            names = [f"{self._made}-{i}" for i in range(params.beam_width)]
            adds.append(AddBeam(names, ids, wanted, time.monotonic()))
        found: dict[str, Output] = {}
        with bar("sequences", sum(len(add.ids) for add in adds), "sequences", use_tqdm) as show:
            for id, output in self._outputs(adds):
                found[id] = output
                show(len(found))
        return [BeamSearchOutput([self._sequence(add.prompt, found[id]) for id in add.ids]) for add in adds]

    def _sequence(self, prompt: Sequence[int], output: Output) -> BeamSearchSequence:
        tokens = [*([] if self.ready.encoder_decoder else prompt), *output.tokens]
        logprobs = None if output.logprobs is None else [self._named(entry) for entry in output.logprobs]
        text = self.engine.tokenizer.decode(tokens)
        total = output.cumulative_logprob or 0.0
        return BeamSearchSequence(tokens, logprobs, total, text, output.finish_reason, output.stop_reason)

    @property
    def _longest(self) -> int:
        """Tokens of a prompt, at most."""
        longest = self.ready.max_model_len
        return longest if self.ready.encoder_decoder else longest - 1

    def _room(self, ids: Sequence[int], more: Sequence[int] = ()) -> int:
        """How many tokens can follow a prompt. Raises ValueError where none can, and for ids, or `more` of them, that
        are none.
        """
        longest, most = self.ready.max_model_len, self._longest
        if not 1 <= len(ids) <= most:
            raise ValueError(f"a prompt has {len(ids)} tokens; it must have 1 to {most}.")
        foreign = [id for id in (*ids, *more) if not 0 <= id < self.ready.vocab_size]
        if foreign:
            raise ValueError(
                f"token id {foreign[0]} is out of vocabulary; ids are from 0 to {self.ready.vocab_size - 1}."
            )
        return longest if self.ready.encoder_decoder else longest - len(ids)

    def _request(self, prompt: Any, params: SamplingParams, priority: int, how: Mapping[str, Any]) -> _Made:
        text, ids = self._ids(prompt, how)
        room = self._room(ids, params.token_ids)
        longest = room if params.max_tokens is None else min(room, params.max_tokens)
        params = replace(params, max_tokens=longest, min_tokens=min(params.min_tokens, longest))
        self._made += 1
        id, now = str(self._made), time.monotonic()
        salt = prompt.get("cache_salt") if isinstance(prompt, Mapping) else None
        adds = [
            Add(f"{id}-{i}", list(ids), child, now, priority=priority, cache_salt=salt)
            for i, child in enumerate(children(params, params.n))
        ]
        outputs = [CompletionOutput(index=i) for i in range(params.n)]
        return _Made(adds, RequestOutput(id, text, list(ids), None, outputs))

    def _ids(self, prompt: Any, how: Mapping[str, Any]) -> tuple[str | None, list[int]]:
        unknown = how.keys() - {"add_special_tokens", "truncate_prompt_tokens"}
        if unknown:
            raise ValueError(f"tokenization_kwargs has {min(unknown)!r}, which nothing here knows.")
        text = None
        if isinstance(prompt, Mapping):
            prompt = prompt["prompt_token_ids"] if "prompt_token_ids" in prompt else prompt["prompt"]
        if isinstance(prompt, str):
            text = prompt
            ids = self.engine.tokenizer.encode(text, add_special_tokens=how.get("add_special_tokens", True))
        else:
            ids = list(prompt)
        most = how.get("truncate_prompt_tokens")
        if most is not None:
            if most == -1:
                most = self._longest
            if most < 1:
                raise ValueError(f"truncate_prompt_tokens is {most}; it must be at least 1, or -1.")
            ids = ids[-most:]
        return text, ids

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

    def _extend(self, request: RequestOutput, completion: CompletionOutput, output: Output) -> None:
        request.num_cached_tokens = request.num_cached_tokens or output.cached
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


def _each(name: str, given: Any, count: int) -> list[Any]:
    """One for each prompt. Raises ValueError where there are more or fewer."""
    if not isinstance(given, Sequence):
        return [given] * count
    if len(given) != count:
        raise ValueError(f"there are {count} prompts and {len(given)} {name}; give one, or one for each.")
    return list(given)


def _no_lora(request: None) -> None:
    if request is not None:
        raise ValueError("lora_request is given; adapters are not served: merge them into the model's folder.")
