"""The README's examples, taken from the README and run against a real server on a tiny model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PORT = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_python_example_streams_text(tiny_server) -> None:
    examples = [block for block in blocks("python") if PORT in block]
    assert examples
    for example in examples:
        code = example.replace(PORT, tiny_server.url)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_the_curl_example_answers_with_a_completion(tiny_server) -> None:
    import json

    examples = [block for block in blocks("bash") if block.startswith("curl ")]
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
    first = blocks("bash")[0]
    assert re.findall(r"^make (\w+)", first, re.MULTILINE) == ["demo", "test"]


@pytest.mark.parametrize("word", ["path", "glob", "JSON lines", "datasets", "streamed"])
def test_each_kind_of_text_is_shown(word: str) -> None:
    shown = {
        "path": "data.text=my.txt",
        "glob": "data.text=books/**/*.txt",
        "JSON lines": "data.text_key=",
        "datasets": "data.dataset=",
        "streamed": "data.streaming=true",
    }
    assert shown[word] in README
