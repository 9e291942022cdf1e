"""What /v1/chat/completions answers, in vLLM's shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from serve.api.answers import Answer, Choice
from serve.api.protocol import ChatRequest
from serve.api.reading import Read, Reader, Reading, delta_calls, message_calls
from serve.engine.messages import Output


class ChatAnswer(Answer):
    prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    running_usage: ClassVar[dict[str, Any]] = {"completion_tokens_details": None}

    def choice(self, choice: Choice, output: Output) -> dict[str, Any]:
        reader = self._reader(choice)
        read = Read(content=output.text) if reader is None else reader.feed(output.text, output.tokens, last=True)
        reading = self._reading
        content: str | None = self.job.opening + read.content
        if not content and reading is not None and not self._must_call:
            content = None
        thought = reading is not None and reading.thinks and reading.shows_thoughts
        message: dict[str, Any] = {
            "role": self.job.role,
            "content": content,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "reasoning": read.reasoning if thought else None,
        }
        if read.calls:
            message["tool_calls"] = message_calls(read.calls)
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice, output),
            "finish_reason": self._reason(output, reader),
            "stop_reason": output.stop_reason,
            "token_ids": output.tokens if self.wants_ids and not self._hides else None,
            "routed_experts": None,
        }

    def rest(self, outputs: list[Output]) -> dict[str, Any]:
        return {"prompt_logprobs": self.prompt_logprobs(outputs[0]), **self._prompt()}

    def usage(self) -> dict[str, Any]:
        """With a parser of thoughts, how many tokens were such (vLLM: only those after a <think> in the answer)."""
        usage = super().usage()
        if self._reading is not None and self._reading.reasoning is not None:
            thought = sum(choice.reader.thought for choice in self.choices if choice.reader is not None)
            usage["completion_tokens_details"] = {"reasoning_tokens": thought}
        return usage

    def openings(self) -> Iterator[dict[str, Any]]:
        """Who speaks; then, with echo, what the prompt has of the answer."""
        for choice in self.choices:
            yield {"choices": [_delta(choice, {"role": self.job.role, "content": ""})], **self._prompt()}
        for choice in self.choices if self.job.opening else ():
            yield {"choices": [_delta(choice, {"content": self.job.opening})]}

    def delta(self, choice: Choice, output: Output) -> dict[str, Any] | None:
        reader = self._reader(choice)
        made = _delta(choice, {"content": output.text} if reader is None else _read(reader, output))
        made["logprobs"], made["finish_reason"] = self._logprobs(choice, output), self._reason(output, reader)
        if output.finish_reason is not None:
            made["stop_reason"] = output.stop_reason
        made["token_ids"] = output.tokens if self.wants_ids and not self._hides else None
        shown = made["delta"] or output.finish_reason or made["logprobs"] or made["token_ids"]
        return made if shown else None

    @property
    def _reading(self) -> Reading | None:
        return self.job.forms[0].reading if self.job.forms else None

    @property
    def _must_call(self) -> bool:
        reading = self._reading
        return reading is not None and reading.tools is not None and reading.tools.choice != "auto"

    @property
    def _hides(self) -> bool:
        """Whether tokens are not shown, since there are thoughts among them that were not asked for."""
        reading = self._reading
        return reading is not None and not reading.shows_thoughts

    def _reader(self, choice: Choice) -> Reader | None:
        """What reads this choice's text; None where it is all content."""
        reading = self._reading
        if reading is not None and choice.reader is None:
            choice.reader = reading.reader()
        return choice.reader

    def _reason(self, output: Output, reader: Reader | None) -> str | None:
        reading = self._reading
        if reader is None or reading is None or reading.tools is None:
            return output.finish_reason
        return reading.tools.reason(output.finish_reason, reader.calls)

    def _prompt(self) -> dict[str, Any]:
        assert isinstance(self.request, ChatRequest)
        prompt = self.job.prompts[0]
        return {
            "prompt_token_ids": prompt.ids if self.wants_ids else None,
            "prompt_text": prompt.text if self.request.return_prompt_text else None,
        }

    def _logprobs(self, choice: Choice, output: Output) -> dict[str, Any] | None:
        if self.job.logprobs is None or self._hides:
            return None
        return self.token_texts.content(output.tokens, output.logprobs or [], self.job.logprobs, choice.context)


def _delta(choice: Choice, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}


def _read(reader: Reader, output: Output) -> dict[str, Any]:
    """What a chunk says: of thoughts, content and calls those that have come."""
    read = reader.feed(output.text, output.tokens, last=output.finish_reason is not None)
    made: dict[str, Any] = {}
    if read.reasoning:
        made["reasoning"] = read.reasoning
    if read.content:
        made["content"] = read.content
    if read.calls:
        made["tool_calls"] = delta_calls(read.calls)
    return made
