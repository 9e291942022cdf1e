"""The paged runner on a GPU: a step in which everybody decodes is one CUDA graph, any other runs kernel by kernel.
`unverified`: no GPU has run it. Its answers are not promised to be the same to the bit whoever shares a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lm.decoder import DecoderLM
from lm.params import SamplingParams
from serve.engine import gpu_batch
from serve.engine.blocks import NULL
from serve.engine.gpu_batch import Decoding, Inputs
from serve.engine.gpu_decoder import GpuDecoder, Operations
from serve.engine.gpu_graphs import Capture, CudaCapture, Graphs
from serve.engine.pages import Pages
from serve.engine.requests import Request
from serve.engine.runner import PagedRunner
from serve.engine.scheduler import Share

MOST = 256  # rows of the largest graph


class GpuRunner(PagedRunner):
    """See the module's docstring. `seats`: requests at once; `longest`: tokens of a sequence, at most."""

    paced = False

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

    def hidden(self, shares: Sequence[Share]) -> Tensor:
        """See PagedRunner."""
        if len(shares) <= self._graphs.most and all(share.length == 1 for share in shares):
            return self._graphs.run(shares)
        return self._decoder.hidden(self._mixed(shares))

    def _mixed(self, shares: Sequence[Share]) -> Inputs:
        return gpu_batch.mixed(shares, self.pages.size, self._decoder.tokens_per_tile, self.pages.device)


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
