"""The README's and the serving page's examples, taken from there and run against a real server on a tiny model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PORT = "http://127.0.0.1:8000"


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language in a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", ["README.md", "docs/serving.md"])
def test_the_python_examples_print_text(page: str, tiny_server) -> None:
    examples = blocks(page, "python")
    assert any(PORT in example for example in examples)
    for example in examples:
        code = example.replace(PORT, tiny_server.url).replace(
            'LLM("runs/demo/model")', f"LLM({str(tiny_server.folder)!r})"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout


@pytest.mark.parametrize("page", ["README.md", "docs/serving.md"])
def test_the_curl_examples_answer_with_a_completion(page: str, tiny_server) -> None:
    examples = [block for block in blocks(page, "bash") if block.startswith(f"curl {PORT}/v1/completions")]
    assert examples
    for example in examples:
        command = example.replace(PORT, tiny_server.url).replace(
            "curl ", "curl --silent --show-error --fail-with-body ", 1
        )
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        answer = json.loads(done.stdout)
        assert answer["object"] == "text_completion"
        assert answer["model"] == "runs/demo/model"
        assert answer["usage"]["completion_tokens"] >= 1


def test_the_two_commands_stand_first_and_exist() -> None:
    first = blocks("README.md", "bash")[0]
    assert re.findall(r"^make (\w+)", first, re.MULTILINE) == ["demo", "test"]


@pytest.mark.parametrize(
    "shown",
    [
        "data.text=my.txt",
        "data.text=books/**/*.txt",
        "data.text=rows.jsonl data.text_key=",
        "data.dataset=",
        "data.streaming=true",
    ],
)
def test_each_kind_of_text_is_shown(shown: str) -> None:
    assert shown in README
