"""The loop: add, abort, step. Synchronous, no HTTP, no processes: `process` and `llm` put those around it.

One step is: schedule, one forward pass, one draw for each sequence that caught up, then text and stops; and one step
of each beam search. A request that fails ends with finish_reason "error" and a sentence, and frees what it held; the
others do not notice.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lm.tokenizer import Tokenizer
from serve.engine import sampler
from serve.engine.admission import Admission
from serve.engine.beams import NOT_A_NUMBER, Beams
from serve.engine.blocks import BlockManager
from serve.engine.detokenizer import Match
from serve.engine.gpu_runner import paged_runner
from serve.engine.messages import Add, AddBeam, Output, Stats, Step, Timings, TokenLogprobs
from serve.engine.pages import Pages
from serve.engine.requests import BeamRequest, Request, Status
from serve.engine.rows import RowsRunner
from serve.engine.runner import Runner
from serve.engine.scheduler import Scheduler, Share


def in_rows(model: Any) -> bool:
    """Whether a model reads its prompt as a whole, so that pages, which take it in chunks, are not for it."""
    return model.encoder_decoder or model.config.prefix


class Engine:
    """Continues token sequences, or translates them, with one model of lm's (the decoding interface is all it knows).

    `eos` are the ids that end a sequence; `max_model_len` bounds prompt and output together, of an encoder-decoder
    each; `blocks` are counted with the null block.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        *,
        eos: Sequence[int] = (),
        max_model_len: int | None = None,
        max_num_seqs: int = 128,
        max_num_batched_tokens: int = 2048,
        blocks: int = 1024,
        block_size: int = 16,
        seed: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.eos = tuple(eos)
        self.max_model_len = max_model_len or model.config.context
        self.blocks = BlockManager(blocks, block_size)
        self.scheduler = Scheduler(
            self.blocks, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
        )
        self.runner: Runner = (
            RowsRunner(model)
            if in_rows(model)
            else paged_runner(
                model,
                Pages.of(model, blocks=blocks, size=block_size),
                seats=max_num_seqs,
                longest=self.max_model_len,
            )
        )
        self.beams = Beams(model, self.eos)
        self._requests: dict[str, Request] = {}
        self._ended: list[Output] = []  # between steps: refused on arrival
        self._admission = Admission(
            tokenizer,
            self.scheduler,
            eos=self.eos,
            max_model_len=self.max_model_len,
            vocab_size=model.config.vocab_size,
            encoder_decoder=model.encoder_decoder,
            source=self.runner.source,
            seed=seed,
        )

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._ended)

    def add(self, message: Add | AddBeam) -> None:
        """Queues a request. What cannot be ends at once, with an error in the next step's outputs; it never raises."""
        ids = message.ids if isinstance(message, AddBeam) else [message.id]
        try:
            for id in ids:
                if id in self._requests:
                    raise ValueError(f"a request with the id {id!r} is already running.")
            request = self._admission.request(message)
        except (ValueError, TypeError, OverflowError) as error:
            self._ended += [Output(id=id, finish_reason="error", error=str(error)) for id in ids]
            return
        self._requests |= dict.fromkeys(ids, request)
        self.scheduler.add(request)

    def abort(self, ids: Sequence[str]) -> None:
        """Forgets requests, and frees what they hold at once; ids that are not known are passed over."""
        for id in ids:
            request = self._requests.get(id)
            if request is not None:
                self._forget(request)
        self._tidy()

    def _tidy(self) -> None:
        self.runner.tidy()
        self.beams.tidy()

    @torch.inference_mode()
    def step(self) -> Step:
        """Advances every sequence that has a share in this step; see the module's docstring."""
        outputs, self._ended = self._ended, []
        preemptions = self.scheduler.preemptions
        shares = self.scheduler.schedule()
        stats = Stats()
        if shares:
            self._note_first_share(shares)
            stats.tokens = sum(share.length * (share.request.width if share.start else 1) for share in shares)
            stats.prompt_tokens = sum(max(0, min(len(r.prompt) - start, count)) for r, start, count in shares)
            searched = [share for share in shares if isinstance(share.request, BeamRequest)]
            plain = [share for share in shares if share not in searched] if searched else shares
            stepped: list[Output] = []
            try:
                if plain:
                    stepped += self._advance(plain)
            except Exception as error:
                stepped += [self._fail(share.request, _sentence(error)) for share in plain]
            for share in searched:
                stepped += self._search(share)
            self._tidy()
            outputs += stepped
            stats.generated = sum(len(output.tokens) for output in stepped)
        stats.preemptions = self.scheduler.preemptions - preemptions
        return Step(outputs, self.fill(stats))

    def fill(self, stats: Stats) -> Stats:
        """Sets how full the engine is now."""
        stats.running, stats.waiting = len(self.scheduler.running), len(self.scheduler.waiting)
        stats.cache_usage = self.blocks.usage
        return stats

    def _note_first_share(self, shares: Sequence[Share]) -> None:
        now = time.monotonic()
        for share in shares:
            if not share.request.scheduled:
                share.request.scheduled = now

    def _advance(self, shares: Sequence[Share]) -> list[Output]:
        forward = self.runner.run(shares)
        for prompt in forward.prompts:
            self._note_prompt(prompt.request, prompt.start, prompt.logits)
        for share in shares:
            self.scheduler.computed(share)

        outputs: list[Output] = []
        going: list[int] = []  # rows of the logits that a token is drawn from
        for row, share in enumerate(forward.shares):
            if not forward.sound[row]:
                outputs.append(self._fail(share.request, NOT_A_NUMBER))
            elif share.request.generate:
                going.append(row)
            else:
                outputs.append(self._end(share.request, "length"))
        if not going:
            return outputs

        requests = [forward.shares[row].request for row in going]
        logits = forward.logits if len(going) == len(forward.logits) else forward.logits[going]
        tokens = sampler.draw(requests, logits)
        for request, token, logprobs in zip(requests, tokens, self._logprobs(requests, logits, tokens), strict=True):
            try:
                outputs.append(self._append(request, token, logprobs))
            except Exception as error:  # of this request's own text or stops: it fails alone
                outputs.append(self._fail(request, _sentence(error)))
        return outputs

    def _search(self, share: Share) -> list[Output]:
        """One step of a beam search. The last gives its sequences, best first."""
        request = share.request
        assert isinstance(request, BeamRequest)
        try:
            found = self.beams.advance(share)
            self.scheduler.computed(share)
            if found is None:
                return []
            outputs = self.beams.outputs(request, found, self.tokenizer)
        except Exception as error:
            sentence = _sentence(error)
            self._fail(request, sentence)
            return [Output(id=id, finish_reason="error", error=sentence) for id in request.ids]
        self._forget(request)
        return outputs

    def _note_prompt(self, request: Request, start: int, logits: Tensor) -> None:
        following = request.prompt[start + 1 : start + 1 + len(logits)]
        assert request.prompt_logprobs is not None
        assert request.params.prompt_logprobs is not None
        request.prompt_logprobs += sampler.logprobs(logits, following, request.params.prompt_logprobs)

    def _logprobs(
        self, requests: Sequence[Request], logits: Tensor, tokens: Sequence[int]
    ) -> list[list[TokenLogprobs] | None]:
        """What each request asked to see of the probabilities of its token; computed for those who asked alone."""
        asked = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
        shown: list[list[TokenLogprobs] | None] = [None] * len(requests)
        if asked:
            counts = [requests[row].params.logprobs or 0 for row in asked]
            entries = sampler.logprobs(logits[asked], [tokens[row] for row in asked], max(counts))
            for row, count, entry in zip(asked, counts, entries, strict=True):
                shown[row] = [TokenLogprobs(entry.token, entry.logprob, entry.rank, entry.top[:count])]
        return shown

    def _append(self, request: Request, token: int, logprobs: list[TokenLogprobs] | None) -> Output:
        """Adds a token to its sequence, which may end it: by EOS, stop token, stop string or length, in this order."""
        params = request.params
        request.output.append(token)
        if not request.first_token:
            request.first_token = time.monotonic()
        output = Output(id=request.id, tokens=[token], logprobs=logprobs, prompt_logprobs=request.prompt_logprobs)
        if len(request.output) > 1:
            output.prompt_logprobs = None
        enough = len(request.output) >= params.min_tokens

        eos = not params.ignore_eos and token in self.eos
        if enough and (eos or token in params.stop_token_ids):
            # The token that stops is shown as an id; as text only on request.
            text = request.detokenizer.feed(token) if params.include_stop_str_in_output else ""
            reason = None if self.eos and token == self.eos[0] and eos else token
            return self._end(request, "stop", output, text=text, stop_reason=reason)

        text = request.detokenizer.feed(token)
        passed = request.stops.feed(text) if enough else text
        if isinstance(passed, Match):
            output.text = passed.text
            return self._end(request, "stop", output, stop_reason=passed.stop, flush=False)
        output.text = passed
        if len(request.output) >= request.limit:
            return self._end(request, "length", output)
        return output

    def _end(
        self,
        request: Request,
        reason: str,
        output: Output | None = None,
        *,
        text: str = "",
        stop_reason: int | str | None = None,
        flush: bool = True,
    ) -> Output:
        """The last output of a request. Unless a stop string ended it, what was held back is text after all."""
        if output is None:
            output = Output(id=request.id, prompt_logprobs=request.prompt_logprobs)
        if flush:
            rest = request.stops.feed(text + request.detokenizer.finish())
            if isinstance(rest, Match):  # complete only now that an unfinished character has been given up
                output.text += rest.text
                reason, stop_reason = "stop", rest.stop
            else:
                output.text += rest + request.stops.finish()
        output.finish_reason, output.stop_reason = reason, stop_reason
        self._forget(request)
        now = time.monotonic()
        output.timings = Timings(
            request.arrival, request.scheduled, request.first_token or now, now, request.preemptions
        )
        return output

    def _fail(self, request: Request, sentence: str) -> Output:
        if request.status is not Status.FINISHED:
            self._forget(request)
        return Output(id=request.id, finish_reason="error", error=sentence)

    def _forget(self, request: Request) -> None:
        self.scheduler.finish(request)
        for id in request.ids if isinstance(request, BeamRequest) else [request.id]:
            self._requests.pop(id, None)


def _sentence(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
