"""What the matplotlib pictures share: a figure without global state, fonts, names, and the file it is written to."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm.trace import Maps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {"encoder": "encoder self-attention", "decoder": "decoder self-attention", "cross": "cross-attention"}
DPI = 160
POINTS = 72  # of an inch
# One colour a head, in this order; past the last they begin again. They are told apart in print and with weak colours.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#8c564b")
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Noto Emoji", "Symbola", "Unifont")


def figure() -> Figure:
    """A figure of its own canvas, known to nobody else: pictures can be drawn in any thread."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(1, 1), dpi=DPI, facecolor="white")
    FigureCanvasAgg(made)
    return made


@cache
def families() -> tuple[str, ...]:
    """Those of FONTS that this machine has, for the scripts that the first one lacks."""
    from matplotlib import font_manager

    known = {font.name for font in font_manager.fontManager.ttflist}
    return tuple(name for name in FONTS if name in known) or ("sans-serif",)


def size_of(cells: int, cell: float, longest: float) -> float:
    """Inches for `cells` of `cell` inches each, never more than `longest` together."""
    return min(cells * cell, longest)


def font_points(cell: float) -> float:
    """The size of a label that has `cell` inches for its line."""
    return max(4.0, min(10.0, 0.72 * cell * POINTS))


def every(cell: float, points: float) -> int:
    """Each how manyth label can be shown at `points` where the lines are `cell` inches apart."""
    return max(1, -int(-points // (cell * POINTS)))


def plain(labels: Sequence[Any], points: float | None = None) -> None:
    """Text is text: no label is read as mathematics, whatever it holds."""
    for label in labels:
        label.set_parse_math(False)
        label.set_fontfamily(families())
        if points is not None:
            label.set_fontsize(points)


def heading(kind: str, layer: int | None = None, head: int | None = None) -> str:
    """What a picture shows, in words."""
    words = [NAMES[kind]]
    if layer is not None:
        words.append(f"layer {layer}")
    if head is not None:
        words.append(f"head {head}")
    text = ", ".join(words)
    return text[0].upper() + text[1:]


def is_alignment(maps: Maps) -> bool:
    """Whether the record is the one alignment that a model learned (RNNsearch's, with its energies), and not a head."""
    return maps.kinds == ["cross"] and len(maps.cross) == len(maps.energies) == len(maps.head_numbers("cross")) == 1


def save(figure: Figure, file: str | os.PathLike[str]) -> None:
    """Write the figure as PNG or SVG, by the file's suffix. Equal pictures are equal files."""
    import matplotlib

    suffix = Path(file).suffix.lower().lstrip(".")
    # Text stays text in SVG: it can be searched, and shows scripts whose fonts the reader has and this machine lacks.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "heed"}
    metadata: dict[str, Any] = {"Date": None} if suffix == "svg" else {"Software": None}
    logger = logging.getLogger("matplotlib.font_manager")
    level = logger.level
    logger.setLevel(logging.ERROR)  # a character that no font has is drawn as a box; that is no news to its writer
    try:
        with matplotlib.rc_context(settings), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            figure.savefig(file, format=suffix, metadata=metadata, bbox_inches="tight", pad_inches=0.12)
    finally:
        logger.setLevel(level)
