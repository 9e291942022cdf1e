"""Chats to text, by the templates of a model or of a request; the programs that those are run in processes aside."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm.tokenizer import Tokenizer
from serve.api.aside import Aside, Ended
from serve.api.chat_template import CPU_SECONDS
from serve.errors import InvalidRequest

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
NO_TEMPLATE = (
    "This model has no chat template, so messages cannot become a prompt: start the server with --chat-template FILE, "
    "or send text to /v1/completions."
)

DEVELOPER = re.compile(r"""["']developer["']""")  # in a template that knows this role


class TemplateFileError(ValueError):
    """--chat-template names no template: one sentence."""


@dataclass(frozen=True)
class Templates:
    """A model's chat templates by name ("default", "tool_use", ...) and its special tokens by the names that templates
    use.
    """

    named: Mapping[str, str] = field(default_factory=dict)
    special: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: Tokenizer, given: str | None = None) -> Templates:
        """Those of the model's folder or file, or the one `given` in their place."""
        settings = tokenizer.settings
        special = {}
        for name in SPECIAL:
            token = settings.get(name)
            token = token.get("content") if isinstance(token, Mapping) else token
            if isinstance(token, str):
                special[name] = token
        for name, id in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
            if name not in special and id is not None:
                special[name] = tokenizer.inner.id_to_token(id) or ""
        named = _named(settings.get("chat_template")) if given is None else {"default": given}
        return cls(named, special)

    def pick(self, tools: bool) -> str | None:
        """The template for a chat with or without tools; None where there is none."""
        if tools and "tool_use" in self.named:
            return self.named["tool_use"]
        return self.named.get("default")


def _named(setting: Any) -> dict[str, str]:
    """tokenizer_config.json has one template, or a list of {"name", "template"}."""
    if isinstance(setting, str):
        return {"default": setting}
    entries = setting if isinstance(setting, list) else []
    pairs = [(one.get("name"), one.get("template")) for one in entries if isinstance(one, Mapping)]
    return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}


def _for_system(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What developers say, said by the system: of several such messages one, and that the first, as vLLM does it for
    templates that know no developer.
    """
    said = [message for message in messages if message["role"] in ("developer", "system")]
    if messages[0] is said[0] and len(said) == 1:
        return [{**messages[0], "role": "system"}, *messages[1:]]
    texts = [_plain(message.get("content")) for message in said]
    others = [message for message in messages if message["role"] not in ("developer", "system")]
    return [{"role": "system", "content": "\n\n".join(text for text in texts if text)}, *others]


def _plain(content: Any) -> str:
    """A text, or the text parts of a list of parts, a line each."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content or ())


def read_template(given: str) -> str:
    """--chat-template: a file, or a template as such. Raises TemplateFileError."""
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if "{" in given:  # a template itself, as vLLM takes it, too
            return given
        reason = getattr(error, "strerror", None) or error
        raise TemplateFileError(f"--chat-template {given} cannot be read: {reason}.") from None


class Renderer:
    """Renders chats with the model's templates, or with one that came with the request."""

    def __init__(self, templates: Templates, *, trust_requests: bool = False) -> None:
        self.templates = templates
        self.trust_requests = trust_requests
        self.aside = Aside("serve.api.chat_template", "chats are waiting to be rendered")

    async def start(self) -> None:
        """Starts a process if there is a template to render, so that the first chat finds it. Does not wait for it."""
        if self.templates.named:
            await self.aside.start()

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        *,
        template: str | None = None,
        tools: bool = False,
        continue_final: bool = False,
    ) -> str:
        """The text. Raises InvalidRequest (no template, or it fails) or Overloaded."""
        template = template or self.templates.pick(tools)
        if template is None:
            raise InvalidRequest(NO_TEMPLATE, "messages")
        if any(message["role"] == "developer" for message in messages) and not DEVELOPER.search(template):
            messages = _for_system(messages)
        question = {
            "template": template,
            "messages": messages,
            "variables": {**self.templates.special, **variables},
            "continue_final": continue_final,
        }
        try:
            line = json.dumps(question).encode() + b"\n"
        except RecursionError:
            raise InvalidRequest("The chat is nested too deeply to be rendered.", "messages") from None
        try:
            answer = json.loads(await self.aside.ask(line))
        except Ended as end:
            what = f"takes more than {CPU_SECONDS:g} s for" if end.slow else "fails on"
            raise InvalidRequest(f"The chat template {what} this chat.", "messages") from None
        if "error" in answer:
            raise InvalidRequest(answer["error"], "messages")
        return answer["text"]

    async def close(self) -> None:
        """Ends the processes."""
        await self.aside.close()
