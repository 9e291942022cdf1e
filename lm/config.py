"""The shape of a model: one frozen dataclass an architecture, every value checked by name."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

ACTIVATIONS = ("swiglu", "gelu", "gelu_tanh", "relu2")
NORMS = ("rms", "layer")
POSITIONS = ("rotary", "learned", "sinusoidal", "none")

# Which maps add a bias: `bias` -> the parts of a block (qkv, o, mlp) and the LayerNorms (norm).
BIASES: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "qkv": frozenset({"qkv"}),  # Qwen2
    "attention": frozenset({"qkv", "o"}),  # Llama's and Qwen3's attention_bias
    "mlp": frozenset({"mlp"}),  # Llama's mlp_bias
    "all": frozenset({"qkv", "o", "mlp", "norm"}),  # GPT-2
}

# The scalings of rotary frequencies, under transformers' names: what each must be given, and what it may be.
ROPE_SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ("original_max_position_embeddings",)),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
}

MOST_CONTEXT = 2**24  # tokens: beyond what any model claims, and a bound on the tables of positions


class ConfigError(ValueError):
    """A model shape that cannot be: `problems` holds one sentence for each thing that is wrong."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


def wrong_types(config: Any) -> list[str]:
    """A sentence for each field of a config dataclass whose value is not of the declared type."""
    wanted: dict[str, tuple[type, ...]] = {
        "int": (int,),
        "int | None": (int, type(None)),
        "float": (float, int),
        "float | None": (float, int, type(None)),
        "str": (str,),
        "bool": (bool,),
        "bool | str": (bool, str),
        "dict[str, Any] | None": (dict, type(None)),
    }
    problems = []
    for entry in fields(config):
        kind, value = str(entry.type), getattr(config, entry.name)
        is_bool = isinstance(value, bool)
        if not isinstance(value, wanted[kind]) or (is_bool and bool not in wanted[kind]):
            words = kind.replace(" | None", " or left out").replace("dict[str, Any]", "keys with their values")
            problems.append(f"{entry.name} is {value!r}; it must be {words.replace(' | ', ' or ')}.")
    return problems


class Checks:
    """Collects, in `problems`, a sentence for each value of `config` that is not what it must be."""

    def __init__(self, config: Any):
        self.config = config
        self.problems: list[str] = []

    def __call__(self, good: bool, name: str, right: str) -> None:
        if not good:
            self.problems.append(f"{name} is {getattr(self.config, name)!r}; {right}.")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only causal Transformer.

    `kv_heads`, `head_dim` and `mlp_width` may be left out: they are resolved here, so that a reader always sees a
    number; likewise `bias` becomes a name and `rope_scaling` is complete, or None where it scales nothing. Raises
    ConfigError, with a sentence for each unknown or contradictory value.
    """

    architecture: ClassVar[str] = "decoder"

    vocab_size: int
    context: int  # the longest sequence, in tokens
    layers: int
    width: int  # of the residual stream
    heads: int  # query heads
    kv_heads: int | None = None  # key and value heads; fewer than `heads` is grouped-query attention (arXiv 2305.13245)
    head_dim: int | None = None
    mlp_width: int | None = None
    activation: str = "swiglu"  # swiglu: arXiv 2002.05202; relu2: arXiv 2109.08668
    norm: str = "rms"  # rms: arXiv 1910.07467
    norm_eps: float = 1e-5
    positions: str = "rotary"  # rotary: arXiv 2104.09864; sinusoidal: arXiv 1706.03762, section 3.5
    rope_theta: float = 10_000.0
    # rope_type (of ROPE_SCALINGS) and its parameters; lm.positions has the formulas
    rope_scaling: dict[str, Any] | None = field(default=None, hash=False)
    rope_pattern: str = "R"  # repeated over the layers: R rotates q and k, N does not (SmolLM3)
    qk_norm: bool = False  # RMSNorm over each head of q and k, before the rotation (Qwen3)
    window: int | None = None  # a token of an S layer sees itself and the window - 1 tokens before it
    window_pattern: str = "L"  # repeated over the layers: S slides, L sees everything
    tie_embeddings: bool = True
    bias: bool | str = False  # BIASES: none (false), qkv, attention, mlp, or all (true); never on the output head
    softcap: float | None = None  # logits = softcap * tanh(logits / softcap)
    dropout: float = 0.0  # on the embedding and on each sub-layer's output, while training
    prefix: bool = (
        False  # a source (a prompt but for its last token) is visible as a whole, not from the left (lm.prefix)
    )

    def __post_init__(self) -> None:
        problems = wrong_types(self) or self._wrong_values()
        if problems:
            raise ConfigError(problems)
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        head_dim = self.width // self.heads if self.head_dim is None else self.head_dim
        if self.mlp_width is not None:
            mlp_width = self.mlp_width
        elif self.activation == "swiglu":  # three matrices for two: 8/3 keeps the parameters of a 4 x width MLP
            mlp_width = 64 * math.ceil(8 * self.width / 3 / 64)
        else:
            mlp_width = 4 * self.width
        bias = {True: "all", False: "none"}.get(self.bias, self.bias) if isinstance(self.bias, bool) else self.bias
        resolved = {"kv_heads": kv_heads, "head_dim": head_dim, "mlp_width": mlp_width, "bias": bias}
        for name, value in (resolved | {"rope_scaling": self._resolved_scaling()}).items():
            object.__setattr__(self, name, value)

    # The three resolved numbers, typed as what they are after __post_init__.
    @property
    def kv(self) -> int:
        assert self.kv_heads is not None
        return self.kv_heads

    @property
    def dim(self) -> int:
        assert self.head_dim is not None
        return self.head_dim

    @property
    def inner(self) -> int:
        assert self.mlp_width is not None
        return self.mlp_width

    def windows(self) -> list[int | None]:
        """The sliding window of each layer in tokens; None sees the whole past."""
        pattern = self.window_pattern
        return [self.window if pattern[i % len(pattern)] == "S" else None for i in range(self.layers)]

    def rotates(self) -> list[bool]:
        """Whether each layer turns its queries and keys; no layer does without rotary positions."""
        pattern = self.rope_pattern
        return [self.positions == "rotary" and pattern[i % len(pattern)] == "R" for i in range(self.layers)]

    def has_bias(self, part: str) -> bool:
        """Whether a part has biases: qkv, o (attention's output), mlp, norm (LayerNorm's)."""
        return part in BIASES[str(self.bias)]

    def parameters(self) -> dict[str, int]:
        """Parameter counts by arithmetic: `embedding` (tokens and learned positions), `layers`, `head`, `total`."""
        w, inner = self.width, self.inner
        q, kv = self.heads * self.dim, self.kv * self.dim
        norm = w * (2 if self.norm == "layer" and self.has_bias("norm") else 1)
        attention = w * (q + 2 * kv) + q * w + (2 * self.dim if self.qk_norm else 0)
        mlp = (3 if self.activation == "swiglu" else 2) * w * inner
        attention += (q + 2 * kv if self.has_bias("qkv") else 0) + (w if self.has_bias("o") else 0)
        if self.has_bias("mlp"):
            mlp += (2 if self.activation == "swiglu" else 1) * inner + w
        embedding = self.vocab_size * w + (self.context * w if self.positions == "learned" else 0)
        layers = self.layers * (attention + mlp + 2 * norm) + norm  # + the norm after the last layer
        head = 0 if self.tie_embeddings else self.vocab_size * w
        return {"embedding": embedding, "layers": layers, "head": head, "total": embedding + layers + head}

    def flops_per_token(self, context: int | None = None) -> int:
        """Floating-point operations to train on one token, forward and backward, in sequences of `context` tokens.

        6 x (parameters that are multiplied with) + 12 x head_dim x heads x (mean number of keys a token attends to) a
        layer: two products (scores, mixing) of 2 operations a multiply-add, three times (forward, and backward by both
        factors).
        Embedding look-ups cost nothing; the output head counts whether tied or not; recomputation does not count.
        """
        context = self.context if context is None else context
        w, inner, q, kv = self.width, self.inner, self.heads * self.dim, self.kv * self.dim
        matrices = self.layers * (w * (q + 2 * kv) + q * w + (3 if self.activation == "swiglu" else 2) * w * inner)
        matrices += self.vocab_size * w
        keys = 0.0
        for window in self.windows():
            span = context if window is None else min(window, context)
            keys += span - span * (span - 1) / (2 * context)  # the first `span` tokens see 1, 2, ... span keys
        return int(6 * matrices + 12 * q * keys)

    def _wrong_values(self) -> list[str]:
        check = Checks(self)
        problems = check.problems
        for name in ("vocab_size", "context", "layers", "width", "heads"):
            check(getattr(self, name) >= 1, name, "it must be at least 1")
        for name in ("kv_heads", "head_dim", "mlp_width", "window"):
            value = getattr(self, name)
            check(value is None or value >= 1, name, "it must be at least 1, or left out")
        for name, options in (("activation", ACTIVATIONS), ("norm", NORMS), ("positions", POSITIONS)):
            check(getattr(self, name) in options, name, f"it must be one of {', '.join(options)}")
        check(self.bias in (True, False, *BIASES), "bias", f"it must be true, false or one of {', '.join(BIASES)}")
        check(self.context <= MOST_CONTEXT, "context", f"it must be at most {MOST_CONTEXT}")
        check(0 < self.norm_eps < 1, "norm_eps", "it must lie between 0 and 1")
        check(0 < self.rope_theta < math.inf, "rope_theta", "it must be positive")
        check(self.softcap is None or 0 < self.softcap < math.inf, "softcap", "it must be positive, or left out")
        check(0 <= self.dropout < 1, "dropout", "it must be at least 0 and below 1")
        check(
            bool(self.window_pattern) and set(self.window_pattern) <= {"S", "L"},
            "window_pattern",
            "it must be made of S (sliding) and L (sees everything)",
        )
        check(
            bool(self.rope_pattern) and set(self.rope_pattern) <= {"R", "N"},
            "rope_pattern",
            "it must be made of R (rotates) and N (does not)",
        )
        problems += self._wrong_scaling()
        if problems:
            return problems
        if self.head_dim is None:
            check(
                self.width % self.heads == 0, "heads", f"it must divide width {self.width}, or head_dim must be given"
            )
        if self.kv_heads is not None:
            check(self.heads % self.kv_heads == 0, "kv_heads", f"it must divide heads {self.heads}")
        if self.positions == "rotary":
            dim = self.head_dim if self.head_dim is not None else self.width // self.heads
            check(dim % 2 == 0, "positions", f"rotary needs an even head_dim, and it is {dim}")
            if (self.rope_scaling or {}).get("rope_type") == "yarn":
                check(self.rope_theta > 1, "rope_theta", "yarn needs it above 1")
        else:
            check(self.rope_scaling is None, "rope_scaling", f"it belongs to rotary, and positions is {self.positions}")
            check(self.rope_pattern == "R", "rope_pattern", f"it belongs to rotary, and positions is {self.positions}")
        if self.positions == "sinusoidal":
            check(self.width % 2 == 0, "width", "sinusoidal positions need an even width")
        slides = "S" in self.window_pattern
        if slides and self.window is None:
            problems.append(f"window_pattern is {self.window_pattern!r}; its S layers need window, in tokens.")
        if self.window is not None and not slides:
            problems.append(f"window is {self.window!r}; window_pattern must name the layers that slide with an S.")
        if self.prefix and slides:
            problems.append(f"prefix is {self.prefix!r}; a visible prefix needs layers without a window.")
        return problems

    def _wrong_scaling(self) -> list[str]:
        given = self.rope_scaling
        if given is None:
            return []
        kind = given.get("rope_type")
        if kind == "default":
            return []
        if not isinstance(kind, str) or kind not in ROPE_SCALINGS:
            return [f"rope_type is {kind!r}; the supported ones are default, {', '.join(ROPE_SCALINGS)}."]
        needed, optional = ROPE_SCALINGS[kind]
        problems = [f"rope_scaling of type {kind} lacks {name}." for name in needed if given.get(name) is None]
        for name, value in given.items():
            if name == "rope_type" or value is None:
                continue
            if name not in needed + optional:
                known = ", ".join(needed + optional)
                problems.append(f"rope_scaling has {name}, which {kind} does not know; its keys are {known}.")
            elif isinstance(value, bool) != (name == "truncate") or not isinstance(value, (int, float)):
                right = "true or false" if name == "truncate" else "a number"
                problems.append(f"rope_scaling.{name} is {value!r}; it must be {right}.")
            elif name != "truncate" and not 0 < value < math.inf:
                problems.append(f"rope_scaling.{name} is {value!r}; it must be positive.")
            elif name == "factor" and value < 1:
                problems.append(f"rope_scaling.factor is {value!r}; it must be at least 1.")
        if not problems and kind == "llama3" and given["low_freq_factor"] >= given["high_freq_factor"]:
            low, high = given["low_freq_factor"], given["high_freq_factor"]
            problems.append(f"rope_scaling.low_freq_factor is {low!r}; it must be below high_freq_factor, {high!r}.")
        return problems

    def _resolved_scaling(self) -> dict[str, Any] | None:
        """The scaling with its original context, without keys that are None; None where nothing is scaled."""
        given = {name: value for name, value in (self.rope_scaling or {}).items() if value is not None}
        if given.get("rope_type", "default") == "default":
            return None
        if "original_max_position_embeddings" in ROPE_SCALINGS[given["rope_type"]][1]:
            given.setdefault("original_max_position_embeddings", self.context)
        return given


def decoder_config(values: dict[str, Any]) -> DecoderConfig:
    """A DecoderConfig from a dictionary; an unknown key is a ConfigError that names it."""
    known = {entry.name for entry in fields(DecoderConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(
            [f"{name} is not a key of a decoder; the keys are {', '.join(sorted(known))}." for name in unknown]
        )
    return DecoderConfig(**values)
