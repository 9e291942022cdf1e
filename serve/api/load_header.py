"""What an answer's header tells a router of the server's load, where the request asks for it.

The header is ORCA's (Open Request Cost Aggregation), as vLLM writes it: `endpoint-load-metrics-format: TEXT` or `JSON`
in the request; in the answer `endpoint-load-metrics` with the share of the KV cache in use and the sequences that wait.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

ASKED = "endpoint-load-metrics-format"


def load_header(asked: str | None, load: Mapping[str, float]) -> dict[str, str]:
    """The header for the form that is `asked` for; none for another form. `load`: by name."""
    form = (asked or "").lower()
    if form == "text":
        told = "TEXT " + ", ".join(f"named_metrics.{name}={value}" for name, value in load.items())
    elif form == "json":
        told = "JSON " + json.dumps({"named_metrics": dict(load)})
    else:
        return {}
    return {"endpoint-load-metrics": told}
