"""Chats to text, in processes aside: which template, how many at once, and an end for what does not end by itself."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm.tokenizer import Tokenizer
from serve.api.chat_template import CPU_SECONDS
from serve.errors import InvalidRequest, Overloaded

WORKERS = 2  # processes at most: one that is slow does not keep everybody waiting
WAITING = 1024  # chats that may wait for one
WALL_SECONDS = 60.0  # the processor's time is what is limited; this is for a machine that gives none
LINE = 1 << 27  # bytes of an answer, at most
# What the process sees of the environment: enough to start, and no keys.
ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_TIME", "TZ")
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
NO_TEMPLATE = (
    "This model has no chat template, so messages cannot become a prompt: start the server with --chat-template FILE, "
    "or send text to /v1/completions."
)


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
        self._seats = asyncio.Semaphore(WORKERS)
        self._waiting = 0
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()

    async def start(self) -> None:
        """Starts a process if there is a template to render, so that the first chat finds it. Does not wait for it."""
        if self.templates.named:
            self._idle.append(await self._spawn())

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
        answer = await self._ask(line)
        if "error" in answer:
            raise InvalidRequest(answer["error"], "messages")
        return answer["text"]

    async def close(self) -> None:
        """Ends the processes."""
        for worker in list(self._all):
            await self._end(worker)

    async def _ask(self, question: bytes) -> dict[str, str]:
        if self._waiting >= WAITING:
            raise Overloaded(f"{WAITING} chats are waiting to be rendered. Try again later.")
        self._waiting += 1
        try:
            async with self._seats:
                worker = await self._take()
                try:
                    line = await asyncio.wait_for(worker.ask(question), WALL_SECONDS)
                except BaseException as error:
                    await self._end(worker)
                    if isinstance(error, TimeoutError):
                        line = b""
                    else:
                        raise
                if not line:
                    status = await self._end(worker)
                    slow = status in (-signal.SIGPROF, -signal.SIGKILL)
                    what = f"takes more than {CPU_SECONDS:g} s for" if slow else "fails on"
                    return {"error": f"The chat template {what} this chat."}
                self._idle.append(worker)
        finally:
            self._waiting -= 1
        return json.loads(line)

    async def _take(self) -> _Worker:
        while self._idle:
            worker = self._idle.pop()
            if worker.process.returncode is None:
                return worker
            self._all.discard(worker)
        return await self._spawn()

    async def _spawn(self) -> _Worker:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "serve.api.chat_template",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
            limit=LINE,
        )
        worker = _Worker(process)
        self._all.add(worker)
        return worker

    async def _end(self, worker: _Worker) -> int:
        """Kills the process unless it has ended; its exit status."""
        self._all.discard(worker)
        if worker in self._idle:
            self._idle.remove(worker)
        try:
            # It may be on its way out, with a status that says why.
            return await asyncio.wait_for(worker.process.wait(), 0.2)
        except TimeoutError:
            worker.process.kill()
            return await worker.process.wait()


class _Worker:
    """A process that renders, one chat at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def ask(self, question: bytes) -> bytes:
        """The line it answers; empty where it died over the question."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(question)
            await self.process.stdin.drain()
            return await self.process.stdout.readline()
        except (ConnectionError, ValueError):  # ValueError: more than LINE bytes
            return b""
