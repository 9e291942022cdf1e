"""The runner of models that read their prompt as a whole: encoder-decoders, and decoders that see all of a source.

It is written over lm's decoding interface alone (`start`, `step`, `select`, `join`). Whoever runs is a row of one
state. New sources are read together and joined to it; one step then computes the next token of every row; rows whose
request has ended, was aborted or preempted leave by `select`. A preempted row that comes back is read again, and takes
its own output, forced, so that it is where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lm.search import pad
from serve.engine.requests import Request, Status
from serve.engine.runner import Forward
from serve.engine.sampler import Drawn
from serve.engine.scheduler import Share

SHORT = 15  # tokens: sources up to one more are read together, longer ones with those of up to twice their length
PROBE = 32  # tokens of the source that is read to learn what a row takes


class _Part(NamedTuple):
    """Rows of one state: what they have been given so far, and the token int64 [R] that each is given next."""

    shares: list[Share]
    state: Any
    tokens: Tensor


class RowsRunner:
    """Rows of one state, in the order of `_rows`; see the module's docstring."""

    source = True
    paced = True
    note: str | None = None

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self._device = next(model.parameters()).device
        self._rows: list[Request] = []
        self._state: Any = None

    def run(self, shares: Sequence[Share]) -> Forward:
        """See Runner. What an exception leaves behind belongs to the requests of these shares, and leaves with them."""
        self.tidy()
        parts = [*self._going(shares), *self._fresh(shares), *self._again(shares)]
        aside, kept = self._aside(shares)
        logits, state = self.model.step(
            torch.cat([part.tokens for part in parts]).unsqueeze(1), _join([part.state for part in parts])
        )
        stepped = [share for part in parts for share in part.shares]
        self._rows = [share.request for share in stepped] + aside
        self._state = _join([state, kept] if aside else [state])

        rows = [row for row, share in enumerate(stepped) if share.catches_up]
        logits = logits[:, -1].float()
        finite = torch.isfinite(logits.sum(dim=-1)).tolist()
        broken = [share.request for share, good in zip(stepped, finite, strict=True) if not good]
        if len(rows) < len(stepped):
            logits = logits[rows]
        return Forward([stepped[row] for row in rows], [1] * len(rows), logits, broken, iter(()))

    def ahead(self, drawn: Mapping[Request, Sequence[Drawn]], grow: Callable[[list[int], int], bool]) -> None:
        """Nothing: rows come and go between steps."""

    def tidy(self) -> None:
        """See Runner."""
        stay = [r for r, request in enumerate(self._rows) if request.status is Status.RUNNING and request.computed]
        self._state = self._select(stay)
        self._rows = [self._rows[row] for row in stay]

    def clear(self, blocks: Sequence[int]) -> None:
        """Nothing to do: what a request has is in its row, and leaves with it."""

    def _going(self, shares: Sequence[Share]) -> Iterator[_Part]:
        """Rows of the state that take one token, together; then those that have to take several, each alone."""
        row_of = {request: row for row, request in enumerate(self._rows)}
        going = sorted((row_of[share.request], share) for share in shares if share.start)
        several = [(row, share) for row, share in going if share.length > 1]
        single = [(row, share) for row, share in going if share.length == 1]
        if single:
            tokens = [share.request.tokens(share.start, 1)[0] for _, share in single]
            yield _Part([share for _, share in single], self._select([row for row, _ in single]), self._tensor(tokens))
        for row, share in several:
            state, token = self._feed(self._select([row]), share.request.tokens(share.start, share.length))
            yield _Part([share], state, token)

    def _fresh(self, shares: Sequence[Share]) -> Iterator[_Part]:
        """Sources that nothing was made of so far, read together with those of similar length: the budget counts no
        padding, so there must be little of it.
        """
        similar: dict[int, list[Share]] = {}
        for share in shares:
            if share.start == 0 and share.length == len(share.request.prompt):
                similar.setdefault(max(SHORT, share.length - 1).bit_length(), []).append(share)
        for fresh in similar.values():
            state = self.model.start(*pad([share.request.prompt for share in fresh], self._device))
            yield _Part(fresh, state, state.first)

    def _again(self, shares: Sequence[Share]) -> Iterator[_Part]:
        """Sources of preempted requests: each is read again, and takes the output that it had, or a part of it."""
        for share in shares:
            source = share.request.prompt
            if share.start == 0 and share.length > len(source):
                state = self.model.start(*pad([source], self._device))
                output = share.request.output[: share.length - len(source)]
                state, token = self._feed(state, [int(state.first[0]), *output])
                yield _Part([share], state, token)

    def _aside(self, shares: Sequence[Share]) -> tuple[list[Request], Any]:
        """Rows without a share, since the budget is spent: they stay as they are."""
        sharing = {share.request for share in shares}
        rows = [row for row, request in enumerate(self._rows) if request not in sharing]
        return [self._rows[row] for row in rows], self._select(rows)

    def _feed(self, state: Any, tokens: Sequence[int]) -> tuple[Any, Tensor]:
        """A state of one row after all tokens but the last, and that."""
        if len(tokens) > 1:
            _, state = self.model.step(self._tensor(tokens[:-1]).unsqueeze(0), state)
        return state, self._tensor(tokens[-1:])

    def _select(self, rows: list[int]) -> Any:
        """These rows of the state; no copy where they are all, nothing where there is none."""
        if rows == list(range(len(self._rows))):
            return self._state
        return self._state.select(self._tensor(rows)) if rows else None

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def _join(states: list[Any]) -> Any:
    return states[0] if len(states) == 1 else type(states[0]).join(states)


@torch.inference_mode()
def bytes_per_token(model: Any, longest: int) -> int:
    """What a row takes for each token of its source, found by reading one; a token of the output takes no more."""
    count = min(PROBE, longest)
    return -(
        -_size(model.start(torch.zeros(1, count, dtype=torch.int64, device=next(model.parameters()).device))) // count
    )


def _size(value: Any) -> int:
    """Bytes of the tensors that a state is made of."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(map(_size, value))
    return sum(_size(getattr(value, field.name)) for field in fields(value)) if is_dataclass(value) else 0
