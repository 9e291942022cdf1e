"""What computes the shares of a step: the protocol, and the paged runner, which is the decoders'.

It makes one forward pass over a mixed batch: single tokens of those who decode beside chunks of prompts, flattened.
rows.py has the other runner, for models that read their prompt as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lm.decoder import DecoderLM
from lm.upload import upload
from serve.engine.pages import Attend, Pages
from serve.engine.requests import Request
from serve.engine.sampler import Drawn
from serve.engine.scheduler import Share
from serve.engine.served import ServedLM

PROMPT_ROWS = 256  # rows of prompt log-probabilities at a time: each is as wide as the vocabulary


class PromptLogits(NamedTuple):
    """Logits fp32 [R, V] that the tokens from `start` on leave for the R tokens after them, all of the prompt."""

    request: Request
    start: int
    logits: Tensor


class Forward(NamedTuple):
    """What the shares that catch up leave: `counts[i]` rows of `logits` fp32 [R, V] belong to `shares[i]`, in order.

    The first row is what follows the last known token, each further one what follows a token of the draft that the
    share covers. `broken` are those requests of which something that was computed is no number; it may be in the
    cache. `prompts` are computed while they are read.
    """

    shares: list[Share]
    counts: list[int]
    logits: Tensor
    broken: list[Request]
    prompts: Iterator[PromptLogits]


class Runner(Protocol):
    """Runs a model on what the scheduler chose. Knows no sampling and no text."""

    source: bool
    """Whether a prompt is computed in one step or not at all, and its own tokens have no probabilities."""

    paced: bool
    """Whether the time of a step tells what its tokens cost; on a GPU it tells how many kernels were started."""

    note: str | None
    """A sentence where it is slower than it could be."""

    def run(self, shares: Sequence[Share]) -> Forward:
        """Computes the shares, whose blocks are allotted; call it in inference mode."""

    def ahead(self, drawn: Mapping[Request, Sequence[Drawn]], grow: Callable[[list[int], int], bool]) -> None:
        """May begin with the next step. drawn: the tokens of this one, which are not in the outputs yet; grow(table,
        tokens) lets a table hold so many, or says that there is no room.
        """

    def tidy(self) -> None:
        """Lets go of what is kept of requests that do not run any more: ended, aborted or preempted."""

    def clear(self, blocks: Sequence[int]) -> None:
        """Writes zeros over what blocks of the cache hold, which is no number: whoever has them next multiplies, with
        zero, also what lies behind its own end.
        """


class PagedRunner:
    """A decoder over pages, where what belongs to a request is what its blocks hold."""

    source = False
    paced = True
    note: str | None = None

    def __init__(self, model: DecoderLM, pages: Pages) -> None:
        self.model = model.eval()
        self.pages = pages
        self._windows = model.config.windows()

    def run(self, shares: Sequence[Share]) -> Forward:
        """See Runner."""
        caught_up: list[Share] = []
        counts: list[int] = []
        wanted: list[int] = []  # rows whose hidden states are asked for
        final: list[int] = []  # of these, those that logits are for
        prompts: list[tuple[Request, int, slice]] = []  # of these, those that prompts' probabilities are for
        end = 0
        for share in shares:
            begin, end = end, end + share.length
            count = 0
            if share.catches_up:
                caught_up.append(share)
                count = share.start + share.length - share.request.known + 1
                counts.append(count)
            first, last = _reported(share)
            at = len(wanted)
            if first < last:
                prompts.append((share.request, first, slice(at + first - share.start, at + last - share.start)))
            rows = range(begin if first < last else end - count, end)
            wanted += rows
            final += range(at + len(rows) - count, at + len(rows))
        hidden, shown = self._passed(shares, wanted, end)
        logits = self.model.logits(self._some(hidden, final)).float()
        return Forward(caught_up, counts, logits, _broken(shares, shown), self._prompt_logits(prompts, hidden))

    def hidden(self, shares: Sequence[Share]) -> Tensor:
        """What the model makes of the tokens of the shares, [tokens, width]; good until the next call."""
        return self.model.hidden(*self._inputs(shares))

    def _passed(self, shares: Sequence[Share], wanted: list[int], tokens: int) -> tuple[Tensor, Tensor]:
        """`hidden` of the rows wanted, and of every row of the shares a number, finite if all of the row is."""
        if isinstance(self.model, ServedLM) and len(wanted) < tokens:
            return self.model.hidden_of(self._tensor(wanted), *self._inputs(shares))
        hidden = self.hidden(shares)
        return self._some(hidden, wanted), hidden.sum(dim=-1, dtype=torch.float32)

    def _some(self, rows: Tensor, wanted: list[int]) -> Tensor:
        return rows if len(wanted) == len(rows) else rows.index_select(0, self._tensor(wanted))

    def _inputs(self, shares: Sequence[Share]) -> tuple[Tensor, Tensor, Attend]:
        tokens: list[int] = []
        positions: list[int] = []
        for request, start, count in shares:
            tokens += request.tokens(start, count)
            positions += range(start, start + count)
        return self._tensor(tokens), self._tensor(positions), self.pages.attend(self._windows, shares)

    def _tensor(self, values: list[int]) -> Tensor:
        """int64, by way of numpy, which reads a list several times as fast."""
        return upload(torch.from_numpy(np.array(values, dtype=np.int64)), self.pages.device)

    def ahead(self, drawn: Mapping[Request, Sequence[Drawn]], grow: Callable[[list[int], int], bool]) -> None:
        """Nothing: on a CPU nobody else would compute it meanwhile."""

    def tidy(self) -> None:
        """Nothing to do: blocks are the scheduler's to free."""

    def clear(self, blocks: Sequence[int]) -> None:
        """See Runner."""
        self.pages.clear(blocks)

    def _prompt_logits(self, prompts: Sequence[tuple[Request, int, slice]], hidden: Tensor) -> Iterator[PromptLogits]:
        """prompts: of each a first position and the rows of hidden from there on."""
        for request, first, rows in prompts:
            for begin in range(rows.start, rows.stop, PROMPT_ROWS):
                logits = self.model.logits(hidden[begin : min(begin + PROMPT_ROWS, rows.stop)])
                yield PromptLogits(request, first + begin - rows.start, logits.float())


def _reported(share: Share) -> tuple[int, int]:
    """From which position to which before the share leaves probabilities of the prompt that are asked for."""
    request = share.request
    if request.prompt_logprobs is None:
        return 0, 0
    # A preempted request computes its prompt again; what it has reported already is not asked for twice.
    return max(share.start, len(request.prompt_logprobs) - 1), min(share.start + share.length, len(request.prompt) - 1)


def _broken(shares: Sequence[Share], shown: Tensor) -> list[Request]:
    """Requests of which a row, each of which has a number in shown [tokens], is no number. Not the last row alone: a
    layer that sees the nearest positions alone need not have passed it on.
    """
    finite = torch.isfinite(shown)
    if bool(finite.all()):
        return []
    whole = finite.split([share.length for share in shares])
    return [share.request for share, rows in zip(shares, whole, strict=True) if not bool(rows.all())]
