"""Log-probabilities in the forms that clients read: OpenAI's two, and vLLM's for prompts."""

from __future__ import annotations

from collections import deque
from typing import Any

from serve.api.model import Model
from serve.engine.messages import TokenLogprobs

Context = deque[int]  # the last tokens before one: as many as a character can have bytes
LONGEST = 4
UNFINISHED = "\ufffd"  # how a decoded text ends that stops in the middle of a character
LOWEST = -9999.0  # what OpenAI's clients get for a probability of zero


class TokenTexts:
    """Token ids as the strings that log-probabilities are labelled with."""

    def __init__(self, model: Model, as_ids: bool) -> None:
        self._inner = model.tokenizer.inner
        self._as_ids = as_ids
        self._known: dict[int, str] = {}

    def text(self, id: int, context: Context | None = None) -> str:
        """What a token is called after those of `context`; without them, as it decodes alone."""
        if self._as_ids:
            return f"token_id:{id}"
        return self._plain(id) if context is None else self._decoded(id, context)

    def listed(
        self, tokens: list[int], entries: list[TokenLogprobs | None], k: int, offset: int, context: Context
    ) -> dict[str, list[Any]]:
        """OpenAI's form for completions: four lists of one length.

        `offset` is where in the text the first token begins. `context` are the tokens before, which grows by these.
        """
        offsets, texts, values, tops = [], [], [], []
        for id, entry in zip(tokens, entries, strict=True):
            text = self.text(id) if entry is None else self.text(id, context)
            offsets.append(offset)
            offset += len(text)
            texts.append(text)
            values.append(None if entry is None else max(entry.logprob, LOWEST))
            tops.append(None if entry is None else self._top(entry, k, context))
            if entry is not None:
                context.append(id)
        return {"text_offset": offsets, "token_logprobs": values, "tokens": texts, "top_logprobs": tops}

    def content(self, tokens: list[int], entries: list[TokenLogprobs], k: int, context: Context) -> dict[str, Any]:
        """OpenAI's form for chats: an object a token, with the k most probable ones; as vLLM does it, the token itself
        comes first and is one of the k. `context` as in `listed`.
        """
        listed = []
        for id, entry in zip(tokens, entries, strict=True):
            chosen = {id: entry.logprob}
            for other, value in entry.top:
                chosen.setdefault(other, value)
            shown = [self._spelt(one, value, context) for one, value in list(chosen.items())[: max(k, 1)]]
            spelt = list(self._decoded(id, context).encode())  # of the text, even where tokens are named by their ids
            listed.append(shown[0] | {"bytes": spelt, "top_logprobs": shown[:k]})
            context.append(id)
        return {"content": listed}

    def _spelt(self, id: int, value: float, context: Context) -> dict[str, Any]:
        text = self.text(id, context)
        return {"token": text, "logprob": max(value, LOWEST), "bytes": list(text.encode())}

    def _top(self, entry: TokenLogprobs, k: int, context: Context) -> dict[str, float]:
        """The token itself, then the k most probable."""
        top = {self.text(entry.token, context): max(entry.logprob, LOWEST)}
        for id, value in entry.top[:k]:
            if id != entry.token:
                top[self.text(id, context)] = max(value, LOWEST)
        return top

    def ranked(self, entries: list[TokenLogprobs | None]) -> list[dict[str, Any] | None]:
        """vLLM's form of prompt_logprobs: by token id, the prompt's own token first; None where there are none."""
        context: Context = deque(maxlen=LONGEST)
        made: list[dict[str, Any] | None] = []
        for entry in entries:
            if entry is None:
                made.append(None)
                continue
            chosen = {str(entry.token): self._ranked(entry.token, entry.logprob, entry.rank, context)}
            for rank, (id, value) in enumerate(entry.top, start=1):
                if str(id) not in chosen:
                    chosen[str(id)] = self._ranked(id, value, rank, context)
            made.append(chosen)
            context.append(entry.token)
        return made

    def _ranked(self, id: int, value: float, rank: int, context: Context) -> dict[str, Any]:
        return {"logprob": max(value, LOWEST), "rank": rank, "decoded_token": self._decoded(id, context)}

    def _decoded(self, id: int, context: Context) -> str:
        """A token that ends in the middle of a character is empty, and the one that completes it has the whole."""
        alone = self._plain(id)
        return self._completed(id, list(context)) if alone.endswith(UNFINISHED) else alone

    def _completed(self, id: int, context: list[int]) -> str:
        for begin in range(len(context) - 1, -1, -1):
            whole = self._inner.decode([*context[begin:], id], skip_special_tokens=False)
            if whole.endswith(UNFINISHED):
                continue
            before = context[begin:]
            while before and self._plain(before[-1]).endswith(UNFINISHED):
                before.pop()  # its bytes are this token's to show
            shown = self._inner.decode(before, skip_special_tokens=False) if before else ""
            pairs = zip(shown, whole, strict=False)
            return whole[next((i for i, (one, two) in enumerate(pairs) if one != two), len(shown)) :]
        return ""

    def _plain(self, id: int) -> str:
        if id not in self._known:
            self._known[id] = self._inner.decode([id], skip_special_tokens=False)
        return self._known[id]
