"""Grammars from what requests ask: made and compiled once in a process of its own, so that a schema of a million
alternatives or a pattern that explodes ends there and not in the engine.

`python -m serve.api.grammar_check` is that process, with limits on memory and processor time that the kernel holds;
grammars.py is its other end. What it lets pass, the engine compiles again, with the same library and in the same time.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import llguidance
import numpy as np
import psutil
import tokenizers

from lm.tokenizer import Tokenizer
from serve.engine.grammar import Impossible, Vocabulary, first_line

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

CPU_SECONDS = 2.0  # for one grammar
VOCABULARY_SECONDS = 30.0  # for the vocabulary, once
MEMORY = 256 << 20  # bytes beside what the vocabulary takes
# Keywords of a JSON schema under which further schemas stand: by name, or as they are.
MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
SINGLE = (
    *("additionalProperties", "unevaluatedProperties", "propertyNames", "contains", "additionalItems"),
    *("unevaluatedItems", "not", "if", "then", "else", "contentSchema", "items", "prefixItems", "allOf", "anyOf"),
    "oneOf",
)


def grammar(
    kind: str,
    value: Any,
    *,
    whitespace: bool = True,
    whitespace_pattern: str | None = None,
    additional: bool = True,
) -> str:
    """llguidance's text for "json" (a schema), "json_object", "regex", "choice" (texts), "grammar" (Lark or GBNF),
    "structural_tag" ({"triggers", "structures"}) or "lark". `whitespace`: whether JSON may have any (or what the
    pattern says); `additional`: whether objects may have properties that a schema does not name, where it does not say.

    Raises Impossible.
    """
    options: JsonCompileOptions = {"whitespace_flexible": whitespace}
    if whitespace_pattern is not None:
        options["whitespace_pattern"] = whitespace_pattern
    try:
        if kind == "json":
            schema = json.loads(value) if isinstance(value, str) else value
            return _schema(schema if additional else _closed(schema), options)
        if kind == "json_object":
            return _schema({"type": "object"}, options)
        if kind == "choice":
            return _choice(value)
        if kind == "structural_tag":
            return _tags(json.loads(value) if isinstance(value, str) else value, additional)
        if kind == "regex":
            return llguidance.LLMatcher.grammar_from_regex(value)
        return value if kind == "lark" else llguidance.grammar_from("grammar", value)
    except Impossible:
        raise
    except (ValueError, TypeError, KeyError, RecursionError, AssertionError) as error:
        raise Impossible(f"Invalid grammar specification: {first_line(str(error))}") from None


def _schema(schema: Any, options: JsonCompileOptions) -> str:
    if not isinstance(schema, (dict, bool)):
        raise Impossible("Invalid grammar specification: a JSON schema is an object.")
    return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), options)


def _choice(choices: list[str]) -> str:
    """One terminal, so that thousands of choices share an automaton; as a rule, where one is empty: no terminal is."""
    options = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    return f"start: CHOICE\nCHOICE: {options}" if all(choices) else f"start: {options}"


def _tags(spec: Any, additional: bool) -> str:
    if not (isinstance(spec, dict) and isinstance(spec.get("structures"), list)):
        raise Impossible(
            'Invalid grammar specification: a structural tag has "structures", each with "begin", "schema" and "end", '
            'and "triggers", with which they begin.'
        )
    tags = []
    for structure in spec["structures"]:
        begin, schema = structure["begin"], structure.get("schema") or {}
        trigger = next((one for one in spec["triggers"] if one and begin.startswith(one)), None)
        if trigger is None:
            raise Impossible(f"Invalid grammar specification: {begin[:50]!r} begins with none of the triggers.")
        body = schema if additional else _closed(schema)
        tags.append(llguidance.StructTag(trigger=trigger, begin=begin, grammar=body, end=structure["end"]))
    return llguidance.StructTag.to_grammar(tags)


def _closed(schema: Any) -> Any:
    """The schema without properties that it does not name."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    for name in MAPS:
        if isinstance(made.get(name), dict):
            made[name] = {key: _closed(one) for key, one in made[name].items()}
    for name in SINGLE:
        if name in made:
            made[name] = _closed(made[name])
    if "additionalProperties" not in made and any(
        isinstance(made.get(name), dict) for name in ("properties", "patternProperties")
    ):
        made["additionalProperties"] = False
    return made


# ---------------------------------------------------------------- the process


class Checker:
    """Compiles for one model, told in the first line: {"tokenizer", "vocab_size", "eos"}."""

    def __init__(self, line: bytes) -> None:
        told = json.loads(line)
        tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(told["tokenizer"]))
        self._vocabulary = Vocabulary(tokenizer, told["vocab_size"], told["eos"])
        self._mask = np.zeros(self._vocabulary.mask_words, dtype=np.uint32)

    def check(self, text: str) -> None:
        """Compiles a grammar and asks what may come first, which goes through more of it. Raises Impossible."""
        matcher = self._vocabulary.compile(text)
        matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if matcher.is_error():
            raise Impossible(first_line(matcher.get_error()))
        if not self._mask.any():
            raise Impossible("no text obeys it")


def _answers(checker: Checker, questions: Iterator[bytes]) -> Iterator[dict[str, str]]:
    """{"text"} or {"error"} for each line of JSON: `grammar`'s arguments by name."""
    for line in questions:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # SIGPROF ends the process, whatever it is in
        try:
            text = grammar(**json.loads(line))
            checker.check(text)
            answer = {"text": text}
        except Impossible as error:
            answer = {"error": str(error)}
        except (MemoryError, RecursionError):
            answer = {"error": "it takes too much memory"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        yield answer


def main() -> int:
    """Answers one line on stdout for each on stdin but the first, until that closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    lines = iter(sys.stdin.buffer.readline, b"")
    first = next(lines, None)
    if first is None:
        return 0
    signal.setitimer(signal.ITIMER_PROF, VOCABULARY_SECONDS)
    checker = Checker(first)
    try:
        checker.check('start: "a"')  # reads the vocabulary
    except Impossible as error:
        refusal = str(error)
        for _ in lines:
            _say({"error": refusal})
        return 0
    taken = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    for answer in _answers(checker, lines):
        _say(answer)
    return 0


def _say(answer: Mapping[str, str]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
