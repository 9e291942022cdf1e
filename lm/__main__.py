"""`python -m lm VERB ...`: what can be done with a model folder without a server."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

# Before torch is imported: a thread that waits for another spins for some microseconds and then sleeps. By default it
# spins far longer, and where another program wants a core, decoding's many small operations take several times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Each module has main(argv) -> exit status.
VERBS = {
    "attend": "lm.attend",
    "convert": "lm.convert",
    "generate": "lm.generate",
    "score": "lm.score",
    "translate": "lm.translate",
}

USAGE = """usage: python -m lm generate MODEL PROMPT [options]
       python -m lm translate FOLDER [options] < SOURCE > TARGET
       python -m lm score FOLDER --source FILE --target FILE [options]
       python -m lm attend FOLDER SENTENCE --out FILE [options]
       python -m lm convert SOURCE DEST [options]

generate   continue a prompt with a model folder or GGUF file, on the console
translate  translate lines of text
score      the probability of given translations
attend     show what each attention head looks at: a picture, a page or numbers
convert    write a model folder or GGUF file as another
(each verb explains its options with --help)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; the exit status is its own, 2 for a verb that does not exist."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in VERBS:
        return importlib.import_module(VERBS[argv[0]]).main(argv[1:])
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    problem = f"{argv[0]} is not a verb; the verbs are {', '.join(VERBS)}." if argv else "a verb must come first."
    print(f"{problem}\n\n{USAGE}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
