"""GGUF files: what the library's bytes mean, llama.cpp's order undone, tokenizers rebuilt, broken files refused."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from lm import DecoderLM, SamplingParams
from lm.attention import CausalAttend
from lm.gguf import halves, neighbours, own_dtype, read, weights
from lm.gguf_tokenizer import PRE_TOKENIZERS
from lm.gguf_write import write
from lm.pretrained import FolderError, load, load_tokenizer, stop_ids
from lm.search import generate
from lm.tokenizer import Tokenizer, TokenizerError, train_bpe

Make = Callable[..., DecoderLM]
TEXTS = [
    "To be, or not to be: that is the question.",
    "I'll take 1234567 of  them\n\n\tor ÄÖÜ, 東京 and 🙂!!",
    " x",
    "",
]
KEYS = {
    "general.architecture": "llama",
    "llama.context_length": 32,
    "llama.embedding_length": 32,
    "llama.block_count": 1,
    "llama.feed_forward_length": 32,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


@torch.no_grad()
def logits(model: DecoderLM, tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1]).unsqueeze(0)
    return model.logits(model.hidden(tokens, positions, CausalAttend(model.config.windows())))


def handmade(
    path: Path, keys: dict[str, Any], tensors: dict[str, np.ndarray], kinds: dict[str, str] | None = None
) -> Path:
    """A GGUF file by the library's writer; `kinds` names the type of tensors that are given as bytes."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in keys.items():
        if key == "general.architecture":
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add[type(value)](key, value)
    for name, tensor in tensors.items():
        kind = (kinds or {}).get(name)
        writer.add_tensor(name, tensor, raw_dtype=gguf.GGMLQuantizationType[kind] if kind else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def vocabulary(path: Path, **keys: Any) -> Path:
    """A file with a tokenizer and one tensor: keys without tokenizer.ggml."""
    original = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    return handmade(path, original, {"token_embd.weight": np.zeros((4, 32), dtype=np.float32)})


# ------------------------------------------------------------ weights

KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 256), (40, 512)])
def test_bytes_mean_what_the_library_says(kind: str, shape: tuple[int, int], tmp_path: Path) -> None:
    """However many rows are given to it at a time."""
    import gguf

    wanted = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[wanted]
    # Small bytes: as scales they are small positive halves, and nothing is infinite.
    data = np.random.default_rng(0).integers(0, 60, (shape[0], shape[1] // block * size), dtype=np.uint8)
    typed = {"F32": np.float32, "F16": np.float16}.get(kind)
    stored = data.view(typed) if typed else data
    path = handmade(
        tmp_path / "a.gguf", {}, {"output_norm.weight": stored}, None if typed else {"output_norm.weight": kind}
    )
    file = read(path)
    assert file.tensors["output_norm.weight"].shape == shape
    assert own_dtype(file) == {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    (ours,) = weights(file, None, torch.float32).values()  # type: ignore[arg-type]
    assert torch.equal(ours, torch.from_numpy(gguf.dequantize(stored, wanted).reshape(shape).copy()))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_llama_cpps_order_and_back(heads: int, half: int, columns: int) -> None:
    rows = torch.arange(heads * 2 * half * columns).reshape(heads * 2 * half, columns)
    assert torch.equal(halves(neighbours(rows, heads), heads), rows)
    one = halves(rows, heads)[: 2 * half, 0] // columns
    assert one.tolist() == [*range(0, 2 * half, 2), *range(1, 2 * half, 2)]


# ------------------------------------------------------------ tokenizers


def byte_level(name: str) -> Tokenizer:
    """A byte-level BPE that cuts text as `name` says, learned from TEXTS."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = PRE_TOKENIZERS[name]()
    inner.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|begin|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS * 3, trainer)
    inner.add_tokens([tokenizers.AddedToken("<think>", special=False, normalized=False)])
    return Tokenizer(inner, {"chat_template": "{{ messages }}"}, eos_id=0, bos_id=1)


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_a_byte_level_tokenizer_comes_back(name: str, make: Make, tmp_path: Path) -> None:
    original = byte_level(name)
    if name == "llama-bpe":
        original.inner.post_processor = tokenizers.processors.TemplateProcessing(
            single=["<|begin|>", "$A"], special_tokens=[("<|begin|>", 1)]
        )
    model = make(vocab_size=original.vocab_size + 3)  # padded, as vocabularies are
    write(model, original, tmp_path / "a.gguf", "float32", "a")
    found = load_tokenizer(tmp_path / "a.gguf")
    assert read(tmp_path / "a.gguf").metadata["tokenizer.ggml.pre"] == name
    for text in [*TEXTS, "a<|end|>b <think>c", " ".join(TEXTS)]:
        assert found.encode(text) == original.encode(text)
        assert found.decode(found.encode(text)) == original.decode(original.encode(text))
    assert (found.eos_id, found.bos_id, found.pad_id) == (0, 1, None)
    assert found.settings["chat_template"] == "{{ messages }}"
    assert found.decode([0, 1]) == ""
    assert (found.encode("")[:1] == [1]) == (name == "llama-bpe")
    assert stop_ids(tmp_path / "a.gguf", found) == [0]


def test_pre_tokenizers_cut_as_the_models_do(tmp_path: Path) -> None:
    """By hand: digits alone in SmolLM, by threes in Llama 3, alone in Qwen2, together in GPT-2."""
    cuts = {
        name: [text for text, _ in make().pre_tokenize_str("it's 12345 ok\n\n")]
        for name, make in PRE_TOKENIZERS.items()
    }
    assert cuts["gpt-2"] == ["it", "'s", "Ġ12345", "Ġok", "ĊĊ"]
    assert cuts["smollm"] == ["it", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġok", "ĊĊ"]
    assert cuts["llama-bpe"] == ["it", "'s", "Ġ", "123", "45", "Ġok", "ĊĊ"]
    assert cuts["qwen2"] == ["it", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġok", "ĊĊ"]


PIECES = ["▁", "a", "b", "c", "ab", "▁a", "bc", "abc", "▁ab", "▁▁", "ca", "cab"]


def sentencepiece(text: str, scores: dict[str, float], ids: dict[str, int]) -> list[int]:
    """SentencePiece's BPE, written out: join the neighbours whose joint piece scores best, the leftmost of equals."""
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        joint = [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not joint:
            break
        _, place = min(joint)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    found: list[int] = []
    for part in parts:
        found += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return found


@given(
    text=st.text("abc d\né🙂", min_size=1, max_size=12),
    order=st.permutations(range(len(PIECES))),
)
def test_a_sentencepiece_tokenizer_is_rebuilt_from_its_scores(
    text: str, order: Sequence[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    scores = [0.0] * 259 + [-float(place) for place in order]
    types = [2, 3, 3] + [6] * 256 + [1] * len(PIECES)
    path = vocabulary(
        tmp_path_factory.mktemp("spm") / "a.gguf",
        model="llama",
        tokens=tokens,
        scores=scores,
        token_type=types,
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
    )
    found = load_tokenizer(path)
    ids = {token: id for id, token in enumerate(tokens)}
    expected = sentencepiece(text, dict(zip(PIECES, scores[259:], strict=True)), ids)
    assert found.encode(text) == [1, *expected]
    assert found.decode(found.encode(text)) == text


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'; the supported ones are gpt2, llama."),
        ({"model": "gpt2", "pre": "viking"}, "tokenizer.ggml.pre is 'viking'; the supported ones are gpt-2, smollm, "),
        ({"model": "gpt2"}, "tokenizer.ggml.merges is no list of texts."),
        ({"model": "gpt2", "tokens": [1, 2], "merges": ["a b"]}, "tokenizer.ggml.tokens is no list of texts."),
        ({"model": "gpt2", "tokens": ["a", "a"], "merges": ["a b"]}, "the token 'a' is there twice."),
        ({"model": "gpt2", "tokens": ["a", "b"], "merges": ["a c"]}, "holds no readable tokenizer: "),
        (
            {"model": "gpt2", "tokens": ["a", "b", "ab"], "merges": ["a b"], "eos_token_id": 3},
            "tokenizer.ggml.eos_token_id is 3; there are 3 tokens.",
        ),
        (
            {"model": "gpt2", "tokens": ["a", "b", "ab"], "merges": ["a b"], "token_type": [1]},
            "tokenizer.ggml.token_type is no list with a type for each token.",
        ),
        ({"model": "llama", "tokens": ["a"]}, "tokenizer.ggml.scores is no list with a score for each token."),
        ({"model": "llama", "tokens": ["a"], "scores": [0.0], "unknown_token_id": 7}, "holds no readable tokenizer: "),
    ],
)
def test_no_tokenizer_is_a_sentence(keys: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    path = vocabulary(tmp_path / "a.gguf", **keys)
    with pytest.raises(TokenizerError) as refused:
        load_tokenizer(path)
    said = str(refused.value)
    assert said.startswith(str(path))
    assert sentence in said
    assert said.endswith(".")
    assert "\n" not in said


# ------------------------------------------------------------ what is refused


def one_layer(**change: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    ones = np.ones((32, 32), dtype=np.float32)
    tensors = {f"blk.0.{name}.weight": ones for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    tensors |= {f"blk.0.{name}.weight": ones for name in ("ffn_gate", "ffn_up", "ffn_down")}
    tensors |= {f"blk.0.{name}.weight": ones[0] for name in ("attn_norm", "ffn_norm")}
    tensors |= {"token_embd.weight": ones, "output_norm.weight": ones[0]}
    keys = {key: value for key, value in (KEYS | change).items() if value is not None}
    return keys, tensors


def test_a_file_by_hand_is_read(tmp_path: Path) -> None:
    model = load(handmade(tmp_path / "a.gguf", *one_layer()))
    assert (model.config.vocab_size, model.config.norm_eps, model.config.rope_theta) == (32, 1e-5, 1e4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"llama.block_count": None}, ": the key llama.block_count is missing; a decoder needs it."),
        ({"llama.block_count": 2}, ": the tensor layers.1.input_layernorm.weight is missing from the weights."),
        ({"llama.block_count": 10**6}, ": the config asks for 7232001056 parameters in 1000000 "),
        ({"llama.feed_forward_length": 2**31}, ": the config asks for 206158435424 parameters in 1 layers; "),
        ({"llama.embedding_length": 2**31}, ": the tensor blk.0.attn_q.weight has 32 rows; the config asks for 2147"),
        ({"llama.embedding_length": "32"}, ": a value has the wrong type"),
        ({"llama.attention.head_count": 0}, ": a value has the wrong type"),
        ({"llama.attention.head_count": [4, 4]}, ": a value has the wrong type"),
        ({"llama.attention.head_count": 8, "llama.attention.key_length": 8}, ": the tensor blk.0.attn_q.weight has 32"),
        ({"llama.attention.value_length": 16}, ": llama.attention.value_length is 16; it must be a head's, 8."),
        ({"llama.rope.dimension_count": 4}, ": llama.rope.dimension_count is 4; it must be a head's, 8."),
        ({"llama.rope.scaling.type": "longrope"}, ": rope.scaling.type is 'longrope'; the supported ones are none, "),
        ({"llama.rope.scaling.type": "linear"}, ": the key llama.rope.scaling.factor is missing; "),
        ({"llama.context_length": 2**31}, ": context is 2147483648; it must be at most 16777216."),
        ({"general.alignment": 3}, " is not a readable GGUF file: general.alignment is 3, and it must be a power of"),
    ],
)
def test_what_the_keys_cannot_say_is_a_sentence(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    path = handmade(tmp_path / "a.gguf", *one_layer(**change))
    with pytest.raises(FolderError) as refused:
        load(path)
    assert str(refused.value).startswith(f"{path}{sentence}")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("blk.0.ffn_gate_exps.weight", "the weights hold blk.0.ffn_gate_exps.weight, which a llama of ours does not "),
        ("blk.1.attn_q.weight", "the weights hold layers.1.self_attn.q_proj.weight, which a GGUF file of llama of "),
        ("blk.0.attn_q.bias", "the tensor layers.0.self_attn.k_proj.bias is missing from the weights."),
        ("blk.0.attn_output.bias", "biases are on o; that is no decoder of ours."),
        ("rope_freqs.weight", "rope_freqs.weight is no scaling that is known; the supported one is llama3's."),
    ],
)
def test_an_unknown_tensor_is_refused_by_name(name: str, sentence: str, tmp_path: Path) -> None:
    keys, tensors = one_layer()
    extra = np.ones((32, 32) if name.startswith("blk.1") else 32, dtype=np.float32)
    path = handmade(tmp_path / "a.gguf", keys, tensors | {name: extra})
    with pytest.raises(FolderError) as refused:
        load(path)
    assert str(refused.value).startswith(f"{path}: {sentence}")


def test_another_architecture_and_what_is_no_gguf(tmp_path: Path) -> None:
    path = handmade(tmp_path / "a.gguf", *one_layer())
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", 1))
    with pytest.raises(FolderError, match=r"general\.architecture is 'mamba'; the supported ones are llama, qwen2, "):
        load(path)
    path.write_bytes(b"GGML" + content[4:])
    with pytest.raises(FolderError, match="is no GGUF file; a file of a model must be one, else it is a folder"):
        load(path)
    path.write_bytes(b"GGUF")
    with pytest.raises(FolderError, match="byte 4 begins 4 bytes, and the file has 4"):
        load(path)


MUTATIONS = 100
BROKEN = """
import pathlib, random, resource, struct, sys, time, traceback
import torch, lm.decoder, lm.gguf, lm.gguf_tokenizer, gguf
from lm.pretrained import load, load_tokenizer, FolderError
from lm.tokenizer import TokenizerError

kind, source, count = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
file = source if kind == "gguf" else source / "model.safetensors"
content = file.read_bytes()
header = 8 + int.from_bytes(content[:8], "little")
if kind == "gguf":
    header = min(tensor.start for tensor in lm.gguf.read(file).tensors.values())
load(source)
def memory():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (memory() + 2**30, resource.getrlimit(resource.RLIMIT_AS)[1]))
dice, refused, begin = random.Random(0), 0, time.monotonic()
HUGE = [2**64 - 1, 2**63, 2**62 + 5, 2**40, 2**32, 2**31, 10**7, 1000, 0]
for number in range(count):
    broken = bytearray(content)
    how = number % 5
    if how == 0:  # truncated
        del broken[dice.randrange(len(broken)):]
    elif how == 1:  # a length, or what lies where one may
        struct.pack_into("<Q", broken, dice.choice([0, 4, 8, 16, dice.randrange(header - 8)]), dice.choice(HUGE))
    elif how == 2:  # a few bytes
        for _ in range(dice.randint(1, 8)):
            broken[dice.randrange(header)] = dice.randrange(256)
    elif how == 3:  # a number in text, or a name
        place = dice.randrange(8, header)
        broken[place:place + 4] = dice.choice([b"9999", b"llam", b'"":1', b"\\xff" * 4, b"[[[["])
    else:  # a piece left out, or twice
        place = dice.randrange(8, header - 8)
        piece = broken[place:place + dice.randint(1, 40)]
        broken[place:place + len(piece)] = dice.choice([b"", piece * 2])
    file.write_bytes(broken)
    for read, error in ((load, FolderError), (load_tokenizer, (FolderError, TokenizerError))):
        if read is load_tokenizer and kind != "gguf":
            continue
        try:
            read(source)
        except error as sentence:
            said = str(sentence)
            assert said.endswith(".") and chr(10) not in said, said
            refused += read is load
        except BaseException:
            traceback.print_exc()
            sys.exit(f"mutation {number} ({how})")
print(refused, time.monotonic() - begin)
"""


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_a_broken_header_is_a_sentence_and_costs_nothing(kind: str, make: Make, tmp_path: Path) -> None:
    """In a process that may take 1 GiB more than it has, and is given a minute for a hundred files."""
    from lm.pretrained import save

    tokenizer = train_bpe(TEXTS, 300)
    model = make(vocab_size=tokenizer.vocab_size)
    source = tmp_path / "model"
    if kind == "gguf":
        source = tmp_path / "model.gguf"
        write(model, tokenizer, source, "q8_0", "a")
    else:
        save(model, source, tokenizer=tokenizer)
    command = [sys.executable, "-c", BROKEN, kind, str(source), str(MUTATIONS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    refused, seconds = done.stdout.split()
    assert int(refused) > MUTATIONS / 2
    assert float(seconds) < 60


# ------------------------------------------------------------ a real one

PROMPT, GREEDY = [504, 3575, 282, 4649, 314], [7042, 30, 198, 198, 504, 2988, 314]


def test_smollm2_gives_the_recorded_ids(smollm2: Path) -> None:
    model, tokenizer = load(smollm2, torch.float32), load_tokenizer(smollm2)
    assert tokenizer.encode("The capital of France is") == PROMPT
    assert generate(model, [PROMPT], SamplingParams(temperature=0.0, max_tokens=7)) == [GREEDY]
    assert tokenizer.decode(GREEDY) == " Paris.\n\nThe answer is"
    assert (tokenizer.eos_id, tokenizer.bos_id, stop_ids(smollm2, tokenizer)) == (2, 1, [2])
    assert "<|im_start|>assistant" in tokenizer.settings["chat_template"]
    assert tokenizer.encode("<|im_end|> 12") == [2, 216, 33, 34]
    assert model.config.parameters()["total"] == 134_515_008


def test_smollm2_has_transformers_logits(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32)
    tokens = torch.tensor([PROMPT + GREEDY])
    with torch.no_grad():
        expected = theirs.eval()(tokens).logits
    assert math.isclose(float(expected.std()), float(logits(load(smollm2, torch.float32), tokens).std()), rel_tol=1e-4)
    torch.testing.assert_close(logits(load(smollm2, torch.float32), tokens), expected, atol=1e-4, rtol=1e-4)
