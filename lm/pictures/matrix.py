"""Attention as grey squares: one head with its tokens, or every head of every layer, small.

Orientation and shades are those of arXiv 1409.0473, Fig. 3: what is attended to (the source) runs across the top, what
attends (the translation) runs down; black is 0, white is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lm.pictures.canvas import every, figure, font_points, heading, is_alignment, plain, size_of
from lm.trace import Maps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL, LARGEST = 0.26, 18.0  # inches: of a token, and of a whole side
PANEL = 1.0  # inches: of a head's longer side in the grid
WIDEST_GRID = 26.0


def matrix(maps: Maps, kind: str, layer: int, head: int, *, energies: bool = False, title: str | None = None) -> Figure:
    """One head, as large as its tokens need. head: its number. energies: e_ij in place of their softmax (the
    cross-attention of a model that gives them), black the lowest, white the highest.
    """
    queries, keys = maps.axes(kind)
    values = (maps.energies if energies else maps.of(kind))[layer][maps.head_numbers(kind).index(head)]
    finite = values[torch.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if energies and finite.numel() else (0.0, 1.0)
    made = figure()
    width, height = size_of(len(keys), CELL, LARGEST), size_of(len(queries), CELL, LARGEST)
    across, down = width / len(keys), height / len(queries)
    made.set_size_inches(width, height)
    axes = made.add_axes((0, 0, 1, 1))
    image = axes.imshow(values.numpy(), cmap="gray", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    points = font_points(min(across, down))
    axes.xaxis.tick_top()
    columns, rows = range(0, len(keys), every(across, points)), range(0, len(queries), every(down, points))
    axes.set_xticks(columns, [keys[i] for i in columns], rotation=90)
    axes.set_yticks(rows, [queries[i] for i in rows])
    plain([*axes.get_xticklabels(), *axes.get_yticklabels()], points)
    axes.tick_params(length=0, pad=3)
    if energies:
        bar = made.colorbar(image, ax=axes, fraction=0.25 / max(width, 0.5), pad=0.15 / max(width, 0.5))
        bar.set_label("energy e_ij", fontsize=points)
        bar.ax.tick_params(labelsize=points)
    text = "Alignment" if is_alignment(maps) else heading(kind, layer, head)
    if energies:
        text += ": the energies"
    axes.set_xlabel(text if title is None else title, fontsize=9, labelpad=6, parse_math=False)
    return made


def grid(
    maps: Maps,
    kind: str,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Every recorded head, a layer a row, a head a column. In each, white is its own largest weight: heads that spread
    over many tokens would else be black.
    """
    layers = list(maps.of(kind)) if layers is None else list(layers)
    numbers = maps.head_numbers(kind)
    heads = numbers if heads is None else heads
    first = maps.of(kind)[layers[0]]
    _, q, k = first.shape
    gap = max(1, round(0.07 * max(q, k)))  # in cells
    tiles = torch.full((len(layers) * (q + gap) - gap, len(heads) * (k + gap) - gap), torch.nan)
    for i, layer in enumerate(layers):
        for j, head in enumerate(heads):
            weights = maps.of(kind)[layer][numbers.index(head)]
            top, left = i * (q + gap), j * (k + gap)
            # A causal map's first row has but one place to look at: it says nothing about the largest.
            largest = weights[1:].max() if kind == "decoder" and q > 1 else weights.max()
            tiles[top : top + q, left : left + k] = (weights / largest.clamp(min=1e-9)).clamp(max=1)
    rows, columns = tiles.shape
    cell = min(PANEL / max(q, k), WIDEST_GRID / columns, WIDEST_GRID / rows)
    made = figure()
    made.set_size_inches(columns * cell, rows * cell)
    axes = made.add_axes((0, 0, 1, 1))
    # `auto` shows cells as they are where they are larger than a pixel, and averages them where they are smaller.
    axes.imshow(tiles.numpy(), cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="auto")
    axes.xaxis.tick_top()
    axes.set_xticks([j * (k + gap) + (k - 1) / 2 for j in range(len(heads))], [str(head) for head in heads])
    axes.set_yticks([i * (q + gap) + (q - 1) / 2 for i in range(len(layers))], [str(layer) for layer in layers])
    axes.tick_params(length=0, pad=3, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_ylabel("layer", fontsize=9)
    across, down = ("source", "translation") if kind == "cross" else ("attended to", "attending")
    text = f"{heading(kind)}: {len(layers)} x {len(heads)} heads.\nEach: {across} across, {down} down."
    axes.set_xlabel(text if title is None else title, fontsize=9, labelpad=6, parse_math=False)
    axes.set_title("head", fontsize=9, pad=16)
    return made
