"""`python -m lm convert SOURCE DEST`: between model folders, ours and others', and GGUF files, either way."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lm.tokenizer import Tokenizer

# What --dtype takes -> its one name.
DTYPES = {
    "float32": "float32",
    "f32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "f16": "float16",
    "q8_0": "q8_0",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 with one sentence for what cannot be as asked."""
    options = parser().parse_args(argv)
    try:
        print(convert(options.source, options.dest, options.dtype))
    except ValueError as error:  # FolderError and TokenizerError, each one sentence
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{options.dest} cannot be written: {error.strerror or error}.", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m lm convert",
        description="Write a model folder or GGUF file as another: DEST is a GGUF file where it ends in .gguf, "
        "else a folder under the architecture's own name.",
    )
    parser.add_argument("source", help="a model folder or a GGUF file")
    parser.add_argument("dest", help="a folder that is not there yet, or FILE.gguf")
    known = ", ".join(DTYPES)
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", metavar="DTYPE", help=known)
    return parser


def convert(source: str | Path, dest: str | Path, dtype: str = "auto") -> str:
    """Read SOURCE, write DEST, say what was written. `dtype` auto is the source's own; q8_0 is for GGUF alone.

    Raises FolderError or TokenizerError, one sentence.
    """
    from lm import pretrained

    source, dest = Path(source), Path(dest)
    to_gguf = dest.suffix == ".gguf"
    if dest.exists():
        raise pretrained.FolderError(f"{dest} is there already; it must be a new name.")
    own = next(name for name, value in pretrained.DTYPES.items() if value == pretrained.own_dtype(source))
    kind = own if dtype == "auto" else DTYPES[dtype]
    if kind == "q8_0" and not to_gguf:
        raise pretrained.FolderError(f"--dtype is q8_0 and {dest} is a folder; q8_0 is for GGUF files.")
    if kind == "q8_0":
        model = pretrained.load(source, pretrained.DTYPES["float32"])
    else:
        model = pretrained.load(source, pretrained.DTYPES[kind])
    tokenizer = _tokenizer(source)
    if to_gguf:
        from lm import gguf_write

        gguf_write.write(model, tokenizer, dest, kind, source.stem)
        what = f"a GGUF file of {kind}"
    else:
        generation = _generation(source, tokenizer)
        pretrained.save(model, dest, dtype=pretrained.DTYPES[kind], tokenizer=tokenizer, generation=generation)
        what = f"a {pretrained.family_of(model.config).architecture} folder of {kind}"
    without = "" if tokenizer is not None else ", without a tokenizer"
    return f"{dest}: {what}{without}, {model.config.parameters()['total']:,} parameters."


def _tokenizer(source: Path) -> Tokenizer | None:
    """The source's tokenizer; None where a folder has none. One that is there and unreadable is a TokenizerError."""
    from lm import gguf, pretrained

    if source.is_dir() and not (source / "tokenizer.json").exists():
        return None
    if source.is_file() and "tokenizer.ggml.model" not in gguf.read(source).metadata:
        return None
    return pretrained.load_tokenizer(source)


def _generation(source: Path, tokenizer: Tokenizer | None) -> dict:
    """What the new folder's generation_config.json should say beyond the tokenizer's own EOS."""
    from lm import pretrained

    if source.is_dir():
        return pretrained.read_generation(source)
    ends = [] if tokenizer is None else pretrained.stop_ids(source, tokenizer)
    return {"eos_token_id": ends} if len(ends) > 1 else {}
