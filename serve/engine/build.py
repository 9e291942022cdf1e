"""From a model folder and the flags to an engine that has produced a token: dtype, threads, the size of the cache."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from lm import pretrained
from lm.linear import bf16_is_fast
from lm.params import SamplingParams
from lm.tokenizer import Tokenizer
from serve.engine import kernels, rows
from serve.engine.draft import Speculation
from serve.engine.engine import Engine, in_rows
from serve.engine.memory import SetupError, ran_out, size_cache, step_budget
from serve.engine.messages import Add, EngineConfig, Ready
from serve.engine.pages import Pages
from serve.engine.quantize import refusal
from serve.engine.runner import PagedRunner
from serve.engine.served import ServedLM, serve_model

DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
}


def build(config: EngineConfig, tokenizer: Tokenizer | None = None) -> tuple[Engine, Ready]:
    """Loads the folder or file, sizes the cache, computes a first token. `tokenizer` is its, where it has been loaded.

    Raises SetupError, or lm's FolderError and TokenizerError.
    """
    begin = time.perf_counter()
    threads = use_cores()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, note = choose_dtype(config.dtype, config.folder, device)
    try:
        model = pretrained.load(config.folder, dtype, device)
        tokenizer = tokenizer or pretrained.load_tokenizer(config.tokenizer or config.folder)
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        raise SetupError(f"The weights in {config.folder} do not fit the memory of this machine ({device}).") from None
    _check_vocabulary(model.config, tokenizer if config.tokenizer else None)
    parameters = sum(p.numel() for p in model.parameters())
    loaded = time.perf_counter()
    model, model_note = prepare(model, config, device)
    packed = time.perf_counter()
    per_block = bytes_per_block(model, config.block_size, dtype)
    size = size_cache(model.config.context, per_block, config, device, sides=2 if model.encoder_decoder else 1)
    budget, budget_note = step_budget(size.max_model_len, config, whole=in_rows(model))
    eos = eos_token_ids(config.folder, tokenizer, model.config.vocab_size)
    speculation, draft_note = choose_speculation(config, whole=in_rows(model))
    engine = Engine(
        model,
        tokenizer,
        eos=eos,
        max_model_len=size.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=budget,
        blocks=size.blocks,
        block_size=config.block_size,
        seed=config.seed,
        policy=config.scheduling_policy,
        prefix_caching=config.enable_prefix_caching,
        speculation=speculation,
    )
    if config.batch_invariant:
        check_invariance(engine)
    sized = time.perf_counter()
    first_token(engine)
    return engine, Ready(
        vocab_size=model.config.vocab_size,
        max_model_len=size.max_model_len,
        max_num_batched_tokens=budget,
        max_num_seqs=config.max_num_seqs,
        encoder_decoder=model.encoder_decoder,
        source=engine.runner.source,
        eos_token_ids=eos,
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        parameters=parameters,
        blocks=size.blocks,
        block_size=config.block_size,
        cache_bytes=size.blocks * per_block,
        threads=threads,
        seconds={
            "load": loaded - begin,
            "pack": packed - loaded,
            "cache": sized - packed,
            "first_token": time.perf_counter() - sized,
        },
        note=" ".join(
            said for said in (note, model_note, engine.runner.note, size.note, budget_note, draft_note) if said
        )
        or None,
    )


def _check_vocabulary(config: Any, tokenizer: Tokenizer | None) -> None:
    """`tokenizer`: another than the model's own."""
    written = getattr(config, "target_vocab_size", config.vocab_size)
    if written != config.vocab_size:
        raise SetupError(
            f"The model reads {config.vocab_size} tokens and writes {written}; to be served it needs one vocabulary."
        )
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise SetupError(
            f"--tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab_size}: it is another model's."
        )


def use_cores() -> int:
    """Gives torch every core that this process may use, unless OMP_NUM_THREADS says how many."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(wanted) if wanted.isdigit() and int(wanted) > 0 else cores
    torch.set_num_threads(threads)
    return threads


def half_on_cpu(*, whole: bool) -> torch.dtype:
    """What a CPU is fast in, of halves: bfloat16, or float32 where its products are slow in that. The kernels, which
    decoders use, widen bfloat16 as they read it: that is half the memory's work on any CPU with AVX2. whole: the model
    reads its prompt as a whole, through torch.
    """
    widened = not whole and kernels.available() not in (None, "portable")
    return torch.bfloat16 if widened or bf16_is_fast("cpu") else torch.float32


def choose_dtype(name: str, folder: str, device: str) -> tuple[torch.dtype, str | None]:
    """`auto` is the folder's dtype, but on a CPU its halves are what that is fast in; so are the numbers of a GGUF
    file, whose precision is less than either's.
    """
    if name != "auto":
        return DTYPES[name], None
    raw = {} if Path(folder).is_file() else _read_json(Path(folder) / "config.json")
    whole = bool(raw.get("is_encoder_decoder") or raw.get("prefix"))
    half = torch.bfloat16 if device == "cuda" else half_on_cpu(whole=whole)
    if Path(folder).is_file():
        own = pretrained.own_dtype(folder)
        if own is torch.float32:
            return half, None
    else:
        own = DTYPES.get(str(raw.get("dtype") or raw.get("torch_dtype") or "float32"), torch.float32)
    if device == "cpu" and own is not torch.float32 and half is torch.float32:
        return (
            torch.float32,
            f"This CPU is slow in {str(own).removeprefix('torch.')}: the weights were widened to float32.",
        )
    if device == "cpu" and own is torch.float16:
        return torch.bfloat16, "On a CPU float16 is slow: the weights were taken as bfloat16."
    return own, None


def prepare(model: Any, config: EngineConfig, device: str) -> tuple[Any, str | None]:
    """The model as it is served, and a sentence where that is not as fast as it could be."""
    whole = in_rows(model)
    if config.quantization is not None and (refused := refusal(device, kernels.current(), whole=whole)):
        raise SetupError(refused)
    if device != "cpu" or whole:
        return model, None
    served = serve_model(model, config.quantization)
    if kernels.available() is None:
        return served, (
            "The C kernels are not here (they are compiled at install, with gcc or clang): answers come slower, and "
            "may depend in their last digits on who shares a step."
        )
    return served, None


def check_invariance(engine: Engine) -> None:
    """Raises SetupError where answers may depend in their last digits on who shares a step."""
    runner = engine.runner
    served = isinstance(runner, PagedRunner) and isinstance(runner.model, ServedLM) and runner.model.invariant
    if not (served and isinstance(runner, PagedRunner) and runner.pages.kernels is not None):
        raise SetupError(
            "--batch-invariant can be promised for decoder-only models on a CPU with the compiled kernels alone, in "
            "float32, bfloat16 or int8, with a --block-size that is a multiple of 16; leave it out."
        )


def choose_speculation(config: EngineConfig, *, whole: bool) -> tuple[Speculation | None, str | None]:
    """What is proposed in each step. A model that reads its prompt as a whole writes no part of it: a sentence."""
    if config.speculative == 0:
        return None, None
    if whole:
        return None, "Nothing is speculated: this model's answers do not continue their prompts."
    return Speculation(config.speculative, config.prompt_lookup_max, config.prompt_lookup_min), None


def bytes_per_block(model: Any, size: int, dtype: torch.dtype) -> int:
    """What `size` tokens of a sequence take: in pages, or in a row and while a row is copied, as others come and go."""
    config = model.config
    if in_rows(model):
        return 2 * size * rows.bytes_per_token(model, config.context)
    return Pages.bytes_per_block(layers=config.layers, kv_heads=config.kv, dim=config.dim, size=size, dtype=dtype)


def eos_token_ids(folder: str, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """The tokenizer's EOS first, then others that the folder's configs or a GGUF file's metadata name. Empty where the
    model has none.
    """
    value = _read_json(Path(folder) / "config.json").get("eos_token_id")
    named = [*pretrained.stop_ids(folder, tokenizer), *(value if isinstance(value, list) else [value])]
    ids = [id for id in named if isinstance(id, int) and 0 <= id < vocab_size]
    return list(dict.fromkeys(ids))


def first_token(engine: Engine) -> None:
    """Computes one token for real, so that what follows finds everything loaded; leaves no trace."""
    id = "first-token"
    if engine.max_model_len < 2:
        raise SetupError(f"max_model_len is {engine.max_model_len}; a prompt and an answer need 2 tokens at least.")
    engine.add(Add(id, [0], SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True), time.monotonic()))
    output = engine.step().outputs[0]
    if output.error:
        raise SetupError(f"The model could not produce a first token: {output.error}")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
