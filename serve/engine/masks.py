"""Which tokens may come, for a whole batch: the bits that the requests' rules fill in, spread over the logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lm.upload import upload
from serve.engine.grammar import Impossible
from serve.engine.requests import Request


class Masks:
    """Takes what cannot come out of logits. `width` is the number of uint32 in a mask, at least V / 32."""

    def __init__(self, width: int) -> None:
        self._width = width
        # For each byte eight numbers: 0 for a bit that is set, else -inf. One gather of them for the batch costs the
        # same whatever the bits are; a fill by a mask costs ten times that where the bits are mixed.
        bits = (torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1
        self._numbers = torch.where(bits == 1, 0.0, -torch.inf)

    def apply(self, requests: Sequence[Request], counts: Sequence[int], logits: Tensor) -> list[int]:
        """Sets to -inf in logits fp32 [sum of counts, V] what cannot come: for each request in the row of its next
        token, and in one after each token of its draft. Returns the rows in which EOS alone is left.

        A request whose grammar takes too much to follow keeps its row, and has the sentence in `failure`.
        """
        height = sum(count for request, count in zip(requests, counts, strict=True) if request.rule is not None)
        if height == 0:
            return []
        bits = np.zeros((height, self._width), dtype=np.uint32)
        taken: list[int] = []  # rows of the bits that are filled in,
        rows: list[int] = []  # and those of the logits that they are for
        final: list[int] = []
        first = at = 0
        for request, count in zip(requests, counts, strict=True):
            if request.rule is not None:
                try:
                    for row, last in request.rule.masks(request.draft[: count - 1], bits[at : at + count]):
                        taken.append(at + row)
                        rows.append(first + row)
                        if last:
                            final.append(first + row)
                except Impossible as error:
                    request.failure = str(error)
                at += count
            first += count
        if rows:
            self._spread(bits if len(taken) == height else bits[taken], rows, logits)
        return final

    def _spread(self, bits: np.ndarray, rows: list[int], logits: Tensor) -> None:
        vocabulary, device = logits.shape[1], logits.device
        if self._numbers.device != device:
            self._numbers = self._numbers.to(device)
        octets = upload(torch.from_numpy(bits.view(np.uint8).astype(np.int32)), device)
        numbers = torch.nn.functional.embedding(octets, self._numbers).view(len(rows), -1)[:, :vocabulary]
        if len(rows) == len(logits):
            logits.add_(numbers)
        else:
            logits.index_add_(0, upload(torch.tensor(rows), device), numbers)
