"""One optimizer object for the whole model: AdamW, Muon for the matrices inside the layers and AdamW for the rest, or
Adadelta.

AdamW: arXiv 1711.05101; without decay it is Adam. Adadelta: arXiv 1212.5701. Muon: the momentum of a matrix is replaced
by the nearest orthogonal matrix, found by a few Newton-Schulz steps, so that every direction is learned at the same
rate (Jordan et al. 2024; the coefficients are those of arXiv 2505.16932). Embeddings, the output head and vectors are
no maps between features: they stay with AdamW.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from lm.linear import bf16_is_fast
from train.config import Optim

# Each step applies x -> a x + b x^3 + c x^5 to the singular values; the triples are tuned one after another, so that
# five steps take values from 1e-3 on to near 1. The last triple is the one that later steps repeat.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
STATE = {  # what is kept for a parameter, by kind
    "muon": {"momentum"},
    "adamw": {"step", "exp_avg", "exp_avg_sq"},
    "adadelta": {"square_avg", "acc_delta"},
}
SAFETY = 1.01  # keeps the singular values inside the range that the coefficients were made for, whatever rounding adds


def orthogonalise(matrices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The orthogonal factor of each matrix, [N, rows, columns] -> the same shape: U V^T of U S V^T, singular values
    near 1.

    dtype: what the products are computed in; None takes bfloat16 where the machine multiplies it fast (the update
    needs no more precision), else float32.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(
        dtype or (torch.bfloat16 if bf16_is_fast(matrices.device.type) else torch.float32)
    )
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] * SAFETY + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Optimizer(torch.optim.Optimizer):
    """Groups carry `kind` ("muon", "adamw" or "adadelta"); state is made in the first step, for whatever tensors the
    parameters are then.

    Muon's update of a matrix [rows, columns] is scaled by sqrt(max(1, rows / columns)), so that one learning rate fits
    all. Weight decay is decoupled in all three.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]):
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["kind"] == "muon":
                self._muon(group, parameters)
            elif group["kind"] == "adadelta":
                self._adadelta(group, parameters)
            else:
                self._adamw(group, parameters)

    def _adamw(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        if not parameters:
            return
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        states = [self.state[p] for p in parameters]
        adamw(
            list[Tensor](parameters),
            [p.grad for p in parameters if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _muon(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {"momentum": torch.zeros_like(p)}
            by_shape[p.shape].append(p)
        for shape, matrices in by_shape.items():
            gradients = [p.grad for p in matrices if p.grad is not None]
            momenta = [self.state[p]["momentum"] for p in matrices]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's look ahead
            updates = orthogonalise(torch.stack(ahead)).unbind()
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            if group["weight_decay"]:
                torch._foreach_mul_(list[Tensor](matrices), 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(list[Tensor](matrices), updates, alpha=-group["lr"] * scale)

    def _adadelta(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        """Algorithm 1 of the paper: each step as long as the last ones were, over the last gradients' size."""
        rho, eps = group["rho"], group["eps"]
        for p in parameters:
            gradient = p.grad
            assert gradient is not None
            if not self.state[p]:
                self.state[p] = {"square_avg": torch.zeros_like(p), "acc_delta": torch.zeros_like(p)}
            squares, deltas = self.state[p]["square_avg"], self.state[p]["acc_delta"]
            squares.mul_(rho).addcmul_(gradient, gradient, value=1 - rho)
            delta = (deltas + eps).sqrt_().div_((squares + eps).sqrt_()).mul_(gradient)
            deltas.mul_(rho).addcmul_(delta, delta, value=1 - rho)
            if group["weight_decay"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(delta, alpha=group["lr"])


def make_optimizer(model: nn.Module, optim: Optim) -> Optimizer:
    """The optimizer that a recipe asks for; every parameter is in exactly one group, whose peak rate is `peak_lr`.

    Groups: `matrices` (two-dimensional, inside the layers; Muon's if optim.name is muon), `embeddings` (tokens,
    positions and the output head) and `vectors` (norms and biases, never decayed).
    """
    named: dict[str, list[nn.Parameter]] = {"matrices": [], "embeddings": [], "vectors": []}
    for name, p in model.named_parameters():
        if p.dim() < 2:
            named["vectors"].append(p)
        elif "embed" in name or "lm_head" in name:
            named["embeddings"].append(p)
        else:
            named["matrices"].append(p)
    if optim.name == "adadelta":
        rest: dict[str, Any] = {"kind": "adadelta", "rho": optim.rho, "eps": optim.eps}
    else:
        rest = {"kind": "adamw", "betas": tuple(optim.betas), "eps": optim.eps}
    embedding_lr = optim.lr if optim.embedding_lr is None else optim.embedding_lr
    if optim.name == "muon":
        matrices = {"kind": "muon", "momentum": optim.momentum, "peak_lr": optim.matrix_lr}
    else:
        matrices = {**rest, "peak_lr": optim.lr}
    groups: list[dict[str, Any]] = [
        {"name": "matrices", "params": named["matrices"], "weight_decay": optim.weight_decay, **matrices},
        {
            "name": "embeddings",
            "params": named["embeddings"],
            "weight_decay": optim.weight_decay,
            "peak_lr": embedding_lr,
            **rest,
        },
        {"name": "vectors", "params": named["vectors"], "weight_decay": 0.0, "peak_lr": optim.lr, **rest},
    ]
    return Optimizer([{**group, "lr": group["peak_lr"]} for group in groups if group["params"]])
