"""What the tokens of a sequence must obey: a grammar, and a limit on thinking. llguidance reads the grammars.

A grammar is compiled once, beside the loop, and kept for those who bring the same. Each sequence has a state of its own
(`Rule`), which advances with the tokens that are kept and, for the rows after a draft, there and back; masks.py asks it
in each step which tokens may come next. The state belongs to the tokens and not to the cache, so that a preempted
sequence goes on with it.

Nothing here imports torch: the API compiles grammars too (serve/api/grammar_check.py), to tell what is wrong with them.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import llguidance
import numpy as np

from lm.tokenizer import Tokenizer
from serve.engine.messages import Constraint, Grammar

KEPT = 32  # compiled grammars that are kept for those who may bring them again
WORD = 32  # tokens in a word of a mask
TOO_COMPLEX = "The grammar became too complex while it was followed; a simpler one may do."
UNKNOWN = "The grammar of this request is not known to the engine."


class Impossible(ValueError):
    """What a request asks for cannot be given: one sentence, and no fault of the engine."""


class Vocabulary:
    """What llguidance has to know of a model: its tokens as bytes, how many logits it gives, and the token that ends
    an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        size = max(vocab_size, tokenizer.inner.get_vocab_size())
        # Of a model that never ends some token has to stand for EOS; it never comes, and answers end with the grammar.
        self.size, self.endless = size, not eos
        self.eos = size - 1 if self.endless else eos[0]
        self._words: Any = None

    @property
    def mask_words(self) -> int:
        """uint32 in a mask."""
        return -(-self.size // WORD)

    def compile(self, text: str) -> Any:
        """A matcher at the beginning of a grammar. Raises Impossible. The first call takes half a second more, for a
        vocabulary of 50,000; meanwhile other threads run.
        """
        if self._words is None:
            inner = self._tokenizer.inner.from_str(self._tokenizer.inner.to_str())  # a copy, which does not cut or pad
            inner.no_padding()
            inner.no_truncation()
            try:
                self._words = llguidance.LLTokenizer(as_texts(inner.to_str()), n_vocab=self.size, eos_token=self.eos)
            except ValueError as error:
                raise Impossible(f"This model's tokenizer is of no kind that grammars can use: {error}") from None
        matcher = llguidance.LLMatcher(self._words, text, log_level=0)
        if matcher.is_error():
            raise Impossible(first_line(matcher.get_error()))
        return matcher


def as_texts(told: str) -> str:
    """tokenizer.json as llguidance is to see it.

    It takes every added token for a special one; where a grammar leaves nothing but a text that has one in it, such as
    <tool_call>, it offers that token and then refuses it. So added tokens that are plain text become words like others,
    and special ones, which no text may stand for, get names that no text has.
    """
    tokenizer = json.loads(told)
    model = tokenizer["model"]
    words = model.get("vocab")
    if not isinstance(words, dict):  # a unigram model's is a list by id, into which nothing can be put
        return told
    special = []
    for token in tokenizer["added_tokens"]:
        if token["special"]:
            old, token["content"] = token["content"], f"\0{token['id']}"
            words.pop(old, None)
            if model.get("unk_token") == old:
                model["unk_token"] = token["content"]
            special.append(token)
        words[token["content"]] = token["id"]
    return json.dumps(tokenizer | {"added_tokens": special}, ensure_ascii=False)


def first_line(error: str) -> str:
    """llguidance's sentence without the states and traces that follow it."""
    line = next((line for line in error.splitlines() if line.strip()), "it has no meaning")
    return line.split("<state>")[0].strip()[:300]


class Grammars:
    """Compiles grammars for one model, in a thread beside the loop."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: Sequence[int]) -> None:
        self.vocabulary = Vocabulary(tokenizer, vocab_size, eos)
        self._compiled: OrderedDict[str, Future[Any]] = OrderedDict()
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="grammars")  # it starts with the first grammar

    def learn(self, grammar: Grammar) -> None:
        """Begins to compile what has not been compiled; it never raises."""
        if grammar.key in self._compiled:
            self._compiled.move_to_end(grammar.key)
            return
        self._compiled[grammar.key] = self._aside.submit(self.vocabulary.compile, grammar.text)
        while len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)

    def rule(self, constraint: Constraint) -> Rule:
        """The state of a new sequence. Raises Impossible."""
        if constraint.grammar is None:
            return Rule(constraint, None, self.vocabulary)
        if constraint.grammar not in self._compiled:
            raise Impossible(UNKNOWN)
        return Rule(constraint, self._compiled[constraint.grammar], self.vocabulary)


class Bound(NamedTuple):
    """A row that a rule has filled in; `final` where EOS alone is left."""

    row: int
    final: bool


class Rule:
    """One sequence's way through its grammar."""

    def __init__(self, constraint: Constraint, compiled: Future[Any] | None, vocabulary: Vocabulary) -> None:
        self._end, self._start, self._budget = constraint.end, constraint.start, constraint.budget
        self._compiled = compiled
        self._eos, self._endless = vocabulary.eos, vocabulary.endless
        self._matcher: Any = None
        self._thinking = constraint.thinking
        self._thought = 0  # tokens since thinking began
        self._free = constraint.end is not None  # the grammar has not begun yet
        self.ended = False  # the last token was the one that ends it

    @property
    def ready(self) -> bool:
        """Whether the grammar has been compiled, or cannot be."""
        return self._compiled is None or self._compiled.done()

    def wait(self, seconds: float) -> None:
        """Waits for that, not longer than so many seconds."""
        if self._compiled is not None and not self._compiled.done():
            try:
                self._compiled.exception(seconds)
            except TimeoutError:
                return

    def begin(self) -> None:
        """To be called once, when it is ready. Raises Impossible for a grammar that is none."""
        if self._compiled is not None:
            self._matcher = self._compiled.result().deep_copy()
            self._compiled = None

    # ---------------------------------------------------------------- what may come

    def masks(self, draft: Sequence[int], masks: np.ndarray) -> list[Bound]:
        """Fills masks uint32 [1 + len(draft), W], a bit for each token that may come next, and after each token of the
        draft. Rows that it does not bind are left as they are, as are those after a token that cannot come. Raises
        Impossible where the grammar takes too much to follow.
        """
        bound: list[Bound] = []
        free, thinking, thought = self._free, self._thinking, self._thought
        entered = 0
        for row in range(len(draft) + 1):
            if free:
                if thinking and self._budget is not None and thought >= self._budget:
                    self._only_end(masks[row])
                    bound.append(Bound(row, False))
            elif self._matcher is not None:
                self._matcher.unsafe_compute_mask_ptr(masks[row].ctypes.data, masks[row].nbytes)
                if self._matcher.is_error():
                    raise Impossible(TOO_COMPLEX)
                if self._endless:
                    masks[row, self._eos // WORD] &= ~np.uint32(1 << self._eos % WORD)
                bound.append(Bound(row, self._is_final(masks[row])))
            if row == len(draft):
                break
            token = draft[row]
            if free:
                free, thinking, thought = self._think(token, thinking, thought)
            elif self._matcher is not None:
                if token == self._eos or self._matcher.try_consume_tokens([token]) != 1:
                    break
                entered += 1
        if entered:
            self._matcher.rollback(entered)
        return bound

    def _only_end(self, mask: np.ndarray) -> None:
        assert self._end is not None
        mask[:] = 0
        mask[self._end // WORD] = 1 << self._end % WORD

    def _is_final(self, mask: np.ndarray) -> bool:
        own = int(mask[self._eos // WORD])
        return not self._endless and own == 1 << self._eos % WORD and np.count_nonzero(mask) == 1

    def agreed(self, draft: list[int]) -> list[int]:
        """As much of a draft as may come."""
        if self._free or self._matcher is None:
            return draft
        return draft[: self._matcher.validate_tokens(draft)] if draft and not self._matcher.is_stopped() else []

    # ---------------------------------------------------------------- what has come

    def accept(self, token: int) -> None:
        """Takes in a token that was drawn. Raises Impossible for one that the grammar does not know."""
        if self._free:
            self._free, self._thinking, self._thought = self._think(token, self._thinking, self._thought)
            return
        if self._matcher is None or self.ended:
            return
        if token == self._eos:
            self.ended = True
        elif not self._matcher.consume_token(token):
            raise Impossible(TOO_COMPLEX)
        elif self._endless and self._matcher.is_stopped():
            self.ended = True

    def _think(self, token: int, thinking: bool, thought: int) -> tuple[bool, bool, int]:
        """Whether it is free, whether it thinks, and how long it has, after one more token that it was free to give."""
        if token == self._end:
            return False, False, 0
        if token == self._start and not thinking:
            return True, True, 0
        return True, thinking, thought + thinking
