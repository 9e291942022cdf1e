"""Chats for offline use: the model's tokenizer, which also knows its chat template, under Hugging Face's names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from lm.tokenizer import Tokenizer
from serve.api.chat_template import render
from serve.api.renderer import NO_TEMPLATE, Templates, read_template

Messages = Sequence[Mapping[str, Any]]


class ChatTokenizer:
    """Text to ids and back as lm's Tokenizer has it, and chats to either."""

    def __init__(self, tokenizer: Tokenizer, template: str | os.PathLike[str] | None = None) -> None:
        """template: a file, or a template; None: the model's own. Raises TemplateFileError."""
        self._tokenizer = tokenizer
        self._templates = Templates.of(tokenizer, None if template is None else read_template(os.fspath(template)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def apply_chat_template(
        self,
        conversation: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **variables: Any,
    ) -> str | list[int]:
        """The chat as ids or, without `tokenize`, as text; `variables` are the template's further names. Raises
        ValueError with one sentence where there is no template, or it does not give a text for this chat.
        """
        template = chat_template or self._templates.pick(bool(tools))
        if template is None:
            raise ValueError(NO_TEMPLATE)
        given = {**self._templates.special, **variables, "tools": tools, "add_generation_prompt": add_generation_prompt}
        text = render(template, conversation, given, continue_final=continue_final_message)
        return self._tokenizer.encode(text, add_special_tokens=False) if tokenize else text
