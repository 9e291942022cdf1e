"""The loop: add, abort, step. Synchronous, no HTTP, no processes: `process` and `llm` put those around it.

One step is: propose (draft.py), schedule, one forward pass, one draw for each sequence that caught up, then text and
stops (endings.py); and one step of each beam search.

A request that fails ends with finish_reason "error" and a sentence, and frees what it held; the others do not notice.
An exception in what a step does together ends the requests of that step, whichever of them was the reason, and the
engine goes on. Memory that is lacking is no reason to end more than the request that needs more than there is by
itself: the scheduler admits less, and what had been scheduled is computed again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from lm.tokenizer import Tokenizer
from serve.engine import endings, sampler
from serve.engine.admission import Admission
from serve.engine.beams import Beams
from serve.engine.blocks import BlockManager
from serve.engine.draft import Drafter, Speculation
from serve.engine.gpu_runner import paged_runner
from serve.engine.grammar import Grammars, Impossible
from serve.engine.masks import Masks
from serve.engine.memory import ran_out
from serve.engine.messages import Add, AddBeam, Grammar, Output, Stats, Step
from serve.engine.pages import Pages
from serve.engine.requests import BeamRequest, Request, Status
from serve.engine.rows import RowsRunner
from serve.engine.runner import PromptLogits, Runner
from serve.engine.sampler import Drawn
from serve.engine.scheduler import Scheduler, Share

NOT_A_NUMBER = "The model's output for this request is not a number; its weights or this prompt make it overflow."
COMPILING = 0.01  # seconds that a step waits for grammars, where it has nothing else to do
NO_MEMORY = "There is not enough memory to compute this request, even alone; a shorter one may do."


def in_rows(model: Any) -> bool:
    """Whether a model reads its prompt as a whole, so that pages, which take it in chunks, are not for it."""
    return model.encoder_decoder or model.config.prefix


class Engine:
    """Continues token sequences, or translates them, with one model of lm's (the decoding interface is all it knows).

    `eos` are the ids that end a sequence; `max_model_len` bounds prompt and output together, of an encoder-decoder
    each; `blocks` are counted with the null block. `speculation` is for models over pages alone.
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
        policy: str = "fcfs",
        prefix_caching: bool = True,
        speculation: Speculation | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.eos = tuple(eos)
        self.max_model_len = max_model_len or model.config.context
        self.blocks = BlockManager(blocks, block_size)
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
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            policy=policy,
            prefix_caching=prefix_caching and not self.runner.source,
        )
        self.beams = Beams(model, self.eos)
        self._drafter = None if speculation is None or self.runner.source else Drafter(speculation)
        self._grammars = Grammars(tokenizer, model.config.vocab_size, self.eos)
        self._masks = Masks(self._grammars.vocabulary.mask_words)
        self._compiling: list[Request] = []  # they wait for their grammar before they queue
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
        return self.scheduler.has_work or bool(self._ended or self._compiling)

    def learn(self, grammar: Grammar) -> None:
        """Makes a grammar known to those who come after; it never raises."""
        self._grammars.learn(grammar)

    def add(self, message: Add | AddBeam) -> None:
        """Queues a request. What cannot be ends at once, with an error in the next step's outputs; it never raises."""
        ids = message.ids if isinstance(message, AddBeam) else [message.id]
        try:
            for id in ids:
                if id in self._requests:
                    raise ValueError(f"a request with the id {id!r} is already running.")
            request = self._admission.request(message)
            if isinstance(message, Add) and message.constraint is not None:
                request.rule = self._grammars.rule(message.constraint)
        except Exception as error:  # whatever it is, it is this request's own
            expected = isinstance(error, (ValueError, TypeError, OverflowError))
            sentence, impossible = str(error) if expected else _sentence(error), isinstance(error, Impossible)
            self._ended += [Output(id=id, finish_reason="error", error=sentence, impossible=impossible) for id in ids]
            return
        self._requests |= dict.fromkeys(ids, request)
        if request.rule is None:
            self.scheduler.add(request)
        else:
            self._compiling.append(request)

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
        if self._drafter is not None:
            self._drafter.tidy()

    @torch.inference_mode()
    def step(self) -> Step:
        """Advances every sequence that has a share in this step; see the module's docstring."""
        began = time.perf_counter()
        self._begin()
        outputs, self._ended = self._ended, []
        preemptions, prefixes = self.scheduler.preemptions, self.scheduler.prefixes
        queries, hits, seconds = prefixes.queries, prefixes.hits, prefixes.seconds
        if self._drafter is not None:
            self._drafter.propose(self.scheduler.running)
        shares = self.scheduler.schedule()
        stats = Stats()
        if shares:
            self._note(shares, stats)
            searched = [share for share in shares if isinstance(share.request, BeamRequest)]
            plain = [share for share in shares if share not in searched] if searched else shares
            stepped = self._advance(plain, stats) if plain else []
            for share in searched:
                if share.request.status is Status.RUNNING:  # not preempted for want of memory
                    stepped += self._search(share, stats)
            self._tidy()
            outputs += stepped
            stats.generated = sum(len(output.tokens) for output in stepped)
        stats.preemptions = self.scheduler.preemptions - preemptions
        stats.prefix_queries, stats.prefix_hits = prefixes.queries - queries, prefixes.hits - hits
        stats.prefix_seconds = prefixes.seconds - seconds
        stats.seconds = time.perf_counter() - began
        return Step(outputs, self.fill(stats))

    def _begin(self) -> None:
        """Queues those whose grammar has been compiled."""
        if self._compiling and not self.scheduler.has_work:
            self._compiling[0].rule.wait(COMPILING)
        for request in [request for request in self._compiling if request.rule.ready]:
            try:
                request.rule.begin()
            except Exception as error:  # of the grammar: it fails alone
                self._ended.append(self._fail(request, error))
                continue
            self._compiling.remove(request)
            self.scheduler.add(request)

    def fill(self, stats: Stats) -> Stats:
        """Sets how full the engine is now."""
        stats.running, stats.waiting = len(self.scheduler.running), len(self.scheduler.waiting) + len(self._compiling)
        stats.cache_usage = self.blocks.usage
        return stats

    def _note(self, shares: Sequence[Share], stats: Stats) -> None:
        """What is known of the shares before they are computed."""
        now = time.monotonic()
        for request, start, length in shares:
            if not request.scheduled:
                request.scheduled = now
            stats.tokens += length * request.width if start else length
            stats.prompt_tokens += max(0, min(len(request.prompt) - start, length))
            if request.draft:
                stats.drafts += 1
                stats.drafted += len(request.draft)

    def _advance(self, shares: Sequence[Share], stats: Stats) -> list[Output]:
        """One step of the sequences; of each its own end or failure, or that of all."""
        outputs: list[Output] = []
        try:
            drawn = self._compute(shares, stats, outputs)
        except Exception as error:
            return outputs + self._give_up(shares, error)
        for share in shares:
            request = share.request
            if request.status is not Status.RUNNING:  # not a number
                continue
            tokens = drawn.get(request)
            if tokens is None:
                self.scheduler.computed(share)
                if not request.generate and share.catches_up:
                    outputs.append(self._ended_with(request, endings.only_prompt(request)))
                continue
            _count_accepted(stats, len(tokens) - 1)
            before = request.known
            try:
                output = endings.take(request, tokens, self.eos)
            except Exception as error:  # of this request's own text or stops: it fails alone
                outputs.append(self._fail(request, error))
                continue
            # Of what was proposed, the cache holds what turned out to be so.
            self.scheduler.computed(share, min(before + len(tokens) - 1, request.known) - share.start)
            outputs.append(self._ended_with(request, output) if output.finish_reason else output)
        return outputs

    def _compute(self, shares: Sequence[Share], stats: Stats, outputs: list[Output]) -> dict[Request, list[Drawn]]:
        """The tokens that are drawn in this step. Whoever's numbers are none ends here, in `outputs`, before anybody
        could find what that has left in the cache. Of the others nothing is changed that an exception would leave half
        done.
        """
        began = time.perf_counter()
        forward = self.runner.run(shares)
        took = time.perf_counter() - began
        stats.model_seconds += took
        if self.runner.paced:
            self.scheduler.pace.observe(shares, took)
        for prompt in forward.prompts:
            _note_prompt(prompt)
        for request in forward.broken:
            self.runner.clear(self.scheduler.distrust(request))
            outputs.append(self._fail(request, NOT_A_NUMBER))
        requests: list[Request] = []
        counts: list[int] = []
        rows: list[int] = []
        row = 0
        for share, count in zip(forward.shares, forward.counts, strict=True):
            if share.request.generate and share.request.status is Status.RUNNING:
                requests.append(share.request)
                counts.append(count)
                rows += range(row, row + count)
            row += count
        drawn: list[list[Drawn]] = []
        if requests:
            logits = forward.logits if len(rows) == row else forward.logits[rows]
            drawn = sampler.draw(requests, counts, logits, self._masks, self._grammars.vocabulary.eos)
        found = dict(zip(requests, drawn, strict=True))
        self.runner.ahead(found, self.blocks.grow)
        return found

    def _search(self, share: Share, stats: Stats) -> list[Output]:
        """One step of a beam search. The last gives its sequences, best first."""
        request = share.request
        assert isinstance(request, BeamRequest)
        began = time.perf_counter()
        try:
            found = self.beams.advance(share)
            stats.model_seconds += time.perf_counter() - began
            self.scheduler.computed(share)
            if found is None:
                return []
            outputs = self.beams.outputs(request, found, self.tokenizer)
        except Exception as error:
            return self._give_up([share], error)
        self._forget(request)
        return outputs

    def _give_up(self, shares: Sequence[Share], error: Exception) -> list[Output]:
        """What cannot be computed ends; unless it was memory that was lacking, and less of it would do."""
        lacking = ran_out(error)
        if lacking and self.scheduler.shrink():
            return []
        sentence = NO_MEMORY if lacking else _sentence(error)
        failed = []
        for request in [share.request for share in shares if share.request.status is not Status.FINISHED]:
            failed += [Output(id=id, finish_reason="error", error=sentence) for id in _ids(request)]
            self._forget(request)
        return failed

    def _fail(self, request: Request, error: Exception | str) -> Output:
        impossible = isinstance(error, Impossible)
        sentence = str(error) if impossible or isinstance(error, str) else _sentence(error)
        output = Output(id=request.id, finish_reason="error", error=sentence, impossible=impossible)
        return self._ended_with(request, output)

    def _ended_with(self, request: Request, output: Output) -> Output:
        self._forget(request)
        return output

    def _forget(self, request: Request) -> None:
        if request in self._compiling:
            self._compiling.remove(request)
            request.status = Status.FINISHED
        else:
            self.scheduler.finish(request)
        for id in _ids(request):
            self._requests.pop(id, None)


def _note_prompt(prompt: PromptLogits) -> None:
    request, start, logits = prompt
    assert request.prompt_logprobs is not None
    assert request.params.prompt_logprobs is not None
    following = request.prompt[start + 1 : start + 1 + len(logits)]
    request.prompt_logprobs += sampler.logprobs(logits, following, request.params.prompt_logprobs)


def _ids(request: Request) -> list[str]:
    return request.ids if isinstance(request, BeamRequest) else [request.id]


def _count_accepted(stats: Stats, tokens: int) -> None:
    """The first so many tokens of a draft held."""
    stats.accepted += tokens
    stats.accepted_at += [0] * (tokens - len(stats.accepted_at))
    for place in range(tokens):
        stats.accepted_at[place] += 1


def _sentence(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
