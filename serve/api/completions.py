"""What /v1/completions answers, in vLLM's shapes."""

from __future__ import annotations

from typing import Any

from serve.api.answers import Answer, Choice
from serve.api.protocol import CompletionRequest
from serve.engine.messages import Output, TokenLogprobs


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
            "prompt_token_ids": choice.prompt.ids if self.wants_ids and first else None,
            "token_ids": output.tokens if self.wants_ids else None,
        }

    def _shown(self, choice: Choice, output: Output) -> tuple[str, dict[str, Any] | None]:
        """Text and log-probabilities of an output; the first of an echoing request has its prompt in front."""
        text, tokens = output.text, output.tokens
        entries: list[TokenLogprobs | None] = list(output.logprobs or [])
        assert isinstance(self.request, CompletionRequest)
        if self.request.echo and not choice.begun:
            # Who asks for ids gets the prompt as ids.
            text = text if self.wants_ids else (choice.prompt.text or "") + text
            tokens = choice.prompt.ids + tokens
            entries = [*(output.prompt_logprobs or []), *entries]
        choice.begun = True
        offset, choice.text_length = choice.text_length, choice.text_length + len(text)
        if self.job.logprobs is None:
            return text, None
        return text, self.token_texts.listed(tokens, entries, self.job.logprobs, offset)
