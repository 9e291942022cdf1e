"""Pictures of an attention record (lm.trace.Maps): matplotlib figures, written as PNG or SVG, and one HTML page.

    matrix   one head, the papers' alignment matrix (arXiv 1409.0473, Fig. 3)
    grid     every head of every layer of a kind, small
    lines    two rows of tokens joined by lines (arXiv 1706.03762, Figs. 3 to 5)
    page     all of it, to click through, in one file that asks nothing of the network

matplotlib is imported here alone (and by train/plot.py, for the loss), where a picture is drawn.
"""

from __future__ import annotations

from lm.pictures.canvas import save
from lm.pictures.labels import labels
from lm.pictures.lines import lines
from lm.pictures.matrix import grid, matrix
from lm.pictures.page import page

__all__ = ["grid", "labels", "lines", "matrix", "page", "save"]
