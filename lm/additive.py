"""Additive attention: where attention began, as a soft alignment (arXiv 1409.0473, section 3.1 and appendix A.1.2).

`AdditiveAttention.forward` is the paper's equations, one target position of them. `align` is what runs: the decoder's
recurrence with its alignment over a whole target, the gradient written by hand. Two identities carry its speed:

    tanh(a) = 2 sigmoid(2a) - 1     the constant leaves the softmax as it is; torch's sigmoid is five times as fast
    C sum_j alpha_j h_j = sum_j alpha_j (C h_j)     so that one product, before the loop, maps the contexts of all steps
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.gated import Product, product_with, step_back, tanh_, weight_gradient
from lm.linear import linear


class AdditiveAttention(nn.Module):
    """A small network scores how well annotation h_j fits what comes after state s. Trained with all the rest."""

    def __init__(self, hidden: int, memory: int, alignment: int, bias: bool = True):
        super().__init__()
        self.W_a = nn.Parameter(torch.empty(alignment, hidden))
        self.U_a = nn.Parameter(torch.empty(alignment, memory))
        self.v_a = nn.Parameter(torch.empty(alignment))
        self.b_a = nn.Parameter(torch.empty(alignment)) if bias else None

    def project(self, annotations: Tensor) -> Tensor:
        """U_a h_j (+ b_a), which no state changes: once a sentence. [B, S, memory] -> [B, S, n']."""
        return linear(annotations, self.U_a, self.b_a)

    def forward(self, s: Tensor, projected: Tensor, annotations: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s [B, n], projected [B, S, n'], annotations [B, S, memory], mask bool [B, S] (True = a real token)
        -> the context [B, memory], the weights [B, S] and the energies [B, S] (-inf at padding).
        """
        energies = torch.tanh(F.linear(s, self.W_a).unsqueeze(1) + projected) @ self.v_a  # e_j = v^T tanh(W s + U h_j)
        energies = energies.masked_fill(~mask, -torch.inf)
        weights = energies.softmax(dim=-1)  # alpha_j = exp(e_j) / sum_k exp(e_k)
        context = (weights.unsqueeze(-1) * annotations).sum(dim=1)  # c = sum_j alpha_j h_j, the expected annotation
        return context, weights, energies


class Aligned(NamedTuple):
    """What a decoder with alignment did: states [T + 1, B, n], the first one included; weights [T, B, S]; energies
    [T, B, S], without gradient, -inf at padding.
    """

    states: Tensor
    weights: Tensor
    energies: Tensor


class Alignment(NamedTuple):
    """The weights of the loop: query [n', n]: W_a; v [n']; gates [2n, n]: [U_z; U_r]; candidate [n, n]: U."""

    query: Tensor
    v: Tensor
    gates: Tensor
    candidate: Tensor


def align(
    x: Tensor, s: Tensor, projected: Tensor, values: Tensor, mask: Tensor, weights: Alignment, dtype: torch.dtype
) -> Aligned:
    """All steps of a decoder: s_i from s_{i-1}, x_i, and the context that s_{i-1} chooses.

    x [T, B, 3n]: what the unit reads of the targets, in the order z, r, candidate; s [B, n]: s_0; projected [B, S, n']:
    U_a h_j; values [B, S, 3n]: the annotations as the unit reads them, [C_z; C_r; C] h_j; mask bool [B, S], True for
    real tokens; dtype: what products are computed in. The rest is float32.
    """
    with torch.autocast(x.device.type, enabled=False):
        x, s, projected, values = x.float(), s.float(), projected.float(), values.float()
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, s, projected, values, *weights)):
            return Aligned(*_Align.apply(x, s, projected, values, mask, dtype, *weights))
        return Aligned(*_align_with(x, s, projected, values, mask, dtype, weights)[:3])


def align_steps(
    x: Tensor,
    s: Tensor,
    projected: Tensor,
    annotations: Tensor,
    mask: Tensor,
    v: Tensor,
    by_state: Product,
    by_candidate: Product,
    by_context: Product,
) -> Aligned:
    """The same for few steps, without a gradient: of annotations [B, S, memory], of which only the expected one is
    mapped. The products: [W_a; U_z; U_r] s, U (r * s) and [C_z; C_r; C] c.

    projected, annotations and mask may be those of M sources, where each has B / M rows that stand beside each other.
    """
    with torch.autocast(x.device.type, enabled=False):
        x, s, projected, annotations = x.float(), s.float(), projected.float(), annotations.float()
        return Aligned(*_align(x, s, projected, annotations, mask, v, by_state, by_candidate, by_context)[:3])


def _align_with(
    x: Tensor, s: Tensor, projected: Tensor, values: Tensor, mask: Tensor, dtype: torch.dtype, weights: Alignment
) -> tuple[Tensor, ...]:
    by_state = product_with(torch.cat((weights.query, weights.gates)), dtype, len(s))
    by_candidate = product_with(weights.candidate, dtype, len(s))
    return _align(x, s, projected, values, mask, weights.v, by_state, by_candidate)


def _align(
    x: Tensor,
    s: Tensor,
    projected: Tensor,
    values: Tensor,
    mask: Tensor,
    v: Tensor,
    by_state: Product,
    by_candidate: Product,
    by_context: Product | None = None,
) -> tuple[Tensor, ...]:
    """-> states, weights, energies as in `Aligned`; then what the gradient needs: 2 W_a s [T, B, n'], z and r
    [T, B, 2n], r * s and candidates [T, B, n].
    """
    (steps, rows, _), n, size = x.shape, s.shape[-1], len(v)
    sources, length, _ = projected.shape
    each = rows // max(1, sources)
    hidden = projected.new_empty(sources, each, length, size)  # of one step after another
    states, alphas = x.new_empty(steps + 1, rows, n), x.new_empty(steps, rows, length)
    energies, queries = torch.empty_like(alphas), x.new_empty(steps, rows, size)
    zr, reset, new = x.new_empty(steps, rows, 2 * n), x.new_empty(steps, rows, n), x.new_empty(steps, rows, n)
    v = v.float()
    closed = torch.zeros(mask.shape, device=x.device).masked_fill_(~mask, -torch.inf).sub_(v.sum())
    closed = closed.repeat_interleave(each, dim=0) if each > 1 else closed
    states[0] = s
    for t in range(steps):
        s = states[t]
        of_state = by_state(s)
        torch.mul(of_state[:, :size], 2, out=queries[t])
        query = queries[t].view(sources, each, 1, size)
        torch.add(query, projected.unsqueeze(1), alpha=2, out=hidden).sigmoid_()  # sigmoid(2 (W_a s + U_a h))
        torch.add(closed, (hidden.flatten(0, 2) @ v).view(rows, length), alpha=2, out=energies[t])
        torch.softmax(energies[t], dim=-1, out=alphas[t])
        context = torch.bmm(alphas[t].view(sources, each, length), values).flatten(0, 1)
        if by_context is not None:
            context = by_context(context).float()
        context += x[t]  # all that the unit reads
        torch.add(context[:, : 2 * n], of_state[:, size:], out=zr[t]).sigmoid_()
        z, r = zr[t].chunk(2, dim=-1)
        torch.mul(r, s, out=reset[t])
        tanh_(torch.add(context[:, 2 * n :], by_candidate(reset[t]), out=new[t]))
        torch.lerp(s, new[t], z, out=states[t + 1])
    return states, alphas, energies, queries, zr, reset, new


class _Align(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, s, projected, values, mask, dtype, *parameters):  # type: ignore[no-untyped-def]
        weights = Alignment(*parameters)
        states, alphas, energies, *rest = _align_with(x, s, projected, values, mask, dtype, weights)
        ctx.save_for_backward(states, alphas, projected, values, *rest, *weights)
        ctx.mark_non_differentiable(energies)
        ctx.dtype = dtype
        return states, alphas, energies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor, dalphas: Tensor, _: Tensor):  # type: ignore[override]
        with torch.autocast(gradient.device.type, enabled=False):
            dx, ds, dprojected, dvalues, dweights = _align_back(gradient, dalphas, ctx.saved_tensors, ctx.dtype)
        return dx, ds, dprojected, dvalues, None, None, *dweights


def _align_back(
    gradient: Tensor, dalphas: Tensor, saved: tuple[Tensor, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Alignment]:
    """gradient [T + 1, B, n], of all states, and dalphas [T, B, S], of the weights -> of x, s, projected, values, and
    the loop's weights.
    """
    states, alphas, projected, values, queries, zr, reset, new, *parameters = saved
    weights = Alignment(*parameters)
    (steps, rows, n), size = new.shape, weights.query.shape[0]
    by_state = product_with(torch.cat((weights.query, weights.gates)).t(), dtype, rows)
    by_candidate = product_with(weights.candidate.t(), dtype, rows)
    v = 4 * weights.v.float()
    dx, dnew = new.new_empty(steps, rows, 3 * n), torch.empty_like(new)
    dstate = new.new_empty(steps, rows, size + 2 * n)  # of what the state is multiplied to: [W_a s, U_z s, U_r s]
    hidden, slope = torch.empty_like(projected), torch.empty_like(projected)
    dkeys, dv, ds = torch.zeros_like(projected), torch.zeros_like(v), torch.zeros_like(states[0])
    for t in reversed(range(steps)):
        dquery, dzr = dstate[t, :, :size], dstate[t, :, size:]
        ds += gradient[t + 1]
        step_back(ds, states[t], zr[t], new[t], dzr, dnew[t], by_candidate)
        torch.cat((dzr, dnew[t]), dim=-1, out=dx[t])
        # through the expected annotation and the softmax: the gradient of e_j is alpha_j (d_j - sum_k alpha_k d_k)
        de = torch.bmm(dx[t].unsqueeze(1), values.mT).squeeze(1).add_(dalphas[t]).mul_(alphas[t])
        de.addcmul_(alphas[t], de.sum(dim=-1, keepdim=True), value=-1)
        # tanh(a) is 2 sigmoid(2a) - 1, its slope 4 sigmoid(2a) (1 - sigmoid(2a)); the 2, the 4 and v are for later
        torch.add(queries[t].unsqueeze(1), projected, alpha=2, out=hidden).sigmoid_()
        dv.addmv_(hidden.flatten(0, 1).t(), de.flatten())
        torch.ops.aten.sigmoid_backward.grad_input(de.unsqueeze(-1), hidden, grad_input=slope)
        dkeys += slope
        torch.mul(slope.sum(dim=1), v, out=dquery)
        ds += by_state(dstate[t])
    ds += gradient[0]
    dvalues = torch.bmm(alphas.permute(1, 2, 0), dx.transpose(0, 1))
    of_query, of_gates = weight_gradient(dstate, states[:-1], dtype, weights.query).split((size, 2 * n))
    of_candidate = weight_gradient(dnew, reset, dtype, weights.candidate)
    return dx, ds, dkeys.mul_(v), dvalues, Alignment(of_query, dv.mul_(2).to(weights.v.dtype), of_gates, of_candidate)
