"""What is decided before vLLM starts: which folder can run there, what our flags become, what is refused and how."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm import DecoderConfig, DecoderLM, RNNSearch, RNNSearchConfig, Transformer, TransformerConfig, pretrained
from lm.tokenizer import train_bpe
from serve.cli import _parser
from serve.cli.parser import UsageError
from serve.engine.build import choose_dtype
from serve.on_vllm import checks, launch
from serve.on_vllm.flags import NATIVE, SPELLED, read, translate, wants_vllm

ROOT = Path(__file__).resolve().parents[2]
ON_CPU = checks.VLLM("0.32.0+cpu", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Makes the folder of a tiny model: a decoder of the given options, or the model that is given."""
    tokenizer = train_bpe(["a man is riding a horse ."], 260)
    made: dict[str, str] = {}

    def make(model: Any = None, dtype: torch.dtype = torch.float32, **options: Any) -> str:
        key = f"{type(model).__name__} {dtype} {options}"
        if key not in made:
            if model is None:
                base = {"vocab_size": tokenizer.vocab_size, "context": 64, "layers": 2, "width": 64, "heads": 2}
                model = DecoderLM(DecoderConfig(**(base | options)))
            path = tmp_path_factory.mktemp("model") / "model"
            pretrained.save(model, path, tokenizer=tokenizer, dtype=dtype)
            made[key] = str(path)
        return made[key]

    return make


def fit(*argv: str) -> checks.Fit:
    return checks.check_folder(read(argv))


def pairs(words: Sequence[str]) -> dict[str, list[str]]:
    """The words as flags with their values; each flag once."""
    found: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("-") and not word.lstrip("-").isdecimal():
            assert word not in found, words
            found[word] = []
        else:
            found[list(found)[-1]].append(word)
    return found


# ---------------------------------------------------------------- which engine, which model


@pytest.mark.parametrize(
    "argv",
    [
        ["m", "--engine", "vllm"],
        ["--engine", "vllm", "m", "--port", "1"],
        ["m", "--engine=vllm"],
        ["m", "--port", "1", "--engine", "native", "--engine", "vllm"],
    ],
)
def test_the_engine_is_found_wherever_it_stands(argv: list[str]) -> None:
    assert wants_vllm(argv)
    assert read(argv).model == "m"


@pytest.mark.parametrize("argv", [[], ["m"], ["m", "--engine", "native"], ["m", "--engine"], ["vllm"]])
def test_without_the_word_the_native_engine_is_meant(argv: list[str]) -> None:
    assert not wants_vllm(argv)


def test_a_model_that_might_be_a_value_is_asked_for() -> None:
    with pytest.raises(UsageError, match=r"^MODEL is missing: .* before all flags$"):
        read(["--engine", "vllm", "--tensor-parallel-size", "2", "m"])
    with pytest.raises(UsageError, match=r"^a b cannot be MODEL: "):
        read(["a", "b", "--engine", "vllm"])


def test_a_file_of_flags_is_read_by_vllms_rule_and_the_command_line_counts_first(tmp_path: Path) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text(
        "model: m\nengine: vllm\nmax_num_seqs: 4\nenable-prefix-caching: false\nenforce-eager: true\n"
        "served-model-name: [a, b]\noverride-generation-config: {temperature: 0.5}\nport: 1\n"
    )
    argv = ["--config", str(file), "--port", "2"]
    assert wants_vllm(argv)
    line = read(argv)
    assert line.model == "m"
    assert line.get("--port") == ("2",)
    words = translate(line, {})
    assert words[: words.index("--port")] == shlex.split(
        "--max-num-seqs 4 --no-enable-prefix-caching --enforce-eager --served-model-name a b "
        """--override-generation-config '{"temperature": 0.5}'"""
    )
    assert "--config" not in words


@pytest.mark.parametrize("text", ["- a\n", "a: [\n", None])
def test_a_file_that_is_none_is_named(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "flags.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=f"^--config {file} "):
        read(["m", "--engine", "vllm", "--config", str(file)])


# ---------------------------------------------------------------- flags

values = st.text(st.characters(exclude_categories=["C"]), min_size=1).filter(lambda text: not text.startswith("-"))


@given(st.dictionaries(st.from_regex(r"--x-[a-z]{1,8}", fullmatch=True), st.lists(values, max_size=3)))
def test_what_only_vllm_has_passes_unchanged(flags: dict[str, list[str]]) -> None:
    argv = [word for name, words in flags.items() for word in (name, *words)]
    words = translate(read(["m", "--engine", "vllm", *argv]), {})
    assert words[: len(argv)] == argv


def test_our_safer_defaults_are_said_and_yield() -> None:
    said = pairs(translate(read(["m", "--engine", "vllm"]), {"--dtype": "float32"}))
    assert said == {
        "--host": ["127.0.0.1"],
        "--served-model-name": ["m"],
        "--max-num-queued-reqs": ["1152"],
        "--shutdown-timeout": ["25"],
        "--dtype": ["float32"],
    }
    given_all = "--host 0.0.0.0 --served-model-name x y --max-num-queued-reqs 1 --shutdown-timeout 1 --dtype half"
    words = shlex.split(given_all)
    assert translate(read(["m", "--engine", "vllm", *words]), {"--dtype": "float32"}) == words
    assert "--host" not in translate(read(["m", "--engine", "vllm", "--uds", "/s"]), {})
    assert pairs(translate(read(["m", "--engine", "vllm", "--dtype", "auto"]), {"--dtype": "float32"})) == said


def test_what_vllm_spells_otherwise_is_spelled_so() -> None:
    argv = "m --engine vllm --shutdown-timeout 2.5 --sse-keep-alive-interval=0.2 --allowed-origins a b"
    said = pairs(translate(read(shlex.split(argv)), {}))
    assert said["--shutdown-timeout"] == ["3"]
    assert said["--sse-keep-alive-interval"] == ["1"]
    assert json.loads(said["--allowed-origins"][0]) == ["a", "b"]
    assert translate(read(["m", "--allowed-origins", '["a"]']), {})[:2] == ["--allowed-origins", '["a"]']
    with pytest.raises(UsageError, match="--shutdown-timeout is 'soon'"):
        translate(read(["m", "--shutdown-timeout", "soon"]), {})


@pytest.mark.parametrize("name", sorted(NATIVE))
def test_what_only_the_native_engine_has_is_refused_with_vllms_way(name: str) -> None:
    with pytest.raises(UsageError, match=f"^{name} belongs to the native engine: .*(vLLM|--disable)"):
        translate(read(["m", "--engine", "vllm", name, "1"]), {})
    assert _parser().flag(name.removeprefix("--")) is not None  # it is one of ours


def test_int8_is_refused_and_other_quantizations_pass() -> None:
    with pytest.raises(UsageError, match=r"^--quantization int8 belongs to the native engine: "):
        translate(read(["m", "-q", "int8"]), {})
    assert translate(read(["m", "-q", "fp8"]), {})[:2] == ["-q", "fp8"]


def test_every_flag_that_is_spelled_otherwise_is_one_of_ours() -> None:
    assert all(_parser().flag(name.removeprefix("--")) is not None for name in SPELLED)


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize(
    ("options", "own"),
    [
        ({}, False),
        ({"qk_norm": True, "window": 8, "window_pattern": "S"}, False),
        ({"activation": "relu2", "window": 8, "window_pattern": "SL", "softcap": 15.0}, True),
        ({"positions": "sinusoidal"}, True),
    ],
)
def test_decoders_can_run_there(folder: Callable[..., str], options: dict[str, Any], own: bool) -> None:
    found = fit(folder(**options))
    assert (found.own, found.dtype) == (own, torch.float32)


def encoder_decoder(kind: str) -> Any:
    if kind == "rnnsearch":
        return RNNSearch(RNNSearchConfig(vocab_size=260, context=16, embedding=8, hidden=8, maxout=4, start_id=0))
    shape = {"width": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    return Transformer(TransformerConfig(vocab_size=260, context=16, start_id=0, **shape))


@pytest.mark.parametrize(("kind", "word"), [("rnnsearch", "RNNsearch"), ("transformer", "Transformer of encoder and")])
def test_encoder_decoders_are_for_the_native_engine(folder: Callable[..., str], kind: str, word: str) -> None:
    with pytest.raises(checks.Unfit, match=rf"is an? {word}.*: leave --engine vllm out\.$"):
        fit(folder(encoder_decoder(kind)))


def test_what_vllm_would_compute_otherwise_is_refused(folder: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(checks.Unfit, match=r"prefix is true.*: leave --engine vllm out\.$"):
        fit(folder(prefix=True))
    with pytest.raises(checks.Unfit, match=r"windows in some of its layers.*: leave --engine vllm out\.$"):
        fit(folder(qk_norm=True, window=8, window_pattern="SL"))
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
    with pytest.raises(checks.Unfit, match=r"context of 64.* 32 positions.*: leave --engine vllm out\.$"):
        fit(folder(rope_scaling=yarn))
    assert fit(folder(rope_scaling=yarn, softcap=9.0)).own  # with our plugin the angles are ours
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    with pytest.raises(checks.Unfit, match=r"GGUF.*`python -m lm convert .*: leave --engine vllm out\.$"):
        fit(str(gguf))


def test_heads_that_a_cpu_has_no_attention_for(folder: Callable[..., str]) -> None:
    config = fit(folder(heads=4)).config
    with pytest.raises(checks.Unfit, match=r"heads of 16; on a CPU .* 32, 64, .*: leave --engine vllm out\.$"):
        checks.check_heads("m", config, "cpu")
    checks.check_heads("m", config, "gpu")


def test_how_many_processes_can_share_a_model(folder: Callable[..., str]) -> None:
    config = fit(folder(heads=4, kv_heads=2, mlp_width=96)).config
    for flags, ranks in ((["-tp", "2"], 2), (["--tensor-parallel-size=4", "-pp", "2"], 8), ([], 1)):
        assert checks.check_ranks(config, read(["m", *flags])) == ranks
    for flags in (["-tp", "3"], ["-tp", "8"], ["-pp", "3"]):
        with pytest.raises(checks.Unfit, match=r"^--(tensor|pipeline)-parallel-size is \d"):
            checks.check_ranks(config, read(["m", *flags]))
    with pytest.raises(UsageError, match="--tensor-parallel-size is 'two' and must be a whole number"):
        checks.check_ranks(config, read(["m", "-tp", "two"]))


def test_stages_are_for_gpus() -> None:
    line = read(["m", "-pp", "2"])
    checks.check_stages(line, "gpu")
    checks.check_stages(read(["m"]), "cpu")
    with pytest.raises(checks.Unfit, match=r"^--pipeline-parallel-size is 2, .* on a CPU; --tensor-parallel-size"):
        checks.check_stages(line, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_the_one_that_the_native_engine_chooses(folder: Callable[..., str], dtype: torch.dtype) -> None:
    path = folder(dtype=dtype)
    native, _ = choose_dtype("auto", path, "cpu")
    assert checks.serving_dtype(fit(path).dtype, "cpu") == str(native).removeprefix("torch.")
    assert checks.serving_dtype(dtype, "gpu") == str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------- what must be set


def test_a_context_that_vllm_would_stretch_is_said(folder: Callable[..., str]) -> None:
    linear = folder(rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert launch.settings(read([linear]), fit(linear), "gpu", {}) == {"--dtype": "float32", "--max-model-len": "64"}
    plain = folder()
    assert launch.settings(read([plain]), fit(plain), "gpu", {}) == {"--dtype": "float32"}


def test_on_a_cpu_the_cache_is_what_can_be_filled(folder: Callable[..., str]) -> None:
    line = read([folder(), "--max-num-seqs", "3"])
    wanted = launch.settings(line, fit(line.model), "cpu", {})
    assert int(wanted["--kv-cache-memory-bytes"]) == 2 * 2 * 64 * 4 * 256 * 3  # k and v, layers, width, bytes, tokens
    assert "--kv-cache-memory-bytes" not in launch.settings(
        line, fit(line.model), "cpu", {"VLLM_CPU_KVCACHE_SPACE": "1"}
    )


def test_variables_are_added_and_none_is_replaced(folder: Callable[..., str]) -> None:
    own, plain = fit(folder(softcap=9.0)), fit(folder())
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    assert launch.environment(own, "gpu", 1, {}) == quiet
    assert launch.environment(own, "gpu", 1, {"VLLM_PLUGINS": "other"}) == quiet | {"VLLM_PLUGINS": "other,heed"}
    assert launch.environment(own, "gpu", 1, {"VLLM_PLUGINS": ""}) == quiet | {"VLLM_PLUGINS": "heed"}
    assert launch.environment(plain, "gpu", 1, {"VLLM_PLUGINS": "other"}) == quiet
    assert launch.environment(plain, "gpu", 1, {"HF_HUB_OFFLINE": "0", "VLLM_NO_USAGE_STATS": "0"}) == {}
    assert launch.environment(plain, "cpu", 1, {"OMP_NUM_THREADS": "1"})["VLLM_CPU_OMP_THREADS_BIND"].isdecimal()
    assert launch.environment(plain, "cpu", 2, {}) == quiet


def test_the_command_is_shown_without_its_keys() -> None:
    text = launch.shown({"A": "b c"}, "m", ["--api-key", "k1", "k2", "--port", "1"])
    assert text == "A='b c' vllm serve m --api-key '***' '***' --port 1"


# ---------------------------------------------------------------- the whole way


def test_a_dry_run_prints_the_command(
    folder: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "installed", lambda: ON_CPU)
    assert launch.main([folder(), "--engine", "vllm", "--dry-run", "--port", "1"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[words.index("vllm") :][:5] == ["vllm", "serve", folder(), "--port", "1"]


def test_other_versions_are_refused_with_the_command_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.util, "find_spec", lambda name: object())
    monkeypatch.setattr(checks.metadata, "version", lambda name: "0.31.2")
    with pytest.raises(checks.Unfit, match=r"^vLLM is 0\.31\.2 and must be 0\.32: `.* pip install 'vllm==0\.32\.\*'`"):
        checks.installed()
    monkeypatch.setattr(checks.metadata, "version", lambda name: "0.32.0+cpu")
    assert checks.installed() == ON_CPU


@pytest.mark.skipif(checks.util.find_spec("vllm") is not None, reason="vLLM is in this environment")
def test_without_vllm_one_sentence_says_how_to_get_it(folder: Callable[..., str]) -> None:
    command = [sys.executable, "-m", "serve", folder(), "--engine", "vllm"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (sentence,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert sentence.startswith("python -m serve: vLLM is not installed")


def test_a_folder_that_is_none_is_told_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["nowhere", "--engine", "vllm"]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("python -m serve: nowhere is not a folder")
