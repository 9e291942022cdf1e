"""`python -m lm attend FOLDER "sentence" --out FILE`: what each head attended to, as a picture, a page or numbers."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm.trace import KINDS, AttentionTrace, Maps

if TYPE_CHECKING:
    from lm.tokenizer import Tokenizer

OUTPUTS = (".png", ".svg", ".html", ".json", ".safetensors")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0; 2 with one sentence for what cannot be as asked; 130 after Ctrl-C."""
    options = parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a console that lacks a character is no reason to end
    try:
        check(options)
        seen = look(options)
        if seen.output is not None:
            print(seen.output, flush=True)
        write(seen, options)
    except OSError as error:
        print(f"{options.out} cannot be written: {error.strerror}.", file=sys.stderr)
        return 2
    except ValueError as error:  # of the folder, the tokenizer, the options or the sentence; each is one sentence
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m lm attend",
        description="Show what a model's heads attended to. Layers and heads are counted from 0.",
        epilog="Without --head a picture shows every head (of one layer, with --layer); with it, one head and its "
        "tokens. The page (.html) shows all that is recorded, to click through.",
    )
    add = parser.add_argument
    add(
        "folder", metavar="FOLDER", help="a model folder or GGUF file; or a record, .safetensors, that was written here"
    )
    add("sentence", nargs="?", help="the source to translate; for a language model, the text to read")
    add("--out", metavar="FILE", required=True, help=f"what to write: {', '.join(OUTPUTS)}")
    add("--target", help="read this output in place of searching for one")
    add("--beam", type=int, default=1, help="hypotheses that are followed in search (default 1: greedy)")
    add("--max-tokens", type=int, help="output at most (default: 50 more than the source has; a language model: none)")
    add("--kind", choices=KINDS, help="record this kind alone; a picture's is the model's last of these by default")
    add("--layer", type=int, help="record this layer alone (default: all)")
    add("--head", type=int, help="record this head alone (default: all)")
    add("--lines", action="store_true", help="lines between two rows of tokens, a colour a head, in place of squares")
    add("--word", help="only the lines of this token: itself, or its number counted from 0")
    add(
        "--energies",
        action="store_true",
        help="RNNsearch's energies in place of the weights that they are softmaxed to",
    )
    return parser


def check(options: argparse.Namespace) -> None:
    """What is wrong with the options alone, before anything is loaded. Raises ValueError, one sentence."""
    out = Path(options.out)
    if out.suffix.lower() not in OUTPUTS:
        raise ValueError(f"--out is {options.out}; its name must end in one of {', '.join(OUTPUTS)}.")
    if not out.parent.is_dir():
        raise ValueError(f"--out is {options.out}; the folder {out.parent} does not exist.")
    if options.target is not None and options.beam != 1:
        raise ValueError("--beam searches for an output; it cannot be given with --target, which is one.")
    if options.energies and (options.lines or options.word is not None or out.suffix.lower() not in (".png", ".svg")):
        raise ValueError("--energies is for a matrix in a picture; lines are weights, and every other file has both.")
    for name in ("layer", "head"):
        value = getattr(options, name)
        if value is not None and value < 0:
            raise ValueError(f"--{name} is {value}; {name}s are counted from 0.")


@dataclass(frozen=True)
class Seen:
    """A sentence's record, what was read, and the output; None where nothing was written or it is not known."""

    maps: Maps
    source: str
    output: str | None
    title: str


def look(options: argparse.Namespace) -> Seen:
    """Run the model over the sentence, or read the record that `options.folder` is. Raises ValueError."""
    path = Path(options.folder)
    if path.suffix == ".safetensors" and path.is_file():
        return Seen(Maps.load(path), "", None, path.stem)
    if options.sentence is None:
        raise ValueError("a sentence must be given; only a record (.safetensors) needs none.")
    from lm import pretrained

    model, tokenizer = pretrained.load(path), pretrained.load_tokenizer(path)
    trace = AttentionTrace(
        kinds=KINDS if options.kind is None else [options.kind],
        layers=None if options.layer is None else [options.layer],
        heads=None if options.head is None else [options.head],
    )
    maps, output = attention(
        model,
        tokenizer,
        options.sentence,
        pretrained.stop_ids(path, tokenizer),
        trace,
        target=options.target,
        beam=options.beam,
        max_tokens=options.max_tokens,
    )
    found(trace, maps, options)
    return Seen(maps, options.sentence, output, f"Attention of {'/'.join(path.resolve().parts[-2:])}")


def found(trace: AttentionTrace, maps: Maps, options: argparse.Namespace) -> None:
    """Whether what was asked for is what the model has. Raises ValueError, one sentence."""
    if not trace.offered:
        raise ValueError("this model attends to nothing: its context is one fixed state.")
    if options.kind is not None and options.kind not in trace.offered:
        have = " and ".join(kind for kind in KINDS if kind in trace.offered)
        raise ValueError(f"--kind is {options.kind}; this model has {have} attention alone.")
    if not maps.kinds:
        layers = max(max(trace.offered[kind]) for kind in trace.kinds if kind in trace.offered)
        raise ValueError(f"--layer is {options.layer}; this model's layers are 0 to {layers}.")


def attention(
    model: Any,
    tokenizer: Tokenizer,
    sentence: str,
    stop_ids: Sequence[int],
    trace: AttentionTrace,
    *,
    target: str | None = None,
    beam: int = 1,
    max_tokens: int | None = None,
) -> tuple[Maps, str | None]:
    """The record of one sentence with the tokens of its axes, and the output's text.

    A model that translates writes the likeliest output that a beam of that width finds (1: greedy), or reads `target`;
    it is one whose encoder reads the sentence, or whose prompt ends with the token that begins a translation. Any other
    reads the sentence (and target) as they stand, and writes nothing unless max_tokens says so (None is returned).
    Raises ValueError, one sentence, for what is empty, too long, or beyond the record's bounds.
    """
    from lm.beam import BeamParams, beam_search

    source = encode(model, tokenizer, "sentence", sentence)
    if not sentence.strip():
        raise ValueError("the sentence is empty; it must hold at least one token.")
    room = model.room(len(source))
    translates = model.encoder_decoder or source[-1] == tokenizer.bos_id
    if target is not None or not (translates or max_tokens):
        read = encode(model, tokenizer, "target", target or "", add_special_tokens=False)
        most = room - 1 if translates else room  # a translation has an end as well
        if len(read) > most:
            raise ValueError(f"the target has {len(read)} tokens; after this sentence it may have {most} at most.")
        maps = forced(model, source, read, trace)
        written, output = [*read, *stop_ids[:1]], target
    else:
        params = BeamParams(beam=beam, max_tokens=max_tokens)
        best = beam_search(model, [source], params, stop_ids, record=trace)[0][0]
        assert best.attention is not None
        maps, read = best.attention, best.ids
        written = read if best.end is None else [*read, best.end]
        output = tokenizer.decode(read)
    name(maps, tokenizer, model, source, read, written)
    return maps, output


def encode(model: Any, tokenizer: Tokenizer, what: str, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """The ids of `text`. Raises ValueError for what is no text, and for a token that the model does not know."""
    if any(0xD800 <= ord(character) <= 0xDFFF for character in text):
        raise ValueError(f"the {what} is not UTF-8; it must be text.")
    ids, size = tokenizer.encode(text, add_special_tokens=add_special_tokens), model.config.vocab_size
    if max(ids, default=0) >= size:
        raise ValueError(f"the {what} has token {max(ids)}; it must be below the model's vocabulary size, {size}.")
    return ids


def forced(model: Any, source: Sequence[int], target: Sequence[int], trace: AttentionTrace) -> Maps:
    """Give the model the source and then the target's tokens, one at a time, whatever it would have written."""
    import torch

    device = next(model.parameters()).device
    with torch.inference_mode():
        src = torch.tensor([source], dtype=torch.int64, device=device)
        state = model.start(src, torch.ones_like(src, dtype=torch.bool), record=trace)
        for token in [int(state.first), *target]:
            _, state = model.step(torch.tensor([[token]], device=device), state, record=trace)
    return trace.row(0)


def name(
    maps: Maps, tokenizer: Tokenizer, model: Any, source: Sequence[int], read: Sequence[int], written: Sequence[int]
) -> None:
    """Fill in the tokens of the axes. read: the output's tokens that the decoder was given; written: those that it
    gave, or should have given, at each step, the end with them.
    """
    from lm.pictures import labels

    if model.encoder_decoder:
        maps.source, maps.outputs = labels(tokenizer, source), labels(tokenizer, written)
        inputs = labels(tokenizer, [model.config.start_id, *read])
    else:
        inputs = labels(tokenizer, [*source, *read])
    rows = next((weights.shape[1] for weights in maps.decoder.values()), len(inputs))
    maps.inputs = inputs[:rows]  # a last token that was written and never read is not among them


def write(seen: Seen, options: argparse.Namespace) -> None:
    """Write `options.out`. Raises ValueError for a picture of what is not there, OSError."""
    from lm import pictures

    maps, out = seen.maps, Path(options.out)
    suffix = out.suffix.lower()
    kind = options.kind or maps.kinds[-1]
    if kind not in maps.kinds:
        raise ValueError(f"--kind is {kind}; the record has {' and '.join(maps.kinds)} attention alone.")
    numbers, layers = maps.head_numbers(kind), list(maps.of(kind))
    for given, known, what in ((options.layer, layers, "layer"), (options.head, numbers, "head")):
        if given is not None and given not in known:
            raise ValueError(f"--{what} is {given}; the record has {what}s {', '.join(map(str, known))}.")
    layers = layers if options.layer is None else [options.layer]
    heads = numbers if options.head is None else [options.head]
    word = None if options.word is None else find(options.word, maps.axes(kind)[0])
    as_lines = options.lines or word is not None
    if options.energies and not maps.energies:
        raise ValueError("--energies is given; this model has none: its weights are not kept with their energies.")
    if suffix == ".safetensors":
        maps.save(out)
    elif suffix == ".json":
        out.write_text(json.dumps(numbers_of(seen), ensure_ascii=False) + "\n", encoding="utf-8")
    elif suffix == ".html":
        text = pictures.page(
            maps, title=seen.title, source=seen.source, target=seen.output or "", lines=as_lines, word=word
        )
        out.write_text(text, encoding="utf-8")
    elif as_lines:
        pictures.save(pictures.lines(maps, kind, layers[-1], heads, word=word), out)
    elif len(layers) == len(heads) == 1:
        pictures.save(pictures.matrix(maps, kind, layers[0], heads[0], energies=options.energies), out)
    else:
        pictures.save(pictures.grid(maps, kind, layers, heads), out)


def find(word: str, tokens: Sequence[str]) -> int:
    """Where a token stands: its number, or the first that reads so. Raises ValueError, one sentence."""
    bare = [token.removeprefix("\u203f") for token in tokens]
    for known in (tokens, bare):
        if word in known:
            return list(known).index(word)
    if word.isdecimal() and int(word) < len(tokens):
        return int(word)
    raise ValueError(f"--word is {word}; the tokens are {' '.join(tokens)}.")


def numbers_of(seen: Seen) -> dict[str, Any]:
    """The record as JSON holds it: weights[layer][head][query][key], to six digits."""

    def rounded(layers: dict[int, Any], heads: list[int]) -> dict[str, dict[str, list[list[float]]]]:
        return {
            str(layer): {
                str(head): [[float(f"{value:.6g}") for value in row] for row in one.tolist()]
                for head, one in zip(heads, maps, strict=True)
            }
            for layer, maps in layers.items()
        }

    told: dict[str, Any] = {"title": seen.title, "source": seen.source, "output": seen.output}
    for kind in seen.maps.kinds:
        heads, (queries, keys) = seen.maps.head_numbers(kind), seen.maps.axes(kind)
        told[kind] = {"queries": queries, "keys": keys, "weights": rounded(seen.maps.of(kind), heads)}
        if kind == "cross" and seen.maps.energies:
            told[kind]["energies"] = rounded(seen.maps.energies, heads)
    return told


if __name__ == "__main__":
    sys.exit(main())
