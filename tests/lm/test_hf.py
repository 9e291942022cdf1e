"""transformers' Auto classes and our own architecture: known after `import lm`, at no cost before."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch

from lm import DecoderLM, SamplingParams
from lm.attention import CausalAttend
from lm.families import write_own
from lm.pretrained import load, save
from lm.search import generate
from lm.tokenizer import train_bpe

OWN: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 9.0},
    "untied, windows": {"tie_embeddings": False, "window": 5, "window_pattern": "SL", "activation": "relu2"},
    "scaled": {"softcap": 3.0, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_pattern": "RN"},
    "sinusoidal": {"positions": "sinusoidal", "norm": "layer", "bias": True},
    "none": {"positions": "none", "kv_heads": 2, "qk_norm": True, "bias": "qkv"},
}


@pytest.fixture(params=OWN)
def own(request: pytest.FixtureRequest, make: Callable[..., DecoderLM], tmp_path: Path) -> tuple[DecoderLM, Path]:
    """A decoder of our own architecture, and its folder."""
    model = make(**OWN[request.param])
    save(model, tmp_path / "model")
    return model, tmp_path / "model"


def read(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert type(model).__name__ == "HeedForCausalLM"
    return model.eval()


def test_a_config_can_be_sent_to_another_process(own: tuple[DecoderLM, Path]) -> None:
    """As vLLM sends it to its engine."""
    from transformers import AutoConfig

    model, folder = own
    config = AutoConfig.from_pretrained(folder)
    arrived = ForkingPickler.loads(bytes(ForkingPickler.dumps(config)))
    assert type(arrived) is type(config)
    assert arrived.shape() == model.config


def test_a_sequence_beyond_the_context_is_refused_in_a_sentence(own: tuple[DecoderLM, Path]) -> None:
    model, folder = own
    tokens = torch.zeros(1, model.config.context + 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"{model.config.context + 1} tokens; the model's context is"):
        read(folder)(tokens)


def test_a_visible_prefix_is_refused_in_a_sentence(make: Callable[..., DecoderLM], tmp_path: Path) -> None:
    """transformers would compute it causally without a word."""
    save(make(prefix=True), tmp_path / "model")
    with pytest.raises(ValueError, match=r"^prefix is True; transformers computes every token from those before it: "):
        read(tmp_path / "model")


@torch.no_grad()
def test_the_folder_gives_our_logits_and_comes_back(
    own: tuple[DecoderLM, Path], tokens: torch.Tensor, tmp_path: Path
) -> None:
    model, folder = own
    other = read(folder)
    hidden = model.hidden(tokens, torch.arange(24).unsqueeze(0), CausalAttend(model.config.windows()))
    logits = model.logits(hidden)
    assert torch.equal(other(tokens).logits, logits)
    assert other.config.hidden_size == 32
    assert other.config.num_hidden_layers == 2
    loss = other(tokens, labels=tokens).loss
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss == pytest.approx(float(expected))
    other.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.config == model.config
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_generate_is_ours_with_padding_on_either_side(own: tuple[DecoderLM, Path], tokens: torch.Tensor) -> None:
    model, folder = own
    other = read(folder)
    prompts = [tokens[0, :5].tolist(), tokens[1, :3].tolist()]
    expected = generate(model, prompts, SamplingParams(temperature=0.0, max_tokens=4))
    ids = torch.tensor([prompts[0], [0, 0, *prompts[1]]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    made = other.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert made[:, 5:].tolist() == expected
    right = other(torch.tensor([[*prompts[1], 0, 0]]), attention_mask=torch.tensor([[1, 1, 1, 0, 0]])).logits[0, 2]
    assert int(right.argmax()) == expected[1][0]


@pytest.mark.parametrize(
    "order",
    [
        "import lm; from transformers import AutoConfig, AutoModelForCausalLM",
        "from transformers import AutoConfig, AutoModelForCausalLM; import lm",
        "from transformers import AutoConfig; import lm; from transformers import AutoModelForCausalLM",
    ],
)
def test_the_order_of_imports_does_not_matter(order: str, tiny_own: Path) -> None:
    code = (
        f"{order}; import sys; "
        "print(type(AutoConfig.from_pretrained(sys.argv[1])).__name__, "
        "type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_own)], capture_output=True, text=True)
    assert done.stdout.split() == ["HeedConfig", "HeedForCausalLM"], done.stderr


@pytest.fixture(scope="module")
def tiny_own(make: Callable[..., DecoderLM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "model"
    tokenizer = train_bpe(["to be or not"], 270)
    save(make(softcap=9.0, vocab_size=tokenizer.vocab_size), folder, tokenizer=tokenizer)
    return folder


def test_a_pipeline_runs_on_the_folder(tiny_own: Path) -> None:
    """Config, tokenizer and model by the Auto classes, as other tools find them."""
    from transformers import pipeline

    made = pipeline("text-generation", model=str(tiny_own))("to be", max_new_tokens=3, do_sample=False)
    assert made[0]["generated_text"].startswith("to be")


def test_import_lm_stays_light() -> None:
    code = "import sys, lm; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_the_config_is_transformers_own_kind(make: Callable[..., DecoderLM]) -> None:
    from lm.hf import config_class

    config = config_class()(**write_own(make(softcap=9.0, window=3, window_pattern="S").config), eos_token_id=7)
    assert config.shape() == make(softcap=9.0, window=3, window_pattern="S").config
    assert config.eos_token_id == 7
    assert config_class()(**config.to_dict()).shape() == config.shape()
