"""The output head and its cross-entropy in one, a slice of rows at a time.

The logits of a batch are its largest tensor by far (rows x vocabulary); made in slices, and turned into their own
gradient in place, they never exist as a whole, neither in the forward pass nor in the backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lm.linear import linear

IGNORE = -100  # a target that is not asked for
SLICE = {"cpu": 1 << 21, "cuda": 1 << 27}  # logits in a slice: what a CPU's cache holds; what a GPU needs to be busy


class Loss(NamedTuple):
    """What a model's forward returns, each a scalar: summed over the targets of the batch."""

    total: Tensor  # the objective, in nats, fp32: cross-entropy, label-smoothed where that was asked for
    targets: Tensor  # how many there are, int64
    nll: Tensor  # the plain negative log-likelihood, in nats, fp32, without gradient


def head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None, smoothing: float = 0.0
) -> Loss:
    """Summed cross-entropy of softmax(cap(hidden weight^T)) at the targets.

    hidden [..., width], weight [vocab, width], targets int64 [...] with IGNORE where nothing is asked. smoothing: the
    share of the target distribution that is spread evenly over the whole vocabulary (arXiv 1512.00567, section 7).
    """
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    device = hidden.device.type
    if device == "cpu" and not torch.compiler.is_compiling():
        # The head is most of a small model's work; padding and sources need none. (A GPU would have to be waited for.)
        asked = targets != IGNORE
        if not bool(asked.all()):
            rows = asked.nonzero().squeeze(1)
            hidden, targets = hidden.index_select(0, rows), targets[rows]
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if needs_gradient:
        total, nll = _HeadLoss.apply(hidden, weight, targets, softcap, smoothing)
    else:
        total, nll = _head_loss(hidden, weight, targets, softcap, smoothing, None, None)
    return Loss(total, (targets != IGNORE).sum(), nll)


def _head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float | None,
    smoothing: float,
    dhidden: Tensor | None,
    dweight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The objective and the plain loss; and, where dhidden [rows, width] and dweight [vocab, width] are given, they
    are filled with the objective's gradients.
    """
    vocab = weight.shape[0]
    rows = max(64, SLICE.get(hidden.device.type, 1 << 24) // vocab)
    nll = torch.zeros((), dtype=torch.float32, device=hidden.device)
    even = torch.zeros((), dtype=torch.float32, device=hidden.device)  # cross-entropy against the even distribution
    weight = weight.to(hidden.dtype)
    for start in range(0, hidden.shape[0], rows):
        h, target = hidden[start : start + rows], targets[start : start + rows]
        asked = target != IGNORE
        index = target.clamp(min=0).unsqueeze(1)
        logits = linear(h, weight).float()
        slope = None
        if softcap is not None:
            logits.div_(softcap).tanh_()
            slope = 1 - logits.square() if dhidden is not None else None
            logits.mul_(softcap)
        logits.sub_(logits.amax(dim=-1, keepdim=True))
        picked = logits.gather(1, index).squeeze(1)
        mean = logits.mean(dim=-1) if smoothing else None
        total = logits.exp_().sum(dim=-1, keepdim=True)
        log_total = total.squeeze(1).log()
        nll += (log_total - picked).masked_fill_(~asked, 0).sum()
        if mean is not None:
            even += (log_total - mean).masked_fill_(~asked, 0).sum()
        if dhidden is None or dweight is None:
            continue
        gradient = logits.div_(total)  # softmax, minus the target distribution
        if smoothing:
            gradient.sub_(smoothing / vocab)
        gradient.scatter_add_(1, index, gradient.new_full(index.shape, smoothing - 1.0))
        gradient.mul_(asked.unsqueeze(1))
        if slope is not None:
            gradient.mul_(slope)
        gradient = gradient.to(h.dtype)
        dhidden[start : start + rows] = linear(gradient, weight.t())
        if dweight.dtype == h.dtype:
            dweight.addmm_(gradient.t(), h)
        else:
            dweight.add_(gradient.t() @ h)
    return (1 - smoothing) * nll + smoothing * even if smoothing else nll.clone(), nll


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight)
        with torch.autocast(hidden.device.type, enabled=False):
            total, nll = _head_loss(hidden, weight, targets, softcap, smoothing, dhidden, dweight)
        ctx.save_for_backward(dhidden, dweight)
        ctx.mark_non_differentiable(nll)
        return total, nll

    @staticmethod
    def backward(ctx, gradient: Tensor, _):  # type: ignore[override]
        dhidden, dweight = ctx.saved_tensors
        return dhidden * gradient.to(dhidden.dtype), dweight * gradient.to(dweight.dtype), None, None, None
