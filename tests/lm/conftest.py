"""A family of small decoders that between them have every option, in combinations that are in use and others."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lm import DecoderConfig, DecoderLM

BASE: dict[str, Any] = {"vocab_size": 50, "context": 48, "layers": 2, "width": 32, "heads": 4}
FAMILY: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biased": {"bias": True, "tie_embeddings": False, "rope_theta": 5e4, "kv_heads": 2},
    "qwen3": {"qk_norm": True, "kv_heads": 2, "head_dim": 16, "norm_eps": 1e-6},
    "qwen3-one-kv-head": {"qk_norm": True, "kv_heads": 1, "tie_embeddings": False},
    "long-context": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "bias": "qkv",
    },
    "partly-rotated": {
        "rope_pattern": "RN",
        "rope_scaling": {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 16},
        "bias": "mlp",
        "tie_embeddings": False,
    },
    "qwen2": {"bias": "qkv", "kv_heads": 1, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    "smollm3": {"rope_pattern": "RN", "bias": "attention", "kv_heads": 2},
    "gpt2": {"positions": "learned", "norm": "layer", "bias": True, "activation": "gelu_tanh"},
    "sinusoidal": {"positions": "sinusoidal", "norm": "layer", "activation": "gelu", "tie_embeddings": False},
    "no-positions": {"positions": "none", "activation": "relu2", "softcap": 5.0, "kv_heads": 2},
    "windows": {"window": 5, "window_pattern": "SL", "qk_norm": True, "kv_heads": 2, "activation": "relu2"},
    "windows-only": {"window": 3, "window_pattern": "S", "positions": "learned", "bias": True, "activation": "gelu"},
    "everything": {
        "window": 4,
        "window_pattern": "LS",
        "norm": "layer",
        "qk_norm": True,
        "kv_heads": 2,
        "head_dim": 6,
        "mlp_width": 40,
        "bias": True,
        "tie_embeddings": False,
        "softcap": 3.0,
    },
}


def build(**options: Any) -> DecoderLM:
    """A decoder in eval mode whose norms and biases are no ones and zeros, so that leaving one out would show."""
    torch.manual_seed(0)
    model = DecoderLM(DecoderConfig(**(BASE | options))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=sorted(FAMILY))
def config(request: pytest.FixtureRequest) -> DecoderConfig:
    """Each shape of the family in turn."""
    return DecoderConfig(**(BASE | FAMILY[request.param]))


@pytest.fixture(params=sorted(FAMILY))
def model(request: pytest.FixtureRequest) -> DecoderLM:
    """A decoder of each shape of the family in turn."""
    return build(**FAMILY[request.param])


@pytest.fixture(scope="session")
def make() -> Callable[..., DecoderLM]:
    """make(**options) -> a decoder as `model`'s, of the base shape with these options."""
    return build


@pytest.fixture(scope="session")
def named() -> Callable[[str], DecoderLM]:
    """named(name) -> the family's decoder of that name, made once; a test must not change it."""
    return cache(lambda name: build(**FAMILY[name]))


@pytest.fixture
def tokens() -> torch.Tensor:
    """int64 [3, 24]."""
    return torch.randint(50, (3, 24), generator=torch.Generator().manual_seed(1))


def translators(vocab_size: int = 24) -> dict[str, Callable[[], Any]]:
    """Small models that translate, one of each kind; token 1 begins a target. Their context is 60."""
    from lm.rnnsearch import RNNSearch
    from lm.rnnsearch_config import RNNSearchConfig
    from lm.transformer import Transformer
    from lm.transformer_config import TransformerConfig

    common: dict[str, Any] = {"vocab_size": vocab_size, "context": 60}
    transformer = common | {"start_id": 1, "encoder_layers": 2, "decoder_layers": 2, "width": 32, "heads": 4}
    rnn = common | {"start_id": 1, "hidden": 24, "embedding": 16, "maxout": 12}
    decoder = common | {"layers": 2, "width": 32, "heads": 4}
    return {
        "rnnsearch": lambda: RNNSearch(RNNSearchConfig(**rnn)),
        "rnnencdec": lambda: RNNSearch(RNNSearchConfig(**rnn, fixed_context=True)),
        "transformer": lambda: Transformer(TransformerConfig(**transformer, mlp_width=48)),
        "transformer-pre": lambda: Transformer(
            TransformerConfig(**transformer, mlp_width=48, norm="pre", positions="learned", tie_embeddings="none")
        ),
        "decoder": lambda: DecoderLM(DecoderConfig(**decoder)),
        "decoder-prefix": lambda: DecoderLM(DecoderConfig(**decoder, prefix=True)),
    }


TRANSLATORS = ("rnnsearch", "rnnencdec", "transformer", "transformer-pre", "decoder", "decoder-prefix")


def loud(model: Any) -> Any:
    """With weights large enough that outputs differ and some of them end; in eval mode."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2).add_(0.5 * torch.randn_like(parameter))
    return model.eval()


@cache
def translator(name: str) -> Any:
    torch.manual_seed(1)
    return loud(translators()[name]())


@pytest.fixture(params=TRANSLATORS)
def translator_model(request: pytest.FixtureRequest) -> Any:
    """A translator of each kind in turn, made once; a test must not change it."""
    return translator(request.param)


@pytest.fixture(scope="session")
def translator_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """translator_folder(kind) -> a model folder of that kind, with a joint byte-level vocabulary and context 60."""
    from lm import pretrained
    from lm.tokenizer import close_sources, train_translator_bpe

    words = train_translator_bpe(["to be or not to be, that is the question — naïve 🦄 café"] * 3, 300)

    @cache
    def folder(kind: str) -> Path:
        model = loud(translators(vocab_size=words.vocab_size)[kind]())
        path = tmp_path_factory.mktemp("translators") / kind
        tokenizer = close_sources(words, model.encoder_decoder)
        # Of weights drawn at random an end comes rarely: other tokens end a text too.
        ends = [tokenizer.eos_id, *range(100, 140)]
        pretrained.save(model, path, tokenizer=tokenizer, generation={"eos_token_id": ends})
        return path

    return folder


@pytest.fixture(scope="session")
def translator_named() -> Callable[[str], Any]:
    """translator_named(kind) -> the translator of that kind, made once; a test must not change it."""
    return translator
