"""The three architectures, by the name that a recipe gives them. Configs are made here without loading torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from importlib import import_module
from typing import Any

from lm.config import ConfigError


@dataclass(frozen=True)
class Architecture:
    """Where an architecture's classes are, and the names under which its folders are known."""

    name: str
    title: str  # what it is, in a sentence
    config: str  # module:class
    model: str  # module:class
    folder: str  # of `architectures` in config.json
    model_type: str  # in config.json

    @property
    def config_class(self) -> Any:
        """The dataclass of its shape."""
        return _find(self.config)

    @property
    def model_class(self) -> Any:
        """The module; this loads torch."""
        return _find(self.model)


ARCHITECTURES = {
    each.name: each
    for each in (
        Architecture(
            "decoder",
            "a decoder-only model",
            "lm.config:DecoderConfig",
            "lm.decoder:DecoderLM",
            "HeedForCausalLM",
            "heed",
        ),
        Architecture(
            "transformer",
            "an encoder-decoder",
            "lm.transformer_config:TransformerConfig",
            "lm.transformer:Transformer",
            "HeedTransformer",
            "heed-transformer",
        ),
        Architecture(
            "rnnsearch",
            "a recurrent encoder-decoder",
            "lm.rnnsearch_config:RNNSearchConfig",
            "lm.rnnsearch:RNNSearch",
            "HeedRNNSearch",
            "heed-rnnsearch",
        ),
    )
}


def make_config(architecture: str, values: Mapping[str, Any]) -> Any:
    """The config of an architecture from its keys. Raises ConfigError, a sentence for each problem, by name."""
    if architecture not in ARCHITECTURES:
        raise ConfigError([f"architecture is {architecture!r}; it must be one of {', '.join(ARCHITECTURES)}."])
    kind = ARCHITECTURES[architecture].config_class
    known = {field.name: field.default is MISSING for field in fields(kind) if field.init}
    wrong = [
        f"{name} is not a key of a {architecture}; the keys are {', '.join(sorted(known))}."
        for name in sorted(set(values) - set(known))
    ]
    wrong += [
        f"{name} is missing; a {architecture} needs it."
        for name, needed in known.items()
        if needed and name not in values
    ]
    if wrong:
        raise ConfigError(wrong)
    return kind(**values)


def make_model(config: Any) -> Any:
    """A model of this shape with random weights, in fp32."""
    return ARCHITECTURES[config.architecture].model_class(config)


def _find(place: str) -> Any:
    module, name = place.split(":")
    return getattr(import_module(module), name)
