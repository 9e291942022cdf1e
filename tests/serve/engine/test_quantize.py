"""int8: what the formula says in any shape and company; a language model loses next to nothing; where it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lm import pretrained
from lm.attention import CausalAttend
from lm.decoder import DecoderLM
from lm.layers import RMSNorm
from serve.engine.kernels import Kernels, library
from serve.engine.linears import Scratch
from serve.engine.quantize import PIECE, Int8Linear, refusal
from serve.engine.served import serve_model

KERNELS = [kernels for kernels in map(library.load, library.NEEDS) if kernels]
pytestmark = pytest.mark.skipif(not KERNELS, reason="the kernels are not compiled")


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [N, K] -> int64 [N, K] of at most 127, and the scale fp32 [N, 1] of each row."""
    found = rows.abs().amax(dim=1, keepdim=True)
    return torch.nan_to_num(rows * (torch.tensor(127.0) / found)).round().long(), found / 127


@settings(max_examples=60, deadline=None)
@given(
    kernels=st.sampled_from(KERNELS),
    rows=st.integers(1, 20),
    inputs=st.integers(1, 200),
    outputs=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    biased=st.booleans(),
)
def test_it_is_what_the_formula_says(
    kernels: Kernels, rows: int, inputs: int, outputs: list[int], dtype: torch.dtype, biased: bool
) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(n, inputs).to(dtype) for n in outputs]
    biases = [torch.randn(n).to(dtype) for n in outputs] if biased else []
    x = (torch.randn(rows, inputs) * torch.randint(0, 1000, (rows, 1))).to(dtype)  # some rows are zero
    found = Int8Linear(weights, biases, kernels, Scratch(), out=torch.float32)(x)

    w, w_scale = rounded(torch.cat(weights).float())
    expected = torch.zeros(rows, len(w), dtype=torch.float64)
    for first in range(0, inputs, PIECE):
        n, n_scale = rounded(x[:, first : first + PIECE].float())
        expected += (n @ w[:, first : first + PIECE].T).double() * n_scale.double()
    expected *= w_scale.T.double()
    if biased:
        expected += torch.cat(biases).double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6 * (1 + float(expected.abs().max())))


@settings(max_examples=30, deadline=None)
@given(kernels=st.sampled_from(KERNELS), inputs=st.integers(1, 200), outputs=st.integers(1, 150))
def test_a_row_is_the_same_in_any_company(kernels: Kernels, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    linear = Int8Linear([torch.randn(outputs, inputs)], [], kernels, Scratch())
    x = torch.randn(20, inputs)
    whole = linear(x)
    for rows in (1, 2, 3, 4, 7, 12):
        assert torch.equal(linear(x[rows : 2 * rows - 1]), whole[rows : 2 * rows - 1])
        assert torch.equal(linear(x[:rows]), whole[:rows])


@settings(max_examples=30, deadline=None)
@given(kernels=st.sampled_from(KERNELS), rows=st.integers(1, 9), inner=st.integers(1, 70), biased=st.booleans())
def test_what_stands_around_the_product(kernels: Kernels, rows: int, inner: int, biased: bool) -> None:
    torch.manual_seed(0)
    gate, up = torch.randn(inner, 40), torch.randn(inner, 40)
    biases = [torch.randn(inner), torch.randn(inner)] if biased else []
    norm = RMSNorm(40, 1e-5)
    torch.nn.init.normal_(norm.weight)
    x, scratch = torch.randn(rows, 40), Scratch()
    with torch.no_grad():
        both = Int8Linear([gate, up], biases, kernels, scratch)(norm(x))
        found = Int8Linear([gate, up], biases, kernels, scratch, norm=norm, gated=True)(x)
    # The norm's last bits differ from torch's, and may carry a number over the edge between two integers.
    torch.testing.assert_close(found, F.silu(both[:, :inner]) * both[:, inner:], rtol=0.05, atol=0.5)
    down = Int8Linear([torch.randn(40, inner)], [], kernels, scratch)
    residual = torch.randn(rows, 40)
    assert torch.equal(down(found, residual), down(found) + residual)


@pytest.mark.parametrize("worst", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_in_its_row(worst: float) -> None:
    for kernels in KERNELS:
        linear = Int8Linear([torch.randn(20, 33)], [], kernels, Scratch())
        x = torch.randn(5, 33)
        right = linear(x)
        x[3, 7] = worst
        found = linear(x)
        assert found[3].isnan().all()
        assert torch.equal(found[[0, 1, 2, 4]], right[[0, 1, 2, 4]])


def test_a_language_model_loses_next_to_nothing(smollm2: Path) -> None:
    if refusal("cpu", KERNELS[0], whole=False):
        pytest.skip("this CPU has no fast int8")
    docs = sorted((Path(__file__).resolve().parents[3] / "docs").glob("*.md"))
    text = "\n".join(page.read_text(encoding="utf-8")[:1200] for page in docs)
    tokens = torch.tensor(pretrained.load_tokenizer(smollm2).encode(text))
    # One sequence alone may be 0.01 nats better or worse by chance.
    pieces = [piece for piece in tokens.split(640) if len(piece) > 320]

    @torch.inference_mode()
    def loss(model: DecoderLM) -> float:
        losses = []
        for ids in pieces:
            hidden = model.hidden(ids[:-1], torch.arange(len(ids) - 1), Batched(model))
            losses.append(float(F.cross_entropy(model.logits(hidden).float(), ids[1:])))
        return sum(losses) / len(losses)

    plain = loss(serve_model(pretrained.load(smollm2, torch.bfloat16)))
    eighth = loss(serve_model(pretrained.load(smollm2, torch.bfloat16), "int8"))
    assert eighth < plain + 0.01, f"{eighth:.4f} nats a token, and {plain:.4f} without"


class Batched(CausalAttend):
    """Causal attention over one sequence [T, ...]."""

    def __init__(self, model: DecoderLM) -> None:
        super().__init__(model.config.windows())

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().__call__(layer, q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0))[0]


def test_it_is_refused_where_it_would_be_slower() -> None:
    portable = library.load("portable")
    assert "decoder-only" in (refusal("cpu", portable, whole=True) or "")
    assert "CPUs" in (refusal("cuda", portable, whole=False) or "")
    assert "AVX2" in (refusal("cpu", None, whole=False) or "")
    assert "AVX2" in (refusal("cpu", portable, whole=False) or "")
    for kernels in KERNELS:
        if kernels.variant != "portable":
            assert refusal("cpu", kernels, whole=False) is None
