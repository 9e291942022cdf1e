"""The optimizer: Muon's updates are orthogonal, AdamW's are torch's, and every parameter is moved by exactly one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lm import DecoderConfig, DecoderLM
from train.config import Optim
from train.optim import STATE, Optimizer, make_optimizer, orthogonalise

SHAPE: dict[str, Any] = {"vocab_size": 40, "context": 16, "layers": 2, "width": 32, "heads": 4, "kv_heads": 2}
SHAPES = [
    SHAPE,
    SHAPE | {"tie_embeddings": False, "bias": True, "norm": "layer", "positions": "learned", "qk_norm": True},
]


def build(shape: dict[str, Any] = SHAPE) -> DecoderLM:
    torch.manual_seed(0)
    return DecoderLM(DecoderConfig(**shape))


def fill_gradients(model: DecoderLM, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = 0.1 * torch.randn(parameter.shape, generator=generator)


# ------------------------------------------------------------ orthogonalise


def matrix(rows: int, columns: int, smallest: float, seed: int) -> Tensor:
    """Singular values from 1 down to `smallest`, evenly on a logarithmic scale; random directions."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, torch.log10(torch.tensor(smallest)).item(), min(rows, columns), dtype=torch.float64)
    count = len(values)
    return (left[:, :count] * values @ right[:, :count].T).float()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 60),
    columns=st.integers(1, 60),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    smallest=st.sampled_from([1.0, 0.3, 0.01]),
    seed=st.integers(0, 999),
)
def test_singular_values_come_near_one_and_directions_stay(
    rows: int, columns: int, scale: float, smallest: float, seed: int
) -> None:
    """Square, tall and wide, any scale, down to values a hundredth of the largest."""
    given_ = matrix(rows, columns, smallest, seed)
    out = orthogonalise(scale * given_.unsqueeze(0), torch.float32)[0].double()
    values = torch.linalg.svdvals(out)
    assert out.shape == given_.shape
    assert float(values.min()) > 0.7
    assert float(values.max()) < 1.3
    left, _, right = torch.linalg.svd(given_.double(), full_matrices=False)
    if smallest < 1:  # equal singular values leave the directions to chance
        torch.testing.assert_close(out, left @ right, atol=0.3, rtol=0)


@pytest.mark.parametrize("shape", [(64, 64), (128, 32), (32, 128)])
def test_random_gradients_in_the_dtype_of_this_machine(shape: tuple[int, int]) -> None:
    """None: bfloat16 where it is fast. Of a square random matrix the smallest value is far too small to be lifted."""
    values = torch.linalg.svdvals(orthogonalise(torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))))
    assert float(values.max()) < 1.35
    assert float(values.sort(descending=True).values[:, :-2].min()) > 0.7


def test_what_has_no_direction_stays_small() -> None:
    assert torch.equal(orthogonalise(torch.zeros(2, 8, 4), torch.float32), torch.zeros(2, 8, 4))
    outer = torch.outer(torch.randn(16), torch.randn(24)).unsqueeze(0)  # rank one
    values = torch.linalg.svdvals(orthogonalise(outer, torch.float32))[0]
    assert 0.7 < float(values[0]) < 1.3
    assert float(values[1]) < 0.01


def test_matrices_in_a_stack_do_not_meet() -> None:
    stack = torch.randn(3, 20, 12, generator=torch.Generator().manual_seed(2))
    together = orthogonalise(stack, torch.float32)
    for number in range(3):
        torch.testing.assert_close(together[number], orthogonalise(stack[number : number + 1], torch.float32)[0])


# ------------------------------------------------------------ groups


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("shape", SHAPES, ids=["tied", "all kinds"])
def test_every_parameter_is_in_exactly_one_group(name: str, shape: dict[str, Any]) -> None:
    model = build(shape)
    optim = Optim(name=name, lr=1e-3, embedding_lr=5e-3, matrix_lr=0.05, weight_decay=0.2)
    groups = {group["name"]: group for group in make_optimizer(model, optim).param_groups}
    members = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in model.parameters())
    names = {id(p): n for n, p in model.named_parameters()}
    assert all(names[id(p)].endswith("proj.weight") for p in groups["matrices"]["params"])
    assert all(p.dim() == 1 for p in groups["vectors"]["params"])
    embeddings = {names[id(p)] for p in groups["embeddings"]["params"]}
    assert embeddings <= {"embed_tokens.weight", "embed_positions.weight", "lm_head.weight"}
    rates = {name: group["peak_lr"] for name, group in groups.items()}
    assert rates == {"matrices": 0.05 if name == "muon" else 1e-3, "embeddings": 5e-3, "vectors": 1e-3}
    decays = {name: group["weight_decay"] for name, group in groups.items()}
    assert decays == {"matrices": 0.2, "embeddings": 0.2, "vectors": 0.0}


@pytest.mark.parametrize("shape", SHAPES, ids=["tied", "all kinds"])
def test_adamw_is_torchs_step_by_step(shape: dict[str, Any]) -> None:
    optim = Optim(name="adamw", lr=3e-3, embedding_lr=1e-2, betas=(0.8, 0.98), eps=1e-7, weight_decay=0.3)
    ours, theirs = build(shape), build(shape)
    optimizer = make_optimizer(ours, optim)
    twin = {id(a): b for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)}
    reference = torch.optim.AdamW(
        [
            {"params": [twin[id(p)] for p in g["params"]], "lr": g["peak_lr"], "weight_decay": g["weight_decay"]}
            for g in optimizer.param_groups
        ],
        betas=(0.8, 0.98),
        eps=1e-7,
    )
    for step in range(6):
        rate = 1 / (1 + step)  # the schedule sets lr anew each time
        for mine, other in zip(optimizer.param_groups, reference.param_groups, strict=True):
            mine["lr"] = other["lr"] = mine["peak_lr"] * rate
        fill_gradients(ours, step)
        fill_gradients(theirs, step)
        optimizer.step()
        reference.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)


def test_muon_is_its_definition_step_by_step() -> None:
    """m <- mu m + (1 - mu) g; W <- (1 - lr wd) W - lr sqrt(max(1, rows / columns)) orthogonal((1 - mu) g + mu m)."""
    model = build()
    optimizer = make_optimizer(model, Optim(name="muon", matrix_lr=0.02, momentum=0.9, weight_decay=0.1))
    matrices = next(g for g in optimizer.param_groups if g["kind"] == "muon")["params"]
    weights, momenta = [p.detach().clone() for p in matrices], [torch.zeros_like(p) for p in matrices]
    assert {tuple(p.shape) for p in matrices} == {(32, 32), (16, 32), (128, 32), (32, 128)}
    for step in range(4):
        fill_gradients(model, step)
        for number, p in enumerate(matrices):
            assert p.grad is not None
            momenta[number] = 0.9 * momenta[number] + 0.1 * p.grad
            update = orthogonalise((0.1 * p.grad + 0.9 * momenta[number]).unsqueeze(0))[0]
            scale = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
            weights[number] = weights[number] * (1 - 0.02 * 0.1) - 0.02 * scale * update
        optimizer.step()
        for p, expected in zip(matrices, weights, strict=True):
            torch.testing.assert_close(p.detach(), expected, atol=2e-3, rtol=0)  # bf16 products round one by one


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_loss_falls(name: str) -> None:
    model = build(SHAPE | {"qk_norm": True})
    tokens = torch.randint(40, (8, 17), generator=torch.Generator().manual_seed(3))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    optimizer = make_optimizer(model, Optim(name=name, lr=1e-2, matrix_lr=0.02, weight_decay=0.0))
    losses = []
    for _ in range(40):
        loss, count, _ = model(batch)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float((loss / count).detach()))
    assert losses[-1] < 0.6 * losses[0]


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    model = build()
    optimizer = make_optimizer(model, Optim(name="muon"))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not optimizer.state
    assert isinstance(optimizer, Optimizer)


@pytest.mark.parametrize("optim", [Optim(name="adadelta", lr=1.0, eps=1e-6, weight_decay=0.0), Optim(name="adadelta")])
def test_adadelta_is_torchs_with_its_own_rho(optim: Optim) -> None:
    """arXiv 1212.5701; torch's default rho is another. Weight decay is decoupled here, so it is compared without."""
    model, other = build(), build()
    optimizer = make_optimizer(model, optim)
    theirs = torch.optim.Adadelta(other.parameters(), lr=optim.lr, rho=0.95, eps=optim.eps)
    for step in range(5):
        for one in (model, other):
            fill_gradients(one, step)
        optimizer.step()
        if optim.weight_decay:
            with torch.no_grad():
                for p in other.parameters():
                    p.mul_(1 - optim.lr * optim.weight_decay * (p.dim() > 1))
        theirs.step()
    for ours, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)
    assert {key for state in optimizer.state.values() for key in state} == STATE["adadelta"]
