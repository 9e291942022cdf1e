"""The shape of RNNsearch (arXiv 1409.0473), every value checked by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lm.config import MOST_CONTEXT, Checks, ConfigError, wrong_types

READOUTS = ("previous", "current")
INITIALISATIONS = ("paper", "scaled")


@dataclass(frozen=True, kw_only=True)
class RNNSearchConfig:
    """A recurrent encoder-decoder that aligns as it translates; the defaults are the paper's sizes (appendix A.2.3).

    `target_vocab_size` and `alignment` may be left out: they are resolved here, so that a reader always sees a number
    (`alignment` stays None where there is no alignment). Raises ConfigError, with a sentence for each unknown or
    contradictory value.
    """

    architecture: ClassVar[str] = "rnnsearch"

    vocab_size: int  # of the source; 30,000 in the paper
    context: int  # the longest source and the longest target, each, in tokens; the paper trained to 30 and to 50 words
    start_id: int  # what the decoder is given before the first token of a target
    target_vocab_size: int | None = None  # vocab_size where it is left out
    hidden: int = 1000  # n, of the decoder and of each direction of the encoder
    embedding: int = 620  # m
    maxout: int = 500  # l, of the deep output
    alignment: int | None = None  # n', of the alignment model; hidden where it is left out
    # RNNencdec, what the paper compares with: every context c_i is the forward state at the last source token, and
    # nothing is aligned.
    fixed_context: bool = False
    # The state that the deep output reads: previous is s_{i-1}, as appendix A.2.2 prints it; current is s_i, as
    # equation 4 has it and most code since.
    readout: str = "previous"
    bias: bool = True  # of all maps but the embeddings and W_o; the paper's start at 0 and are left out of its print
    share_embeddings: bool = False  # one table for source and target, where the vocabulary is joint; not the paper's
    # paper: appendix B.1, nearly all weights N(0, 0.01^2), which small models leave slowly. scaled, not the paper's:
    # N(0, 1 / (3 x inputs)), embeddings N(0, 0.1^2). Recurrent matrices are random orthogonal in both.
    initialisation: str = "paper"
    dropout: float = 0.0  # on embeddings and on the deep output, while training; the paper has none

    def __post_init__(self) -> None:
        problems = wrong_types(self) or self._wrong_values()
        if problems:
            raise ConfigError(problems)
        if self.target_vocab_size is None:
            object.__setattr__(self, "target_vocab_size", self.vocab_size)
        if self.alignment is None and not self.fixed_context:
            object.__setattr__(self, "alignment", self.hidden)

    # Typed as what they are after __post_init__.
    @property
    def target_vocab(self) -> int:
        """The number of tokens that can be written."""
        assert self.target_vocab_size is not None
        return self.target_vocab_size

    @property
    def energy(self) -> int:
        """n', or 0 where nothing is aligned."""
        return self.alignment or 0

    @property
    def memory(self) -> int:
        """The size of a context c_i: an annotation's, both directions; of the fixed context, the forward one's."""
        return self.hidden if self.fixed_context else 2 * self.hidden

    def parameters(self) -> dict[str, int]:
        """Parameter counts by arithmetic: `embedding`, `encoder`, `decoder` (with the map to s_0), `alignment`,
        `readout`, `head` and `total`. 80.4 million at 30,000 words a side.
        """
        n, m, out, bias = self.hidden, self.embedding, self.maxout, int(self.bias)
        unit = 3 * (m * n + n * n + bias * n)
        tables = self.vocab_size if self.share_embeddings else self.vocab_size + self.target_vocab
        counts = {
            "embedding": tables * m,
            "encoder": 2 * unit,
            "decoder": unit + 3 * self.memory * n + n * n + bias * n,
            "alignment": self.energy * (n + self.memory + 1 + bias),
            "readout": 2 * out * (n + m + self.memory + bias),
            "head": self.target_vocab * out,
        }
        return counts | {"total": sum(counts.values())}

    def flops_per_token(self, source: int | None = None, target: int | None = None) -> int:
        """Floating-point operations to train on one target token, forward and backward, of pairs with `source` and
        `target` tokens (default: the longest); the work on the source is shared out among its target tokens.

        6 x (parameters that are multiplied with), and 6 x (n' + 2n) for each annotation that a target token looks at
        (v^T tanh, and the weighted sum). Embedding look-ups and biases cost nothing.
        """
        source = self.context if source is None else source
        target = self.context if target is None else target
        n, m, out, memory = self.hidden, self.embedding, self.maxout, self.memory
        reading = 2 * 3 * (m * n + n * n) + self.energy * memory
        writing = 3 * (m * n + n * n + memory * n) + self.energy * n
        writing += 2 * out * (n + m + memory) + self.target_vocab * out
        meeting = 0 if self.fixed_context else self.energy + memory
        return int(6 * (writing + meeting * source + (reading * source + n * n) / target))

    def _wrong_values(self) -> list[str]:
        check = Checks(self)
        for name in ("vocab_size", "context", "hidden", "embedding", "maxout"):
            check(getattr(self, name) >= 1, name, "it must be at least 1")
        for name in ("target_vocab_size", "alignment"):
            size = getattr(self, name)
            check(size is None or size >= 1, name, "it must be at least 1, or left out")
        check(self.context <= MOST_CONTEXT, "context", f"it must be at most {MOST_CONTEXT}")
        check(self.readout in READOUTS, "readout", f"it must be one of {', '.join(READOUTS)}")
        check(
            self.initialisation in INITIALISATIONS, "initialisation", f"it must be one of {', '.join(INITIALISATIONS)}"
        )
        check(0 <= self.dropout < 1, "dropout", "it must be at least 0 and below 1")
        if self.fixed_context:
            check(self.alignment is None, "alignment", "it must be left out, for fixed_context aligns nothing")
        if check.problems:
            return check.problems
        targets = self.vocab_size if self.target_vocab_size is None else self.target_vocab_size
        check(0 <= self.start_id < targets, "start_id", f"it must be a target token, of {targets}, from 0")
        if self.share_embeddings:
            right = f"it must be vocab_size, {self.vocab_size}, for share_embeddings makes both tables one"
            check(targets == self.vocab_size, "target_vocab_size", right)
        return check.problems
