"""Tokens as a reader wants to see them along the axes of a picture."""

from __future__ import annotations

from collections.abc import Sequence

from lm.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
JOIN = "\u203f"  # an undertie: this token goes on with the word before
PART = "\u2026"  # an ellipsis: bytes of a character that a later token completes
SPACES = {" ": "\u2423", "\n": "\u21b5", "\r": "\u240d", "\t": "\u21e5"}  # shown where a token is nothing else


def labels(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """A label for each id: its text without the space in front; special tokens by their name.

    A token that goes on with a word is marked with JOIN. A byte-level token need not be a whole character: the one that
    completes it shows it, those before show PART. Characters that cannot be seen are written as escapes.
    """
    special = {id for id, token in tokenizer.inner.get_added_tokens_decoder().items() if token.special}
    shown: list[str] = []
    plain: list[int] = []  # the ids since the last special token; text is decoded with what stands before it
    settled = ""
    for id in ids:
        if id in special:
            shown.append(visible(tokenizer.inner.id_to_token(id) or str(id)))
            plain, settled = [], ""
            continue
        plain.append(id)
        text = tokenizer.decode(plain)
        whole = text.rstrip(REPLACEMENT)
        piece, before = whole[len(settled) :], settled
        settled = max(settled, whole, key=len)
        if not piece:
            shown.append(PART)
        elif before and not before[-1].isspace() and before[-1].isalnum() and piece[0].isalnum():
            shown.append(JOIN + visible(piece))
        else:
            shown.append(visible(piece))
    return shown


def visible(text: str) -> str:
    """`text` without spaces around it, or what stands for them where there is nothing else; no control characters."""
    kept = text.strip() or "".join(SPACES.get(character, character) for character in text)
    return "".join(c if c.isprintable() else SPACES.get(c) or c.encode("unicode_escape").decode() for c in kept)
