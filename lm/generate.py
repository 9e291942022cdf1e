"""`python -m lm generate MODEL PROMPT`: continue a prompt, written to the console as it comes."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator, Sequence

from lm.console import reader_left
from lm.params import SamplingParams
from lm.tokenizer import Tokenizer

DTYPES = ("auto", "float32", "bfloat16", "float16")
REPLACEMENT = "\ufffd"
UNFINISHED = 3  # a character that lacks its last byte shows as at most this many replacement signs


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0; 2 with one sentence for what cannot be as asked; 130 after Ctrl-C."""
    options = parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a console that lacks a character is no reason to end
    try:
        texts = continuation(options.folder, options.prompt, params(options), options.dtype)
    except ValueError as error:  # of the folder, the tokenizer, the options or the prompt; each is one sentence
        print(error, file=sys.stderr)
        return 2
    try:
        print(options.prompt, end="", flush=True)
        for text in texts:
            print(text, end="", flush=True)
        print(flush=True)
    except KeyboardInterrupt:
        print()
        return 130
    except BrokenPipeError:
        reader_left()
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m lm generate",
        description="Continue a prompt with a model folder or GGUF file, on the console as it comes.",
    )
    add = parser.add_argument
    add("folder", metavar="MODEL", help="a model folder (config.json, model.safetensors, tokenizer.json) or GGUF file")
    add("prompt", help="the text to continue")
    add("--max-tokens", type=int, default=256, help="tokens to add at most (default 256)")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token (default 0.8)")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this mass (default 1)")
    add("--top-k", type=int, default=0, help="draw from this many likeliest tokens (default 0: all)")
    add("--min-p", type=float, default=0.0, help="least share of the likeliest one's probability (default 0)")
    add("--seed", type=int, help="the same seed gives the same text (default: another each time)")
    add("--dtype", choices=DTYPES, default="auto", help="to compute in (default auto: the model's own)")
    return parser


def params(options: argparse.Namespace) -> SamplingParams:
    """The options as sampling parameters. Raises ValueError, one sentence."""
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed")
    return SamplingParams(**{name: getattr(options, name) for name in names})


def continuation(folder: str, prompt: str, params: SamplingParams, dtype: str = "auto") -> Iterator[str]:
    """The text that the folder's model puts after `prompt`, in pieces, each final when it is given out.

    Everything is checked and loaded before this returns. Raises ValueError, one sentence, for a folder that cannot be
    read (FolderError, TokenizerError) and for a prompt that is empty, no text or too long.
    """
    import torch

    from lm import pretrained, search

    model = pretrained.load(folder, None if dtype == "auto" else getattr(torch, dtype))
    tokenizer = pretrained.load_tokenizer(folder)
    size, context = model.config.vocab_size, model.config.context
    if any(0xD800 <= ord(character) <= 0xDFFF for character in prompt):
        raise ValueError("the prompt is not UTF-8; it must be text.")
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("the prompt is empty; it must hold at least one token.")
    if max(ids) >= size:
        raise ValueError(f"the prompt has token {max(ids)}; it must be below the model's vocabulary size, {size}.")
    if len(ids) >= context:
        raise ValueError(f"the prompt has {len(ids)} tokens; it must have fewer than the model's context, {context}.")

    def pieces() -> Iterator[str]:
        text = TextStream(tokenizer, ids)
        for produced in search.stream(model, [ids], params, pretrained.stop_ids(folder, tokenizer)):
            yield text.feed(produced[0][1])
        yield text.finish()

    return pieces()


class TextStream:
    """Ids to text as they come: a character is given out when all its bytes are there.

    What is given out, joined, is what decoding prompt and ids at once puts after the prompt, whatever the tokenizer
    does with spaces or broken bytes; for that all is decoded again with each token, which costs less than computing it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self.tokenizer, self.ids = tokenizer, list(prompt)
        self.shown = self._settled(tokenizer.decode(self.ids))

    def feed(self, id: int) -> str:
        """The text that this token settles; "" inside a character."""
        self.ids.append(id)
        text = self.tokenizer.decode(self.ids)
        return self._give(text, self._settled(text))

    def finish(self) -> str:
        """What is left: signs for a character that was never completed."""
        text = self.tokenizer.decode(self.ids)
        return self._give(text, len(text))

    def _give(self, text: str, settled: int) -> str:
        piece = text[self.shown : settled]
        self.shown = max(self.shown, settled)
        return piece

    @staticmethod
    def _settled(text: str) -> int:
        """How many characters no later byte can change."""
        return len(text) - min(UNFINISHED, len(text) - len(text.rstrip(REPLACEMENT)))
