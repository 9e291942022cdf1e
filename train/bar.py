"""The progress bar of lm."""

from lm.bar import bar

__all__ = ["bar"]
