"""What is being served, as far as a request can ask for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lm.tokenizer import Tokenizer
from serve.api.renderer import Renderer
from serve.engine.messages import Ready
from serve.errors import NotFound


@dataclass(frozen=True)
class Model:
    """What is served: names, limits, tokenizer, chat templates, and the sampling defaults of generation_config.json."""

    names: tuple[str, ...]
    folder: str
    ready: Ready
    tokenizer: Tokenizer
    renderer: Renderer
    max_logprobs: int = 20
    defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def max_model_len(self) -> int:
        return self.ready.max_model_len

    def room(self, prompt_tokens: int) -> int:
        """How many tokens can follow so many: what they leave of max_model_len; after a source, all of it."""
        return self.max_model_len - (0 if self.ready.encoder_decoder else prompt_tokens)

    def check_name(self, name: str | None) -> None:
        """Raises NotFound unless `name` is served; no name means the first."""
        if name and name not in self.names:
            aliases = ", ".join(self.names)
            raise NotFound(f"The model `{name[:200]}` does not exist. Valid aliases: {aliases}.", "model")
