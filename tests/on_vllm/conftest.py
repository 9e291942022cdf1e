"""Real vLLM with our plugin in it, and the models that are asked there and here. `make test-vllm` runs these tests.

vLLM has an environment of its own (bench/peers.py makes it). This package comes to it as `pip install --no-deps` would
bring it: on the path, with the entry points of pyproject.toml.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from lm import DecoderConfig, DecoderLM, pretrained
from lm.tokenizer import Tokenizer, train_bpe
from serve import LLM, SamplingParams

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 420.0  # seconds for a start
TEXT = """Shall I compare thee to a summer's day? Thou art more lovely and more temperate.
Rough winds do shake the darling buds of May, and summer's lease hath all too short a date.
Sometime too hot the eye of heaven shines, and often is his gold complexion dimmed;
And every fair from fair sometime declines, by chance, or nature's changing course, untrimmed.
But thy eternal summer shall not fade, nor lose possession of that fair thou owest,
Nor shall death brag thou wanderest in his shade, when in eternal lines to time thou growest.
So long as men can breathe, or eyes can see, so long lives this, and this gives life to thee.
Let me not to the marriage of true minds admit impediments. Love is not love
Which alters when it alteration finds, or bends with the remover to remove.
O no! it is an ever-fixed mark that looks on tempests and is never shaken;
It is the star to every wandering bark, whose worth's unknown, although his height be taken.
Love's not Time's fool, though rosy lips and cheeks within his bending sickle's compass come;
Love alters not with his brief hours and weeks, but bears it out even to the edge of doom.
If this be error and upon me proved, I never writ, nor no man ever loved.
"""
TEMPLATE = (
    "{% for message in messages %}{{ message.content }}\n{% endfor %}{% if add_generation_prompt %}So long{% endif %}"
)


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The interpreter of vLLM's environment, which is made where it is missing."""
    from bench import peers

    return peers.vllm() / "python"


@pytest.fixture(scope="session")
def vllm_variables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables with which that interpreter has this package and its plugin."""
    from bench import peers
    from bench.serve_sides import alone

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed = tmp_path_factory.mktemp("installed")
    about = installed / f"{project['name']}-{project['version']}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n", encoding="utf-8"
    )
    lines = [
        line
        for group, entries in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()))
    ]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return alone() | {
        "PYTHONPATH": f"{installed}{os.pathsep}{ROOT}",
        "VLLM_CACHE_ROOT": str(peers.PEERS / "vllm-cache"),
    }


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    made = train_bpe(TEXT.splitlines(), 400)
    made.settings["chat_template"] = TEMPLATE
    return made


@pytest.fixture(scope="session")
def sharp(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Callable[..., Path]:
    """Makes the folder of a decoder of these options with random weights, wide enough for clear first choices."""

    def make(seed: int = 0, **options: Any) -> Path:
        torch.manual_seed(seed)
        base = {"vocab_size": tokenizer.vocab_size, "context": 128, "layers": 3, "width": 64, "heads": 2, "kv_heads": 1}
        model = DecoderLM(DecoderConfig(**(base | options)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2:
                    parameter.mul_(25 if "embed" in name or "lm_head" in name else 2.5)
        folder = tmp_path_factory.mktemp("sharp") / "model"
        pretrained.save(model, folder, tokenizer=tokenizer)
        return folder

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A decoder of no standard shape (squared ReLU, windows, a soft cap), trained until it knows the text by heart."""
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        context=256,
        layers=3,
        width=128,
        heads=4,
        kv_heads=2,
        activation="relu2",
        window=16,
        window_pattern="SSL",
        softcap=15.0,
    )
    model = DecoderLM(config)
    ids = torch.tensor(tokenizer.encode(TEXT))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        begins = torch.randint(len(ids) - 97, (8, 1)) + torch.arange(97)
        rows = ids[begins]
        loss = model({"tokens": rows[:, :-1], "targets": rows[:, 1:]})
        mean = loss.total / loss.targets
        mean.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(mean) < 1.0, f"the model did not learn the text: a loss of {mean:.2f}"
    folder = tmp_path_factory.mktemp("trained") / "model"
    pretrained.save(model, folder, tokenizer=tokenizer)
    assert pretrained.read_architecture(folder) == pretrained.OWN_ARCHITECTURE
    return folder


@pytest.fixture(scope="session")
def ask_vllm(
    vllm_python: Path, vllm_variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[list[Any]]]:
    """For each folder and prompt of token ids, vLLM's greedy answer: [token, the two best log-probabilities] each."""

    def ask(prompts: list[list[int]], *folders: Path, **settings: Any) -> list[list[Any]]:
        place = tmp_path_factory.mktemp("ask")
        (place / "prompts").write_text(json.dumps(prompts))
        plain = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 1 << 26, "max_num_seqs": 8}
        script = str(Path(__file__).with_name("ask_vllm.py"))
        command = [str(vllm_python), script, "result", "prompts", json.dumps(plain | settings), *map(str, folders)]
        variables = vllm_variables | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        done = subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return json.loads((place / "result").read_text())

    return ask


@pytest.fixture(scope="session")
def ask_native() -> Callable[..., list[Any]]:
    """The native engine's answers to the same, of one folder."""

    def ask(prompts: list[list[int]], folder: Path) -> list[Any]:
        llm = LLM(str(folder), dtype="float32", kv_cache_memory_bytes=1 << 26)
        params = SamplingParams(max_tokens=24, temperature=0, logprobs=2, ignore_eos=True)
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        return [
            [
                (token, sorted((entry.logprob for entry in row.values()), reverse=True)[:2])
                for token, row in zip(output.token_ids, output.logprobs, strict=True)
            ]
            for output in (result.outputs[0] for result in llm.generate(asked, params))
        ]

    return ask


@pytest.fixture(scope="session")
def serving(
    vllm_python: Path, vllm_variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., contextlib.AbstractContextManager[str]]:
    """`with serving(folder, "vllm", *flags) as url`: `python -m serve` by that engine, ended with the block."""

    @contextlib.contextmanager
    def start(folder: Path, engine: str, *flags: str) -> Iterator[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        place = tmp_path_factory.mktemp(engine)
        python = vllm_python if engine == "vllm" else Path(sys.executable)
        command = [str(python), "-m", "serve", str(folder), "--engine", engine, "--port", str(port), *flags]
        variables, cwd = (vllm_variables, place) if engine == "vllm" else (dict(os.environ), ROOT)
        log = place / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, cwd=cwd, env=variables, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            url = f"http://127.0.0.1:{port}"
            wait(url, process, log)
            yield url
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    return start


def wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Returns when the server is ready; fails with what it said where it is not."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(0.2)
    pytest.fail(f"the server did not come up (status {process.poll()}):\n{log.read_text(errors='replace')[-4000:]}")
