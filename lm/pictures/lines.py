"""Attention as lines between two rows of tokens (arXiv 1706.03762, Figs. 3 to 5): who attends above, to whom below.

A line is as strong as its weight, and has its head's colour. One word's lines alone, with bars below that show how much
each head gives to each token, are what Fig. 3 ("making") and Fig. 4 ("its") show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from unicodedata import east_asian_width

from lm.pictures.canvas import COLOURS, POINTS, every, figure, font_points, heading, plain, size_of
from lm.trace import Maps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL, LARGEST, HEIGHT = 0.28, 24.0, 2.6  # inches: between tokens, of the whole width, between the two rows
FAINTEST = 0.02  # a weight below is not drawn
BAR = 0.09  # inches: a head's bar at a token


def lines(
    maps: Maps,
    kind: str,
    layer: int,
    heads: Sequence[int] | None = None,
    *,
    word: int | None = None,
    title: str | None = None,
) -> Figure:
    """The heads (numbers; None: all that were recorded) of one layer. word: the one query whose lines are drawn."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    queries, keys = maps.axes(kind)
    numbers = maps.head_numbers(kind)
    heads = numbers if heads is None else list(heads)
    longest = max(len(queries), len(keys))
    width = size_of(longest, CELL, LARGEST)
    cell = width / longest
    points = font_points(cell)
    made = figure()
    made.set_size_inches(width, HEIGHT)
    axes = made.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(0, HEIGHT)
    axes.set_axis_off()
    above = [(i + 0.5) * cell + (width - len(queries) * cell) / 2 for i in range(len(queries))]
    below = [(i + 0.5) * cell + (width - len(keys) * cell) / 2 for i in range(len(keys))]
    floor = BAR * len(heads) if word is not None else 0.0
    for number, head in enumerate(heads):
        weights = maps.of(kind)[layer][numbers.index(head)]
        colour = COLOURS[number % len(COLOURS)]
        drawn = (weights >= FAINTEST).nonzero().tolist()
        drawn = [(i, j) for i, j in drawn if word is None or i == word]
        drawn.sort(key=lambda pair: float(weights[pair[0], pair[1]]))  # the strongest on top
        axes.add_collection(
            LineCollection(
                [[(above[i], HEIGHT), (below[j], floor)] for i, j in drawn],
                colors=[to_rgba(colour, float(weights[i, j].clamp(0, 1))) for i, j in drawn],
                linewidths=[0.5 + 1.8 * float(weights[i, j]) for i, j in drawn],
                capstyle="butt",
            )
        )
        if word is None:
            continue
        for j, weight in enumerate(weights[word].tolist()):
            if weight >= FAINTEST:
                corner = (below[j] - 0.45 * cell, floor - (number + 1) * BAR)
                axes.add_patch(Rectangle(corner, 0.9 * cell, BAR, color=to_rgba(colour, min(1.0, weight)), lw=0))
    texts = []
    step = every(cell, points)
    for tokens, xs, y, side in ((queries, above, HEIGHT + 0.06, "bottom"), (keys, below, -0.06, "top")):
        for i, (token, x) in enumerate(zip(tokens, xs, strict=True)):
            chosen = side == "bottom" and i == word
            if i % step == 0 or chosen:
                pale = word is not None and side == "bottom" and not chosen
                texts.append(axes.text(x, y, token, rotation=90, ha="center", va=side, clip_on=False))
                texts[-1].set_color("0.6" if pale else "black")
                if chosen:
                    texts[-1].set_bbox({"facecolor": "0.85", "edgecolor": "none", "pad": 1.2})
    plain(texts, points)
    text = heading(kind, layer, heads[0] if len(heads) == 1 else None) if title is None else title
    # Of the tokens below, about: a letter is 0.62 of its height wide, an East Asian one as wide as it is high.
    depth = max(sum(1.0 if east_asian_width(c) in "WF" else 0.62 for c in token) for token in keys) * points / POINTS
    _name(axes, text, heads, width, -depth - 0.25)
    return made


def _name(axes: Axes, text: str, heads: Sequence[int], width: float, y: float) -> None:
    """The title under the drawing, and below it the heads, each in its colour."""
    plain([axes.text(width / 2, y, text, ha="center", va="top", fontsize=9, clip_on=False)])
    if len(heads) > 1:
        apart = 0.6
        for number, head in enumerate(heads):
            x = width / 2 + (number - (len(heads) - 1) / 2) * apart
            colour = COLOURS[number % len(COLOURS)]
            axes.text(x, y - 0.22, f"head {head}", ha="center", va="top", fontsize=8, color=colour, clip_on=False)
