"""A chat as the text that its model was trained on: a Jinja template, rendered in a sandbox and within limits.

`render` is what Hugging Face's apply_chat_template does, from the same variables. A template comes with a model or with
a request, so it is treated as hostile: `python -m serve.api.chat_template` is the process in which it runs, with little
memory, a limit on processor time that the kernel holds, and nothing in its environment; renderer.py is its other end.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 2.0  # of one rendering, compiling included
MEMORY = 1 << 30  # bytes of address space
MAX_CHARACTERS = 1 << 23  # of the text
CONTINUE_HERE = "<|the final message ends here|> "  # its last sign shows whether the template strips what it is given


class ChatTemplateError(ValueError):
    """The template does not give a text for this chat: one sentence, often the template's own."""


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    *,
    continue_final: bool = False,
    limit: int = MAX_CHARACTERS,
) -> str:
    """The text of `messages`, each with role, content (a text, or a list of {"type": "text", "text": ...}) and whatever
    else the template knows of; `variables` are the template's further names. With `continue_final` the text ends with
    the last message's own content. Raises ChatTemplateError.
    """
    try:
        program, wants_parts = _compiled(template)
        chat = [_shaped(message, wants_parts) for message in messages]
        if continue_final:
            _mark_end(chat)
        pieces, size = [], 0
        for piece in program.generate({**variables, "messages": chat}):
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                raise ChatTemplateError(f"The chat template gives more than {limit} characters for this chat.")
        text = "".join(pieces)
        text.encode("utf-8")
    except ChatTemplateError:
        raise
    except UnicodeEncodeError as error:
        raise ChatTemplateError(f"The rendered chat has half of a surrogate pair at character {error.start}.") from None
    except Exception as error:  # a program that others wrote may raise whatever there is
        raise ChatTemplateError(_sentence(error)) from None
    return _cut(text) if continue_final else text


def _sentence(error: BaseException) -> str:
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"The chat template is not valid Jinja: {error.message} (line {error.lineno})."
    if type(error) is TemplateError:  # raise_exception: what the template's author wants to be read
        return str(error)
    if isinstance(error, MemoryError):
        return f"The chat template needs more than {MEMORY >> 20} MiB of memory for this chat."
    return f"The chat template fails on this chat: {type(error).__name__}: {error}"


# ---------------------------------------------------------------- messages


def _shaped(message: Mapping[str, Any], wants_parts: bool) -> dict[str, Any]:
    """The message with its content in the form that the template reads."""
    content = message.get("content")
    if wants_parts:
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else [dict(p) for p in content or ()]
        return {**message, "content": parts}
    text = content if isinstance(content, str) else "\n".join(part["text"] for part in content or ())
    return {**message, "content": text}


def _mark_end(chat: list[dict[str, Any]]) -> None:
    content = chat[-1]["content"]
    if isinstance(content, str):
        chat[-1]["content"] = content + CONTINUE_HERE
    elif content:
        content[-1]["text"] += CONTINUE_HERE
    else:
        raise ChatTemplateError("continue_final_message is set, but the final message has no text to continue.")


def _cut(text: str) -> str:
    """The text up to the mark; without spaces before it, if the template strips those of a message."""
    end = text.rfind(CONTINUE_HERE.rstrip())
    if end < 0:
        raise ChatTemplateError(
            "continue_final_message is set, but the chat template does not show the final message as it is."
        )
    kept = text[end:].startswith(CONTINUE_HERE)
    return text[:end] if kept else text[:end].rstrip()


# ---------------------------------------------------------------- Jinja


@lru_cache(maxsize=8)
def _compiled(template: str) -> tuple[jinja2.Template, bool]:
    """The template as a program, and whether it reads contents as lists of parts."""
    environment = _environment()
    return environment.from_string(template), _reads_parts(environment.parse(template))


def _environment() -> ImmutableSandboxedEnvironment:
    """The names and rules that templates on the Hugging Face hub are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class GenerationTag(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks what the assistant says, for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes <, > and & for web pages."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: object) -> None:
    raise TemplateError(str(message))


def _reads_parts(tree: nodes.Template) -> bool:
    """Whether the template loops over the content of what it loops over: then a content is a list of parts."""
    loops = list(tree.find_all(nodes.For))
    turns = {loop.target.name for loop in loops if isinstance(loop.target, nodes.Name)}
    return any(_is_content(loop.iter, turns) for loop in loops)


def _is_content(node: nodes.Node, turns: set[str]) -> bool:
    while isinstance(node, nodes.Filter) and node.node is not None:
        node = node.node
    if isinstance(node, nodes.Getattr):
        key = node.attr
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        key = node.arg.value
    else:
        return False
    return key == "content" and isinstance(node.node, nodes.Name) and node.node.name in turns


# ---------------------------------------------------------------- the process


def _answers(questions: Iterator[bytes]) -> Iterator[dict[str, str]]:
    """{"text"} or {"error"} for each line of JSON: `render`'s arguments by name."""
    for line in questions:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # SIGPROF ends the process, whatever it is in
        try:
            answer = {"text": render(**json.loads(line))}
        except ChatTemplateError as error:
            answer = {"error": str(error)[:1000]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        yield answer


def main() -> int:
    """Answers one line on stdout for each on stdin, until that closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for answer in _answers(iter(sys.stdin.buffer.readline, b"")):
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
