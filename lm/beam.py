"""Beam search over `start`, `step` and `select` alone: it works for whatever model has them.

A beam holds the likeliest unfinished hypotheses of each source, as rows of one batch. A step extends all rows of all
sources at once: one call of the model, one top-k of its logits, and one `select` that reorders, repeats and drops rows
(of the state, and of the attention record where there is one). A source whose search is over leaves the batch.

When is it over? Not when a hypothesis ends: with a length penalty a longer one may still pass it. It is over when no
hypothesis that lives could, at the best length it may yet reach, pass the worst of those to be returned. What a
hypothesis is worth is the scorer's to say: `GNMT` is what translation uses, `VLLM` what vLLM's API promises.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Collection, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from lm.search import checked, pad
from lm.trace import AttentionTrace, Maps

BLOCK = 64  # logits that are looked at together
BEYOND_SOURCE = 50  # a translation may be longer than its source by this many tokens (arXiv 1706.03762, section 6.1)


class Scorer(Protocol):
    """What a hypothesis is worth. For a given log-probability, the worth must rise or fall steadily with the length."""

    competes: ClassVar[bool]
    """How hypotheses end. False: an end counts where it is among the `beam` best continuations of its source, and
    those that the length limit cut off only fill up what did not end. True, as in vLLM: it counts where it is among the
    2 x beam likeliest tokens of its own hypothesis, and those that were cut off compete with the others."""

    def score(self, logprob: float, tokens: int, ended: bool) -> float:
        """logprob: the sum in nats over all `tokens`, the end token counted in both where the hypothesis `ended`."""


@dataclass(frozen=True)
class GNMT:
    """logprob / ((5 + |Y|) / 6)^alpha, |Y| with the end token (arXiv 1609.08144, equation 14, without coverage)."""

    alpha: float = 0.6  # the 2017 Transformer's (arXiv 1706.03762, section 6.1)
    competes: ClassVar[bool] = False

    def score(self, logprob: float, tokens: int, ended: bool) -> float:
        return _over(logprob, (5 + tokens) / 6, self.alpha)


@dataclass(frozen=True)
class VLLM:
    """logprob / length^length_penalty; vLLM's length is prompt and output together, without the end token.

    prompt: the tokens before the first that is decoded. An encoder-decoder's is 1, the start token: the source is the
    encoder's.
    """

    length_penalty: float = 1.0
    prompt: int = 1
    competes: ClassVar[bool] = True

    def score(self, logprob: float, tokens: int, ended: bool) -> float:
        return _over(logprob, self.prompt + tokens - ended, self.length_penalty)


def _over(logprob: float, length: float, power: float) -> float:
    """logprob / length^power, also where the power is more, or less, than a float can hold."""
    try:
        return logprob / length**power
    except OverflowError:
        return -0.0
    except ZeroDivisionError:
        return -math.inf if logprob < 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class BeamParams:
    """What to search for. Raises ValueError with one sentence for what cannot be."""

    beam: int = 4  # hypotheses that live at once, for each source; 1 is greedy search
    n_best: int = 1  # hypotheses to return
    scorer: Scorer = GNMT()
    max_tokens: int | None = (
        None  # end token included; None: 50 more than the source has. Never beyond the model's room
    )
    min_tokens: int = 0  # as many come before an end; min_tokens = max_tokens decodes exactly so many

    def __post_init__(self) -> None:
        def check(good: bool, sentence: str) -> None:
            if not good:
                raise ValueError(sentence)

        check(self.beam >= 1, f"beam must be at least 1, got {self.beam}.")
        check(1 <= self.n_best <= self.beam, f"n_best must be between 1 and beam={self.beam}, got {self.n_best}.")
        check(self.max_tokens is None or self.max_tokens >= 1, f"max_tokens must be at least 1, got {self.max_tokens}.")
        check(self.min_tokens >= 0, f"min_tokens must be at least 0, got {self.min_tokens}.")


@dataclass(frozen=True)
class Hypothesis:
    """One output: its tokens without the end, and what it is worth."""

    ids: list[int]
    score: float
    logprobs: list[float]  # of each token, in nats; the end token's is the last, where it ended
    end: int | None  # the token that ended it; None: it was cut off at the greatest length
    attention: Maps | None = None  # where a record was given; the end token's row is the last, where it ended

    @property
    def logprob(self) -> float:
        """The sum over all tokens, in nats."""
        return math.fsum(self.logprobs)


def beam_search(
    model: Any,
    sources: Sequence[Sequence[int]],
    params: BeamParams,
    stop_ids: Collection[int] = (),
    record: AttentionTrace | None = None,
) -> list[list[Hypothesis]]:
    """The n_best hypotheses of each source (token ids as the tokenizer gives them), best first; see `beam_steps`."""
    steps = beam_steps(model, sources, params, stop_ids, record)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


@torch.inference_mode()
def beam_steps(
    model: Any,
    sources: Sequence[Sequence[int]],
    params: BeamParams,
    stop_ids: Collection[int] = (),
    record: AttentionTrace | None = None,
) -> Generator[int, None, list[list[Hypothesis]]]:
    """The search, a step at a time: yields the number of rows after each step of the model, returns what
    `beam_search` does.

    stop_ids: the tokens that end a hypothesis; with none, all are cut off at their greatest length. Fewer than n_best
    come back where the vocabulary does not hold more. Hypotheses that ended come before those that were cut off, unless
    the scorer lets them compete; equal scores keep the order in which they were found, equal log-probabilities that of
    (parent's rank, token id). Raises ValueError for a source that is empty or too long, before the first step.
    """
    if not sources:
        return []
    device = next(model.parameters()).device
    rooms = checked(model, sources)
    most = [params.max_tokens or len(source) + BEYOND_SOURCE for source in sources]
    sentences = [_Sentence(params, min(limit, room)) for limit, room in zip(most, rooms, strict=True)]
    stops = sorted(set(stop_ids))
    state = model.start(*pad(sources, device), record=record)
    live, tokens = list(range(len(sources))), state.first
    sums = torch.zeros(len(live), dtype=torch.float64, device=device)
    step = 0
    while live:
        logits, state = model.step(tokens.unsqueeze(1), state, record=record)
        step += 1
        values, ids = _continuations(logits[:, -1].float(), params, stops, step)
        widths = [len(sentences[number].sums) for number in live]
        ranked = _ranked(sums.unsqueeze(1) + values, ids, widths)
        index: list[int] = []
        going: list[int] = []
        row = 0
        for number, width, candidates in zip(live, widths, ranked, strict=True):
            parents = sentences[number].advance(candidates, ids.shape[1], stops, record, row)
            index += [row + parent for parent in parents]
            if parents:
                going.append(number)
            row += width
        if index and index != list(range(row)):
            rows = torch.tensor(index, dtype=torch.int64, device=device)
            state = state.select(rows)
            if record is not None:
                record.select(rows)
        live = going
        tokens = torch.tensor([token for n in live for token in sentences[n].tokens], dtype=torch.int64, device=device)
        sums = torch.tensor([total for n in live for total in sentences[n].sums], dtype=torch.float64, device=device)
        yield row
    return [sentence.kept for sentence in sentences]


class _Sentence:
    """The search of one source: its live hypotheses, how they came to be, and the best that ended."""

    def __init__(self, params: BeamParams, limit: int):
        self.params, self.limit = params, limit
        self.kept: list[Hypothesis] = []
        self.tokens: list[int] = []  # the last token of each live hypothesis; best hypothesis first
        self.sums: list[float] = [0.0]  # its log-probability
        self.past: list[tuple[list[int], list[int], list[float]]] = []  # a step each: parents, tokens, sums

    def advance(
        self,
        candidates: Iterable[tuple[float, int, int]],
        width: int,
        stops: Collection[int],
        record: AttentionTrace | None,
        row: int,
    ) -> list[int]:
        """One step. The candidates come best first: log-probability, parent x `width` + rank among its parent's, token.
        `row` is the record's first of this source. Returns the parents of the hypotheses that live on, none when the
        search is over.
        """
        params, scorer = self.params, self.params.scorer
        within = 2 * params.beam
        parents: list[int] = []
        tokens: list[int] = []
        sums: list[float] = []
        for place, (total, where, token) in enumerate(candidates):
            if total == -math.inf:
                break
            parent, rank = divmod(where, width)
            if token in stops:
                if rank < within if scorer.competes else place < params.beam:
                    self._keep(parent, token, total, token, record, row)
            elif len(parents) < params.beam:
                parents.append(parent)
                tokens.append(token)
                sums.append(total)
            elif not scorer.competes:
                break
        self.tokens, self.sums = tokens, sums
        if len(self.past) + 1 >= self.limit:
            cut = list(zip(parents, tokens, sums, strict=True))  # of one length, so the likeliest are the best
            for parent, token, total in cut if scorer.competes else cut[: params.n_best - len(self.kept)]:
                self._keep(parent, token, total, None, record, row)
        elif not self._over():
            self.past.append((parents, tokens, sums))
            return parents
        self.tokens, self.sums = [], []
        return []

    def _keep(
        self, parent: int, token: int, total: float, end: int | None, record: AttentionTrace | None, row: int
    ) -> None:
        """Put a hypothesis among the best, if it is one of them."""
        tokens = len(self.past) + 1
        score = self.params.scorer.score(total, tokens, end is not None)
        full = len(self.kept) == self.params.n_best
        if full and score <= self.kept[-1].score:
            return
        ids, logprobs = self._path(parent, token, total)
        maps = None if record is None else record.row(row + parent)
        hypothesis = Hypothesis(ids if end is None else ids[:-1], score, logprobs, end, maps)
        last = not self.params.scorer.competes  # where those that were cut off stand
        insort(self.kept, hypothesis, key=lambda h: (last and h.end is None, -h.score))
        del self.kept[self.params.n_best :]

    def _path(self, parent: int, token: int, total: float) -> tuple[list[int], list[float]]:
        """The tokens that lead to here, and the log-probability of each."""
        tokens, sums = [token], [total]
        for parents, words, totals in reversed(self.past):
            tokens.append(words[parent])
            sums.append(totals[parent])
            parent = parents[parent]
        sums.append(0.0)
        return tokens[::-1], [after - before for after, before in zip(sums[-2::-1], sums[:0:-1], strict=True)]

    def _over(self) -> bool:
        """Whether no live hypothesis can get among the best any more. All tokens to come have probability 1 at most, so
        that the best one's worth is bounded by that of its log-probability now, at the shortest or greatest length.
        """
        params, scorer = self.params, self.params.scorer
        if not self.sums:
            return True
        if len(self.kept) < params.n_best:
            return False
        if params.beam == 1 and not scorer.competes:
            return True  # greedy search: the one hypothesis ended
        best, next_length = self.sums[0], len(self.past) + 2
        bounds = [scorer.score(best, next_length, True), scorer.score(best, self.limit, True)]
        if scorer.competes:
            bounds.append(scorer.score(best, self.limit, False))
        return max(bounds) <= self.kept[-1].score


def _continuations(logits: Tensor, params: BeamParams, stops: Sequence[int], step: int) -> tuple[Tensor, Tensor]:
    """The log-probabilities float64 [R, k] and ids int64 [R, k] of as many tokens a row as may matter, best first.

    logits fp32 [R, V], which may be overwritten. Beside each row's `beam` likeliest that do not end it, every end token
    may come before them.
    """
    logprobs = logits.log_softmax(dim=-1)  # the order is that of the logits: here two of them may round to one
    if step <= params.min_tokens and stops:
        logits[:, list(stops)] = logprobs[:, list(stops)] = -torch.inf
    count = params.beam + len(stops)
    if params.scorer.competes:
        count = max(count, 2 * params.beam)
    _, ids = best(logits, min(count, logits.shape[1]))
    return logprobs.gather(1, ids).double(), ids


def best(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k greatest of each row [R, V] and where they are, [R, k] both; of equal ones the first, on every device.

    torch.topk promises no order among equals, and in bfloat16 equals are common.
    """
    rows, size = logits.shape
    if logits.device.type != "cpu" or size < max(32, 2 * k) * BLOCK:
        ids = _first_greatest(logits, k)
        return logits.gather(1, ids), ids
    # On a CPU four times as fast. The k greatest stand in the k blocks whose greatest are greatest, of equal blocks the
    # first, and the greatest of a block is found by vector instructions.
    whole = size // BLOCK * BLOCK
    blocks = logits[:, :whole].unflatten(1, (-1, BLOCK))
    chosen = _first_greatest(blocks.amax(dim=-1), k).sort(dim=-1).values.unsqueeze(-1)  # [R, k, 1], as in the row
    values = blocks.gather(1, chosen.expand(-1, -1, BLOCK)).flatten(1)
    ids = (chosen * BLOCK + torch.arange(BLOCK)).flatten(1)
    if whole < size:  # what does not fill a block
        values = torch.cat((values, logits[:, whole:]), dim=1)
        ids = torch.cat((ids, torch.arange(whole, size).expand(rows, -1)), dim=1)
    places = _first_greatest(values, k)
    return values.gather(1, places), ids.gather(1, places)


def _first_greatest(values: Tensor, k: int) -> Tensor:
    """Where the k greatest of each row [R, N] are, int64 [R, k], greatest first; of equal ones the first."""
    # A float's bits, those of a negative one turned round, are an integer of the same order; + 0.0 makes one of both
    # zeros. With the place below it no two numbers are equal, so there is one right answer.
    bits = (values.float() + 0.0).view(torch.int32).long()
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    places = torch.arange(values.shape[1], device=values.device)
    return ((order << 32) - places).topk(k, dim=-1).indices


def _ranked(totals: Tensor, ids: Tensor, widths: Sequence[int]) -> list[Iterable[tuple[float, int, int]]]:
    """The continuations of each source's rows, best first: log-probability, row within the source x k + rank, token.

    totals float64 and ids int64 [R, k]; widths: the rows of each source, one source after another.
    """
    k, widest = ids.shape[1], max(widths)
    if min(widths) < widest:  # the sources' rows are padded to the same number
        at = [source * widest + row for source, width in enumerate(widths) for row in range(width)]
        slots = torch.tensor(at, dtype=torch.int64, device=ids.device)
        shape = (len(widths) * widest, k)
        totals = totals.new_full(shape, -torch.inf).index_copy(0, slots, totals)
        ids = ids.new_zeros(shape).index_copy(0, slots, ids)
    totals, order = totals.reshape(len(widths), -1).sort(dim=-1, descending=True, stable=True)
    ids = ids.reshape(len(widths), -1).gather(1, order)
    return [zip(*columns, strict=True) for columns in zip(totals.tolist(), order.tolist(), ids.tolist(), strict=True)]
