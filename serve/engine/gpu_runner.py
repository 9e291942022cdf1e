"""The paged runner on a GPU: a step in which everybody decodes is one CUDA graph, any other runs kernel by kernel.
`unverified`: no GPU has run it. Its answers are not promised to be the same to the bit whoever shares a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lm.decoder import DecoderLM
from lm.params import SamplingParams
from serve.engine import gpu_batch
from serve.engine.blocks import NULL
from serve.engine.gpu_batch import Decoding, Inputs, Single
from serve.engine.gpu_decoder import GpuDecoder, Operations
from serve.engine.gpu_graphs import Capture, CudaCapture, Graphs
from serve.engine.pages import Pages
from serve.engine.requests import Request
from serve.engine.runner import PagedRunner
from serve.engine.sampler import NOTHING, Drawn
from serve.engine.scheduler import Share

MOST = 256  # rows of the largest graph


class GpuRunner(PagedRunner):
    """See the module's docstring. `seats`: requests at once; `longest`: tokens of a sequence, at most."""

    paced = False
    note = "The kernels for GPUs are unverified: docs/gpu.md says how to check them."

    def __init__(
        self,
        model: DecoderLM,
        pages: Pages,
        *,
        seats: int,
        longest: int,
        operations: Operations,
        capture: Capture,
        processors: int,
    ) -> None:
        super().__init__(model, pages)
        self._decoder = GpuDecoder(model, pages, operations, processors)
        most = min(seats, MOST)
        decoding = Decoding(most, -(-longest // pages.size), pages.size, pages.device)
        with torch.inference_mode():
            self._decoder.hidden(self._mixed(_chunk()))  # compiles what no graph uses
            self._graphs = Graphs(self._decoder.hidden, decoding, capture, most)
        self._ahead: Tensor = torch.empty(0)  # what `ahead` has begun with, and which row of it is whose
        self._begun: dict[_Key, int] = {}

    def hidden(self, shares: Sequence[Share]) -> Tensor:
        """See PagedRunner. Of what `ahead` began with, the rows that turned out to be wanted are taken."""
        begun, self._begun = self._begun, {}
        rows = [begun.get(_key(Single.of(share))) if share.length == 1 else None for share in shares]
        missing = [share for share, row in zip(shares, rows, strict=True) if row is None]
        if len(missing) == len(shares):
            return self._fresh(shares)
        if rows == list(range(len(self._ahead))):  # the usual step: nobody came, nobody went
            return self._ahead
        known = self._ahead.index_select(0, self._tensor([row for row in rows if row is not None]))
        if not missing:
            return known
        both = torch.cat((known, self._fresh(missing)))
        order: list[int] = []
        first, behind = 0, len(known)
        for share, row in zip(shares, rows, strict=True):
            if row is None:
                order += range(behind, behind + share.length)
                behind += share.length
            else:
                order.append(first)
                first += 1
        return both.index_select(0, self._tensor(order))

    def ahead(self, drawn: Mapping[Request, Sequence[Drawn]], grow: Callable[[list[int], int], bool]) -> None:
        """See Runner: the next pass begins while the host makes text of these tokens and chooses the next step's."""
        singles = []
        for request, tokens in drawn.items():
            position = request.known  # of the token that is not in its output yet
            goes_on = len(tokens) == 1 and len(request.output) + 1 < request.limit and tokens[0].token != NOTHING
            if goes_on and grow(request.table, position + 1):
                singles.append(Single(request, position, tokens[0].token))
        if 0 < len(singles) <= self._graphs.most:
            self._ahead = self._graphs.run(singles)
            self._begun = {_key(single): row for row, single in enumerate(singles)}

    def _fresh(self, shares: Sequence[Share]) -> Tensor:
        if len(shares) <= self._graphs.most and all(share.length == 1 for share in shares):
            return self._graphs.run([Single.of(share) for share in shares])
        return self._decoder.hidden(self._mixed(shares))

    def _mixed(self, shares: Sequence[Share]) -> Inputs:
        return gpu_batch.mixed(shares, self.pages.size, self._decoder.tokens_per_tile, self.pages.device)


_Key = tuple[Request, int, int, int]


def _key(single: Single) -> _Key:
    """Also how often it was preempted: then its table is another, and what was written is not in it."""
    return (*single, single.request.preemptions)


def _chunk() -> list[Share]:
    """Two tokens of nobody's, in the null block, where padding goes too."""
    return [Share(Request(id="", prompt=[0, 0], params=SamplingParams(), table=[NULL, NULL]), 0, 2)]


def paged_runner(model: DecoderLM, pages: Pages, *, seats: int, longest: int) -> PagedRunner:
    """The runner for where the pages are. On a GPU without Triton, or where its kernels cannot be compiled or captured,
    torch's own operators attend, and a note says so.
    """
    if pages.device.type != "cuda":
        return PagedRunner(model, pages)
    try:
        from serve.engine import gpu_kernels

        return GpuRunner(
            model,
            pages,
            seats=seats,
            longest=longest,
            operations=gpu_kernels,
            capture=CudaCapture(),
            processors=torch.cuda.get_device_properties(pages.device).multi_processor_count,
        )
    except Exception as error:
        runner = PagedRunner(model, pages)
        lines = str(error).strip().splitlines() or [""]
        runner.note = (
            f"The GPU's kernels could not be made ({type(error).__name__}: {lines[0]}): torch's own operators attend, "
            "which is slower."
        )
        return runner
