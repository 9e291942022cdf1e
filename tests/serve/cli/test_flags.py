"""The flags of `python -m serve`: each is a setting, vLLM's spellings hold, and --config FILE is the same flags."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from serve.api.server import ServerConfig
from serve.cli import _parser, parse
from serve.engine.messages import EngineConfig

OWN = {"help", "config", "engine", "speculative_config"}  # no setting of that name comes of these


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one sentence with which a command line is refused."""
    with pytest.raises(SystemExit) as ended:
        parse(argv)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def file(folder: Path, text: str) -> str:
    path = folder / "flags.yaml"
    path.write_text(text)
    return str(path)


def test_every_flag_is_a_setting_and_every_setting_a_flag() -> None:
    """Nothing is taken that changes nothing, but the flags that say so; nothing can be set by Python alone."""
    groups = {group.title: group for group in _parser()._action_groups}
    idle = {
        action.dest for title, group in groups.items() if "taken" in (title or "") for action in group._group_actions
    }
    flags = {action.dest for action in _parser()._actions} - OWN - idle
    speculation = {"speculative", "prompt_lookup_max", "prompt_lookup_min"}
    assert flags == {*ServerConfig.__struct_fields__, *EngineConfig.__struct_fields__} - speculation
    server, engine = parse(["x"])
    assert server == ServerConfig()
    assert engine == EngineConfig(folder="x")


def test_a_switch_can_be_put_out_again(tmp_path: Path) -> None:
    on = file(tmp_path, "enable-log-requests: true\nbatch-invariant: true\n")
    server, engine = parse(["x", "--config", on, "--no-enable-log-requests", "--no-batch-invariant"])
    assert (server.enable_log_requests, engine.batch_invariant) == (False, False)


def test_the_cache_of_vllms_variable(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert parse(["x"])[1].kv_cache_memory_bytes == 2 << 30
    assert parse(["x", "--kv-cache-memory-bytes", "1M"])[1].kv_cache_memory_bytes == 1 << 20
    assert parse(["x", "--num-gpu-blocks-override", "9"])[1].kv_cache_memory_bytes is None
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "much")
    assert "VLLM_CPU_KVCACHE_SPACE is 'much' and must be a number of GiB" in refused(capsys, "x")


def test_all_logprobs(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["x", "--max-logprobs", "-1"])[0].max_logprobs == -1
    assert "'-2' is not a whole number of at least 0" in refused(capsys, "x", "--max-logprobs=-2")


def test_underscores_and_equals_signs(tmp_path: Path) -> None:
    server, engine = parse(["x", "--max_num_seqs=4", "--served-model-name", "a_b", "--max-model-len", "32k"])
    assert (engine.max_num_seqs, engine.max_model_len, server.served_model_name) == (4, 32_000, ("a_b",))
    for word in ("auto", "-1"):
        assert parse(["x", "--max-model-len", word])[1].max_model_len is None


@pytest.mark.parametrize(
    "flags",
    [
        ["--tensor-parallel-size", "1"],
        ["-tp", "1", "-pp", "1"],
        ["--gpu-memory-utilization", "0.9"],
        ["--enforce-eager"],
        ["--enable-chunked-prefill"],
        ["--no-async-scheduling"],
        ["--logprobs-mode", "raw_logprobs"],
        ["--load-format", "auto"],
    ],
    ids=lambda flags: flags[0],
)
def test_flags_of_vllm_that_ask_for_what_is_so_change_nothing(flags: list[str]) -> None:
    assert parse(["x", *flags]) == parse(["x"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tensor-parallel-size", "2"], "'2' is for --engine vllm; the native engine has 1"),
        (["--logprobs-mode", "raw_logits"], "'raw_logits' is for --engine vllm; the native engine has raw_logprobs"),
        (["--gpu-memory-utilization", "90"], "'90' is not a number above 0 and of at most 1"),
        (["--no-enable-chunked-prefill"], "--no-enable-chunked-prefill; the other flags of vLLM are for --engine vllm"),
        (["--enable-lora"], "unrecognized arguments: --enable-lora; the other flags of vLLM are for --engine vllm"),
        (["--max-num-s", "3"], "unrecognized arguments: --max-num-s"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_the_native_engine_cannot_is_refused(
    capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert said in refused(capsys, "x", *flags)


# ---------------------------------------------------------------- --config FILE


def test_a_file_of_flags(tmp_path: Path) -> None:
    config = file(
        tmp_path,
        """
        model: some/folder
        port: 8001
        max_model_len: 32k          # underscores, too
        served-model-name: [one, two]
        api-key: secret
        enable-prefix-caching: false
        enable-log-requests: true
        trust-request-chat-template: false
        speculative-config: {method: ngram, num_speculative_tokens: 3}
        shutdown-timeout: 1.5
        tensor-parallel-size: 1
        """,
    )
    flags = ["--port", "8001", "--max-model-len", "32k", "--served-model-name", "one", "two", "--api-key", "secret"]
    flags += ["--no-enable-prefix-caching", "--enable-log-requests", "--shutdown-timeout", "1.5"]
    flags += ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}']
    assert parse(["--config", config]) == parse(["some/folder", *flags])


def test_the_command_line_counts_before_the_file(tmp_path: Path) -> None:
    config = file(tmp_path, "model: a\nport: 1\nenable-prefix-caching: false\nserved-model-name: [x, y]\n")
    server, engine = parse(["b", "--port", "2", "--config", config, "--enable-prefix-caching"])
    assert (engine.folder, server.port, engine.enable_prefix_caching) == ("b", 2, True)
    assert server.served_model_name == ("x", "y")
    assert parse(["b", "--config", file(tmp_path, "# nothing\n")]) == parse(["b"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("port: 70000", "port is 70000: argument --port: '70000' is not a whole number from 0 to 65535"),
        ("prot: 8000", "'prot' is no flag that a file can have (its value is 8000)"),
        ("config: other.yaml", "'config' is no flag that a file can have (its value is 'other.yaml')"),
        ("enable-log-requests: 3", "enable-log-requests is 3: the value must be true or false"),
        ("enable-log-requests: 'yes'", "enable-log-requests is 'yes': the value must be true or false"),
        ("port:", "port is None: there is no value"),
        ("served-model-name: []", "served-model-name is []: there is no value"),
        ("dtype: int3", "dtype is 'int3': argument --dtype: invalid choice: 'int3'"),
        ("port: [1, 2]", "port is [1, 2]: argument --port: '[1, 2]' is not a whole number"),
        ("tensor-parallel-size: 2", "tensor-parallel-size is 2: argument --tensor-parallel-size/-tp: '2' is for"),
        ("speculative-config: {method: eagle}", "speculative-config is {'method': 'eagle'}: argument --speculative"),
        ("model: 3", "model is 3 and must be a folder or a GGUF file"),
        ("- port", "is a list; it must be keys with values"),
        ("port: [", "is not YAML, line"),
        ("a: !!python/object/apply:os.system [ls]", "is not YAML, line 1"),
    ],
    ids=lambda value: value[:30],
)
def test_a_file_that_cannot_be_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, said: str
) -> None:
    config = file(tmp_path, text)
    line = refused(capsys, "x", "--config", config)
    assert config in line
    assert said in line


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing.yaml")
    assert f"{missing} cannot be read: No such file" in refused(capsys, "x", "--config", missing)
    assert "MODEL is missing" in refused(capsys, "--config", file(tmp_path, "port: 1"))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=5), SCALARS, max_size=2)
NAMES = sorted(name.removeprefix("--") for name in _parser()._option_string_actions if name.startswith("--"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flags=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), VALUES, max_size=3))
@example(flags={"ssl-keyfile": "key.pem"})  # which needs another flag
def test_any_file_is_settings_or_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: dict[str, object]
) -> None:
    config = file(tmp_path, json.dumps(flags))
    try:
        server, engine = parse(["x", "--config", config])
    except SystemExit as ended:
        said = capsys.readouterr().err
        assert (ended.code, said.count("\n"), config in said) == (2, 1, True)  # noqa: PT017
    else:
        assert isinstance(server, ServerConfig)
        assert engine.folder == "x"
