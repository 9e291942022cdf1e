"""Every option of the decoder and every family of folders: real vLLM's greedy answers are the native engine's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lm import pretrained

NEAR = 1e-3  # two choices so close may come out either way
PROMPTS = [[5, 17, 200, 33, 41], [3], [100, 101, 102, *range(7, 40)]]
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}

# Each option of lm.config.DecoderConfig that has a meaning when a model is served, and the family that it is saved as.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "squared ReLU, windows, soft cap": (
        "HeedForCausalLM",
        {"activation": "relu2", "window": 8, "window_pattern": "SSL", "softcap": 15.0},
    ),
    "LayerNorm, biases, learned positions": (
        "HeedForCausalLM",
        {"activation": "gelu", "norm": "layer", "bias": True, "positions": "learned", "tie_embeddings": False},
    ),
    "sinusoids, qk-norm": (
        "HeedForCausalLM",
        {"positions": "sinusoidal", "norm": "layer", "bias": "qkv", "qk_norm": True, "activation": "gelu_tanh"},
    ),
    "yarn, layers without rotation, wide heads": (
        "HeedForCausalLM",
        {"rope_scaling": YARN, "rope_pattern": "RRN", "qk_norm": True, "bias": "mlp", "head_dim": 64, "mlp_width": 96},
    ),
    "no positions": ("HeedForCausalLM", {"positions": "none", "bias": "all", "softcap": 20.0}),
    "rotation for a longer context": (
        "HeedForCausalLM",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}},
    ),
    "Llama": ("LlamaForCausalLM", {"bias": "attention", "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "Qwen2": ("Qwen2ForCausalLM", {"bias": "qkv"}),
    "Qwen3": ("Qwen3ForCausalLM", {"qk_norm": True, "window": 8, "window_pattern": "S"}),
    "Mistral": ("MistralForCausalLM", {"window": 8, "window_pattern": "S"}),
    "SmolLM3": ("SmolLM3ForCausalLM", {"rope_pattern": "RRN"}),
    "GPT-2": (
        "GPT2LMHeadModel",
        {"norm": "layer", "bias": True, "positions": "learned", "activation": "gelu_tanh", "kv_heads": 2},
    ),
}

Answer = list[tuple[int, list[float]]]  # each token, and the two best log-probabilities where it was chosen


def same(ours: list[Answer], theirs: list[Answer]) -> int:
    """Fails where answers differ before one of them was a near tie; how many tokens were compared."""
    compared = 0
    for here, there in zip(ours, theirs, strict=True):
        assert len(here) == len(there)
        for (token, best), (their_token, their_best) in zip(here, there, strict=True):
            if min(best[0] - best[1], their_best[0] - their_best[1]) < NEAR:
                break  # from here on the two may have gone different ways
            assert token == their_token
            assert best == pytest.approx(their_best, abs=1e-3)
            compared += 1
    return compared


@pytest.fixture(scope="module")
def folders(sharp: Callable[..., Path]) -> dict[str, Path]:
    return {name: sharp(seed, **options) for seed, (name, (_, options)) in enumerate(MODELS.items())}


@pytest.fixture(scope="module")
def theirs(folders: dict[str, Path], ask_vllm: Callable[..., list[list[Answer]]]) -> dict[str, list[Answer]]:
    """vLLM's answers, of one process that has a model after the other."""
    return dict(zip(folders, ask_vllm(PROMPTS, *folders.values()), strict=True))


def test_every_option_is_tried() -> None:
    from lm.config import ACTIVATIONS, BIASES, NORMS, POSITIONS, ROPE_SCALINGS

    tried = [options for _, options in MODELS.values()]
    for name, values in (("activation", ACTIVATIONS), ("norm", NORMS), ("positions", POSITIONS)):
        assert {options.get(name, values[0]) for options in tried} >= set(values) - {"swiglu", "rms", "rotary"}
    biases = [options.get("bias", "none") for options in tried]
    assert {"all" if bias is True else bias for bias in biases} == set(BIASES)
    kinds = {options["rope_scaling"]["rope_type"] for options in tried if "rope_scaling" in options}
    assert kinds == set(ROPE_SCALINGS) - {"llama3"}  # its frequencies go the way of the others


@pytest.mark.timeout(1600)
@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers_are_the_same(
    name: str,
    folders: dict[str, Path],
    theirs: dict[str, list[Answer]],
    ask_native: Callable[..., list[Answer]],
) -> None:
    assert pretrained.read_architecture(folders[name]) == MODELS[name][0]
    assert same(ask_native(PROMPTS, folders[name]), theirs[name]) >= 36  # of 72


@pytest.mark.timeout(1600)
def test_two_processes_give_the_answers_of_one(
    sharp: Callable[..., Path], ask_vllm: Callable[..., list[list[Answer]]], ask_native: Callable[..., list[Answer]]
) -> None:
    """Heads, MLP and vocabulary are cut, the one key-value head is in both."""
    cut = [sharp(seed, **MODELS[name][1]) for seed, name in enumerate(list(MODELS)[:2])]
    for folder, answers in zip(cut, ask_vllm(PROMPTS, *cut, tensor_parallel_size=2), strict=True):
        assert same(ask_native(PROMPTS, folder), answers) >= 36
