"""Model folders: bit-equal round trips, equal logits through transformers in both directions."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lm import DecoderConfig, DecoderLM
from lm.attention import CausalAttend
from lm.pretrained import family_of, load, read_config, save
from lm.tokenizer import Tokenizer, train_bpe, train_characters

Make = Callable[..., DecoderLM]
GPT2: dict[str, Any] = {"positions": "learned", "norm": "layer", "bias": True, "activation": "gelu_tanh"}
OTHERS: list[tuple[str, dict[str, Any]]] = [  # what transformers can hold
    ("LlamaForCausalLM", {}),
    ("LlamaForCausalLM", {"kv_heads": 2, "head_dim": 16, "rope_theta": 5e4, "tie_embeddings": False, "norm_eps": 1e-3}),
    ("LlamaForCausalLM", {"bias": True, "mlp_width": 40}),
    ("Qwen3ForCausalLM", {"qk_norm": True, "kv_heads": 1, "head_dim": 16, "norm_eps": 1e-6}),
    ("Qwen3ForCausalLM", {"qk_norm": True, "tie_embeddings": False}),
    ("GPT2LMHeadModel", GPT2),
    ("GPT2LMHeadModel", GPT2 | {"mlp_width": 40, "norm_eps": 1e-3}),
    ("GPT2LMHeadModel", GPT2 | {"activation": "gelu", "tie_embeddings": False}),
]
IDS = [f"{name}-{number}" for number, (name, _) in enumerate(OTHERS)]


@torch.no_grad()
def logits(model: DecoderLM, tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1]).unsqueeze(0)
    return model.logits(model.hidden(tokens, positions, CausalAttend(model.config.windows())))


def same_weights(a: DecoderLM, b: DecoderLM) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ------------------------------------------------------------ round trips


def test_a_folder_is_the_model_bit_by_bit(model: DecoderLM, tokens: Tensor, tmp_path: Path) -> None:
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.config == model.config
    assert read_config(tmp_path / "model") == model.config
    assert same_weights(loaded, model)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    assert not loaded.training
    assert all(p.requires_grad and p.is_contiguous() for p in loaded.parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]  # nothing left aside


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_folder_is_loaded_in_its_own_dtype_or_another(
    make: Make, tokens: Tensor, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = make(**GPT2)
    save(model, tmp_path / "model", dtype=dtype)
    assert all(p.dtype == dtype for p in load(tmp_path / "model").parameters())
    wide = load(tmp_path / "model", torch.float32)
    assert all(p.dtype == torch.float32 for p in wide.parameters())
    assert same_weights(wide, model.to(dtype).to(torch.float32))
    rotary = make()
    save(rotary, tmp_path / "rotary", dtype=dtype)
    table = load(tmp_path / "rotary").positions
    assert table is not None
    assert torch.equal(table, rotary.position_table())  # angles stay fp32 whatever the weights are


def test_saving_again_replaces_and_given_weights_are_written(make: Make, tmp_path: Path) -> None:
    first, second = make(), make(width=64)
    save(first, tmp_path / "model")
    (tmp_path / "model" / "stray").touch()
    save(second, tmp_path / "model")
    assert load(tmp_path / "model").config == second.config
    assert not (tmp_path / "model" / "stray").exists()
    doubled = {name: 2 * tensor for name, tensor in second.state_dict().items()}
    save(second, tmp_path / "model", weights=doubled)
    assert torch.equal(load(tmp_path / "model").norm.weight, 2 * second.norm.weight)


def test_dropout_is_of_training_and_other_shapes_are_ours(make: Make, tmp_path: Path) -> None:
    save(make(dropout=0.1), tmp_path / "model")
    assert load(tmp_path / "model").config == make().config
    for options in ({"window": 4, "window_pattern": "SL"}, {"softcap": 9.0}, {"positions": "none"}, {"norm": "layer"}):
        assert family_of(make(**options).config).architecture == "HeedForCausalLM"
    for change in ({"bias": False}, {"qk_norm": True}, {"head_dim": 16}, {"kv_heads": 2}):
        assert family_of(make(**GPT2 | change).config).architecture == "HeedForCausalLM"


def test_nothing_is_pickled_and_every_weight_is_stored_once(model: DecoderLM, tmp_path: Path) -> None:
    save(model, tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118, it is no dictionary
    assert stored == model.config.parameters()["total"]


# ------------------------------------------------------------ through transformers


@pytest.mark.parametrize(("architecture", "options"), OTHERS, ids=IDS)
def test_transformers_reads_our_folder_to_equal_logits(
    architecture: str, options: dict[str, Any], make: Make, tokens: Tensor, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = make(**options)
    save(model, tmp_path / "model")
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True
    )
    assert type(theirs).__name__ == architecture
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(tokens).logits, logits(model, tokens), atol=1e-4, rtol=1e-4)
    assert theirs.config.eos_token_id is None
    generated = theirs.generate(tokens[:1, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 9)  # no EOS is legal


def foreign(name: str, **more: Any) -> Any:
    """A model of transformers' own, with no value left at what it is initialised to."""
    import transformers

    torch.manual_seed(1)
    common = {"vocab_size": 50, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if name == "gpt2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**common | shape | more))
    else:
        shape = {
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 48,
        }
        kind = {"llama": "Llama", "qwen3": "Qwen3"}[name]
        config = getattr(transformers, f"{kind}Config")(**common | shape | more)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("shard", [None, "6KB"], ids=["one-file", "sharded"])
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ("qwen3", {}),
        ("qwen3", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
        ("gpt2", {}),
        ("gpt2", {"n_inner": 40, "tie_word_embeddings": False}),
    ],
    ids=str,
)
def test_we_read_folders_that_transformers_wrote(
    name: str, more: dict[str, Any], shard: str | None, tokens: Tensor, tmp_path: Path
) -> None:
    theirs = foreign(name, **more)
    theirs.save_pretrained(tmp_path, **({} if shard is None else {"max_shard_size": shard}))
    assert (shard is None) == (tmp_path / "model.safetensors").exists()
    ours = load(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(logits(ours, tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    save(ours, tmp_path / "again")
    assert same_weights(load(tmp_path / "again"), ours)


def test_older_folders_are_read_too(make: Make, tokens: Tensor, tmp_path: Path) -> None:
    """rope_theta on top, no head_dim, torch_dtype; GPT-2's bare names, its mask as a buffer and its head again."""
    from safetensors.torch import load_file, save_file

    llama = make(rope_theta=5e4)
    save(llama, tmp_path / "llama")
    file = tmp_path / "llama" / "config.json"
    raw = json.loads(file.read_text())
    for key in ("rope_parameters", "head_dim", "num_key_value_heads", "dtype"):
        del raw[key]
    file.write_text(json.dumps(raw | {"torch_dtype": "float32", "rope_scaling": None}))
    assert torch.equal(logits(load(tmp_path / "llama"), tokens), logits(llama, tokens))

    gpt2 = make(**GPT2)
    save(gpt2, tmp_path / "gpt2")
    weights = load_file(tmp_path / "gpt2" / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 48, 48)
    bare["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    bare["lm_head.weight"] = bare["wte.weight"].clone()
    save_file(bare, tmp_path / "gpt2" / "model.safetensors")
    assert torch.equal(logits(load(tmp_path / "gpt2"), tokens), logits(gpt2, tokens))


# ------------------------------------------------------------ tokenizer and special tokens

TEXT = ["to be or not to be", "that is the question"]


def test_the_tokenizer_lies_beside_the_weights(make: Make, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = train_bpe(TEXT, 270)
    save(make(**GPT2, vocab_size=tokenizer.vocab_size), tmp_path / "model", tokenizer=tokenizer)
    assert Tokenizer.load(tmp_path / "model").fingerprint() == tokenizer.fingerprint()
    assert AutoTokenizer.from_pretrained(tmp_path / "model").encode(TEXT[0]) == tokenizer.encode(TEXT[0])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == tokenizer.eos_id


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True}, GPT2, {"softcap": 9.0}], ids=["llama", "qwen3", "gpt2", "ours"]
)
def test_a_folder_without_end_of_text_says_so(make: Make, options: dict[str, Any], tmp_path: Path) -> None:
    """Else GPT-2's own 50256 would be taken for it, an id that a small vocabulary does not have."""
    tokenizer = train_characters(TEXT)
    save(make(**options, vocab_size=tokenizer.vocab_size), tmp_path / "model", tokenizer=tokenizer)
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    assert {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")} == dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id")
    )
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text()) == {}
    assert load(tmp_path / "model").config.vocab_size == tokenizer.vocab_size
    assert Tokenizer.load(tmp_path / "model").eos_id is None


def test_loading_needs_neither_transformers_nor_the_compiler(make: Make, tmp_path: Path) -> None:
    save(make(), tmp_path / "model")
    code = (
        "import sys; from lm.pretrained import load; load(sys.argv[1]);"
        "heavy = ('transformers', 'torch._dynamo', 'torch._inductor', 'accelerate');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_config_is_what_it_was_after_a_change(make: Make) -> None:
    """replace() of a resolved config keeps its numbers: what the folders' round trips rest on."""
    config = make().config
    assert replace(config, layers=3) == DecoderConfig(
        vocab_size=50, context=48, layers=3, width=32, heads=4, kv_heads=4, head_dim=8, mlp_width=config.mlp_width
    )
