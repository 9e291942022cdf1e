"""What /v1/chat/completions answers, in vLLM's shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from serve.api.answers import Answer, Choice
from serve.api.protocol import ChatRequest
from serve.engine.messages import Output


class ChatAnswer(Answer):
    prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(self, choice: Choice, output: Output) -> dict[str, Any]:
        message = {
            "role": self.job.role,
            "content": self.job.opening + output.text,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "reasoning": None,
        }
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(output),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
            "token_ids": output.tokens if self.wants_ids else None,
            "routed_experts": None,
        }

    def rest(self, outputs: list[Output]) -> dict[str, Any]:
        return {"prompt_logprobs": self.prompt_logprobs(outputs[0]), **self._prompt()}

    def openings(self) -> Iterator[dict[str, Any]]:
        """Who speaks; then, with echo, what the prompt has of the answer."""
        for choice in self.choices:
            yield {"choices": [_delta(choice, {"role": self.job.role, "content": ""})], **self._prompt()}
        for choice in self.choices if self.job.opening else ():
            yield {"choices": [_delta(choice, {"content": self.job.opening})]}

    def delta(self, choice: Choice, output: Output) -> dict[str, Any]:
        made = _delta(choice, {"content": output.text})
        made["logprobs"], made["finish_reason"] = self._logprobs(output), output.finish_reason
        if output.finish_reason is not None:
            made["stop_reason"] = output.stop_reason
        made["token_ids"] = output.tokens if self.wants_ids else None
        return made

    def _prompt(self) -> dict[str, Any]:
        assert isinstance(self.request, ChatRequest)
        prompt = self.job.prompts[0]
        return {
            "prompt_token_ids": prompt.ids if self.wants_ids else None,
            "prompt_text": prompt.text if self.request.return_prompt_text else None,
        }

    def _logprobs(self, output: Output) -> dict[str, Any] | None:
        if self.job.logprobs is None:
            return None
        return self.token_texts.content(output.tokens, output.logprobs or [], self.job.logprobs)


def _delta(choice: Choice, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
