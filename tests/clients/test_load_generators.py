"""Load generators that others wrote: every request comes back, with as many tokens as were asked for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from .conftest import KEY, ROOT, read, run

VLLM = ROOT / ".cache" / "bench" / "peers" / "vllm" / "bin" / "vllm"


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_guidellm(server, folder: Path, tmp_path: Path, route: str) -> None:
    report = tmp_path / "report.json"
    command = [str(Path(sys.executable).parent / "guidellm"), "run", "--disable-console"]
    command += ["--backend", f"kind=openai_http,target={server.url},model=smollm2,api_key={KEY},request_format={route}"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={folder}"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=24,output_tokens=6"]
    command += ["--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=12"]
    run([*command, "--output", f"kind=json,path={report}"], cwd=tmp_path, HF_HOME=str(tmp_path))
    (benchmark,) = read(report)["benchmarks"]
    requests = benchmark["requests"]
    assert (len(requests["successful"]), len(requests["errored"])) == (12, 0)
    assert {request["output_metrics"]["text_tokens"] for request in requests["successful"]} == {6}


@pytest.mark.parametrize(("backend", "route"), [("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")])
def test_vllm_bench_serve(server, folder: Path, tmp_path: Path, backend: str, route: str) -> None:
    if not VLLM.exists():
        pytest.skip("vLLM's environment is not here: `make test-vllm` makes it")
    command = [str(VLLM), "bench", "serve", "--backend", backend, "--base-url", server.url, "--endpoint", route]
    command += ["--model", "smollm2", "--tokenizer", str(folder), "--dataset-name", "random"]
    command += ["--random-input-len", "24", "--random-output-len", "6", "--num-prompts", "12", "--max-concurrency", "4"]
    command += ["--ignore-eos", "--disable-tqdm", "--save-result", "--result-dir", str(tmp_path)]
    command += ["--result-filename", "result.json"]
    run(command, cwd=tmp_path, OPENAI_API_KEY=KEY, VLLM_NO_USAGE_STATS="1", CUDA_VISIBLE_DEVICES="")
    result = read(tmp_path / "result.json")
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (12, 0, 72)
