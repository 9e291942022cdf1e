"""schemathesis: calls made of /openapi.json are answered as /openapi.json says, and none is a server error.

A short run; `python -m bench.fuzz --schemathesis 300` makes a long one.
"""

from __future__ import annotations

import pytest

from .conftest import PYTHON, ROOT, run


@pytest.mark.timeout(600)
def test_answers_are_what_the_description_says() -> None:
    said = run([PYTHON, "-m", "bench.fuzz", "--schemathesis", "1"], cwd=ROOT, seconds=500)
    assert "0 failures" in said
