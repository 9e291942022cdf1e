"""The lines of docs/clients.md, run as they stand there but for the address and the key."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from .conftest import KEY, ROOT, run

PAGE = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def here(text: str, url: str) -> str:
    assert "http://127.0.0.1:8000" in text
    return text.replace("http://127.0.0.1:8000", url)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.split()[1])
def test_an_example_in_python(server, tmp_path: Path, example: str) -> None:
    said = run([sys.executable, "-c", here(example, server.url).replace('"none"', f'"{KEY}"')], cwd=tmp_path)
    assert "Paris" in said


def test_the_line_for_guidellm(server, folder: Path, tmp_path: Path) -> None:
    (line,) = re.findall(r"^guidellm (?:.*\\\n)*.*$", PAGE, re.MULTILINE)
    line = (
        here(line, server.url).replace("FOLDER", str(folder)).replace("model=smollm2", f"model=smollm2,api_key={KEY}")
    )
    program, *words = shlex.split(line.replace("\\\n", " "))
    run([str(Path(sys.executable).parent / program), *words, "--disable-console"], cwd=tmp_path, HF_HOME=str(tmp_path))
