"""What the API process and the engine process say to each other: msgspec structs, one frame of msgpack a message.

To the engine: `Configure` (once, first), then `Grammar`, `Add`, `AddBeam` and `Abort`. From it: `Words`, then `Ready`
(or `Failed` in place of either), then one `Step` for each step of the engine. Nothing here imports torch, and nothing
is pickled.
"""

from __future__ import annotations

import msgspec

from lm.params import SamplingParams

STEEPEST = 10.0  # length penalty; beyond it, lengths become numbers that no float holds


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All that the engine is told at its start; names and meanings are vLLM's flags."""

    folder: str  # or a GGUF file
    tokenizer: str | None = None  # a folder or GGUF file with another tokenizer
    dtype: str = "auto"
    max_model_len: int | None = None  # tokens; None: the model's context, or what the cache holds if that is less
    max_num_seqs: int = 128  # requests that run at once
    max_num_batched_tokens: int = 2048  # tokens a step
    kv_cache_memory_bytes: int | None = None  # None: from the memory that is free
    num_gpu_blocks_override: int | None = None  # blocks of the cache, in place of that
    block_size: int = 16  # tokens a block
    seed: int = 0  # of the requests that bring no seed of their own
    enable_prefix_caching: bool = True
    scheduling_policy: str = "fcfs"  # or "priority"
    quantization: str | None = None  # or "int8"
    batch_invariant: bool = False  # refuse to start where answers might depend on who shares the batch
    speculative: int = 0  # tokens proposed a step, found by prompt lookup; 0: none
    prompt_lookup_max: int = 5  # the longest and the shortest n-gram that is looked for
    prompt_lookup_min: int = 5


class Grammar(msgspec.Struct, tag="grammar", frozen=True):
    """What the answers of sequences that come after this, and name its key, must obey. `text` is llguidance's: Lark, or
    its JSON; it has been compiled once, aside, within limits.
    """

    key: str
    text: str


class Constraint(msgspec.Struct, array_like=True, frozen=True):
    """What holds for a sequence's tokens beside its parameters: a grammar, by its key, for those that come after the
    token `end` (None: for all).

    With a `budget`, `end` comes after so many tokens of thinking at the latest; thinking begins after the token
    `start`, or has begun in the prompt.
    """

    grammar: str | None = None
    end: int | None = None
    start: int | None = None
    budget: int | None = None
    thinking: bool = False


class Add(msgspec.Struct, tag="add", frozen=True):
    """A sequence to continue. `arrival` is time.monotonic(), a clock that the machine's processes share."""

    id: str
    prompt: list[int]
    params: SamplingParams  # its n is not looked at: the n sequences of a request are n of these (requests.children)
    arrival: float
    generate: bool = True  # False: nothing is drawn, the prompt's log-probabilities alone are wanted
    priority: int = 0  # the lower goes first, where scheduling_policy is "priority"
    cache_salt: str | None = None  # prefixes are found only by requests with the same salt
    constraint: Constraint | None = None


class BeamSearchParams(msgspec.Struct, frozen=True, kw_only=True):
    """A beam search, under vLLM's names. Of the `beam_width` sequences that it ends with, the best has the largest
    log-probability / length ** length_penalty.
    """

    beam_width: int
    max_tokens: int
    length_penalty: float = 1.0
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False  # whether EOS is one of the tokens
    skip_special_tokens: bool = True  # in the texts
    logprobs: int | None = None  # how many alternatives beside each token
    temperature: float = 0.0  # of no effect, as in vLLM: sequences are ranked by the model's own probabilities

    def __post_init__(self) -> None:
        """Raises ValueError with one sentence for what cannot be."""
        if self.beam_width < 1:
            raise ValueError(f"beam_width must be at least 1, got {self.beam_width}.")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}.")
        if not abs(self.length_penalty) <= STEEPEST:
            raise ValueError(f"length_penalty must be in [-{STEEPEST}, {STEEPEST}], got {self.length_penalty}.")


class AddBeam(msgspec.Struct, tag="add_beam", frozen=True):
    """A prompt to search continuations of: its sequences, best first, come as the outputs of `ids`, all at the end."""

    ids: list[str]  # beam_width of them
    prompt: list[int]
    params: BeamSearchParams
    arrival: float
    priority: int = 0


class Abort(msgspec.Struct, tag="abort", frozen=True):
    """Forget these sequences: their client has gone. An unknown id is no error: it may just have ended. A beam ends
    with any of its sequences.
    """

    ids: list[str]


class Configure(msgspec.Struct, tag="configure", frozen=True):
    config: EngineConfig


class Words(msgspec.Struct, tag="words", frozen=True, kw_only=True):
    """The model's tokenizer, sent before the weights are loaded: the texts of tokenizer.json and of
    tokenizer_config.json.
    """

    tokenizer: str
    settings: str  # JSON in a text, since it may have numbers that msgpack has not
    eos_id: int | None
    bos_id: int | None
    pad_id: int | None


class Ready(msgspec.Struct, tag="ready", frozen=True, kw_only=True):
    """The engine has produced its first real token.

    What the API needs for validation, `/v1/models` and the line it prints.
    """

    vocab_size: int
    max_model_len: int  # prompt and output together; of an encoder-decoder each
    max_num_batched_tokens: int
    max_num_seqs: int
    encoder_decoder: bool  # the output does not continue the prompt, and has a length of its own
    source: bool  # the prompt is read as a whole, in one step, and its tokens have no probabilities
    eos_token_ids: list[int]
    dtype: str
    device: str
    parameters: int
    blocks: int
    block_size: int
    cache_bytes: int
    threads: int
    seconds: dict[str, float]  # what the start-up time went into
    note: str | None = None  # a sentence about a value that was chosen otherwise than one might expect


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """The engine cannot start: one sentence for the person at the terminal."""

    message: str


class TokenLogprobs(msgspec.Struct, array_like=True, frozen=True):
    """Log-probabilities at one position, of the model as it is (before temperature and penalties).

    `top` holds the k most probable tokens, best first; `rank` counts from 1.
    """

    token: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class Timings(msgspec.Struct, array_like=True, frozen=True):
    """When a sequence arrived, was first scheduled, gave its first and its last token: seconds of time.monotonic()."""

    arrival: float
    scheduled: float
    first_token: float
    finished: float
    preemptions: int


class Output(msgspec.Struct, array_like=True, omit_defaults=True):
    """What one step added to one sequence. The text is settled: partial characters and stops are held back."""

    id: str
    text: str = ""
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None  # stop | length | abort | error
    stop_reason: int | str | None = None  # the stop string or stop token; None for EOS
    error: str | None = None
    timings: Timings | None = None
    cumulative_logprob: float | None = None  # of all tokens, in nats; told where a beam search has compared it
    cached: int = 0  # prompt tokens that were found in the prefix cache: told once, in the first output
    impossible: bool = False  # the error is what the request asks for, and no fault of the engine


class Stats(msgspec.Struct, array_like=True):
    """Counters of one step (not totals), and how full the engine is after it."""

    running: int = 0
    waiting: int = 0
    cache_usage: float = 0.0  # 0 to 1
    tokens: int = 0  # computed in this step
    prompt_tokens: int = 0  # of these, tokens of a prompt
    generated: int = 0
    preemptions: int = 0
    prefix_queries: int = 0  # tokens that were looked up in the prefix cache,
    prefix_hits: int = 0  # and of these, found
    prefix_seconds: float = 0.0  # spent on hashing and on looking up
    seconds: float = 0.0  # of the whole step,
    model_seconds: float = 0.0  # and of this, of the model
    drafts: int = 0  # times that tokens were proposed,
    drafted: int = 0  # the tokens,
    accepted: int = 0  # of these, those that the model agreed with,
    accepted_at: list[int] = []  # and how many that were at each place of a draft


class Step(msgspec.Struct, tag="step"):
    outputs: list[Output]
    stats: Stats


ToEngine = Add | AddBeam | Abort | Configure | Grammar
FromEngine = Words | Ready | Failed | Step
