"""What a model thinks before it answers: told from its answer by the tags <think> and </think>.

One machine reads the text as it comes, whether it is shown in pieces or whole, so that both show the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from serve.api.markup import begun, find

if TYPE_CHECKING:
    from lm.tokenizer import Tokenizer

START, END = "<think>", "</think>"
PARSERS = ("deepseek_r1", "qwen3")


class ReasoningError(ValueError):
    """--reasoning-parser does not fit the model: one sentence."""


class Thought(NamedTuple):
    """What a piece of text has brought."""

    reasoning: str
    content: str


@dataclass(frozen=True)
class Reasoning:
    """How a model's thinking is known: the parser's name, and the ids of the tokens around it."""

    name: str
    start: int
    end: int
    special: bool  # whether decoding leaves the tags out of the text, unless it is told not to

    @classmethod
    def of(cls, name: str, tokenizer: Tokenizer) -> Reasoning:
        """Raises ReasoningError where the tokenizer does not have the tags as tokens."""
        start, end = (tokenizer.inner.token_to_id(tag) for tag in (START, END))
        if start is None or end is None:
            raise ReasoningError(
                f"--reasoning-parser {name} needs {START} and {END} as tokens, which this model's tokenizer has not."
            )
        special = any(not tokenizer.decode([id]) for id in (start, end))
        return cls(name, start, end, special)

    def over(self, prompt: Sequence[int]) -> bool:
        """Whether the prompt has ended it: of the two tags, the last one there is the end."""
        for id in reversed(prompt):
            if id in (self.start, self.end):
                return id == self.end
        return False

    def open(self, prompt: Sequence[int]) -> bool:
        """Whether the prompt has begun it: of the two tags, the last one there is the start."""
        return any(id in (self.start, self.end) for id in prompt) and not self.over(prompt)

    def reader(self, *, over: bool) -> ThoughtReader:
        """For an answer; `over` where it begins with what is no thought."""
        return ThoughtReader(over=over, ends_again=self.name == "qwen3")


class ThoughtReader:
    """Tells thoughts from content. <think> is left out, wherever it stands among thoughts, and with `ends_again` so is
    a second </think>.
    """

    def __init__(self, *, over: bool, ends_again: bool = False) -> None:
        self._over, self._ends_again = over, ends_again
        self._held = ""

    def feed(self, text: str) -> Thought:
        """What is settled with this text."""
        reasoning: list[str] = []
        content: list[str] = []
        rest, self._held = self._held + text, ""
        while rest:
            tags = self._tags()
            found = find(rest, tags)
            into = content if self._over else reasoning
            if found is None:
                settled = len(rest) - begun(rest, tags) if tags else len(rest)
                into.append(rest[:settled])
                self._held = rest[settled:]
                break
            at, tag = found
            into.append(rest[:at])
            self._over = self._over or tag == END
            rest = rest[at + len(tag) :]
        return Thought("".join(reasoning), "".join(content))

    def finish(self) -> Thought:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return Thought("", held) if self._over else Thought(held, "")

    def _tags(self) -> tuple[str, ...]:
        if self._over:
            return (END,) if self._ends_again else ()
        return (START, END)
