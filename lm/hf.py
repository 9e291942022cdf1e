"""transformers' Auto classes know our own architecture after `import lm`.

AutoConfig, AutoModelForCausalLM and generate() work on a folder whose architecture is HeedForCausalLM; folders of the
other families need none of this. `import lm` loads nothing for it: a finder waits for transformers' Auto modules, and
when somebody imports them, registers two classes with them. The classes are made then, as their bases are
transformers'. The encoder-decoders are not registered, nor can a decoder with a visible prefix be loaded: generate()
would have to keep a state between its calls for them. `python -m lm translate` and the server run both.
"""

from __future__ import annotations

import dataclasses
import importlib.abc
import importlib.util
import sys
from functools import cache
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CONFIGS = "transformers.models.auto.configuration_auto"
MODELS = "transformers.models.auto.modeling_auto"


def install() -> None:
    """Register with transformers as soon as it is there: now, or when its Auto modules are imported."""
    for name, register in ((CONFIGS, _register_config), (MODELS, _register_model)):
        if name in sys.modules:
            register()
        elif not any(isinstance(finder, _AfterImport) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _AfterImport(name, register))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Lets the others find a module, and has `then` called once when it is loaded."""

    def __init__(self, name: str, then: Callable[[], None]):
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.then)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any, then: Callable[[], None]):
        self.loader, self.then = loader, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.then()

    def __getattr__(self, name: str) -> Any:  # get_source and the like
        return getattr(self.loader, name)


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register("heed", config_class(), exist_ok=True)


def _register_model() -> None:
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    AutoModelForCausalLM.register(config_class(), model_class(), exist_ok=True)


@cache
def config_class() -> Any:
    """HeedConfig: a DecoderConfig as transformers' configuration."""
    from transformers.configuration_utils import PreTrainedConfig

    from lm.config import DecoderConfig
    from lm.families import read_own, write_own

    class HeedConfig(PreTrainedConfig):
        """`fields` holds DecoderConfig's fields; in config.json they stand beside transformers' own keys."""

        __qualname__ = "HeedConfig"  # found as lm.hf.HeedConfig, so that it can be sent to another process
        model_type = "heed"

        def __init__(self, **values: Any):
            self.fields = read_own(values) if "vocab_size" in values else {}  # transformers makes an empty one, too
            super().__init__(**{name: value for name, value in values.items() if name not in self.fields})
            self.use_cache = False
            if self.fields:
                complete = write_own(self.shape())
                self.fields = {field.name: complete[field.name] for field in dataclasses.fields(DecoderConfig)}
                # Of some names transformers has its own idea: a pipeline puts a `prefix` before every prompt.
                for name in complete.keys() - {"model_type", "rope_scaling", "prefix"}:
                    setattr(self, name, complete[name])

        def shape(self) -> DecoderConfig:
            """The decoder that it describes."""
            return DecoderConfig(**self.fields)

        def to_dict(self) -> dict[str, Any]:
            values = super().to_dict()
            return {name: value for name, value in values.items() if name != "fields"} | self.fields

    return HeedConfig


@cache
def model_class() -> Any:
    """HeedForCausalLM: a DecoderLM as transformers' model."""
    import torch
    from torch import Tensor
    from transformers.generation.utils import GenerationMixin
    from transformers.modeling_outputs import CausalLMOutput
    from transformers.modeling_utils import PreTrainedModel

    from lm.attention import CausalAttend
    from lm.decoder import DecoderLM
    from lm.loss import IGNORE

    class HeedForCausalLM(PreTrainedModel, GenerationMixin):
        """Whole sequences at each call: there is no cache, so generate() computes them anew for every token."""

        config_class = config_class()
        base_model_prefix = ""
        _supports_sdpa = True

        def __init__(self, config: Any):
            super().__init__(config)
            if config.shape().prefix:
                raise ValueError(
                    "prefix is True; transformers computes every token from those before it: use `python -m lm "
                    "translate` or the server."
                )
            self.model = DecoderLM(config.shape())
            self.post_init()

        def _init_weights(self, module: Any) -> None:
            """What no file holds: the table of positions."""
            if isinstance(module, DecoderLM) and module.positions is not None:
                module.positions = module.position_table(module.embed_tokens.weight.device)

        def get_input_embeddings(self) -> Any:
            return self.model.embed_tokens

        def forward(
            self,
            input_ids: Tensor,
            attention_mask: Tensor | None = None,
            labels: Tensor | None = None,
            **ignored: Any,
        ) -> CausalLMOutput:
            """input_ids and labels int64 [B, T], attention_mask [B, T] with 0 where a row is padded, on either side ->
            logits [B, T, vocab]; loss is the mean over the labels, which are shifted here."""
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
            mask = attention_mask.long()
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            longest, context = int(positions.max()) + 1, self.model.config.context
            if longest > context:
                raise ValueError(f"a sequence has {longest} tokens; the model's context is {context}.")
            documents = None if bool(mask.all()) else mask  # padding is a document of its own
            attend = CausalAttend(self.model.config.windows(), documents)
            logits = self.model.logits(self.model.hidden(input_ids, positions, attend))
            loss = None
            if labels is not None:
                targets = labels[:, 1:].flatten()
                loss = torch.nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORE
                )
            return CausalLMOutput(loss=loss, logits=logits)

        def prepare_inputs_for_generation(
            self, input_ids: Tensor, attention_mask: Tensor | None = None, **ignored: Any
        ) -> dict[str, Any]:
            return {"input_ids": input_ids, "attention_mask": attention_mask}

    return HeedForCausalLM


def __getattr__(name: str) -> Any:
    if name in ("HeedConfig", "HeedForCausalLM"):
        return config_class() if name == "HeedConfig" else model_class()
    raise AttributeError(f"module 'lm.hf' has no attribute {name!r}")
