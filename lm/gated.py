"""The gated hidden unit of RNNsearch (arXiv 1409.0473, appendix A.1.1), as printed, and over whole sentences.

`GatedUnit.forward` is the paper's equations, one step of them. `scan` is what runs: the same numbers for all steps and
both directions of a sentence, with the gradient written by hand. Autograd would keep and visit some thirty small
tensors a step; here a step is a dozen operations in place, and a weight's gradient is one product after the last step.

torch's GRU is another unit: it resets U s after the product, where the paper resets s before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.linear import FEW_ROWS, Packed, linear, onednn_is_usable, packing_pays

Product = Callable[[Tensor], Tensor]


class GatedUnit(nn.Module):
    """A state s in R^n that reads y in R^m and, in a decoder, a context c in R^k."""

    def __init__(self, inputs: int, hidden: int, context: int = 0, bias: bool = True):
        super().__init__()

        def matrix(columns: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(hidden, columns))

        self.bias, self.packed_in, self.packed_out = bias, Packed(), Packed()
        self.W, self.W_z, self.W_r = matrix(inputs), matrix(inputs), matrix(inputs)
        self.U, self.U_z, self.U_r = matrix(hidden), matrix(hidden), matrix(hidden)
        if context:
            self.C, self.C_z, self.C_r = matrix(context), matrix(context), matrix(context)
        if bias:
            self.b, self.b_z, self.b_r = (nn.Parameter(torch.empty(hidden)) for _ in range(3))

    def forward(self, y: Tensor, s: Tensor, c: Tensor | None = None) -> Tensor:
        """One step: y [B, m], s [B, n], c [B, k] -> the next s [B, n]."""
        b, b_z, b_r = (self.b, self.b_z, self.b_r) if self.bias else (None, None, None)
        # z = sigmoid(W_z y + U_z s + C_z c): how much of the candidate is taken
        # r = sigmoid(W_r y + U_r s + C_r c): how much of the state the candidate may see
        # candidate = tanh(W y + U [r * s] + C c)
        z, r, new = F.linear(y, self.W_z, b_z), F.linear(y, self.W_r, b_r), F.linear(y, self.W, b)
        if c is not None:
            z, r, new = z + F.linear(c, self.C_z), r + F.linear(c, self.C_r), new + F.linear(c, self.C)
        z, r = torch.sigmoid(z + F.linear(s, self.U_z)), torch.sigmoid(r + F.linear(s, self.U_r))
        new = torch.tanh(new + F.linear(r * s, self.U))
        return (1 - z) * s + z * new

    def gates(self) -> Tensor:
        """[U_z; U_r], [2n, n]."""
        return torch.cat((self.U_z, self.U_r))

    def contexts(self) -> tuple[Tensor, Tensor, Tensor]:
        """C_z, C_r, C."""
        return self.C_z, self.C_r, self.C

    def read(self, y: Tensor) -> Tensor:
        """y [..., m] -> what all steps read of it, in one product: [W_z; W_r; W] y + [b_z; b_r; b], [..., 3n]."""
        biases = (self.b_z, self.b_r, self.b) if self.bias else None
        return together(y, (self.W_z, self.W_r, self.W), self.packed_in, biases)


def together(x: Tensor, weights: Sequence[Tensor], packed: Packed, biases: Sequence[Tensor] | None = None) -> Tensor:
    """Several maps of the same x as one product: x [..., in], weights [out_i, in], biases [out_i] -> [..., sum of
    out_i]. `packed` keeps the weights from one step of decoding to the next.
    """
    if packing_pays(x, weights[0]):
        return packed(x, weights, [None] * len(weights) if biases is None else biases)
    whole = weights[0] if len(weights) == 1 else torch.cat(list(weights))
    return linear(x, whole, None if biases is None else torch.cat(list(biases)))


def scan(
    x: Tensor, s: Tensor, gates: Tensor, candidate: Tensor, dtype: torch.dtype, mask: Tensor | None = None
) -> Tensor:
    """All steps of D units side by side.

    x [D, T, B, 3n]: what each step reads, in the order z, r, candidate (`GatedUnit.read`); s [D, B, n]: the state
    before the first; gates [D, 2n, n]: [U_z; U_r]; candidate [D, n, n]: U; dtype: what products are computed in; mask
    bool [D, T, B]: where it is False, the step leaves the state as it was (z = 0) -> the states after each step,
    [D, T, B, n], in float32.
    """
    with torch.autocast(x.device.type, enabled=False):
        x, s = x.float(), s.float()
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, s, gates, candidate)):
            return _Scan.apply(x, s, gates, candidate, dtype, mask)
        return _scan(x, s, gates, candidate, dtype, mask)[0][:, 1:]


def products(weights: Tensor, dtype: torch.dtype, rows: int) -> Product:
    """weights [D, out, in] -> a function [D, rows, in] -> [D, rows, out], x W^T, for one set of weights and many x.

    oneDNN multiplies fastest by weights that it has put in its own order, once for all steps.
    """
    maps = [product_with(weight, dtype, rows) for weight in weights]
    if len(maps) == 1:
        return lambda x: maps[0](x[0]).unsqueeze(0)
    return lambda x: torch.stack([product(part) for product, part in zip(maps, x, strict=True)])


def product_with(weight: Tensor, dtype: torch.dtype, rows: int) -> Product:
    """weight [out, in] -> a function x [rows, in] -> x W^T [rows, out], computed in `dtype`."""
    weight = weight.to(dtype)
    if weight.device.type == "cpu" and rows >= FEW_ROWS and onednn_is_usable():
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
            return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, None, "none", [], "")
        except RuntimeError:  # bfloat16 on a machine without its instructions
            pass
    return lambda x: F.linear(x.to(dtype), weight)


def tanh_(x: Tensor) -> Tensor:
    """tanh in place. On a CPU by 2 sigmoid(2x) - 1, which torch computes five times as fast; they differ by 1e-7."""
    return x.mul_(2).sigmoid_().mul_(2).sub_(1) if x.device.type == "cpu" else x.tanh_()


def weight_gradient(output: Tensor, inputs: Tensor, dtype: torch.dtype, like: Tensor) -> Tensor:
    """The gradient of W in x W^T over all steps: output [..., out], x [..., in] -> [out, in]."""
    output, inputs = output.reshape(-1, output.shape[-1]).to(dtype), inputs.reshape(-1, inputs.shape[-1]).to(dtype)
    return (output.t() @ inputs).to(like.dtype)


def _scan(
    x: Tensor, s: Tensor, gates: Tensor, candidate: Tensor, dtype: torch.dtype, mask: Tensor | None
) -> tuple[Tensor, ...]:
    """-> states [D, T + 1, B, n], z and r [D, T, B, 2n], r * s and candidates [D, T, B, n]."""
    units, steps, rows, n = *x.shape[:3], s.shape[-1]
    states, zr = x.new_empty(units, steps + 1, rows, n), x.new_empty(units, steps, rows, 2 * n)
    reset, new = x.new_empty(units, steps, rows, n), x.new_empty(units, steps, rows, n)
    states[:, 0] = s
    by_gates, by_candidate = products(gates, dtype, rows), products(candidate, dtype, rows)
    ended = None if mask is None else ~mask.unsqueeze(-1)
    for t in range(steps):
        s = states[:, t]
        torch.add(x[:, t, :, : 2 * n], by_gates(s), out=zr[:, t]).sigmoid_()
        z, r = zr[:, t].chunk(2, dim=-1)
        if ended is not None:
            z.masked_fill_(ended[:, t], 0)
        torch.mul(r, s, out=reset[:, t])
        tanh_(torch.add(x[:, t, :, 2 * n :], by_candidate(reset[:, t]), out=new[:, t]))
        torch.lerp(s, new[:, t], z, out=states[:, t + 1])
    return states, zr, reset, new


def step_back(
    ds: Tensor, s: Tensor, zr: Tensor, new: Tensor, dzr: Tensor, dnew: Tensor, by_candidate: Product
) -> Tensor:
    """One step of the unit backwards: ds [..., n], the gradient of the state after it, becomes in place what of it
    reaches the state before without passing a gate; dzr [..., 2n] and dnew [..., n] are filled with the gradients of
    what the nonlinearities are given.
    """
    (z, r), (dz, dr) = zr.chunk(2, dim=-1), dzr.chunk(2, dim=-1)
    torch.ops.aten.tanh_backward.grad_input(ds * z, new, grad_input=dnew)
    torch.ops.aten.sigmoid_backward.grad_input((new - s).mul_(ds), z, grad_input=dz)
    dreset = by_candidate(dnew).float()  # of r * s
    torch.ops.aten.sigmoid_backward.grad_input(dreset * s, r, grad_input=dr)
    return ds.addcmul_(ds, z, value=-1).addcmul_(dreset, r)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, s, gates, candidate, dtype, mask):  # type: ignore[no-untyped-def]
        states, zr, reset, new = _scan(x, s, gates, candidate, dtype, mask)
        ctx.save_for_backward(gates, candidate, states, zr, reset, new)
        ctx.dtype = dtype
        return states[:, 1:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        with torch.autocast(gradient.device.type, enabled=False):
            return *_scan_back(gradient, ctx.saved_tensors, ctx.dtype), None, None


def _scan_back(gradient: Tensor, saved: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """gradient [D, T, B, n], of the states after each step -> of x, s, gates and candidate."""
    gates, candidate, states, zr, reset, new = saved
    units, steps, rows, _ = new.shape
    by_gates, by_candidate = products(gates.mT, dtype, rows), products(candidate.mT, dtype, rows)
    dzr, dnew = torch.empty_like(zr), torch.empty_like(new)
    ds = torch.zeros_like(states[:, 0])
    for t in reversed(range(steps)):
        ds += gradient[:, t]
        step_back(ds, states[:, t], zr[:, t], new[:, t], dzr[:, t], dnew[:, t], by_candidate)
        ds += by_gates(dzr[:, t])
    parts = range(units)
    dgates = torch.stack([weight_gradient(dzr[d], states[d, :-1], dtype, gates) for d in parts])
    dcandidate = torch.stack([weight_gradient(dnew[d], reset[d], dtype, candidate) for d in parts])
    return torch.cat((dzr, dnew), dim=-1), ds, dgates, dcandidate
