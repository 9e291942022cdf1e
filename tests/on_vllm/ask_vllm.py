"""Run by vLLM's own interpreter: the same prompts to each folder, one after the other; the answers as JSON.

python ask_vllm.py RESULT PROMPTS SETTINGS FOLDER ...: PROMPTS is a file with a list of lists of token ids, SETTINGS
what vLLM's LLM is given beside the folder, in JSON. RESULT gets, for each folder and prompt, [token, the two best
log-probabilities] for each token of a greedy answer.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory


def main() -> None:
    result, prompts, settings, *folders = sys.argv[1:]
    asked = [{"prompt_token_ids": ids} for ids in json.loads(Path(prompts).read_text())]
    params = SamplingParams(max_tokens=24, temperature=0, logprobs=2, ignore_eos=True)
    found = []
    for folder in folders:
        llm = LLM(folder, **json.loads(settings))
        outputs = [output.outputs[0] for output in llm.generate(asked, params, use_tqdm=False)]
        pairs = [zip(output.token_ids, output.logprobs, strict=True) for output in outputs]
        found.append([[[token, best(row)] for token, row in answer] for answer in pairs])
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
    Path(result).write_text(json.dumps(found))


def best(row: dict) -> list[float]:
    return sorted((entry.logprob for entry in row.values()), reverse=True)[:2]


if __name__ == "__main__":
    main()
