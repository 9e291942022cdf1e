"""What /v1/completions answers, in vLLM's shapes."""

from __future__ import annotations

from collections import deque
from typing import Any

from serve.api.answers import Answer, Choice
from serve.api.logprobs import LONGEST, Context
from serve.api.protocol import CompletionRequest
from serve.engine.messages import Output


class CompletionAnswer(Answer):
    prefix = "cmpl"
    object = chunk_object = "text_completion"

    def choice(self, choice: Choice, output: Output) -> dict[str, Any]:
        text, logprobs = self._shown(choice, output)
        return {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
            "token_ids": output.tokens if self.wants_ids else None,
            "prompt_logprobs": self.prompt_logprobs(output),
            "prompt_token_ids": choice.prompt.ids if self.wants_ids else None,
            "routed_experts": None,
        }

    def delta(self, choice: Choice, output: Output) -> dict[str, Any]:
        first = not choice.begun
        text, logprobs = self._shown(choice, output)
        return {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
            "prompt_token_ids": choice.prompt.ids if first and (self.wants_ids or self._echo) else None,
            "token_ids": output.tokens if self.wants_ids else None,
        }

    def _shown(self, choice: Choice, output: Output) -> tuple[str, dict[str, Any] | None]:
        """Text and log-probabilities of an output; the first of an echoing request has its prompt in front."""
        echoed, text = self._echo and not choice.begun, output.text
        if echoed and not self.wants_ids:  # who asks for ids gets the prompt as ids
            text = (choice.prompt.text or "") + text
        choice.begun = True
        k = self.job.logprobs
        if k is None:
            return text, None
        listed = self.token_texts.listed
        parts: list[dict[str, list[Any]]] = []
        if echoed:
            before: Context = deque(maxlen=LONGEST)
            parts.append(listed(choice.prompt.ids, output.prompt_logprobs or [], k, 0, before))
            choice.text_length = _end(parts[0])
        parts.append(listed(output.tokens, list(output.logprobs or []), k, choice.text_length, choice.context))
        choice.text_length = _end(parts[-1]) or choice.text_length
        return text, {name: [one for part in parts for one in part[name]] for name in parts[0]}

    @property
    def _echo(self) -> bool:
        assert isinstance(self.request, CompletionRequest)
        return bool(self.request.echo)


def _end(listed: dict[str, list[Any]]) -> int:
    """Where in the text the next token begins; 0 if there is none before it."""
    return listed["text_offset"][-1] + len(listed["tokens"][-1]) if listed["tokens"] else 0
