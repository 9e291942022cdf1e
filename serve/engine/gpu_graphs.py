"""Steps in which everybody decodes, as CUDA graphs: hundreds of kernels started by one call. `unverified`: replay,
padding and the order of rows are tested on a CPU, with a stand-in for the capture.

A graph is a forward pass over fixed memory for a fixed number of rows; a step takes the next larger one, padded. Graphs
share one pool of memory: what one left is gone when another ran.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from serve.engine.gpu_batch import Decoding, Inputs, Single

Replay = Callable[[], None]
Capture = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]
"""Given a forward pass over fixed memory: what runs it again, and the tensor in which its result lies each time."""


def sizes(most: int) -> list[int]:
    """The numbers of rows that there is a graph for: the powers of two below `most`, and `most`."""
    return [*(2**n for n in range((most - 1).bit_length())), most]


class Graphs:
    """Runs single tokens: `run(singles)`, up to `most` of them. Everything is captured when it is made."""

    def __init__(self, forward: Callable[[Inputs], Tensor], decoding: Decoding, capture: Capture, most: int) -> None:
        self.most = most
        self._decoding = decoding
        self._sizes = sizes(most)
        self._graphs: dict[int, tuple[Replay, Tensor]] = {}
        for rows in reversed(self._sizes):  # the largest first: the others find its memory in the pool
            inputs = decoding.view(rows)
            self._graphs[rows] = capture(lambda inputs=inputs: forward(inputs))  # type: ignore[misc]

    def run(self, singles: Sequence[Single]) -> Tensor:
        """What `forward` makes of them, [singles, width]; to be used before the next run."""
        rows = next(size for size in self._sizes if size >= len(singles))
        self._decoding.load(singles, rows)
        replay, result = self._graphs[rows]
        replay()
        return result[: len(singles)]


class CudaCapture:
    """Captures on a stream of its own, after two runs that compile kernels and choose algorithms."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, forward: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                forward()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            result = forward()
        return graph.replay, result
