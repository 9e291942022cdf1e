"""Beam search in the engine: lm.beam's, one step of it in each step of the engine, so that everybody else goes on.

A search has rows of its own, of the model's contiguous state, whatever runner serves the others. The scheduler counts
them: seats and budget for each of its sequences, and the cache that they may come to take from the start. What a
sequence is worth is vLLM's score. A preempted search begins anew; it draws nothing, so it finds the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import torch

from lm.beam import VLLM, BeamParams, Hypothesis, beam_steps
from lm.search import pad
from lm.tokenizer import Tokenizer
from serve.engine import sampler
from serve.engine.messages import Output, Timings, TokenLogprobs
from serve.engine.requests import BeamRequest, Status
from serve.engine.scheduler import Share

NOT_A_NUMBER = "The model's output for this request is not a number; its weights or this prompt make it overflow."


class Found(NamedTuple):
    """What a search ended with, best first, and what was asked to see of the probabilities at each token."""

    hypotheses: list[Hypothesis]
    logprobs: list[list[TokenLogprobs]] | None


class Beams:
    """The searches that run. `eos` are the ids that end a sequence."""

    def __init__(self, model: Any, eos: Sequence[int]) -> None:
        self._model = model
        self._eos = tuple(eos)
        self._searches: dict[BeamRequest, Generator[int, None, Found]] = {}

    def advance(self, share: Share) -> Found | None:
        """One step of the search that the share is of: the model is called once. None until it is over.

        Raises ValueError where the model's output is no number.
        """
        request = share.request
        assert isinstance(request, BeamRequest)
        if share.start == 0:
            self._searches[request] = self._search(request)
        try:
            next(self._searches[request])
        except StopIteration as end:
            return end.value
        return None

    def tidy(self) -> None:
        """Lets go of searches whose request has ended, was aborted or preempted."""
        for request in [r for r in self._searches if r.status is not Status.RUNNING or not r.computed]:
            self._searches.pop(request).close()

    def outputs(self, request: BeamRequest, found: Found, tokenizer: Tokenizer) -> list[Output]:
        """The request's sequences. As in vLLM, EOS is a token only where that was asked for, and never text."""
        now = time.monotonic()
        timings = Timings(request.arrival, request.scheduled, now, now, request.preemptions)
        made = []
        for number, (id, hypothesis) in enumerate(zip(request.ids, found.hypotheses, strict=True)):
            tokens = list(hypothesis.ids)
            if hypothesis.end is not None and request.beam.include_stop_str_in_output:
                tokens.append(hypothesis.end)
            text = tokenizer.decode(hypothesis.ids, request.beam.skip_special_tokens)
            output = Output(id=id, text=text, tokens=tokens, timings=timings)
            output.finish_reason = "length" if hypothesis.end is None else "stop"
            output.stop_reason = hypothesis.end
            output.cumulative_logprob = hypothesis.logprob
            if found.logprobs is not None:
                output.logprobs = found.logprobs[number][: len(tokens)]
            made.append(output)
        return made

    def _search(self, request: BeamRequest) -> Generator[int, None, Found]:
        beam, prompt = request.beam, request.prompt
        # vLLM's length counts the prompt, too; an encoder-decoder's is its start token.
        scorer = VLLM(beam.length_penalty, 1 if self._model.encoder_decoder else len(prompt))
        params = BeamParams(beam=beam.beam_width, n_best=beam.beam_width, scorer=scorer, max_tokens=request.limit)
        (hypotheses,) = yield from beam_steps(self._model, [prompt], params, () if beam.ignore_eos else self._eos)
        if not all(math.isfinite(hypothesis.score) for hypothesis in hypotheses):
            raise ValueError(NOT_A_NUMBER)
        if beam.logprobs is None:
            return Found(hypotheses, None)
        return Found(hypotheses, (yield from self._score(prompt, hypotheses, beam.logprobs)))

    @torch.inference_mode()
    def _score(
        self, prompt: Sequence[int], hypotheses: Sequence[Hypothesis], count: int
    ) -> Generator[int, None, list[list[TokenLogprobs]]]:
        """The probabilities at each token, with `count` alternatives: the search keeps none, so the hypotheses are
        gone through once more, together, a token in each step.
        """
        forced = [h.ids if h.end is None else [*h.ids, h.end] for h in hypotheses]
        state = self._model.start(*pad([prompt] * len(forced), next(self._model.parameters()).device))
        given = state.first
        shown: list[list[TokenLogprobs]] = [[] for _ in forced]
        for position in range(max(map(len, forced))):
            logits, state = self._model.step(given.unsqueeze(1), state)
            tokens = [ids[position] if position < len(ids) else 0 for ids in forced]
            entries = sampler.logprobs(logits[:, -1].float(), tokens, count)
            for ids, row, entry in zip(forced, shown, entries, strict=True):
                if position < len(ids):
                    row.append(entry)
            given = torch.tensor(tokens, dtype=torch.int64, device=given.device)
            yield len(forced)
        return shown
