"""Log-probabilities in the forms that clients read: OpenAI's two, and vLLM's for prompts."""

from __future__ import annotations

from typing import Any

from serve.api.model import Model
from serve.engine.messages import TokenLogprobs

LOWEST = -9999.0  # what OpenAI's clients get for a probability of zero


class TokenTexts:
    """Token ids as the strings that log-probabilities are labelled with."""

    def __init__(self, model: Model, as_ids: bool) -> None:
        self._inner = model.tokenizer.inner
        self._as_ids = as_ids
        self._known: dict[int, str] = {}

    def text(self, id: int) -> str:
        if self._as_ids:
            return f"token_id:{id}"
        if id not in self._known:
            self._known[id] = self._inner.decode([id], skip_special_tokens=False)
        return self._known[id]

    def listed(self, tokens: list[int], entries: list[TokenLogprobs | None], k: int, offset: int) -> dict[str, Any]:
        """OpenAI's form for completions: four lists of one length.

        `offset` is where in the text the first token begins.
        """
        offsets, texts, values, tops = [], [], [], []
        for id, entry in zip(tokens, entries, strict=True):
            text = self.text(id)
            offsets.append(offset)
            offset += len(text)
            texts.append(text)
            values.append(None if entry is None else max(entry.logprob, LOWEST))
            tops.append(None if entry is None else self._top(entry, k))
        return {"text_offset": offsets, "token_logprobs": values, "tokens": texts, "top_logprobs": tops}

    def content(self, tokens: list[int], entries: list[TokenLogprobs], k: int) -> dict[str, Any]:
        """OpenAI's form for chats: an object a token, with the k most probable ones; as vLLM does it, the token itself
        comes first and is one of the k.
        """
        listed = []
        for id, entry in zip(tokens, entries, strict=True):
            chosen = {id: entry.logprob}
            for other, value in entry.top:
                chosen.setdefault(other, value)
            shown = [self._spelt(one, value) for one, value in list(chosen.items())[: max(k, 1)]]
            listed.append(shown[0] | {"top_logprobs": shown[:k]})
        return {"content": listed}

    def _spelt(self, id: int, value: float) -> dict[str, Any]:
        text = self.text(id)
        return {"token": text, "logprob": max(value, LOWEST), "bytes": list(text.encode())}

    def _top(self, entry: TokenLogprobs, k: int) -> dict[str, float]:
        """The token itself, then the k most probable."""
        top = {self.text(entry.token): max(entry.logprob, LOWEST)}
        for id, value in entry.top[:k]:
            top.setdefault(self.text(id), max(value, LOWEST))
        return top

    def ranked(self, entry: TokenLogprobs) -> dict[str, Any]:
        """vLLM's form of prompt_logprobs: by token id, the prompt's own token first."""
        chosen = {str(entry.token): self._ranked(entry.token, entry.logprob, entry.rank)}
        for rank, (id, value) in enumerate(entry.top, start=1):
            chosen.setdefault(str(id), self._ranked(id, value, rank))
        return chosen

    def _ranked(self, id: int, value: float, rank: int) -> dict[str, Any]:
        return {"logprob": max(value, LOWEST), "rank": rank, "decoded_token": self.text(id)}
