"""The attention page: one HTML file with the maps, the tokens and all that shows them; it asks nothing of a network."""

from __future__ import annotations

import base64
import html
import json
import re
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from lm.alignment import entropy
from lm.pictures.canvas import COLOURS, heading, is_alignment
from lm.trace import Maps


def page(
    maps: Maps,
    *,
    title: str = "Attention",
    source: str = "",
    target: str = "",
    lines: bool = False,
    word: int | None = None,
) -> str:
    """The page for one sentence's record. title: of the window and the page; source, target: the texts, shown as such.

    It opens with the last kind that was recorded, as lines or as a matrix, with the query `word` alone where one is
    named. Weights are kept as bytes: one is at most 1/510 from what the page says.
    """
    assets = resources.files("lm.pictures") / "assets"
    parts = {name: (assets / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")}
    # Where a script's data ends is the parser's to say, not a string's: no "<" stands in it.
    opening = {"view": "lines" if lines else "matrix"} | ({} if word is None else {"word": word})
    told = {"title": title, "source": source, "target": target, "opening": opening, "colours": list(COLOURS)}
    data = json.dumps(told | {"kinds": page_kinds(maps)}, ensure_ascii=True).replace("<", "\\u003c")
    filled = {"title": html.escape(title), "style": parts["page.css"], "script": parts["page.js"], "data": data}
    return re.sub(r"\{\{(title|style|script|data)\}\}", lambda mark: filled[mark[1]], parts["page.html"])


def page_kinds(maps: Maps) -> list[dict[str, Any]]:
    """The maps as page.js reads them, a kind each."""
    kinds = []
    for kind in maps.kinds:
        queries, keys = maps.axes(kind)
        layers = maps.of(kind)
        one: dict[str, Any] = {
            "kind": kind,
            "name": "Alignment" if is_alignment(maps) else heading(kind),
            "queries": queries,
            "keys": keys,
            "layers": list(layers),
            "heads": maps.head_numbers(kind),
            # uint8 [layers, heads, queries, keys]: round(255 x weight)
            "weights": _bytes(torch.stack(list(layers.values()))),
            "entropy": [[round(v, 3) for v in entropy(w).mean(-1).tolist()] for w in layers.values()],
        }
        if kind == "cross" and maps.energies:
            energies = torch.stack(list(maps.energies.values()))
            finite = energies[torch.isfinite(energies)]
            low, high = float(finite.min()), float(finite.max())
            one["energies"] = {
                "low": low,
                "high": high,
                "values": _bytes((energies.clamp(min=low) - low) / max(high - low, 1e-9)),
            }
        kinds.append(one)
    return kinds


def _bytes(values: Tensor) -> str:
    return base64.b64encode((values * 255).round().clamp(0, 255).to(torch.uint8).numpy().tobytes()).decode()
