"""What is being served, as far as a request can ask for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lm.tokenizer import Tokenizer
from serve.api.grammars import Grammars
from serve.api.reasoning import Reasoning
from serve.api.renderer import Renderer
from serve.engine.messages import Ready
from serve.errors import NotFound


@dataclass(frozen=True, kw_only=True)
class AnswerFlags:
    """What the server's flags say of answers; a request may say otherwise, as far as it has a field for that."""

    role: str = "assistant"  # who speaks the answer of a chat
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # variables of the chat template
    tokens_as_ids: bool = False  # log-probabilities name tokens by id
    usage: bool = False  # every chunk of a stream has it, asked or not
    auto_tools: bool = False  # the model may decide to call a tool
    tool_parser: str | None = None  # how it writes that down
    reasoning: Reasoning | None = None  # how it thinks before it answers
    interval: int = 1  # tokens of a stream's chunk after the first, at least


@dataclass(frozen=True)
class Model:
    """What is served: names, limits, tokenizer, chat templates, sampling defaults, and what flags say of answers."""

    names: tuple[str, ...]
    folder: str
    ready: Ready
    tokenizer: Tokenizer
    renderer: Renderer
    grammars: Grammars
    max_logprobs: int = 20
    defaults: dict[str, Any] = field(default_factory=dict)
    flags: AnswerFlags = field(default_factory=AnswerFlags)

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
