"""What a dry run says: arithmetic that agrees with what happens, and no guess where something is not known."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from lm.decoder import DecoderLM
from train.config import Recipe, RecipeError, load
from train.estimate import Count, Speed, World, estimate, main_dry_run, memory, micro_rows, peak_flops
from train.optim import make_optimizer
from train.prepare import prepare

RECIPE = """
data: {text: TEXT, validation: 0.1}
tokenizer: {kind: characters}
model: {context: 64, layers: 3, width: 96, heads: 4}
train: {tokens: 6400, batch_tokens: 640}
"""


def recipe(folder: Path, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace("TEXT", str(folder / "a.txt")))
    return load(path, [f"data.cache={folder / 'cache'}", *overrides])


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.dtype=bf16"],
        ["model.activation=gelu", "model.bias=true", "model.norm=layer", "model.positions=learned"],
        ["model.qk_norm=true", "model.kv_heads=1"],
        ["model.dropout=0.1"],
        ["train.micro_batch=3"],
    ],
    ids=" ".join,
)
def test_memory_agrees_with_what_a_step_keeps(tmp_path: Path, overrides: list[str]) -> None:
    """Activations: the tensors that autograd saves, counted once each, within a quarter. The rest: exactly."""
    made = recipe(tmp_path, *overrides, "optim.name=muon", "train.batch_tokens=1280")
    config = made.decoder_config(200)
    model = DecoderLM(config)
    held = memory(made, config, World(), "cpu")

    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    known |= {buffer.untyped_storage().data_ptr() for buffer in model.buffers()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.randint(0, 200, (micro_rows(made, World()), config.context))
    bf16 = made.train.dtype == "bf16"
    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss, _, _ = model({"tokens": tokens, "targets": tokens})
    kept = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    assert held["activations"] == pytest.approx(kept, rel=0.25)

    loss.backward()
    optimizer = make_optimizer(model, made.optim)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim() > 0]
    assert held["optimizer"] == sum(value.numel() for value in states) * 4
    assert held["gradients"] == sum(p.numel() for p in model.parameters()) * 4
    if not bf16:
        assert held["weights"] == held["gradients"]


def test_checkpointing_and_sharding_take_less(tmp_path: Path) -> None:
    made = recipe(tmp_path, "model.layers=8")
    config = made.decoder_config(200)
    whole = memory(made, config, World(), "cpu")
    again = memory(recipe(tmp_path, "model.layers=8", "train.activation_checkpointing=true"), config, World(), "cpu")
    assert again["activations"] < whole["activations"] / 3
    sharded = memory(made, config, World(8, sharded=True), "cpu")
    for name in ("weights", "gradients", "optimizer"):
        assert sharded[name] == whole[name] / 8


def test_the_lines_say_every_number_and_where_it_comes_from(tmp_path: Path) -> None:
    made = recipe(tmp_path)
    config = made.decoder_config(200)
    lines = estimate(made, config, Count(3200, "prepared"), World(2), Speed(1e9, "assumed"))
    text = "\n".join(lines)
    assert f"{config.parameters()['total']:,}" in text
    assert "10 updates, 6,400 tokens" in text
    assert "2.00 passes over 3,200 training tokens" in text
    assert "10 sequences of 64: 2 ranks of 5" in text
    seconds = 6400 * config.flops_per_token() / 2e9
    assert f"about {seconds:.3g} seconds" in text
    assert [line.split()[0] for line in lines] == [
        *("model", "parameters", "FLOPs", "batch", "memory", "steps", "text", "epochs", "time")
    ]
    unknown = "\n".join(estimate(made, config, Count(None, "not there"), World(), None))
    assert "epochs       unknown" in unknown
    assert "time         unknown" in unknown


def test_a_dry_run_before_and_after_preparing(tmp_path: Path) -> None:
    made = recipe(tmp_path)
    (missing,) = [line for line in main_dry_run(made) if line.startswith("text")]
    assert "there is no such file" in missing
    (tmp_path / "a.txt").write_text("abcdefghij" * 100)
    before = "\n".join(main_dry_run(made))
    assert "7.11 passes over 900 training tokens" in before
    assert "vocabulary 11," in before
    assert not (tmp_path / "cache").exists()
    prepare(made, progress=False)
    after = "\n".join(main_dry_run(made))
    assert "7.11 passes over 900 training tokens" in after
    assert "prepared, with 100 for validation" in after
    assert "vocabulary 11," in after
    guessed = "\n".join(main_dry_run(recipe(tmp_path, "tokenizer.kind=bpe", "tokenizer.vocab_size=2048")))
    assert "3.0 bytes a token assumed" in guessed


def test_a_dry_run_asks_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("the network was asked"))
    for streaming in ("true", "false"):
        given = [
            "data.dataset=somebody/something",
            f"data.streaming={streaming}",
            "tokenizer.kind=bpe",
            "tokenizer.vocab_size=500",
        ]
        text = "\n".join(main_dry_run(recipe(tmp_path, *given)))
        assert 'not prepared (data.dataset is "somebody/something")' in text
        assert "vocabulary 500," in text


def test_a_dry_run_knows_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "4"), ("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2")):
        monkeypatch.setenv(name, value)
    assert "FSDP2 over 4 ranks" in "\n".join(main_dry_run(recipe(tmp_path, "model.tie_embeddings=false")))
    with pytest.raises(RecipeError, match="tie_embeddings"):
        main_dry_run(recipe(tmp_path))
    monkeypatch.setenv("FSDP_VERSION", "1")
    assert "4 ranks" in "\n".join(main_dry_run(recipe(tmp_path)))


def test_a_tokenizer_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"tokenizer\.folder is"):
        main_dry_run(recipe(tmp_path, "tokenizer.kind=folder", f"tokenizer.folder={tmp_path}/none"))


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H100 NVL", "bf16", 835.5e12),
        ("NVIDIA H200", "bf16", 989.4e12),
        ("NVIDIA GH200 480GB", "bf16", 989.4e12),
        ("NVIDIA B200", "bf16", 2250e12),
        ("NVIDIA GB200", "bf16", 2500e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", 156e12),
        ("NVIDIA A10", "bf16", 125e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA L40", "bf16", 181e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2e12),
        ("NVIDIA GeForce RTX 4090", "fp32", 82.6e12),
        ("AMD Instinct MI300X", "bf16", 1307.4e12),
        ("AMD Instinct MI300X", "fp32", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A10G", "bf16", None),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("NVIDIA H1000", "bf16", None),
        ("AMD EPYC 7763 64-Core Processor", "bf16", None),
    ],
)
def test_peaks_are_known_or_unknown_and_never_guessed(name: str, dtype: str, peak: float | None) -> None:
    assert peak_flops(name, dtype) == pytest.approx(peak) if peak else peak_flops(name, dtype) is None


def test_durations_and_sizes_read_well(tmp_path: Path) -> None:
    made = recipe(tmp_path, "train.tokens=1e12", "model.width=512", "model.layers=12")
    text = "\n".join(
        estimate(made, made.decoder_config(1000), Count(10**9, "prepared"), World(), Speed(1e11, "assumed"))
    )
    assert re.search(r"time +about [\d.]+ years at 100 GFLOP/s a rank: assumed", text)
    assert re.search(r"about [\d.]+ (hours|days) on one H100 in bf16, assumed to reach 40% of its peak", text)
