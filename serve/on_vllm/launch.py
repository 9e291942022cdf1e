"""`python -m serve FOLDER --engine vllm ...` becomes `vllm serve FOLDER ...`, checked and with what must be set."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence

import torch

from lm.pretrained import DTYPES, FolderError
from serve.cli.parser import UsageError
from serve.engine.memory import FREE_SHARE, free_bytes
from serve.on_vllm import checks
from serve.on_vllm.flags import DRY_RUN, CommandLine, read, translate

MAIN = "vllm.entrypoints.cli.main"  # what the command `vllm` runs
SEQUENCES = 128  # at once, unless --max-num-seqs says otherwise: vLLM's default on a CPU
BLOCK = 128  # tokens, vLLM's on a CPU
SECRET = ("--api-key", "--hf-token")


def main(argv: Sequence[str]) -> int:
    """Does not come back where vLLM starts; else 0 after --dry-run, and 2 with one sentence for what cannot be."""
    try:
        line = read(argv)
        fit = checks.check_folder(line)
        ranks = checks.check_ranks(fit.config, line) * line.number("--data-parallel-size", 1)
        vllm = checks.installed()
        checks.check_heads(line.model, fit.config, vllm.device)
        checks.check_stages(line, vllm.device)
        if fit.own:
            checks.check_plugin()
        words = translate(line, settings(line, fit, vllm.device, os.environ))
        variables = environment(fit, vllm.device, ranks, os.environ)
    except (UsageError, checks.Unfit, FolderError) as error:
        print(f"python -m serve: {error}", file=sys.stderr)
        return 2
    print(shown(variables, line.model, words), flush=True)
    if line.get(DRY_RUN) is None:
        command = [sys.executable, "-m", MAIN, "serve", line.model, *words]
        os.execve(sys.executable, command, {**os.environ, **variables})
    return 0


def settings(line: CommandLine, fit: checks.Fit, device: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Flags that vLLM must be given, where the command line does not say otherwise."""
    wanted = {
        "--dtype": checks.serving_dtype(fit.dtype, device)
    }  # vLLM's own choice would be bfloat16, also for a folder in float32
    if (fit.config.rope_scaling or {}).get("rope_type") in ("linear", "dynamic") and not fit.own:
        wanted["--max-model-len"] = str(fit.config.context)  # vLLM would multiply it by the factor once more
    sized = line.get("--gpu-memory-utilization") is not None or "VLLM_CPU_KVCACHE_SPACE" in environ
    if device == "cpu" and not sized:  # vLLM would take 92% of all memory, used or not
        wanted["--kv-cache-memory-bytes"] = str(cpu_cache_bytes(line, fit))
    return wanted


def cpu_cache_bytes(line: CommandLine, fit: checks.Fit) -> int:
    """What all sequences could ever fill, or the share of the free memory that the native engine takes."""
    config = fit.config
    word = (line.get("--dtype") or ("auto",))[0]
    name = {"auto": checks.serving_dtype(fit.dtype, "cpu"), "float": "float32", "half": "float16"}.get(word, word)
    token = 2 * config.layers * config.kv * config.dim * DTYPES.get(name, torch.float32).itemsize
    longest = BLOCK * (-(-config.context // BLOCK) + 1)
    most = token * longest * line.number("--max-num-seqs", SEQUENCES)
    return min(most, int(FREE_SHARE * free_bytes("cpu")))


def environment(fit: checks.Fit, device: str, ranks: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that vLLM must be given beside those that are set."""
    wanted = {name: "1" for name in ("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS") if name not in environ}
    plugins = environ.get("VLLM_PLUGINS")  # unset, vLLM loads all
    if fit.own and plugins is not None and checks.PLUGIN not in plugins.split(","):
        wanted["VLLM_PLUGINS"] = ",".join(filter(None, (plugins, checks.PLUGIN)))
    # Left to itself vLLM keeps a core free, which of two is half; the native engine uses all that the process may.
    if device == "cpu" and ranks == 1 and "VLLM_CPU_OMP_THREADS_BIND" not in environ:
        cores = sorted(os.sched_getaffinity(0))
        threads = environ.get("OMP_NUM_THREADS", "")
        if threads.isdecimal() and 0 < int(threads) < len(cores):
            cores = cores[: int(threads)]
        wanted["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    return wanted


def shown(variables: Mapping[str, str], model: str, words: Sequence[str]) -> str:
    """The command as a person would type it, without the keys."""
    safe: list[str] = []
    flag = ""
    for word in words:
        flag = word if word.startswith("--") else flag
        safe.append("***" if flag in SECRET and word != flag else word)
    before = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    return " ".join([*before, shlex.join(["vllm", "serve", model, *safe])])
