"""RNNSearch: the recurrent encoder-decoder in which attention began (Bahdanau, Cho, Bengio 2014, arXiv 1409.0473).

    h_j = [forward_j ; backward_j]                   an annotation of each source word, from both of its sides
    s_0 = tanh(W_s backward_1)                       backward_1 has read the whole source, its first word last
    for each target word y_i:
        e_ij = v^T tanh(W_a s_{i-1} + U_a h_j)       how well what comes next fits source word j
        alpha_ij = softmax_j(e_ij)                   the soft alignment
        c_i = sum_j alpha_ij h_j                     the expected annotation
        s_i = unit(y_{i-1}, s_{i-1}, c_i)            lm/gated.py
        p(y_i) = softmax(W_o maxout(U_o s_{i-1} + V_o E y_{i-1} + C_o c_i))

`RNNSearch.printed` computes just that, word by word. Training and decoding compute the same through `scan` and `align`
(lm/gated.py, lm/additive.py): all that needs no state is one product for all words, before the loop or after it.

With `fixed_context`, every c_i is forward_S: the RNN encoder-decoder (RNNencdec) that the paper compares with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.additive import AdditiveAttention, Aligned, Alignment, align, align_steps
from lm.dropout import dropout
from lm.gated import GatedUnit, scan, together
from lm.groups import regroup, take
from lm.linear import Linear, Packed, forget_packed, linear
from lm.loss import IGNORE, Loss, head_loss
from lm.rnnsearch_config import RNNSearchConfig
from lm.trace import AttentionTrace


class DeepOutput(nn.Module):
    """t = maxout(U_o s + V_o E y + C_o c): the larger one of rows 2j - 1 and 2j is t_j (appendix A.2.2)."""

    def __init__(self, config: RNNSearchConfig):
        super().__init__()
        rows = 2 * config.maxout
        self.U_o = nn.Parameter(torch.empty(rows, config.hidden))
        self.V_o = nn.Parameter(torch.empty(rows, config.embedding))
        self.C_o = nn.Parameter(torch.empty(rows, config.memory))
        self.b_o = nn.Parameter(torch.empty(rows)) if config.bias else None

    def forward(self, s: Tensor, y: Tensor, c: Tensor) -> Tensor:
        """s [..., n], y [..., m], c [..., memory] -> [..., l]."""
        total = linear(s, self.U_o, self.b_o) + linear(y, self.V_o) + linear(c, self.C_o)
        return torch.maximum(total[..., 0::2], total[..., 1::2])


OF_SOURCES = ("annotations", "projected", "mask")  # what the rows of a source share


@dataclass
class RNNSearchState:
    """What the decoder knows between steps: R rows, of M sources.

    annotations [M, S, 2n], projected [M, S, n'] (U_a h_j), mask bool [M, S] (True = a source token), s [R, n], first
    int64 [R], and `read`, int64 [R]: how many target tokens each row was given. Every source has R / M rows, which
    stand beside each other: the hypotheses of a beam look at one copy of it. The fixed context is one annotation of
    size n, and projected is empty.
    """

    annotations: Tensor
    projected: Tensor
    mask: Tensor
    s: Tensor
    first: Tensor
    read: Tensor

    @property
    def each(self) -> int:
        """The rows of a source."""
        return max(1, len(self.s) // max(1, len(self.mask)))

    def select(self, index: Tensor) -> RNNSearchState:
        """The rows that `index` int64 [R] names, in its order; a row may be named more than once or not at all."""
        kept, _ = regroup(index, self.each)
        sources = {name: take(getattr(self, name), kept) for name in OF_SOURCES}
        return RNNSearchState(**sources, s=self.s[index], first=self.first[index], read=self.read[index])

    @staticmethod
    def join(states: Sequence[RNNSearchState]) -> RNNSearchState:
        """The rows of all states, in order, as one state; shorter sources are padded, and padding that no source of
        theirs needs any more is cut off.
        """
        if len({state.each for state in states}) > 1:
            states = [state._apart() for state in states]
        longest = max((int(state.mask.sum(dim=1).max()) for state in states if len(state.mask)), default=1)
        padded = [state._padded(longest - state.mask.shape[1]) for state in states]
        return RNNSearchState(
            *(torch.cat([getattr(state, name) for state in padded]) for name in RNNSearchState.__dataclass_fields__)
        )

    def _apart(self) -> RNNSearchState:
        """A copy of its source for every row."""
        copies = {name: getattr(self, name).repeat_interleave(self.each, dim=0) for name in OF_SOURCES}
        return replace(self, **copies)

    def _padded(self, cells: int) -> RNNSearchState:
        """With so many cells more; with fewer, where the number is negative."""
        if not cells:
            return self
        longer = {name: F.pad(getattr(self, name), (0, 0, 0, cells)) for name in ("annotations", "projected")}
        return replace(self, **longer, mask=F.pad(self.mask, (0, cells)))


class RNNSearch(nn.Module):
    """See the module's docstring. Made with random weights (`initialise`), in fp32."""

    encoder_decoder = True

    def __init__(self, config: RNNSearchConfig):
        super().__init__()
        self.config = config
        m, n, bias = config.embedding, config.hidden, config.bias
        self.src_embed = nn.Embedding(config.vocab_size, m)
        if not config.share_embeddings:
            self.tgt_embed = nn.Embedding(config.target_vocab, m)
        self.forward_unit = GatedUnit(m, n, bias=bias)
        self.backward_unit = GatedUnit(m, n, bias=bias)
        self.initial = Linear(n, n, bias=bias)  # W_s
        if not config.fixed_context:
            self.attention = AdditiveAttention(n, config.memory, config.energy, bias)
        self.decoder_unit = GatedUnit(m, n, config.memory, bias)
        self.readout = DeepOutput(config)
        self.lm_head = Linear(config.maxout, config.target_vocab, bias=False)  # W_o
        self.packed_state, self.packed_candidate, self.packed_head = Packed(), Packed(), Packed()
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """As `config.initialisation` says. The paper's, appendix B.1: recurrent matrices random orthogonal, W_a and U_a
        N(0, 0.001^2), v_a and biases 0, all else N(0, 0.01^2).
        """
        scaled = self.config.initialisation == "scaled"
        for name, parameter in self.named_parameters():
            leaf = name.rpartition(".")[2]
            if leaf.startswith("b") or (leaf == "v_a" and not scaled):
                parameter.zero_()
            elif leaf in ("U", "U_z", "U_r"):
                nn.init.orthogonal_(parameter)
            elif scaled:
                nn.init.normal_(parameter, std=0.1 if "embed" in name else (3 * parameter.shape[-1]) ** -0.5)
            else:
                nn.init.normal_(parameter, std=0.001 if leaf in ("W_a", "U_a") else 0.01)

    def embed_source(self, src: Tensor) -> Tensor:
        """int64 [...] -> E x [..., m]."""
        return dropout(self.src_embed(src), self.config.dropout, self.training)

    def embed_target(self, tokens: Tensor) -> Tensor:
        """int64 [...] -> E y [..., m]."""
        table = self.src_embed if self.config.share_embeddings else self.tgt_embed
        return dropout(table(tokens), self.config.dropout, self.training)

    def logits(self, deep: Tensor) -> Tensor:
        """t [..., l] -> [..., target vocab]."""
        return together(dropout(deep, self.config.dropout, self.training), [self.lm_head.weight], self.packed_head)

    def train(self, mode: bool = True) -> RNNSearch:
        if mode:
            forget_packed(self)
        return super().train(mode)

    def encode(self, src: Tensor, src_mask: Tensor) -> tuple[Tensor, Tensor]:
        """src int64 [B, S], src_mask bool [B, S], True cells first -> what the decoder may look at and s_0 [B, n].

        That is the annotations [B, S, 2n], 0 at padding; or the fixed context [B, 1, n].
        """
        x, real = self.embed_source(src.t()), src_mask.t()  # [S, B, m], [S, B]
        units = self.forward_unit, self.backward_unit
        states = scan(
            torch.stack((self.forward_unit.read(x), self.backward_unit.read(x.flip(0)))),  # [2, S, B, 3n]
            x.new_zeros(2, src.shape[0], self.config.hidden),
            torch.stack([unit.gates() for unit in units]),
            torch.stack([unit.U for unit in units]),
            product_dtype(x),
            torch.stack((real, real.flip(0))),  # so the backward unit begins at the last real token
        )
        states = states.to(x.dtype)
        s = torch.tanh(self.initial(states[1, -1])).float()
        if self.config.fixed_context:
            return states[0, -1].unsqueeze(1), s
        annotations = torch.cat((states[0], states[1].flip(0)), dim=-1).transpose(0, 1)
        return annotations.masked_fill(~src_mask.unsqueeze(-1), 0), s

    def decode(self, y: Tensor, s: Tensor, memory: Tensor, projected: Tensor, mask: Tensor) -> tuple[Tensor, Aligned]:
        """y [B, T, m]: the targets' embeddings; s [B, n]: the state before them; memory as `encode` gives it, projected
        and mask as in RNNSearchState -> t [B, T, l] for what follows each target, and the states and alignments.

        Where there are fewer sources than targets, each has as many of them, which stand beside each other.
        """
        unit, dtype, few = (
            self.decoder_unit,
            product_dtype(y),
            not torch.is_grad_enabled() and y.shape[1] < mask.shape[1],
        )
        x = unit.read(y).transpose(0, 1)  # [T, B, 3n]
        each = len(y) // max(1, len(memory))
        if self.config.fixed_context:
            memory = memory.repeat_interleave(each, dim=0) if each > 1 else memory
            x = x + self._by_context(memory).transpose(0, 1)
            states = scan(x.unsqueeze(0), s.unsqueeze(0), unit.gates()[None], unit.U[None], dtype)[0]
            weights = s.new_ones(len(states), len(s), 1)
            did = Aligned(torch.cat((s.unsqueeze(0), states)), weights, torch.zeros_like(weights))
            context = memory.expand(-1, y.shape[1], -1)
        else:
            v = self.attention.v_a
            if few:  # than source tokens: it is cheaper to map each context than each annotation
                did = align_steps(
                    x, s, projected, memory, mask, v, self._by_state, self._by_candidate, self._by_context
                )
            else:
                maps = Alignment(self.attention.W_a, v, unit.gates(), unit.U)
                did = align(x, s, projected, self._by_context(memory), mask, maps, dtype)
            weights = did.weights.transpose(0, 1).to(memory.dtype)  # [B, T, S]
            shared = weights.reshape(len(memory), each * y.shape[1], weights.shape[2])
            context = torch.bmm(shared, memory).view(len(y), y.shape[1], memory.shape[2])
        seen = did.states[:-1] if self.config.readout == "previous" else did.states[1:]
        return self.readout(seen.transpose(0, 1).to(y.dtype), y, context), did

    def _by_state(self, s: Tensor) -> Tensor:
        """[W_a s; U_z s; U_r s]."""
        weights = self.attention.W_a, self.decoder_unit.U_z, self.decoder_unit.U_r
        return together(s.to(weights[0].dtype), weights, self.packed_state)

    def _by_candidate(self, reset: Tensor) -> Tensor:
        """U (r * s)."""
        return together(reset.to(self.decoder_unit.U.dtype), [self.decoder_unit.U], self.packed_candidate)

    def _by_context(self, c: Tensor) -> Tensor:
        """[C_z c; C_r c; C c]."""
        return together(c.to(self.decoder_unit.C.dtype), self.decoder_unit.contexts(), self.decoder_unit.packed_out)

    def project(self, memory: Tensor) -> Tensor:
        """U_a h_j [B, S, n'] of annotations [B, S, 2n]; empty for the fixed context."""
        return memory[..., :0] if self.config.fixed_context else self.attention.project(memory)

    def forward(self, batch: Mapping[str, Tensor], smoothing: float = 0.0) -> Loss:
        """The summed loss over the targets. batch: src int64 [B, S], src_mask bool [B, S] (True = real, those first),
        tgt_input int64 [B, T], tgt_output int64 [B, T] with lm.loss.IGNORE where nothing is asked.
        """
        memory, s = self.encode(batch["src"], batch["src_mask"])
        y = self.embed_target(batch["tgt_input"])
        deep, _ = self.decode(y, s, memory, self.project(memory), batch["src_mask"])
        asked = batch["tgt_output"] != IGNORE
        deep = dropout(deep[asked], self.config.dropout, self.training)
        return head_loss(deep, self.lm_head.weight, batch["tgt_output"][asked], smoothing=smoothing)

    def room(self, source_tokens: int) -> int:
        """How many tokens can be decoded after a source of so many. Raises ValueError for one that cannot be read."""
        if not 1 <= source_tokens <= self.config.context:
            raise ValueError(f"the source has {source_tokens} tokens; this model reads 1 to {self.config.context}.")
        return self.config.context

    def start(
        self, src: Tensor, src_mask: Tensor | None = None, record: AttentionTrace | None = None
    ) -> RNNSearchState:
        """Read sources: src int64 [B, S], src_mask bool [B, S] with the True cells of a row first -> a state, ready for
        `step`. There is nothing to record yet. Raises ValueError for a source that is empty or too long.
        """
        if src_mask is None:
            src_mask = torch.ones_like(src, dtype=torch.bool)
        lengths = src_mask.sum(dim=1)
        for length in (int(lengths.min()), int(lengths.max())):
            self.room(length)
        memory, s = self.encode(src, src_mask)
        first = torch.full_like(lengths, self.config.start_id)
        if self.config.fixed_context:
            src_mask = src_mask[:, :1]
        return RNNSearchState(memory, self.project(memory), src_mask, s, first, torch.zeros_like(lengths))

    def step(
        self, tokens: Tensor, state: RNNSearchState, record: AttentionTrace | None = None
    ) -> tuple[Tensor, RNNSearchState]:
        """The next t target tokens of every row, int64 [B, t] -> logits [B, t, vocab] for what follows each, and the
        state after them. Raises ValueError when a target would be longer than the model's context.
        """
        read = state.read + tokens.shape[1]
        if len(read) and int(read.max()) > self.config.context:
            raise ValueError(
                f"a target would have {int(read.max())} tokens; the model's context is {self.config.context}."
            )
        y = self.embed_target(tokens)
        deep, did = self.decode(y, state.s, state.annotations, state.projected, state.mask)
        if record is not None and not self.config.fixed_context:
            weights, energies = (maps.transpose(0, 1).unsqueeze(1) for maps in (did.weights, did.energies))
            record.add("cross", 0, weights, energies, keys=state.mask.repeat_interleave(state.each, dim=0))
        return self.logits(deep), replace(state, s=did.states[-1], read=read)

    def printed(self, src: Tensor, src_mask: Tensor, tgt_input: Tensor) -> Tensor:
        """Logits [B, T, vocab] by the paper's equations, word by word; shapes as in `forward`. What all else is held
        against.
        """
        x, y, real = self.embed_source(src), self.embed_target(tgt_input), src_mask.unsqueeze(-1)
        (rows, length), targets = src.shape, tgt_input.shape[1]
        forward = backward = x.new_zeros(rows, self.config.hidden)
        forwards, backwards = [forward] * length, [backward] * length
        for j in range(length):
            forwards[j] = forward = torch.where(real[:, j], self.forward_unit(x[:, j], forward), forward)
        for j in reversed(range(length)):
            backwards[j] = backward = torch.where(real[:, j], self.backward_unit(x[:, j], backward), backward)
        annotations = torch.stack([torch.cat(pair, dim=-1) for pair in zip(forwards, backwards, strict=True)], dim=1)
        s = torch.tanh(self.initial(backward))
        outputs = []
        for i in range(targets):
            context = forward
            if not self.config.fixed_context:
                context, _, _ = self.attention(s, self.attention.project(annotations), annotations, src_mask)
            after = self.decoder_unit(y[:, i], s, context)
            outputs.append(self.readout(s if self.config.readout == "previous" else after, y[:, i], context))
            s = after
        return self.logits(torch.stack(outputs, dim=1))


def product_dtype(x: Tensor) -> torch.dtype:
    """What matrix products are computed in: autocast's type where it is on, else x's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
