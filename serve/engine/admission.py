"""From a message to a request, or a sentence: what could not be carried out even alone never gets into the queue."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from functools import partial

from lm.params import SamplingParams
from lm.tokenizer import Tokenizer
from serve.engine import sampler
from serve.engine.bad_words import spellings
from serve.engine.detokenizer import Detokenizers, Silent, StopStrings
from serve.engine.messages import Add, AddBeam
from serve.engine.requests import BeamRequest, Request, beam_tokens
from serve.engine.scheduler import Scheduler


class Admission:
    """Knows the bounds of the model and of the scheduler. `source`: whether prompts are computed whole, and have no
    probabilities. `seed` is of the requests that bring none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        scheduler: Scheduler,
        *,
        eos: Sequence[int],
        max_model_len: int,
        vocab_size: int,
        encoder_decoder: bool,
        source: bool,
        seed: int,
    ) -> None:
        self._scheduler, self._eos = scheduler, eos
        self._max_model_len, self._vocab_size = max_model_len, vocab_size
        self._encoder_decoder, self._source = encoder_decoder, source
        self._seeds = random.Random(seed)
        self._detokenizers = Detokenizers(tokenizer.inner)
        self._encode = partial(tokenizer.encode, add_special_tokens=False)

    def request(self, message: Add | AddBeam) -> Request:
        """Raises ValueError with one sentence for what cannot be carried out."""
        request = self._beam(message) if isinstance(message, AddBeam) else self._sequence(message)
        scheduler = self._scheduler
        needed = max(len(request.prompt) + max(request.limit - 1, 0), request.reserve)
        for what, much, most in (
            ("tokens in the cache", needed, scheduler.blocks.capacity),
            ("tokens in one step", max(request.whole, request.width), scheduler.budget),
            ("sequences at once", request.width, scheduler.seats),
        ):
            if much > most:
                raise ValueError(f"the request needs {much} {what}; there is room for {most}.")
        return request

    def _sequence(self, message: Add) -> Request:
        prompt, params = message.prompt, message.params
        self._check_ids(prompt)
        self._check_ids(params.token_ids)
        request = Request(
            id=message.id,
            prompt=prompt,
            params=params,
            generate=message.generate,
            arrival=message.arrival,
            priority=message.priority,
            cache_salt=message.cache_salt,
            limit=self._limit(len(prompt), params.max_tokens if message.generate else 0),
            whole=len(prompt) if self._source else 0,
        )
        seed = self._seeds.getrandbits(64) if params.seed is None else params.seed
        # What is generated goes on after a decoder's prompt; a translation goes on after nothing.
        before = [] if self._encoder_decoder else prompt
        bad = spellings(params.bad_words, self._encode)
        request.draw = sampler.prepare(request, before, seed, self._eos, bad)
        request.detokenizer = (
            self._detokenizers.after(before, skip_special_tokens=params.skip_special_tokens)
            if params.detokenize
            else Silent()
        )
        request.stops = StopStrings(params.stop, include=params.include_stop_str_in_output)
        if params.prompt_logprobs is not None:
            if self._source:
                raise ValueError("the model reads a source, whose tokens have no probabilities.")
            request.prompt_logprobs = [None]  # nothing comes before the first token
        return request

    def _beam(self, message: AddBeam) -> BeamRequest:
        prompt, params = message.prompt, message.params
        self._check_ids(prompt)
        if 2 * params.beam_width > self._vocab_size:
            width, most = params.beam_width, self._vocab_size
            raise ValueError(f"beam_width is {width}; it may be half of the vocabulary, {most}.")
        limit = self._limit(len(prompt), params.max_tokens)
        return BeamRequest(
            id=message.ids[0],
            ids=message.ids,
            prompt=prompt,
            params=SamplingParams(),
            beam=params,
            arrival=message.arrival,
            priority=message.priority,
            limit=limit,
            whole=len(prompt),
            width=params.beam_width,
            reserve=beam_tokens(len(prompt), limit, params),
        )

    def _check_ids(self, ids: Iterable[int]) -> None:
        """Raises ValueError for an id that is none: in the model it would end all those of its step."""
        foreign = next((id for id in ids if not 0 <= id < self._vocab_size), None)
        if foreign is not None:
            raise ValueError(f"token id {foreign} is out of vocabulary; ids are from 0 to {self._vocab_size - 1}.")

    def _limit(self, prompt: int, wanted: int | None) -> int:
        """How many tokens may follow a prompt of so many: as many as wanted; None for all that there is room for.

        Raises ValueError for a prompt that is empty or too long, and for more than there is room for.
        """
        room = self._max_model_len - (0 if self._encoder_decoder else prompt)
        limit = max(room, 1) if wanted is None else wanted
        if not 1 <= prompt <= self._max_model_len or limit > room:
            raise ValueError(
                f"{prompt} tokens of prompt and {limit} more are too many, or none; max_model_len is "
                f"{self._max_model_len}{', for each' if self._encoder_decoder else ''}."
            )
        return limit
