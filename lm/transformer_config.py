"""The shape of the encoder-decoder Transformer of 2017 (arXiv 1706.03762), every value checked by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lm.config import MOST_CONTEXT, Checks, ConfigError, wrong_types

ACTIVATIONS = ("relu", "gelu", "gelu_tanh")
NORMS = ("post", "pre")
POSITIONS = ("sinusoidal", "learned", "none")
TIES = ("all", "target", "none")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """An encoder-decoder Transformer; the defaults are the paper's base model (table 3).

    `key_dim` and `value_dim` may be left out: they are resolved here, so that a reader always sees a number. Raises
    ConfigError, with a sentence for each unknown or contradictory value.
    """

    architecture: ClassVar[str] = "transformer"

    vocab_size: int  # of the one vocabulary that source and target share (section 5.1)
    context: int  # the longest source and the longest target, each, in tokens
    start_id: int  # what the decoder is given before the first token of a target
    encoder_layers: int = 6
    decoder_layers: int = 6
    width: int = 512  # d_model
    heads: int = 8  # h
    key_dim: int | None = None  # d_k, of a head's queries and keys; width / heads where it is left out
    value_dim: int | None = None  # d_v, of a head's values; width / heads where it is left out
    mlp_width: int = 2048  # d_ff
    activation: str = "relu"
    # post: LayerNorm(x + Dropout(Sublayer(x))), as printed in section 3.1. pre: x + Dropout(Sublayer(LayerNorm(x))),
    # with a norm after each stack, as most code has had it since.
    norm: str = "post"
    norm_eps: float = 1e-5  # not printed
    positions: str = "sinusoidal"  # section 3.5; learned is table 3 (E)
    # Which matrices are one: all is source embedding, target embedding and output map (section 3.4); target leaves the
    # source its own.
    tie_embeddings: str = "all"
    bias: bool = True  # on the maps of attention and MLP; the norms always have theirs, the output map never
    dropout: float = 0.1  # P_drop: on each sub-layer's output, and on embedding plus position (section 5.4)
    attention_dropout: float = 0.0  # on the attention weights; the paper has none

    def __post_init__(self) -> None:
        problems = wrong_types(self) or self._wrong_values()
        if problems:
            raise ConfigError(problems)
        for name in ("key_dim", "value_dim"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.width // self.heads)

    # The resolved sizes of a head, typed as what they are after __post_init__.
    @property
    def key(self) -> int:
        assert self.key_dim is not None
        return self.key_dim

    @property
    def value(self) -> int:
        assert self.value_dim is not None
        return self.value_dim

    def parameters(self) -> dict[str, int]:
        """Parameter counts by arithmetic: `embedding` (tokens and learned positions), `layers`, `head`, `total`."""
        w, bias = self.width, int(self.bias)
        encoder, decoder = self._matrices()
        attention_bias = bias * (self.heads * (2 * self.key + self.value) + w)
        mlp_bias = bias * (self.mlp_width + w)
        encoder += attention_bias + mlp_bias + 2 * 2 * w  # each sub-layer has its LayerNorm
        decoder += 2 * attention_bias + mlp_bias + 3 * 2 * w
        layers = self.encoder_layers * encoder + self.decoder_layers * decoder
        if self.norm == "pre":
            layers += 2 * 2 * w
        tables = 1 if self.tie_embeddings == "all" else 2
        embedding = tables * self.vocab_size * w
        if self.positions == "learned":
            embedding += 2 * self.context * w
        head = self.vocab_size * w if self.tie_embeddings == "none" else 0
        return {"embedding": embedding, "layers": layers, "head": head, "total": embedding + layers + head}

    def flops_per_token(self, source: int | None = None, target: int | None = None) -> int:
        """Floating-point operations to train on one target token, forward and backward, of pairs with `source` and
        `target` tokens (default: the longest); the work on the source is shared out among its target tokens.

        6 x (parameters that are multiplied with), and 6 x heads x (d_k + d_v) for each query and key that meet (a
        product for the score and one for the mixing, three times). Embedding look-ups cost nothing; the output map
        counts whether tied or not.
        """
        source = self.context if source is None else source
        target = self.context if target is None else target
        w, meeting = self.width, 6 * self.heads * (self.key + self.value)
        encoder, decoder = self._matrices()
        cross = w * self.heads * (self.key + self.value)  # the keys and values that the decoder makes of the source
        reading = self.encoder_layers * (6 * encoder + meeting * source) + self.decoder_layers * 6 * cross
        writing = self.decoder_layers * (6 * (decoder - cross) + meeting * ((target + 1) / 2 + source))
        return int(writing + 6 * w * self.vocab_size + reading * source / target)

    def _matrices(self) -> tuple[int, int]:
        """The sizes of all matrices of an encoder layer, and of a decoder layer."""
        attention = 2 * self.width * self.heads * (self.key + self.value)
        mlp = 2 * self.width * self.mlp_width
        return attention + mlp, 2 * attention + mlp

    def _wrong_values(self) -> list[str]:
        check = Checks(self)
        for name in ("vocab_size", "context", "encoder_layers", "decoder_layers", "width", "heads", "mlp_width"):
            check(getattr(self, name) >= 1, name, "it must be at least 1")
        for name in ("key_dim", "value_dim"):
            size = getattr(self, name)
            check(size is None or size >= 1, name, "it must be at least 1, or left out")
        options = {"activation": ACTIVATIONS, "norm": NORMS, "positions": POSITIONS, "tie_embeddings": TIES}
        for name, known in options.items():
            check(getattr(self, name) in known, name, f"it must be one of {', '.join(known)}")
        check(self.context <= MOST_CONTEXT, "context", f"it must be at most {MOST_CONTEXT}")
        check(0 < self.norm_eps < 1, "norm_eps", "it must lie between 0 and 1")
        for name in ("dropout", "attention_dropout"):
            check(0 <= getattr(self, name) < 1, name, "it must be at least 0 and below 1")
        if check.problems:
            return check.problems
        check(0 <= self.start_id < self.vocab_size, "start_id", f"it must be a token of {self.vocab_size}, from 0")
        if self.key_dim is None or self.value_dim is None:
            right = f"it must divide width {self.width}, or key_dim and value_dim must be given"
            check(self.width % self.heads == 0, "heads", right)
        if self.positions == "sinusoidal":
            check(self.width % 2 == 0, "width", "sinusoidal positions need an even width")
        return check.problems
