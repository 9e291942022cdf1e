"""Every difference from vLLM that is on purpose: one line each, with its reason. The suite and docs/compatibility.md
read this table; an entry that no longer applies fails the suite.

    python -m tests.conformance.differences      writes the table into docs/compatibility.md
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tests.conformance.compare import Difference

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
BEGIN, END = "<!-- differences: begin -->", "<!-- differences: end -->"
ANY = object()


@dataclass(frozen=True)
class Deliberate:
    """Where answers may differ: the cases and the paths (of `Difference`) that match these patterns, where ours and
    vLLM's are so (or ANY).
    """

    cases: str | Sequence[str]
    paths: str | Sequence[str]
    what: str  # in the table
    theirs_is: str
    ours_is: str
    why: str
    ours: Any = ANY
    theirs: Any = ANY

    def allows(self, case: str, difference: Difference) -> bool:
        return (
            _matches(case, self.cases)
            and _matches(difference.path, self.paths)
            and (self.ours is ANY or self.ours == difference.ours)
            and (self.theirs is ANY or self.theirs == difference.theirs)
        )


def _matches(name: str, patterns: str | Sequence[str]) -> bool:
    """`*` is anything; brackets are themselves."""
    listed = (patterns,) if isinstance(patterns, str) else patterns
    return any(fnmatchcase(name, pattern.replace("[", "[[]")) for pattern in listed)


_OPEN = tuple(
    f"keys/{route} without"
    for route in ("metrics", "tokenize", "detokenize", "version", "load", "options", "invocations")
)

DIFFERENCES: tuple[Deliberate, ...] = (
    Deliberate(
        "*",
        ("*system_fingerprint", "body.data.*.owned_by", "body.version"),
        "`system_fingerprint`, `owned_by`, `/version`",
        "vLLM's name and version",
        "ours",
        "they say who answers",
    ),
    Deliberate(
        "*",
        "body.error.param",
        "`param` of an error",
        "often null",
        "the field, wherever one is at fault",
        "a client can show which",
        theirs=None,
    ),
    Deliberate(
        "chat/messages=*",
        "body.error.param",
        "`param` of a message that is none",
        "names a class of its source",
        "the place in the body",
        "clients know no such class",
    ),
    Deliberate(
        ("chat/messages=None", "chat/messages=5"),
        "body.error.type",
        "`messages` that are no list",
        "BadRequestError with Python's own text",
        "Bad Request, a sentence",
        "as for every field of a wrong type",
        ours="Bad Request",
    ),
    Deliberate(
        "completions/1025 stop tokens",
        "status",
        "more than 1,024 `stop_token_ids`, or entries of `logit_bias`",
        "200",
        "400",
        "each is looked at for every token",
        ours=400,
    ),
    Deliberate(
        "bodies/half a surrogate pair",
        "body.error.type",
        "half of a surrogate pair in a text",
        "BadRequestError from the tokenizer",
        "Bad Request",
        "it is no text: refused with the types",
        ours="Bad Request",
    ),
    Deliberate(
        ("routes/*", "*/got", "bodies/bad utf-8"),
        ("body.detail", "body.error"),
        "404 and 405 of routes, a body that is no UTF-8",
        '`{"detail": ...}`',
        "OpenAI's error object",
        "one shape for every error",
    ),
    Deliberate(
        ("keys/*", "*/no key"),
        ("body.error", "headers.www-authenticate", "headers.vary"),
        "401",
        '`{"error": "Unauthorized"}`',
        "OpenAI's error object, and the headers of a 401",
        "clients read it",
    ),
    Deliberate(
        (*_OPEN, "invocations/no key"),
        "status",
        "what a key guards",
        "`/v1` and some more",
        "everything but the probes, OPTIONS included",
        "/tokenize costs time, /metrics tells of the others",
        ours=401,
    ),
    Deliberate(
        "*",
        "headers.cache-control",
        "header of a stream",
        "none",
        "`Cache-Control: no-cache`",
        "proxies must not keep events",
        ours="no-cache",
    ),
    Deliberate(
        "routes/one model",
        "status",
        "`GET /v1/models/{id}`",
        "404",
        "the card",
        "OpenAI's clients ask for it",
        ours=200,
    ),
    Deliberate(
        ("completions/other alphabets", "completions/stream of bytes"),
        "*.text",
        "an answer that ends within a character",
        "the unfinished character is dropped",
        "it is shown as U+FFFD",
        "the text is what decoding all ids gives",
    ),
    Deliberate(
        ("completions/echo alone", "completions/echo with logprobs alone"),
        ("body.usage.completion_tokens", "body.usage.total_tokens"),
        "`usage` of `echo` with `max_tokens` 0",
        "one completion token",
        "none",
        "nothing is generated",
    ),
    Deliberate(
        "completions/truncated and echoed",
        "body.choices.0.text",
        "`echo` of a truncated prompt",
        "the whole text",
        "what was left of it",
        "it is what the model has read",
    ),
    Deliberate(
        "*best_of*",
        "status",
        "`best_of` other than `n`",
        "ignored",
        "400",
        "the answer would not be the best of so many",
        ours=400,
        theirs=200,
    ),
    Deliberate(
        "completions/n beyond 128",
        "status",
        "`n`",
        "up to 16,384",
        "up to 128",
        "one request must not fill the server",
        ours=400,
        theirs=200,
    ),
    Deliberate(
        "*/kv_transfer_params={*",
        "status",
        "`kv_transfer_params`",
        "taken, without effect",
        "400",
        "there is no other server to take them from",
        ours=400,
        theirs=200,
    ),
    Deliberate(
        "*/request_id=*",
        "body.id",
        "`request_id`, `X-Request-Id`",
        "as it is, empty too",
        "letters, digits and `_.:-`; else a new one",
        "ids are written to logs",
    ),
    Deliberate(
        ("detokenize/out of the vocabulary", "detokenize/large"),
        "status",
        "ids that no token has, in `/detokenize`",
        "left out, or an error of Python's",
        "400",
        "a wrong text is no answer",
        ours=400,
    ),
    Deliberate(
        "*/structured_outputs=5",
        "status",
        "`structured_outputs` that is no object",
        "500",
        "400",
        "it is the client's mistake",
        ours=400,
        theirs=500,
    ),
    Deliberate(
        "calls/*",
        "*.completion_tokens_details.reasoning_tokens",
        "`reasoning_tokens` in `usage`",
        "0 where it was not the model that wrote `<think>`",
        "the tokens of the thought",
        "that is what the field says",
        theirs=0,
    ),
    Deliberate(
        "calls/*",
        ("*.usage.completion_tokens", "*.usage.total_tokens", "*.token_ids.*"),
        "how a text is cut that a form leaves no choice of, where a parser of thoughts or calls is on",
        "by xgrammar: any tokens that spell it",
        "by llguidance, as in vLLM with `guidance`: the tokenizer's own",
        "the text is the same, in tokens that the model knows",
    ),
    Deliberate(
        "calls/auto, a call*streamed",
        "body.choices.0.between.*",
        "chunks of a call in a stream",
        "the name alone, then the arguments, with `content: null`",
        "the name with what has come of the arguments",
        "joined they are the same",
    ),
    Deliberate(
        "calls/auto, a call that is no JSON, streamed",
        "body.choices.0.said.delta.content",
        "a call that is no JSON, in a stream",
        "left out",
        "shown as text, as without `stream`",
        "nothing that was written is lost",
    ),
    Deliberate(
        "calls/thought, not shown*",
        ("*.content", "*.between.length"),
        "an answer of a form with `include_reasoning: false`",
        "taken for a thought, and not shown",
        "shown",
        "it is the answer",
    ),
    Deliberate(
        "headers/priority that is none",
        "status",
        "`X-Vllm-Priority` that is no number",
        "ignored",
        "400",
        "else it would be wrong in silence",
        ours=400,
    ),
    Deliberate(
        "responses/*",
        (
            "body.usage.input_tokens_details.cache_write_tokens",
            "body.usage.input_tokens_details.cached_tokens",
        ),
        "tokens of a prompt in the prefix cache, in `/v1/responses`",
        "whole blocks of 128",
        "whole blocks of `--block-size`, 16",
        "smaller blocks find more",
    ),
    Deliberate(
        ("responses/a strange item", "responses/a tool without a name"),
        ("body.error.type", "body.error.message", "body.error.param"),
        "an item or a tool of no known kind, in `/v1/responses`",
        "Bad Request, with all that it might have been",
        "BadRequestError, one sentence",
        "a client can act on it",
    ),
    Deliberate(
        ("responses/no token", "responses/a negative limit"),
        ("body.error.message", "body.error.param"),
        "`max_output_tokens` below 1",
        "the error names `max_tokens`",
        "it names `max_output_tokens`",
        "that was the field",
    ),
    Deliberate(
        ("responses/a tool that a server would run", "responses/a conversation"),
        "status",
        "`conversation` and tools that a server runs, in `/v1/responses`",
        "ignored",
        "400",
        "the answer would not be what was asked",
        ours=400,
        theirs=200,
    ),
    Deliberate(
        "invocations/a list",
        "body.error.type",
        "a body of `/invocations` that is no object",
        "BadRequestError",
        "Bad Request",
        "as for every body of a wrong type",
        ours="Bad Request",
    ),
    Deliberate(
        ("routes/scale_elastic_ep", "routes/generative_scoring", "routes/systemone"),
        "status",
        "scoring, structured decisions, elastic scaling",
        "there",
        "501",
        "not built",
        ours=501,
    ),
    Deliberate(
        "routes/embeddings",
        "status",
        "`/v1/embeddings`",
        "404",
        "501 with a sentence",
        "a URL that is right is no misspelt one",
        ours=501,
    ),
    Deliberate(
        "routes/metrics",
        ("body.vllm:estimated_*", "body.heed:*"),
        "`/metrics`",
        "estimates of operations and bytes, zero unless a flag asks for them",
        "none; times of the steps as `heed:*`",
        "no number is better than a wrong zero",
    ),
    Deliberate(
        "tokenize/chat with a strange message",
        "body.error.param",
        "`param` of a chat in `/tokenize`",
        "of the text that it is not",
        "the place in the chat",
        "it is the chat that is at fault",
    ),
    Deliberate(
        "chat/beam search streamed",
        "status",
        "`use_beam_search` with `stream` in a chat",
        "one chunk at the end",
        "400, as for completions",
        "it is no stream",
        ours=400,
    ),
    Deliberate(
        ("completions/beam search with logprobs", "chat/beam search with logprobs"),
        ("*top_logprobs*", "*.bytes*"),
        "`logprobs` of a beam search",
        "twice as many as the beam is wide, without bytes",
        "as many as are asked for",
        "the field says how many",
    ),
)


def table() -> str:
    """The table of docs/compatibility.md, a row for each entry."""
    rows = [f"| {one.what} | {one.theirs_is} | {one.ours_is} | {one.why} |" for one in DIFFERENCES]
    return "\n".join(["| | vLLM 0.32 | here | why |", "| --- | --- | --- | --- |", *rows])


def page(text: str) -> str:
    """The page with the table as it is now."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
